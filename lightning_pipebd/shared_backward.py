"""One backward pass for several small blocks: the same gradients, and less time spent on beginning passes.

The blocks' graphs have nothing in common, so the gradients of the sum of their losses are those of each loss. What a
pass costs beside its layers (0.1 to 0.2 ms on a CPU, and caches that Python finds emptied after it) is as much as a
small block's own work; a large block's is not worth keeping another one's activations for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["SharedBackward"]

# What fits into a cache costs no memory worth speaking of.
_SMALL_BLOCK_BYTES = 512 * 1024
_MOST_BYTES = 4 * 1024 * 1024


class _Weight(NamedTuple):
    """What a block kept for its gradients, and the size of the boundary that it was given then."""

    boundary_bytes: int
    kept_bytes: int


class SharedBackward:
    """Put backward passes off, as long as little is kept for them.

    Args:
        backward: Runs one.
        held: Gives the tensors that are there anyway, such as a block's parameters.
    """

    def __init__(self, backward: Callable[[Tensor], None], held: Callable[[int], Iterable[Tensor]]) -> None:
        self._backward = backward
        self._held = held
        self._losses: list[Tensor] = []
        self._num_bytes = 0
        self._weights: dict[int, _Weight] = {}

    @property
    def is_full(self) -> bool:
        """Whether nothing more is to be put off before :meth:`settle`."""
        return self._num_bytes > _MOST_BYTES

    def call(self, block: int, boundary: Any, run: Callable[[], Tensor]) -> Tensor:
        """Run a block's forward pass, and weigh what it keeps where that is not known of a boundary as large.

        Args:
            block: Index of the block.
            boundary: What it is given.
            run: Gives its loss.
        """
        leaves = [leaf for leaf in pytree.tree_leaves(boundary) if isinstance(leaf, Tensor)]
        boundary_bytes = sum(leaf.numel() * leaf.element_size() for leaf in leaves)
        known = self._weights.get(block)
        if known is not None and boundary_bytes <= known.boundary_bytes:
            return run()
        scale = _Scale([*leaves, *self._held(block)])
        with torch.autograd.graph.saved_tensors_hooks(scale.put, scale.take):
            loss = run()
        self._weights[block] = _Weight(boundary_bytes, scale.num_bytes)
        return loss

    def add(self, block: int, loss: Tensor) -> None:
        """Put the backward pass of a block's loss off; one that was never weighed counts as large."""
        self._losses.append(loss)
        weight = self._weights.get(block)
        is_small = weight is not None and weight.kept_bytes <= _SMALL_BLOCK_BYTES
        self._num_bytes += weight.kept_bytes if weight is not None and is_small else _MOST_BYTES + 1

    def settle(self) -> None:
        """Run what was put off: then the gradients of all blocks so far are there."""
        losses, self._losses, self._num_bytes = self._losses, [], 0
        if losses:
            self._backward(sum(losses[1:], losses[0]))


class _Scale:
    """Adds up the memory that a graph keeps beyond some tensors."""

    def __init__(self, held: Iterable[Tensor]) -> None:
        self._held = {tensor.untyped_storage().data_ptr() for tensor in held}
        self._sizes: dict[int, int] = {}

    @property
    def num_bytes(self) -> int:
        return sum(self._sizes.values())

    def put(self, tensor: Tensor) -> tuple[Tensor, int]:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._held:
            self._sizes[storage.data_ptr()] = storage.nbytes()
        # Detached: an output that its own graph keeps would never go. Torch gives it its place in the graph back.
        return tensor.detach(), tensor._version

    @staticmethod
    def take(kept: tuple[Tensor, int]) -> Tensor:
        tensor, version = kept
        if tensor._version != version:
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"{tensor.dtype} of shape {list(tensor.shape)}, expected version {version}, is {tensor._version}"
            )
        return tensor
