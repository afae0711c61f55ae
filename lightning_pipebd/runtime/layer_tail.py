"""What follows a model's last layer as one more block: modules and functions, checked against what the model does."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.layer_calls import LastLayerReached, until_last_layer
from lightning_pipebd.runtime.layer_masks import arguments_of
from lightning_pipebd.runtime.listed_blocks import as_module
from lightning_pipebd.runtime.side_effects import preserved_modes, preserved_random_states
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["TailStep", "make_tail"]

TailStep = str | Callable[[Tensor], Tensor]

_Call = tuple[Any, Any]


def make_tail(
    model: nn.Module, last: nn.Module, tail: Sequence[TailStep], example: Any, find: Callable[[str], nn.Module]
) -> nn.Module:
    """Give a block of what follows the last layer.

    Args:
        model: Runs once, up to the last module of the tail.
        last: Its last layer.
        tail: Paths of modules, and functions without parameters.
        example: An input of the model.
        find: Gives the module of a path.

    Raises:
        PartitionError: The model calls a module of the tail otherwise than on what the step before it gives.
    """
    steps = [
        find(step) if isinstance(step, str) else as_module(step, f"`tail[{index}]`") for index, step in enumerate(tail)
    ]
    own = [module for step, module in zip(tail, steps, strict=True) if isinstance(step, str)]
    hidden, calls = _watch(model, last, own, example)
    before = "the last layer"
    with torch.no_grad():
        for step, module in zip(tail, steps, strict=True):
            if isinstance(step, str):
                hidden = _follow(step, calls[id(module)], hidden, before)
                before = f"`{step}`"
            else:
                hidden = module(hidden)
                before = "the function before it"
    return nn.Sequential(*steps)


def _watch(
    model: nn.Module, last: nn.Module, own: Sequence[nn.Module], example: Any
) -> tuple[Any, dict[int, list[_Call]]]:
    """Give what the last layer gives, and the calls of the modules of the tail with what they gave."""
    args, kwargs = arguments_of(example)
    outputs: list[Any] = []
    calls: defaultdict[int, list[_Call]] = defaultdict(list)

    def leave_last(layer: nn.Module, args: Any, output: Any) -> None:
        outputs.append(output)
        # What ran before may run again: dropout shared with the embeddings.
        calls.clear()

    def leave(module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        calls[id(module)].append(((args, kwargs), output))
        if module is own[-1] and outputs:
            raise LastLayerReached

    with ExitStack() as hooks:
        hooks.callback(last.register_forward_hook(leave_last).remove)
        for module in own:
            hooks.callback(module.register_forward_hook(leave, with_kwargs=True).remove)
        with preserved_random_states(), torch.no_grad(), preserved_modes(model.modules()), until_last_layer():
            model.eval()
            model(*args, **kwargs)
    output = outputs[0]
    return (output[0] if isinstance(output, (tuple, list)) else output), calls


def _follow(path: str, calls: Sequence[_Call], hidden: Tensor, before: str) -> Tensor:
    """Give what a module gave in the model, where it got what the tail hands it."""
    if len(calls) != 1:
        raise PartitionError(
            f"`{path}` of `tail` must be a module that the model calls once between its last layer and the end of "
            f"`tail`, but it calls it {len(calls)} times. Leave it out."
        )
    given, output = calls[0]
    leaves = [leaf for leaf in pytree.tree_leaves(given) if leaf is not None]
    if len(leaves) == 1 and isinstance(leaves[0], Tensor) and _are_equal(leaves[0], hidden):
        found: Tensor = output
        return found
    got = ", ".join(str(tuple(leaf.shape)) if isinstance(leaf, Tensor) else repr(leaf) for leaf in leaves)
    raise PartitionError(
        f"`{path}` of `tail` must get what {before} gives, {tuple(hidden.shape)}, and nothing else, but the model "
        f"gives it {got or 'nothing'} or other values. Put a function that does what the model does in between into "
        "`tail`, such as `lambda hidden: hidden[:, 0]`, or end `tail` before it."
    )


def _are_equal(given: Tensor, hidden: Tensor) -> bool:
    return given.shape == hidden.shape and torch.allclose(given, hidden, rtol=0, atol=0, equal_nan=True)
