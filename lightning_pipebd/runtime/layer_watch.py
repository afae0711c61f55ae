"""How a model calls its layers: seen on an example."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.layer_calls import HIDDEN, LastLayerReached, LayerCall, containers, until_last_layer
from lightning_pipebd.runtime.layer_masks import (
    PADDINGS,
    arguments_by_name,
    arguments_of,
    find_masks,
    with_padded_rows,
)
from lightning_pipebd.runtime.side_effects import preserved_modes, preserved_random_states
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["LayerStack", "watch_layers"]

_PLAIN = (bool, int, float, str, bytes, torch.dtype, torch.device, type(None))


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
