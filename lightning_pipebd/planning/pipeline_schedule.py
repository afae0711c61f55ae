"""The words of schedules: the rules, and the tasks that a rank puts in order by one.

The rules::

    1f1b           backward before forward, few micro-batches under way beyond the stages to come; the teacher works
                   on the next batch whenever nothing else is ready
    gpipe          all forwards, then all backwards; the teacher as above
    teacher-first  the teacher's pass of the batch, then the student in 1f1b order
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple

__all__ = ["Durations", "Phase", "Schedule", "StepKind", "Task"]


class Schedule(str, Enum):
    """A rule that orders a rank's work."""

    ONE_FORWARD_ONE_BACKWARD = "1f1b"
    GPIPE = "gpipe"
    TEACHER_FIRST = "teacher-first"

    def __str__(self) -> str:
        return self.value


class Phase(str, Enum):
    """What a task does with a micro-batch in a stage."""

    TEACH = "teach"
    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT = "weight"
    """The second half of a backward that is split: the gradients of the weights."""


class StepKind(NamedTuple):
    """What a step has to do beside the student's work.

    Args:
        teaches_own: Whether the teacher's work on this batch is done in this step.
        teaches_next: Whether the teacher's work on the next batch is.
    """

    teaches_own: bool
    teaches_next: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class Durations:
    """How long each block needs for a whole batch, in any unit.

    Args:
        teacher: For every teacher block its forward.
        student: For every student block its forward.
        backward: For every student block its backward; twice the forward where nothing is said.
    """

    teacher: tuple[float, ...]
    student: tuple[float, ...]
    backward: tuple[float, ...] = ()


class Task(NamedTuple):
    """One micro-batch in one stage.

    Args:
        phase: What is done.
        stage: Number of the teacher's or the student's stage.
        unit: Number of the micro-batch.
        is_next: Whether it is of the next batch.
    """

    phase: Phase
    stage: int
    unit: int
    is_next: bool = False
