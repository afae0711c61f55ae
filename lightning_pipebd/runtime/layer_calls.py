"""How a model calls its layers: seen on an example, and repeated with the tensors of a boundary."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.blocks import call_block
from lightning_pipebd.runtime.side_effects import preserved_modes, preserved_random_states
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["HIDDEN", "LastLayerReached", "LayerCall", "containers", "until_last_layer", "watch_layers"]

HIDDEN = "hidden"
"""Name of the hidden state in a boundary."""

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))


@dataclass(frozen=True, slots=True)
class LayerCall:
    """How a model calls one of its layers.

    Attributes:
        subject: What messages call the layer.
        spec: Form of arguments and keyword arguments.
        leaves: Per leaf the name of the tensor that goes there, or the value itself.
        is_tensor: Per leaf whether a tensor goes there.
        place: Where in its output the hidden state is, and of how many; ``None`` if it is the output.
    """

    subject: str
    spec: Any
    leaves: tuple[Any, ...]
    is_tensor: tuple[bool, ...]
    place: tuple[int, int] | None

    def run(self, layer: nn.Module, hidden: Tensor, passengers: Mapping[str, Any]) -> Tensor:
        """Call the layer; give its hidden state.

        Raises:
            PartitionError: The boundary has not what the layer gets.
        """
        known = {HIDDEN: hidden, **passengers}
        names = [leaf for leaf, is_tensor in zip(self.leaves, self.is_tensor, strict=True) if is_tensor]
        missing = [name for name in names if name not in known]
        if missing:
            raise PartitionError(
                f"{self.subject} must get `{missing[0]}` from its boundary, which has {', '.join(known)}. Let the "
                "layers of teacher and student take the same arguments (for attention: the same implementation)."
            )
        leaves = [
            known[leaf] if is_tensor else leaf for leaf, is_tensor in zip(self.leaves, self.is_tensor, strict=True)
        ]
        args, kwargs = pytree.tree_unflatten(leaves, self.spec)
        output = layer(*args, **kwargs)
        found: Tensor = output if self.place is None else output[self.place[0]]
        return found

    def pack(self, hidden: Any) -> Any:
        """Give a hidden state as the layer gives it."""
        if self.place is None:
            return hidden
        index, number = self.place
        return tuple(hidden if each == index else None for each in range(number))

    def read(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Tensor]:
        """Give the tensors of a call by name.

        Raises:
            PartitionError: The call has another form than the example's.
        """
        leaves, spec = pytree.tree_flatten((args, kwargs))
        same = spec == self.spec and all(
            isinstance(leaf, Tensor) if is_tensor else not isinstance(leaf, Tensor) and leaf == known
            for leaf, known, is_tensor in zip(leaves, self.leaves, self.is_tensor, strict=True)
        )
        if not same:
            raise PartitionError(
                f"{self.subject} must be called as it was for the example of `layer_blocks`, but an argument is "
                "another number, or a tensor where there was none, or the other way round. Give an example like the "
                "batches. Where a model leaves the mask out of batches without padding (Hugging Face), hand none over, "
                'or use `attn_implementation="eager"`.'
            )
        pairs = zip(leaves, self.leaves, self.is_tensor, strict=True)
        return {name: leaf for leaf, name, is_tensor in pairs if is_tensor}


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


def watch_layers(
    model: nn.Module, path: str, layers: Sequence[nn.Module], example: Any
) -> tuple[list[LayerCall], list[nn.Module]]:
    """Run a model on an example, up to its last layer.

    Args:
        model: The model.
        path: Of the layers.
        layers: Modules that the model calls one after another.
        example: An input.

    Returns:
        How the model calls each layer but the first, and the outermost modules that run before that.

    Raises:
        PartitionError: The layers are not called one after another, each on what the one before it gave.
    """
    seen: list[tuple[int, _Seen]] = []
    before: list[nn.Module] = []

    def enter(index: int) -> Callable[..., None]:
        def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            seen.append((index, _Seen(args, kwargs, _by_name(layer, args, kwargs))))

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
            call_block(model, example)
    if [index for index, _ in seen] != list(range(len(layers))):
        raise PartitionError(
            f"`{path}` must be layers that the model calls one after another, each once, but it calls number "
            f"{', '.join(str(index) for index, _ in seen) or 'none'}. List the blocks yourself."
        )
    inner = {id(part) for module in before for part in module.modules() if part is not module}
    outermost = {id(module): module for module in before if id(module) not in inner}
    return _understand(path, [call for _, call in seen]), list(outermost.values())


def _by_name(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    signature = inspect.signature(layer.forward)
    bound = signature.bind(*args, **kwargs).arguments
    variable = [name for name, each in signature.parameters.items() if each.kind is each.VAR_KEYWORD and name in bound]
    inside = bound.pop(variable[0]) if variable else {}
    return {**bound, **inside}


def _understand(path: str, seen: Sequence[_Seen]) -> list[LayerCall]:
    """Say of each layer but the first which tensors it gets, by names that are the same for all layers."""
    names: dict[int, str] = {}
    calls = []
    for index, call in enumerate(seen):
        for argument, value in call.given.items():
            _check_plain(value, f"`{path}.{index}`", argument)
    for index, (last, call) in enumerate(pairwise(seen), 1):
        subject = f"`{path}.{index}`"
        following = seen[index + 1] if index + 1 < len(seen) else None
        _, hidden = _find_hidden(last.output, call, f"`{path}.{index - 1}`")
        place, _ = _find_hidden(call.output, following, subject)
        names |= _new_names(call.given, {**names, id(hidden): HIDDEN})
        known = {**names, id(hidden): HIDDEN}
        leaves, spec = pytree.tree_flatten((call.args, call.kwargs))
        flags = tuple(isinstance(leaf, Tensor) for leaf in leaves)
        values = tuple(known[id(leaf)] if flag else leaf for leaf, flag in zip(leaves, flags, strict=True))
        calls.append(LayerCall(subject, spec, values, flags, place))
    return calls


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


def _find_hidden(output: Any, following: _Seen | None, subject: str) -> tuple[tuple[int, int] | None, Any]:
    """Give where in a layer's output that is what the next layer gets, and it."""
    parts = list(output) if isinstance(output, (tuple, list)) else [output]
    wanted = parts[:1] if following is None else pytree.tree_leaves((following.args, following.kwargs))
    found = [
        index for index, part in enumerate(parts) if isinstance(part, Tensor) and any(part is own for own in wanted)
    ]
    if len(found) != 1:
        raise PartitionError(
            f"{subject} must give one tensor that the next layer gets as it is, but gives {len(found)} of them. "
            "List the blocks yourself."
        )
    place = (found[0], len(parts)) if isinstance(output, (tuple, list)) else None
    return place, parts[found[0]]


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
