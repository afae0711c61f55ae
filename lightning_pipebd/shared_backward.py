"""One backward pass for several small blocks: the same gradients, and less time spent on beginning passes.

The blocks' graphs have nothing in common, so the gradients of the sum of their losses are those of each loss. What a
pass costs beside its layers (0.1 to 0.2 ms on a CPU, and caches that Python finds emptied after it) is as much as a
small block's own work; a large block's is not worth keeping another one's activations for.
"""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any, NamedTuple

from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["SharedBackward"]

# What fits into a cache costs no memory worth speaking of.
_SMALL_BLOCK_BYTES = 512 * 1024
_MOST_BYTES = 4 * 1024 * 1024
_LARGE = _MOST_BYTES + 1


class _Weight(NamedTuple):
    """What a block's graph keeps, and the size of the boundary that it was given then."""

    boundary_bytes: int
    kept_bytes: int


class SharedBackward:
    """Put backward passes off, as long as little is kept for them.

    Args:
        backward: Runs one.
    """

    def __init__(self, backward: Callable[[Tensor], None]) -> None:
        self._backward = backward
        self._losses: list[Tensor] = []
        self._num_bytes = 0
        self._weights: dict[int, _Weight] = {}

    @property
    def is_full(self) -> bool:
        """Whether nothing more is to be put off before :meth:`settle`."""
        return self._num_bytes > _MOST_BYTES

    def add(self, block: int, boundary: Any, loss: Tensor) -> None:
        """Put the backward pass of a block's loss off.

        Args:
            block: Index of the block.
            boundary: What it was given; a larger one than ever has its graph weighed.
            loss: Its loss.
        """
        boundary_bytes = _num_bytes(boundary)
        weight = self._weights.get(block)
        if weight is None or boundary_bytes > weight.boundary_bytes:
            weight = self._weights[block] = _Weight(boundary_bytes, _weigh(loss))
        self._losses.append(loss)
        self._num_bytes += weight.kept_bytes if weight.kept_bytes <= _SMALL_BLOCK_BYTES else _LARGE

    def settle(self) -> None:
        """Run what was put off: then the gradients of all blocks so far are there."""
        losses, self._losses, self._num_bytes = self._losses, [], 0
        if losses:
            self._backward(sum(losses[1:], losses[0]))


def _num_bytes(boundary: Any) -> int:
    leaves = [leaf for leaf in pytree.tree_leaves(boundary) if isinstance(leaf, Tensor)]
    return sum(leaf.numel() * leaf.element_size() for leaf in leaves)


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
        if name.startswith("CompiledFunction"):
            return _LARGE  # what lies behind it cannot be seen
        # A layer's transposed weight takes no memory; the last nodes are parameters.
        if name != "TBackward0" and not name.endswith("AccumulateGrad"):
            num_bytes += sum(prod(made.shape) * made.dtype.itemsize for made in node._input_metadata)
        waiting += [following for following, _ in node.next_functions]
    return num_bytes
