"""The schedule: in which order each rank teaches, goes forward and goes backward, micro-batch by micro-batch.

Every schedule is found by letting all ranks work off several batches on a clock: whoever is free takes the most urgent
task that is ready. What a rank does in the steady state is its order. So stages may have any lengths, and since the
order was found by doing the work, it can be done: no rank waits for a task that waits for it.

    1f1b           backward before forward, hardly more micro-batches under way than there are stages to come; the
                   teacher works on the next batch whenever nothing else is ready
    gpipe          all forwards, then all backwards; the teacher as above
    teacher-first  the teacher's pass of the batch, then the student in 1f1b order
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum
from heapq import heappop, heappush
from typing import NamedTuple

from lightning_pipebd.planning.pipeline_plan import PipelinePlan

__all__ = ["Durations", "Phase", "Schedule", "StepKind", "Task", "schedule_tasks"]

_NUM_STEADY_STEPS = 6

# Micro-batches under way beyond the stages to come, in "1f1b". While a rank teaches it answers late, and with nothing
# to spare its neighbours would wait for it: 8 equal stages whose teacher takes four times the student's forward are
# busy for 93 % of the time with 0 of them, for 96 % with 1 and always with 2.
_NUM_SPARE = 2


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


def schedule_tasks(
    plan: PipelinePlan,
    durations: Durations,
    *,
    num_units: int,
    num_next_units: int,
    step: StepKind,
    schedule: Schedule,
    is_full_batch: bool,
    splits_backward: bool,
) -> tuple[tuple[Task, ...], ...]:
    """Give every rank the order of its tasks in a step.

    Args:
        plan: Who has which block.
        durations: What tasks take.
        num_units: Micro-batches of the batch.
        num_next_units: Micro-batches of the next batch, if its teacher work belongs to the step.
        step: Which teacher work belongs to the step.
        schedule: The rule.
        is_full_batch: Whether the loss needs the whole batch, so that no backward begins before the last forward.
        splits_backward: Whether the gradients of the weights are tasks of their own, which may wait.
    """
    middle = step if step.teaches_own != step.teaches_next else StepKind(teaches_own=False, teaches_next=True)
    if step.teaches_own and not step.teaches_next:
        kinds, wanted = [step] * _NUM_STEADY_STEPS, _NUM_STEADY_STEPS - 2
    elif step.teaches_own:
        kinds, wanted = [step, middle, middle], 0
    elif step.teaches_next:
        kinds = [StepKind(teaches_own=True, teaches_next=True), *[step] * _NUM_STEADY_STEPS]
        wanted = _NUM_STEADY_STEPS - 1
    else:
        kinds, wanted = [StepKind(teaches_own=True, teaches_next=True), middle, middle, step], 3
    units = [num_units] * len(kinds)
    if wanted + 1 < len(kinds):
        # Later steps only stand for what follows; the step itself teaches this many of the next batch's micro-batches.
        units[wanted + 1 :] = [num_next_units or num_units] * (len(kinds) - wanted - 1)
    return _Clock(plan, durations, kinds, units, schedule, is_full_batch, splits_backward).order_of(wanted)


class _Queue:
    """The tasks of one phase of one stage in one step, first micro-batch first."""

    def __init__(self, phase: Phase, stage: int, num_units: int, urgency: float, *, is_next: bool = False) -> None:
        self.phase = phase
        self.stage = stage
        self.num_units = num_units
        self.urgency = urgency
        self.is_next = is_next
        self.unit = 0

    @property
    def head(self) -> Task:
        return Task(self.phase, self.stage, self.unit, self.is_next)


class _Rank:
    def __init__(self) -> None:
        self.step = -1
        self.free_ms = 0.0
        self.queues: list[_Queue] = []
        self.orders: list[list[Task]] = []


_Key = tuple[Phase, int, int, int]  # phase, stage, micro-batch, batch


class _Clock:
    """All ranks at work, step after step."""

    def __init__(
        self,
        plan: PipelinePlan,
        durations: Durations,
        kinds: Sequence[StepKind],
        units: Sequence[int],
        schedule: Schedule,
        is_full_batch: bool,
        splits_backward: bool,
    ) -> None:
        self.teacher, self.student = plan.teacher_stages, plan.student_stages
        self.kinds = kinds
        self.units = units
        self.schedule = schedule
        self.all_forward_first = is_full_batch or schedule is Schedule.GPIPE
        self.splits_backward = splits_backward
        self.num_spare = 0 if schedule is Schedule.TEACHER_FIRST else _NUM_SPARE
        self.teach_ms = [sum(durations.teacher[block] for block in stage.blocks) for stage in self.teacher]
        self.forward_ms = [sum(durations.student[block] for block in stage.blocks) for stage in self.student]
        backward = durations.backward or [2 * forward for forward in durations.student]
        self.backward_ms = [sum(backward[block] for block in stage.blocks) for stage in self.student]
        self.ranks = [_Rank() for _ in range(plan.num_ranks)]
        self.done: dict[_Key, float] = {}
        self.num_backward: dict[tuple[int, int], int] = {}
        self.events: list[tuple[float, int]] = [(0.0, rank) for rank in range(plan.num_ranks)]

    def order_of(self, wanted: int) -> tuple[tuple[Task, ...], ...]:
        for number in range(len(self.ranks)):
            self._begin_step(number)
        while self.events:
            now, number = heappop(self.events)
            rank = self.ranks[number]
            if rank.free_ms <= now and (queue := self._choose(number, now)) is not None:
                self._do(number, queue, now)
        assert all(rank.step == len(self.kinds) for rank in self.ranks), "the schedule stands still"
        return tuple(tuple(rank.orders[wanted]) for rank in self.ranks)

    def _begin_step(self, number: int) -> None:
        rank = self.ranks[number]
        while not rank.queues:
            rank.step += 1
            if rank.step == len(self.kinds):
                return
            rank.orders.append([])
            rank.queues = self._queues(number, rank.step)

    def _queues(self, number: int, step: int) -> list[_Queue]:
        kind, num_units = self.kinds[step], self.units[step]
        queues = []
        for stage, (owner, _, _) in enumerate(self.student):
            if owner == number:
                queues += [
                    _Queue(Phase.BACKWARD, stage, num_units, 0.0),
                    _Queue(Phase.FORWARD, stage, num_units, 2.0),
                ]
                if self.splits_backward:
                    queues.append(_Queue(Phase.WEIGHT, stage, num_units, 3.0))
        for stage, (owner, _, _) in enumerate(self.teacher):
            if owner == number:
                if kind.teaches_own:
                    queues.append(_Queue(Phase.TEACH, stage, num_units, 1.0))
                if kind.teaches_next:
                    num_next = self.units[step + 1] if step + 1 < len(self.units) else num_units
                    queues.append(_Queue(Phase.TEACH, stage, num_next, 4.0, is_next=True))
        return queues

    def _choose(self, number: int, now: float) -> _Queue | None:
        queues = self.ranks[number].queues
        ready = [queue for queue in queues if self._ready_ms(queue, number) <= now]
        # The teacher's own batch goes along with the forwards, micro-batch by micro-batch, unless it has to be first.
        return min(ready, key=self._urgency, default=None)

    def _urgency(self, queue: _Queue) -> tuple[float, int, float, int]:
        along = queue.urgency in (1.0, 2.0) and self.schedule is not Schedule.TEACHER_FIRST
        return (1.5, queue.unit, queue.urgency, -queue.stage) if along else (queue.urgency, 0, 0.0, -queue.stage)

    def _ready_ms(self, queue: _Queue, number: int) -> float:
        step = self.ranks[number].step
        phase, stage, unit = queue.phase, queue.stage, queue.unit
        if phase is Phase.TEACH:
            # A momentum teacher moves on between two batches, so a rank is done with one before it begins the next.
            if queue.is_next and self._is_teaching(number):
                return float("inf")
            return self._when((Phase.TEACH, stage - 1, unit, step + queue.is_next)) if stage else 0.0
        if phase is Phase.WEIGHT:
            return self._when((Phase.BACKWARD, stage, unit, step))
        if phase is Phase.BACKWARD:
            return self._backward_ready_ms(stage, unit, step)
        if self.schedule is Schedule.TEACHER_FIRST and self._is_teaching(number):
            return float("inf")
        num_under_way = unit - self.num_backward.get((stage, step), 0)
        if not self.all_forward_first and num_under_way >= len(self.student) - stage + self.num_spare:
            return float("inf")
        return self._when((Phase.FORWARD, stage - 1, unit, step)) if stage else 0.0

    def _backward_ready_ms(self, stage: int, unit: int, step: int) -> float:
        last, last_unit = len(self.student) - 1, self.units[step] - 1
        if stage < last:
            needed = [(Phase.BACKWARD, stage + 1, unit, step)]
        else:
            units = range(last_unit + 1) if self.all_forward_first else [unit]
            needed = [(Phase.FORWARD, last, number, step) for number in units]
            needed += [(Phase.TEACH, len(self.teacher) - 1, number, step) for number in units]
        if self.all_forward_first:
            needed.append((Phase.FORWARD, stage, last_unit, step))
        needed.append((Phase.FORWARD, stage, unit, step))
        return max(map(self._when, needed))

    def _is_teaching(self, number: int) -> bool:
        return any(queue.phase is Phase.TEACH and not queue.is_next for queue in self.ranks[number].queues)

    def _when(self, key: _Key) -> float:
        return self.done.get(key, float("inf"))

    def _do(self, number: int, queue: _Queue, now: float) -> None:
        rank = self.ranks[number]
        batch = rank.step + queue.is_next
        end = now + self._duration_ms(queue)
        rank.orders[-1].append(queue.head)
        rank.free_ms = end
        self.done[queue.phase, queue.stage, queue.unit, batch] = end
        if queue.phase is Phase.BACKWARD:
            self.num_backward[queue.stage, batch] = queue.unit + 1
        queue.unit += 1
        if queue.unit == queue.num_units:
            rank.queues.remove(queue)
            self._begin_step(number)
        for other in self._concerned(number, queue):
            heappush(self.events, (end, other))

    def _concerned(self, number: int, queue: _Queue) -> set[int]:
        """Give the ranks that may begin something when a task of this queue is over."""
        stages = self.teacher if queue.phase is Phase.TEACH else self.student
        near = {stages[stage].rank for stage in (queue.stage - 1, queue.stage + 1) if 0 <= stage < len(stages)}
        return near | {number, self.student[-1].rank}

    def _duration_ms(self, queue: _Queue) -> float:
        if queue.phase is Phase.TEACH:
            return self.teach_ms[queue.stage] / queue.num_units
        if queue.phase is Phase.FORWARD:
            return self.forward_ms[queue.stage] / queue.num_units
        backward = self.backward_ms[queue.stage] / queue.num_units
        return backward / 2 if self.splits_backward else backward
