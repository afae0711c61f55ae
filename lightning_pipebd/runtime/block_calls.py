"""Calls of blocks that leave what they are given as it was."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.compiling import compiled_block
from lightning_pipebd.runtime.layouts import without_gaps
from lightning_pipebd.runtime.partition import Partition, call_block
from lightning_pipebd.runtime.row_trees import versions_of

__all__ = ["BlockCalls"]


class BlockCalls:
    """Call a model's blocks without letting them change their inputs.

    A block may begin with an in-place operation (ReLU(inplace=True) after a cut). Its input may also be the target of
    another block, on its way to another rank, or the leaf of a graph, so such a block works on a copy.

    Args:
        partition: The blocks.
        role: ``"teacher"`` or ``"student"``, for messages.
        compile_options: Keyword arguments of ``torch.compile``; ``None`` compiles nothing.
    """

    def __init__(self, partition: Partition, role: str, compile_options: Mapping[str, Any] | None = None) -> None:
        self._partition = partition
        self._role = role
        self._compile_options = compile_options
        self._modifies_input: dict[int, bool] = {}
        self._compiled: dict[int, Callable[[Any], Any]] = {}

    def __getstate__(self) -> dict[str, Any]:
        # What was compiled is bound to this process and to these blocks: a copy compiles its own.
        return self.__dict__ | {"_compiled": {}}

    def __call__(self, block: int, boundary: Any) -> Any:
        """Give the next boundary, without gaps in memory, as it would arrive at another rank.

        Raises:
            RuntimeError: The block changes its input now, but did not do so when it was first called.
        """
        known = self._modifies_input.get(block)
        given = boundary if known is False else pytree.tree_map_only(Tensor, torch.clone, boundary)
        versions = versions_of(given)
        output = self._call(block, given)
        has_changed = versions != versions_of(given)
        if known is False and has_changed:
            msg = f"{self._role} block {block} changed its input in place now, but did not do so on the first batch"
            raise RuntimeError(msg)
        if known is None and not torch.is_inference_mode_enabled():
            self._modifies_input[block] = has_changed
        return without_gaps(output)

    def _call(self, block: int, boundary: Any) -> Any:
        if self._compile_options is None:
            return call_block(self._partition.blocks[block], boundary)
        if block not in self._compiled:
            name = f"{self._role}_block_{block}"
            self._compiled[block] = compiled_block(self._partition.blocks[block], name, self._compile_options)
        return self._compiled[block](boundary)
