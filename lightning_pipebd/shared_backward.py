"""One backward pass for several small blocks: the same gradients, and less time spent on beginning passes.

The blocks' graphs have nothing in common, so the gradients of the sum of their losses are those of each loss. What a
pass costs beside its layers (0.1 to 0.2 ms on a CPU, and caches that Python finds emptied after it) is as much as a
small block's own work; a large block's is not worth keeping another one's activations for.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import Tensor
from torch._C._autograd import _get_sequence_nr
from torch.autograd.function import BackwardCFunction
from torch.utils import _pytree as pytree

__all__ = ["SharedBackward"]

# What fits into a cache costs no memory worth speaking of.
_SMALL_BLOCK_BYTES = 2 * 1024 * 1024
_MOST_BYTES = 16 * 1024 * 1024
_LARGE = _MOST_BYTES + 1
# To weigh a graph takes as long as a shared pass saves.
_CALLS_PER_WEIGHING = 32
_PARAMETER, _COPY = "torch::autograd::AccumulateGrad", "torch::autograd::CopySlices"


@dataclass
class _Weight:
    """The most that a block's graphs of one number of operations kept, and the largest boundary that made one."""

    boundary_bytes: int = -1
    kept_bytes: int = 0
    num_calls: int = 0


class SharedBackward:
    """Put backward passes off, as long as little is kept for them.

    Args:
        backward: Runs one.
    """

    def __init__(self, backward: Callable[[Tensor], None]) -> None:
        self._backward = backward
        self._losses: list[Tensor] = []
        self._num_bytes = 0
        self._weights: dict[tuple[int, int], _Weight] = {}
        self._begin = 0

    @property
    def is_full(self) -> bool:
        """Whether nothing more is to be put off before :meth:`settle`."""
        return self._num_bytes > _MOST_BYTES

    def begin(self) -> None:
        """Note that the graph of a block's loss begins here: what is made until :meth:`add` belongs to it."""
        self._begin = _get_sequence_nr()

    def add(self, block: int, boundary: Any, loss: Tensor) -> None:
        """Put the backward pass of a block's loss off.

        Args:
            block: Index of the block.
            boundary: What it was given; one larger than ever has the graph weighed, as a new number of operations has.
            loss: Its loss.
        """
        try:
            kept_bytes = self._find_weight(block, boundary, loss)
        except Exception:
            # User code makes graphs of every kind. A pass too many costs time, an error here the training.
            kept_bytes = _LARGE
        self._losses.append(loss)
        self._num_bytes += kept_bytes if kept_bytes <= _SMALL_BLOCK_BYTES else _LARGE

    def settle(self) -> None:
        """Run what was put off: then the gradients of all blocks so far are there."""
        losses, self._losses, self._num_bytes = self._losses, [], 0
        if losses:
            self._backward(sum(losses[1:], losses[0]))

    def _find_weight(self, block: int, boundary: Any, loss: Tensor) -> int:
        # Autograd counts operations anyway. Another path through a supernet has another number of them; paths of one
        # number are much alike, so that it is enough to look now and then.
        key = (block, _get_sequence_nr() - self._begin)
        weight = self._weights.get(key)
        if weight is None:
            weight = self._weights[key] = _Weight()
        boundary_bytes = _num_bytes(boundary)
        if boundary_bytes > weight.boundary_bytes or weight.num_calls % _CALLS_PER_WEIGHING == 0:
            weight.kept_bytes = max(weight.kept_bytes, _weigh(loss))
            weight.boundary_bytes = max(weight.boundary_bytes, boundary_bytes)
        weight.num_calls += 1
        return weight.kept_bytes


def _num_bytes(boundary: Any) -> int:
    leaves = [boundary] if isinstance(boundary, Tensor) else pytree.tree_leaves(boundary)
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves if isinstance(leaf, Tensor))


def _weigh(loss: Tensor) -> int:
    """Give the size of all that the operations of a graph have made, of which it keeps a part.

    What is really kept would be known to hooks of saved tensors; but a block may forbid them (torch.func), or have its
    own, which compute (activation checkpointing).
    """
    waiting: list[Any] = [loss.grad_fn]
    seen: set[Any] = set()
    num_bytes = 0
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        name = node.name()
        if _is_closed(node, name):
            return _LARGE
        # A layer's transposed weight takes no memory; the last nodes are parameters.
        if name != "TBackward0" and name != _PARAMETER:
            for made in node._input_metadata:
                if made.is_nested_tensor:
                    return _LARGE  # its shape is no numbers
                num_bytes += prod(made.shape) * made.dtype.itemsize
        if num_bytes > _SMALL_BLOCK_BYTES:
            return _LARGE
        waiting += [following for following, _ in node.next_functions]
    return num_bytes


def _is_closed(node: Any, name: str) -> bool:
    """Tell whether a node may keep any amount that cannot be seen.

    Functions of the user's and compiled code may, TorchScript and C++ extensions, and recurrent layers' workspaces.
    """
    return isinstance(node, BackwardCFunction) or "Rnn" in name or ("::" in name and name not in (_PARAMETER, _COPY))
