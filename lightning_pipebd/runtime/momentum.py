"""The momentum teacher: a moving average of the student, block by block.

Tensors of a block are kept in the same order on both sides, so that a block is followed by a few kernels that work on
all its tensors at once. Without delay the teacher itself is the average. With a delay of one step the average runs
ahead of the teacher that teaches::

    average   t[k-1]  --follow-->  t[k]
    teacher   t[k-2]  --promote->  t[k-1]       so the student learns batch k from t[k-2]
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from torch.optim.swa_utils import get_ema_multi_avg_fn

__all__ = ["Buffers", "MomentumBlock", "MomentumTeacher", "check_momentum"]

Buffers = Literal["average", "copy", "leave"]


@dataclass(frozen=True, slots=True)
class MomentumBlock:
    """The tensors of one block.

    Args:
        student: Parameters of the student's block.
        teacher: Those of the teacher's block, in the same order.
        average: Those that run ahead of the teacher; ``None`` without a delay.
        student_buffers: Buffers of the student's block.
        teacher_buffers: Those of the teacher's block.
        average_buffers: Those that run ahead; ``None`` without a delay.
    """

    student: Sequence[Tensor]
    teacher: Sequence[Tensor]
    average: Sequence[Tensor] | None = None
    student_buffers: Sequence[Tensor] = ()
    teacher_buffers: Sequence[Tensor] = ()
    average_buffers: Sequence[Tensor] | None = None


class MomentumTeacher:
    """Let a teacher follow a student.

    Args:
        blocks: The blocks.
        buffers: What becomes of buffers such as running statistics: ``"average"`` (those of integers are copied),
            ``"copy"`` takes the student's, ``"leave"`` never touches them.

    Example:
        >>> student, teacher = torch.ones(2), torch.zeros(2)
        >>> momentum = MomentumTeacher([MomentumBlock([student], [teacher])])
        >>> momentum.follow(0, 0.75)
        >>> teacher
        tensor([0.2500, 0.2500])
    """

    def __init__(self, blocks: Sequence[MomentumBlock], buffers: Buffers = "average") -> None:
        self._blocks = blocks
        self._buffers = buffers
        self._promoted: set[int] = set()

    @torch.no_grad()
    def promote(self, block: int) -> None:
        """Let a delayed teacher move on by one step: it now teaches the next batch. Does nothing without a delay."""
        own = self._blocks[block]
        if own.average is None or block in self._promoted:
            return
        self._promoted.add(block)
        _copy(own.teacher, own.average)
        assert own.average_buffers is not None
        if self._buffers != "leave":
            _copy(own.teacher_buffers, own.average_buffers)

    def stay(self, block: int) -> None:
        """End a step that was skipped: the average stays, and a delayed teacher catches up with it."""
        self.promote(block)
        self._promoted.discard(block)

    @torch.no_grad()
    def follow(self, block: int, momentum: float) -> None:
        """Move the average towards the student: ``momentum`` of the old, the rest of the student's."""
        self.promote(block)
        self._promoted.discard(block)
        own = self._blocks[block]
        _average(own.teacher if own.average is None else own.average, own.student, momentum)
        if self._buffers == "leave":
            return
        buffers = own.teacher_buffers if own.average_buffers is None else own.average_buffers
        if self._buffers == "copy":
            _copy(buffers, own.student_buffers)
        else:
            _average(buffers, own.student_buffers, momentum)


def check_momentum(momentum: object, buffers: str) -> None:
    """Raise unless these are a momentum, as far as it is a number, and what may become of buffers.

    Raises:
        ValueError: One of them is not.
    """
    if isinstance(momentum, (int, float)) and not 0 <= momentum <= 1:
        raise ValueError(f"`momentum` must lie between 0 and 1, but is {momentum}. Usual values are 0.99 to 0.999.")
    if buffers not in ("average", "copy", "leave"):
        raise ValueError(f"`buffers` must be 'average', 'copy' or 'leave', but is {buffers!r}. Choose one of them.")


def _average(averages: Sequence[Tensor], news: Sequence[Tensor], momentum: float) -> None:
    pairs = list(zip(averages, news, strict=True))
    floats = [(average, new) for average, new in pairs if average.is_floating_point() or average.is_complex()]
    counts = [(average, new) for average, new in pairs if not (average.is_floating_point() or average.is_complex())]
    if floats:
        get_ema_multi_avg_fn(momentum)([average for average, _ in floats], [new for _, new in floats], None)  # type: ignore[no-untyped-call]
    _copy([average for average, _ in counts], [new for _, new in counts])


def _copy(to: Sequence[Tensor], source: Sequence[Tensor]) -> None:
    if to:
        torch._foreach_copy_(list(to), list(source))
