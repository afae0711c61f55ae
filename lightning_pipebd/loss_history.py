"""The losses that a rank has, step by step, thinned out so that a long run needs no more room than a short one."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

from torch import Tensor

__all__ = ["LossHistory", "merge_losses"]

_MAX_STEPS = 512

NameT = TypeVar("NameT", int, str)
"""A block's number, or the name of a term of a whole student's loss."""


class LossHistory:
    """Every n-th step's losses; n doubles whenever there is no room left.

    Which steps are kept depends on their number alone, so all ranks keep the same ones. No value is read from a device
    before it is asked for.

    Example:
        >>> import torch
        >>> history = LossHistory()
        >>> for step in range(2000):
        ...     history.note(step, {0: torch.tensor(float(step))})
        >>> [step for step, _ in history.points[0]][:3], len(history.points[0])
        ([0, 4, 8], 500)
    """

    def __init__(self) -> None:
        self._stride = 1
        self._kept: dict[int, dict[int | str, Tensor]] = {}

    def note(self, step: int, losses: Mapping[Any, Tensor]) -> None:
        """Take in a step's losses."""
        if step % self._stride:
            return
        self._kept[step] = dict(losses)
        if len(self._kept) > _MAX_STEPS:
            self._stride *= 2
            self._kept = {step: losses for step, losses in self._kept.items() if step % self._stride == 0}

    @property
    def points(self) -> dict[int | str, list[tuple[int, float]]]:
        """For each block, or term of a loss, the steps that were kept, and their losses."""
        found: defaultdict[int | str, list[tuple[int, float]]] = defaultdict(list)
        for step, losses in self._kept.items():
            for block, loss in losses.items():
                found[block].append((step, loss.item()))
        return dict(found)


def merge_losses(ranks: Sequence[Mapping[NameT, Sequence[tuple[int, float]]]]) -> dict[NameT, list[tuple[int, float]]]:
    """Add up the parts that several ranks have of a block's losses.

    Example:
        >>> merge_losses([{0: [(0, 1.0)], 1: [(0, 0.25)]}, {1: [(0, 0.5)]}])
        {0: [(0, 1.0)], 1: [(0, 0.75)]}
    """
    sums: defaultdict[NameT, defaultdict[int, float]] = defaultdict(lambda: defaultdict(float))
    for points in ranks:
        for block, curve in points.items():
            for step, loss in curve:
                sums[block][step] += loss
    return {block: sorted(steps.items()) for block, steps in sorted(sums.items())}
