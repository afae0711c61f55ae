"""How a model calls its layers: seen on an example, and repeated with the tensors of a boundary."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.layer_masks import (
    PADDINGS,
    arguments_by_name,
    arguments_of,
    find_masks,
    with_padded_rows,
)
from lightning_pipebd.runtime.side_effects import preserved_modes, preserved_random_states
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = [
    "HIDDEN",
    "LastLayerReached",
    "LayerCall",
    "LayerStack",
    "containers",
    "pack",
    "until_last_layer",
    "watch_layers",
]

HIDDEN = "hidden"
"""Name of the hidden state in a boundary."""

_SAME_ARGUMENTS = (
    "Let the layers of teacher and student take the same arguments (for attention: the same implementation)."
)

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How a model calls one of its layers.

    Attributes:
        subject: What messages call the layer.
        spec: Form of arguments and keyword arguments.
        leaves: Per leaf the name of the tensor that goes there, or the value itself.
        dtypes: Per leaf the tensor's type; ``None`` where a value goes.
        parts: Per part of its output the name of the tensor that it is, or ``None``; empty if the hidden state is the
            output.
    """

    subject: str
    spec: Any
    leaves: tuple[Any, ...]
    dtypes: tuple[torch.dtype | None, ...]
    parts: tuple[str | None, ...]

    @property
    def names(self) -> list[str]:
        """Names of the tensors that the layer gets."""
        return [leaf for leaf, dtype in zip(self.leaves, self.dtypes, strict=True) if dtype is not None]

    def run(self, layer: nn.Module, hidden: Tensor, passengers: Mapping[str, Any]) -> Tensor:
        """Call the layer; give its hidden state.

        Raises:
            PartitionError: The boundary has not what the layer gets.
        """
        known = {HIDDEN: hidden, **passengers}
        for name, dtype in zip(self.leaves, self.dtypes, strict=True):
            if dtype is not None:
                self._check_given(name, dtype, known)
        leaves = [leaf if dtype is None else known[leaf] for leaf, dtype in zip(self.leaves, self.dtypes, strict=True)]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        output = layer(*args, **kwargs)
        found: Tensor = output[self.parts.index(HIDDEN)] if self.parts else output
        return found

    def _check_given(self, name: str, dtype: torch.dtype, known: Mapping[str, Tensor]) -> None:
        if name not in known:
            raise PartitionError(
                f"{self.subject} must get `{name}` from its boundary, which has {', '.join(known)}. {_SAME_ARGUMENTS}"
            )
        # Added to attention's scores, as it would be here, a mask of truth values does nothing.
        if dtype.is_floating_point and known[name].dtype is torch.bool:
            raise PartitionError(
                f"{self.subject} must get `{name}` of type {dtype}, but its boundary has one of truth values. "
                f"{_SAME_ARGUMENTS}"
            )

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Give the tensors of a call by name; those that the model leaves out are not among them.

        Raises:
            PartitionError: The call has another form than the example's.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        same = spec == self.spec and all(
            isinstance(leaf, Tensor) or leaf is None
            if dtype is not None
            else not isinstance(leaf, Tensor) and leaf == known
            for leaf, known, dtype in zip(leaves, self.leaves, self.dtypes, strict=True)
        )
        if not same:
            raise PartitionError(
                f"{self.subject} must be called as it was for the example of `layer_blocks`, but an argument is "
                "another number, or a tensor where there was none. Give an example like the batches, as long as they "
                "are, and a mask in every batch or in none (under `compile`, in every batch)."
            )
        triples = zip(leaves, self.leaves, self.dtypes, strict=True)
        return {name: leaf for leaf, name, dtype in triples if dtype is not None and leaf is not None}


@dataclass(frozen=True, slots=True)
class LayerStack:
    """How a model calls its layers.

    Attributes:
        calls: Of each layer but the first.
        first_parts: Per part of what the first layer gives the name of the tensor that it is, as in a call.
        before: The outermost modules that run before the first layer.
    """

    calls: tuple[LayerCall, ...]
    first_parts: tuple[str | None, ...]
    before: tuple[nn.Module, ...]


def pack(parts: Sequence[str | None], known: Mapping[str, Any]) -> Any:
    """Give an output of a layer, made of the tensors that are known.

    Example:
        >>> pack(("hidden", None, "bias"), {"hidden": 3}), pack((), {"hidden": 3})
        ((3, None, None), 3)
    """
    return tuple(known.get(part) if part else None for part in parts) if parts else known[HIDDEN]


class LastLayerReached(BaseException):  # nothing that a model may catch
    """Leaves a model's ``forward`` at its last layer."""


@dataclass
class _Seen:
    """A call of a layer.

    Attributes:
        given: Its arguments by name.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    given: dict[str, Any]
    output: Any = None


def watch_layers(model: nn.Module, path: str, layers: Sequence[nn.Module], example: Any) -> LayerStack:
    """Run a model on an example, up to its last layer.

    Where it hands over no masks, because nothing is padded, it runs once more with padding.

    Args:
        model: The model.
        path: Of the layers.
        layers: Modules that the model calls one after another.
        example: An input.

    Raises:
        PartitionError: The layers are not called one after another, each on what the one before it gave.
    """
    args, kwargs = arguments_of(example)
    stack = _understand(path, *_watch(model, path, layers, args, kwargs))
    masks = find_masks(model, args, kwargs)
    for padding in PADDINGS if masks and any(None in call.leaves for call in stack.calls) else ():
        inputs = with_padded_rows(args, kwargs, masks, padding)
        # A model that takes no more rows than it was given pictures, for example, keeps the form of the example.
        with suppress(Exception):
            padded = _understand(path, *_watch(model, path, layers, inputs.args, inputs.kwargs))
            if _count_tensors(padded) > _count_tensors(stack):
                return padded
    return stack


def _count_tensors(stack: LayerStack) -> int:
    return sum(len(call.names) for call in stack.calls)


def _watch(
    model: nn.Module, path: str, layers: Sequence[nn.Module], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> tuple[list[_Seen], list[nn.Module]]:
    """Give the calls of the layers, and the outermost modules that run before the first."""
    seen: list[tuple[int, _Seen]] = []
    before: list[nn.Module] = []

    def enter(index: int) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((index, _Seen(args, kwargs, arguments_by_name(layer.forward, args, kwargs))))

        return note

    def leave(layer: nn.Module, args: Any, output: Any) -> None:
        seen[-1][1].output = output
        if layer is layers[-1]:
            raise LastLayerReached

    outside = {id(each) for each in containers(model, path)} | {id(part) for each in layers for part in each.modules()}
    outside.add(id(model.get_submodule(path)))
    with ExitStack() as hooks:
        for index, layer in enumerate(layers):
            hooks.callback(layer.register_forward_pre_hook(enter(index), with_kwargs=True).remove)
            hooks.callback(layer.register_forward_hook(leave).remove)
        for module in model.modules():
            if id(module) not in outside:
                hook = module.register_forward_pre_hook(lambda own, _: None if seen else before.append(own))
                hooks.callback(hook.remove)
        with preserved_random_states(), torch.no_grad(), preserved_modes(model.modules()), until_last_layer():
            model.eval()
            model(*args, **kwargs)
    if [index for index, _ in seen] != list(range(len(layers))):
        raise PartitionError(
            f"`{path}` must be layers that the model calls one after another, each once, but it calls number "
            f"{', '.join(str(index) for index, _ in seen) or 'none'}. List the blocks yourself."
        )
    inner = {id(part) for module in before for part in module.modules() if part is not module}
    outermost = {id(module): module for module in before if id(module) not in inner}
    return [call for _, call in seen], list(outermost.values())


def _understand(path: str, seen: Sequence[_Seen], before: Sequence[nn.Module]) -> LayerStack:
    """Say of each layer but the first which tensors it gets, by names that are the same for all layers."""
    names: dict[int, str] = {}
    calls = []
    for index, call in enumerate(seen):
        for argument, value in call.given.items():
            _check_plain(value, f"`{path}.{index}`", argument)
    first_parts, hidden = _name_parts(seen[0], seen[1], names, f"`{path}.0`", is_first=True)
    for index, call in enumerate(seen[1:], 1):
        subject = f"`{path}.{index}`"
        names |= _new_names(call.given, {**names, id(hidden): HIDDEN})
        known = {**names, id(hidden): HIDDEN}
        following = seen[index + 1] if index + 1 < len(seen) else None
        parts, hidden = _name_parts(call, following, names, subject)
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        dtypes = tuple(leaf.dtype if isinstance(leaf, Tensor) else None for leaf in leaves)
        values = tuple(known[id(leaf)] if isinstance(leaf, Tensor) else leaf for leaf in leaves)
        calls.append(LayerCall(subject, spec, values, dtypes, parts))
    return LayerStack(tuple(calls), first_parts, tuple(before))


def _new_names(given: Mapping[str, Any], known: Mapping[int, str]) -> dict[int, str]:
    """Name the tensors of a call that have no name yet after the argument that they are (part of)."""
    names: dict[int, str] = {}
    for argument, value in given.items():
        leaves = pytree.tree_leaves(value)
        for number, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor) and id(leaf) not in known and id(leaf) not in names:
                name = argument if len(leaves) == 1 else f"{argument}_{number}"
                taken = {HIDDEN, *known.values(), *names.values()}
                same = sum(each == name or each.startswith(f"{name}__") for each in taken)
                names[id(leaf)] = f"{name}__{same}" if same else name
    return names


def _name_parts(
    call: _Seen, following: _Seen | None, names: Mapping[int, str], subject: str, *, is_first: bool = False
) -> tuple[tuple[str | None, ...], Any]:
    """Name the parts of a layer's output that the next layer gets, and give the hidden state.

    Args:
        call: Of the layer.
        following: Of the next layer; ``None`` after the last.
        names: Of the tensors beside the hidden state that layers got so far, by identity.
        subject: What messages call the layer.
        is_first: Whether no layer comes before it.
    """
    output = call.output
    parts = list(output) if isinstance(output, (tuple, list)) else [output]
    wanted = parts[:1] if following is None else pytree.tree_leaves((following.args, following.kwargs))
    given = [part for part in wanted if isinstance(part, Tensor) and any(part is own for own in parts)]
    new = [part for part in given if id(part) not in names]
    # The first layer may also give what all others get, such as a table of positions that it learns.
    if not new or (len(new) > 1 and not is_first):
        raise PartitionError(
            f"{subject} must give one tensor that the next layer gets as it is, but gives {len(new)} of them. "
            "List the blocks yourself."
        )
    hidden = new[0]
    if not isinstance(output, (tuple, list)):
        return (), hidden
    return tuple(HIDDEN if part is hidden else names.get(id(part)) for part in parts), hidden


def _check_plain(value: Any, subject: str, argument: str) -> None:
    if isinstance(value, (tuple, list)) and type(value) in (tuple, list):
        for item in value:
            _check_plain(item, subject, argument)
    elif type(value) is dict:
        for item in value.values():
            _check_plain(item, subject, argument)
    elif not isinstance(value, (Tensor, *_PLAIN)):
        raise PartitionError(
            f"{subject} must get tensors and plain values, but its `{argument}` is {type(value).__name__}. Switch off "
            "what hands it over (for Hugging Face: `model.config.use_cache = False`), or list the blocks yourself."
        )


def containers(model: nn.Module, path: str) -> list[nn.Module]:
    """Give the modules around the layers, from the model inwards."""
    parts = path.split(".")
    return [model.get_submodule(".".join(parts[:count])) for count in range(len(parts))]


@contextmanager
def until_last_layer() -> Iterator[None]:
    """Run a model inside the context no further than to its last layer."""
    try:
        yield
    except LastLayerReached:
        return
