"""Buckets: gradients of several shared student blocks that are summed as one.

A sum has a price whatever its size: everybody is told of it, everybody waits for it. So blocks that the same ranks
share, and that follow each other in their programs, are summed together until they are large enough (Li et al.,
"PyTorch Distributed: Experiences on Accelerating Data Parallel Training", section "Gradient Bucketing").
"""

from __future__ import annotations

from collections.abc import Mapping

from lightning_pipebd.planning.pipeline_program import PipelineProgram
from lightning_pipebd.planning.program import Kind, Program

__all__ = ["BUCKET_BYTES", "find_buckets"]

BUCKET_BYTES = 1 << 20
"""Gradients of this size are not kept back for more: their sum's own price is small beside them."""


def find_buckets(program: Program | PipelineProgram, gradient_bytes: Mapping[int, float]) -> dict[int, tuple[int, ...]]:
    """Give the blocks whose gradients are summed together, by the last of them: their sum begins at its REDUCE.

    The ranks that share blocks come to the same buckets, each by its own program: they have the same REDUCEs in the
    same order. A bucket never outlasts the last REDUCE of its ranks, so that nobody waits for anything but these.

    Args:
        program: A rank's program.
        gradient_bytes: Size of the gradients of each block that it reduces; the same on all ranks.

    Example:
        >>> program = Program.parse('''
        ...     PROGRAM rank=1 rows=8
        ...     REDUCE block=0 ranks=0,1
        ...     REDUCE block=1 ranks=0,1
        ...     REDUCE block=2 ranks=0,1
        ...     REDUCE block=3 ranks=1,2
        ... ''')
        >>> find_buckets(program, {0: 2**19, 1: 2**19, 2: 8, 3: 8})
        {1: (0, 1), 2: (2,), 3: (3,)}
    """
    # Programs of blocks and of whole students name their kinds alike.
    reduces = [action for action in program.actions if action.kind.value == Kind.REDUCE.value]
    last = {action.ranks: action.index for action in reduces}
    open_buckets: dict[tuple[int, ...], list[int]] = {}
    found = {}
    for action in reduces:
        bucket = open_buckets.setdefault(action.ranks, [])
        bucket.append(action.index)
        if action.index == last[action.ranks] or sum(gradient_bytes[block] for block in bucket) >= BUCKET_BYTES:
            found[action.index] = tuple(open_buckets.pop(action.ranks))
    return found
