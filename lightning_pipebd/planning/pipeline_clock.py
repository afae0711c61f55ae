"""All ranks at work on a clock, step after step: whoever is free takes the most urgent task that is ready.

Given orders to keep to, the clock tells how long a step takes with them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate
from math import inf
from typing import NamedTuple

from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Durations, Phase, Schedule, StepKind, Task

__all__ = ["Manner", "Orders", "PipelineClock", "WorkedOff"]

Orders = tuple[tuple[Task, ...], ...]
"""Every rank's tasks of a step, one after another."""

_Key = tuple[Phase, int, int, int]  # phase, stage, micro-batch, batch


class Manner(NamedTuple):
    """How a rank goes about its work where the schedule leaves it open.

    Args:
        num_spare: Micro-batches under way beyond the stages to come, in "1f1b".
        patience: A rank does not begin to teach the next batch if the student's work is ready within this fraction of
            the time that teaching takes.
    """

    num_spare: int
    patience: float


class WorkedOff(NamedTuple):
    """What the clock saw.

    Args:
        orders: For every step the order of every rank.
        ends_ms: For every step when the last rank was done with it.
    """

    orders: tuple[Orders, ...]
    ends_ms: tuple[float, ...]


@dataclass(frozen=True)
class PipelineClock:
    """Works off steps as a plan and a schedule want it.

    Args:
        plan: Who has which block.
        durations: What tasks take.
        schedule: The rule.
        is_full_batch: Whether the loss needs the whole batch, so that no backward begins before the last forward.
        splits_backward: Whether the gradients of the weights are tasks of their own, which may wait.
    """

    plan: PipelinePlan
    durations: Durations
    schedule: Schedule
    is_full_batch: bool
    splits_backward: bool

    @property
    def all_forward_first(self) -> bool:
        """Whether no backward begins before the last forward."""
        return self.is_full_batch or self.schedule is Schedule.GPIPE

    @property
    def teach_ms(self) -> list[float]:
        """What every teacher stage takes for a whole batch."""
        return [sum(self.durations.teacher[block] for block in stage.blocks) for stage in self.plan.teacher_stages]

    @property
    def forward_ms(self) -> list[float]:
        """What the forward of every student stage takes."""
        return [sum(self.durations.student[block] for block in stage.blocks) for stage in self.plan.student_stages]

    @property
    def backward_ms(self) -> list[float]:
        """What the backward of every student stage takes."""
        backward = self.durations.backward or [2 * forward for forward in self.durations.student]
        return [sum(backward[block] for block in stage.blocks) for stage in self.plan.student_stages]

    def bound_ms(self, num_units: int) -> float:
        """Give what a step takes at least: all work of a rank, or of a stage and the way there and back."""
        work_ms = [0.0] * self.plan.num_ranks
        for stage, teach_ms in zip(self.plan.teacher_stages, self.teach_ms, strict=True):
            work_ms[stage.rank] += teach_ms
        train_ms = [forward + backward for forward, backward in zip(self.forward_ms, self.backward_ms, strict=True)]
        for stage, own_ms in zip(self.plan.student_stages, train_ms, strict=True):
            work_ms[stage.rank] += own_ms
        if self.splits_backward:
            # The gradients of weights may wait for when a stage has nothing else to do.
            train_ms = [own - backward / 2 for own, backward in zip(train_ms, self.backward_ms, strict=True)]
        # From the first stage's first forward to its last backward: a stage works when the first micro-batch has come,
        # and its last one has to go back.
        before_ms = accumulate(train_ms, initial=0.0)
        return max(*work_ms, *(own + before / num_units for own, before in zip(train_ms, before_ms, strict=False)))

    def run(
        self, kinds: Sequence[StepKind], units: Sequence[int], manner: Manner, *, keep: Orders | None = None
    ) -> WorkedOff:
        """Work off steps.

        Args:
            kinds: What each step has to do.
            units: How many micro-batches each step has.
            manner: How ranks choose.
            keep: Orders to keep to from the second step on; ranks choose by themselves if there are none.
        """
        return _Run(self, kinds, units, manner, keep).work_off()


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
        self.ends_ms: list[float] = []


class _Run:
    """All ranks at work, step after step."""

    def __init__(
        self,
        clock: PipelineClock,
        kinds: Sequence[StepKind],
        units: Sequence[int],
        manner: Manner,
        keep: Orders | None,
    ) -> None:
        self.teacher, self.student = clock.plan.teacher_stages, clock.plan.student_stages
        self.kinds = kinds
        self.units = units
        self.manner = manner
        self.keep = keep
        self.is_teacher_first = clock.schedule is Schedule.TEACHER_FIRST
        self.all_forward_first = clock.all_forward_first
        self.splits_backward = clock.splits_backward
        self.teach_ms, self.forward_ms, self.backward_ms = clock.teach_ms, clock.forward_ms, clock.backward_ms
        self.ranks = [_Rank() for _ in range(clock.plan.num_ranks)]
        self.done: dict[_Key, float] = {}
        self.num_backward: dict[tuple[int, int], int] = {}
        self.events: list[tuple[float, int]] = [(0.0, rank) for rank in range(clock.plan.num_ranks)]

    def work_off(self) -> WorkedOff:
        for number in range(len(self.ranks)):
            self._begin_step(number)
        while self.events:
            now, number = heappop(self.events)
            rank = self.ranks[number]
            if rank.free_ms <= now and (queue := self._choose(number, now)) is not None:
                self._do(number, queue, now)
        assert all(rank.step == len(self.kinds) for rank in self.ranks), "the schedule stands still"
        orders = zip(*(map(tuple, rank.orders) for rank in self.ranks), strict=True)
        return WorkedOff(tuple(orders), tuple(map(max, zip(*(rank.ends_ms for rank in self.ranks), strict=True))))

    def _begin_step(self, number: int) -> None:
        rank = self.ranks[number]
        while not rank.queues:
            if rank.step >= 0:
                rank.ends_ms.append(rank.free_ms)
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
        rank = self.ranks[number]
        if self.keep is not None and rank.step and rank.queues:
            due = self.keep[number][len(rank.orders[-1])]
            queue = next(queue for queue in rank.queues if queue.head == due)
            return queue if self._ready_ms(queue, number) <= now else None
        ready = [queue for queue in rank.queues if self._ready_ms(queue, number) <= now]
        # The teacher's own batch goes along with the forwards, micro-batch by micro-batch, unless it has to be first.
        best = min(ready, key=self._urgency, default=None)
        if best is not None and best.is_next and self.manner.patience:
            soon = now + self.manner.patience * self._duration_ms(best)
            if any(not queue.is_next and self._ready_ms(queue, number) < soon for queue in rank.queues):
                return None
        return best

    def _urgency(self, queue: _Queue) -> tuple[float, int, float, int]:
        along = queue.urgency in (1.0, 2.0) and not self.is_teacher_first
        return (1.5, queue.unit, queue.urgency, -queue.stage) if along else (queue.urgency, 0, 0.0, -queue.stage)

    def _ready_ms(self, queue: _Queue, number: int) -> float:
        step = self.ranks[number].step
        phase, stage, unit = queue.phase, queue.stage, queue.unit
        if phase is Phase.TEACH:
            # A momentum teacher moves on between two batches, so a rank is done with one before it begins the next.
            if queue.is_next and self._is_teaching(number):
                return inf
            return self._when((Phase.TEACH, stage - 1, unit, step + queue.is_next)) if stage else 0.0
        if phase is Phase.WEIGHT:
            return self._when((Phase.BACKWARD, stage, unit, step))
        if phase is Phase.BACKWARD:
            return self._backward_ready_ms(stage, unit, step)
        if self.is_teacher_first and self._is_teaching(number):
            return inf
        num_under_way = unit - self.num_backward.get((stage, step), 0)
        if not self.all_forward_first and num_under_way >= len(self.student) - stage + self.manner.num_spare:
            return inf
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
        return self.done.get(key, inf)

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
            # Whoever works longer looks around when that is done.
            if other == number or self.ranks[other].free_ms <= end:
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
