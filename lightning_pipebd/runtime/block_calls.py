"""Calls of blocks that leave what they are given as it was."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.partition import Partition, call_block

__all__ = ["BlockCalls"]


class BlockCalls:
    """Call a model's blocks without letting them change their inputs.

    A block may begin with an in-place operation (ReLU(inplace=True) after a cut). Its input may also be the target of
    another block, on its way to another rank, or the leaf of a graph, so such a block works on a copy.

    Args:
        partition: The blocks.
        role: ``"teacher"`` or ``"student"``, for messages.
    """

    def __init__(self, partition: Partition, role: str) -> None:
        self._partition = partition
        self._role = role
        self._modifies_input: dict[int, bool] = {}

    def __call__(self, block: int, boundary: Any) -> Any:
        """Give the next boundary.

        Raises:
            RuntimeError: The block changes its input now, but did not do so when it was first called.
        """
        known = self._modifies_input.get(block)
        given = boundary if known is False else pytree.tree_map_only(Tensor, torch.clone, boundary)
        versions = _versions(given)
        output = call_block(self._partition.blocks[block], given)
        has_changed = versions != _versions(given)
        if known is False and has_changed:
            msg = f"{self._role} block {block} changed its input in place now, but did not do so on the first batch"
            raise RuntimeError(msg)
        if known is None:
            self._modifies_input[block] = has_changed
        return output


def _versions(tree: Any) -> list[int]:
    if isinstance(tree, Tensor):
        return [tree._version]
    return [leaf._version for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]
