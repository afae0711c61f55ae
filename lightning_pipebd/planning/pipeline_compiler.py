"""The compiler of end-to-end training: from a plan and a schedule to every rank's program for one batch.

The schedule orders tasks (a micro-batch in a stage); here each becomes actions: receive what it needs, do its blocks,
send what it made. A message is received just before its first use and sent the moment it exists, so the programs can be
done because the order of the tasks can.

All messages of a step are sent and received within that step, also those about the next batch. So a step ends clean on
every rank, whatever comes next: validation, a checkpoint, the end of the epoch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from math import ceil

from lightning_pipebd.planning.pipeline_order import schedule_tasks
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.pipeline_replicas import write_replicas
from lightning_pipebd.planning.pipeline_schedule import Durations, Phase, Schedule, StepKind, Task
from lightning_pipebd.planning.plan import PlanError, Rows

__all__ = ["PipelineStep", "compile_pipeline", "micro_batches", "write_programs"]

_NO_ROWS = Rows(0, 0)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineStep:
    """What one step of an end-to-end training has to do.

    Args:
        num_rows: Rows of the batch, at least 1.
        num_micro_batches: Micro-batches to cut it into, at least 1; a batch with fewer rows has as many as rows. Each
            replica cuts its own rows so.
        teaches_own: Whether the teacher has still to work on this batch: it was not done a step ahead.
        num_next_rows: Rows of the next batch, for the teacher to work on in this step; 0 if it shall not.
        is_full_batch: Whether the loss needs the whole batch.
        has_targets: Whether the loss reads something of the batch beside the outputs.
        schedule: Order of the work.
        splits_backward: Whether the gradients of the weights are actions of their own.
        update: Whether an optimizer step follows; gradients accumulate otherwise.
        has_momentum: Whether the teacher follows the student after the optimizer step.
    """

    num_rows: int
    num_micro_batches: int = 1
    teaches_own: bool = True
    num_next_rows: int = 0
    is_full_batch: bool = False
    has_targets: bool = False
    schedule: Schedule = Schedule.ONE_FORWARD_ONE_BACKWARD
    splits_backward: bool = False
    update: bool = True
    has_momentum: bool = False

    def __post_init__(self) -> None:
        for name in ("num_rows", "num_micro_batches"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, but is {getattr(self, name)}. Skip an empty batch.")


def micro_batches(num_rows: int, num_micro_batches: int) -> tuple[Rows, ...]:
    """Cut a batch along time: as evenly as rows allow, and never an empty one.

    Example:
        >>> [str(rows) for rows in micro_batches(5, 2)], len(micro_batches(2, 4))
        (['0:3', '3:5'], 2)
    """
    number = min(num_micro_batches, num_rows)
    cuts = [ceil(index * num_rows / number) for index in range(number + 1)]
    return tuple(Rows(start, stop) for start, stop in pairwise(cuts))


def compile_pipeline(
    plan: PipelinePlan, step: PipelineStep, durations: Durations | None = None
) -> tuple[PipelineProgram, ...]:
    """Give every rank its program for one batch.

    Args:
        plan: Who has which block.
        step: What to do.
        durations: What the blocks take; they decide the order alone. ``None`` takes all blocks for equal.

    Returns:
        One program per rank, index = rank. The same arguments give the same object, from a cache.

    Raises:
        PlanError: A momentum teacher has other blocks than the student.

    Example:
        >>> first, second = compile_pipeline(PipelinePlan.parse("0|1"), PipelineStep(num_rows=4))
        >>> print(second)
        PIPELINE rank=1 rows=4 next=0
        RECV boundary=1 rows=0:4 from=0
        TEACH block=1 rows=0:4
        RECV hidden=1 rows=0:4 from=0
        FORWARD block=1 rows=0:4
        LOSS rows=0:4
        BACKWARD block=1 rows=0:4
        SEND gradient=1 rows=0:4 to=0
        UPDATE block=1
    """
    if step.has_momentum and len(plan.teacher) != len(plan.student):
        raise PlanError(
            f"`teacher` and `student` of a momentum teacher must have the same blocks, but have {len(plan.teacher)} "
            f"and {len(plan.student)}. Cut both models alike."
        )
    if durations is None:
        durations = Durations(teacher=(1.0,) * len(plan.teacher), student=(1.0,) * len(plan.student))
    return _compile(plan, step, durations)


@lru_cache(maxsize=64)
def _compile(plan: PipelinePlan, step: PipelineStep, durations: Durations) -> tuple[PipelineProgram, ...]:
    if plan.replicas > 1:
        return write_replicas(plan, step, lambda one: _compile(plan.one, one, durations))
    orders = schedule_tasks(
        plan,
        durations,
        num_units=len(micro_batches(step.num_rows, step.num_micro_batches)),
        num_next_units=len(micro_batches(step.num_next_rows, step.num_micro_batches)) if step.num_next_rows else 0,
        step=StepKind(teaches_own=step.teaches_own, teaches_next=step.num_next_rows > 0),
        schedule=step.schedule,
        is_full_batch=step.is_full_batch,
        splits_backward=step.splits_backward,
    )
    return write_programs(plan, step, orders)


def write_programs(
    plan: PipelinePlan, step: PipelineStep, orders: Sequence[Sequence[Task]]
) -> tuple[PipelineProgram, ...]:
    """Write every rank's program from the order of its tasks."""
    return tuple(
        PipelineProgram(rank, step.num_rows, step.num_next_rows, _Writer(plan, step, rank).write(order))
        for rank, order in enumerate(orders)
    )


class _Writer:
    """Writes one rank's actions."""

    def __init__(self, plan: PipelinePlan, step: PipelineStep, rank: int) -> None:
        self.plan = plan
        self.step = step
        self.rank = rank
        self.rows = micro_batches(step.num_rows, step.num_micro_batches)
        self.loss_rows = (Rows(0, step.num_rows),) if step.is_full_batch else self.rows
        self.next_rows = micro_batches(step.num_next_rows, step.num_micro_batches) if step.num_next_rows else ()
        self.actions: list[PipelineAction] = []
        self.has_loss = False

    def write(self, order: Sequence[Task]) -> tuple[PipelineAction, ...]:
        self._load()
        for task in order:
            if task.phase is Phase.TEACH:
                self._teach(task)
            elif task.phase is Phase.FORWARD:
                self._forward(task)
            elif task.phase is Phase.BACKWARD:
                self._backward(task)
            else:
                self._weight(task)
        # The next batch's teacher outputs wait with the rank that will need them.
        if self.rank == self.plan.loss_rank != self.plan.teacher[-1]:
            for rows in self.next_rows:
                self._move(
                    PipelineKind.RECV, Stream.BOUNDARY, len(self.plan.teacher), rows, self.plan.teacher[-1], True
                )
        if self.step.update:
            self._update()
        return tuple(self.actions)

    def _load(self) -> None:
        if self.rank != self.plan.loading_rank:
            return
        self._add(PipelineKind.LOAD, 0, Rows(0, self.step.num_rows))
        if self.step.has_targets and self.plan.loss_rank != self.rank:
            for rows in self.loss_rows:
                self._move(PipelineKind.SEND, Stream.TARGETS, 0, rows, self.plan.loss_rank)
        if self.plan.teacher[0] != self.rank and self.step.teaches_own:
            for rows in self.rows:
                self._move(PipelineKind.SEND, Stream.BOUNDARY, 0, rows, self.plan.teacher[0])
        if self.next_rows:
            self._add(PipelineKind.LOAD, 0, Rows(0, self.step.num_next_rows), is_next=True)
            if self.plan.teacher[0] != self.rank:
                for rows in self.next_rows:
                    self._move(PipelineKind.SEND, Stream.BOUNDARY, 0, rows, self.plan.teacher[0], True)

    def _teach(self, task: Task) -> None:
        stages, is_next = self.plan.teacher_stages, task.is_next
        rows = (self.next_rows if is_next else self.rows)[task.unit]
        stage = stages[task.stage]
        source = stages[task.stage - 1].rank if task.stage else self.plan.loading_rank
        if source != self.rank:
            self._move(PipelineKind.RECV, Stream.BOUNDARY, stage.first, rows, source, is_next)
        for block in stage.blocks:
            self._add(PipelineKind.TEACH, block, rows, is_next=is_next)
        is_last = task.stage == len(stages) - 1
        destination = self.plan.loss_rank if is_last else stages[task.stage + 1].rank
        if destination != self.rank:
            self._move(PipelineKind.SEND, Stream.BOUNDARY, stage.last + 1, rows, destination, is_next)

    def _forward(self, task: Task) -> None:
        stages, rows = self.plan.student_stages, self.rows[task.unit]
        stage = stages[task.stage]
        if task.stage:
            self._move(PipelineKind.RECV, Stream.HIDDEN, stage.first, rows, stages[task.stage - 1].rank)
        for block in stage.blocks:
            self._add(PipelineKind.FORWARD, block, rows)
        if task.stage < len(stages) - 1:
            self._move(PipelineKind.SEND, Stream.HIDDEN, stage.last + 1, rows, stages[task.stage + 1].rank)

    def _backward(self, task: Task) -> None:
        stages, rows = self.plan.student_stages, self.rows[task.unit]
        stage = stages[task.stage]
        if task.stage == len(stages) - 1:
            self._loss(rows)
        else:
            self._move(PipelineKind.RECV, Stream.GRADIENT, stage.last + 1, rows, stages[task.stage + 1].rank)
        kind = PipelineKind.BACKWARD_INPUT if self.step.splits_backward else PipelineKind.BACKWARD
        for block in reversed(stage.blocks):
            self._add(kind, block, rows)
        if task.stage:
            self._move(PipelineKind.SEND, Stream.GRADIENT, stage.first, rows, stages[task.stage - 1].rank)

    def _weight(self, task: Task) -> None:
        for block in reversed(self.plan.student_stages[task.stage].blocks):
            self._add(PipelineKind.BACKWARD_WEIGHT, block, self.rows[task.unit])

    def _loss(self, rows: Rows) -> None:
        if self.step.is_full_batch and self.has_loss:
            return
        self.has_loss = True
        parts, taught_by = (self.rows if self.step.is_full_batch else (rows,)), self.plan.teacher[-1]
        if self.step.teaches_own and taught_by != self.rank:
            for part in parts:
                self._move(PipelineKind.RECV, Stream.BOUNDARY, len(self.plan.teacher), part, taught_by)
        of_loss = self.loss_rows[0] if self.step.is_full_batch else rows
        if self.step.has_targets and self.plan.loading_rank != self.rank:
            self._move(PipelineKind.RECV, Stream.TARGETS, 0, of_loss, self.plan.loading_rank)
        self._add(PipelineKind.LOSS, 0, of_loss)

    def _update(self) -> None:
        student, teacher = self.plan.student, self.plan.teacher
        own = [block for block, rank in enumerate(student) if rank == self.rank]
        for block in own:
            self._add(PipelineKind.UPDATE, block)
        if not self.step.has_momentum:
            return
        for block in own:
            if teacher[block] != self.rank:
                self._move(PipelineKind.SEND, Stream.WEIGHTS, block, _NO_ROWS, teacher[block])
        for block, rank in enumerate(teacher):
            if rank == self.rank:
                if student[block] != rank:
                    self._move(PipelineKind.RECV, Stream.WEIGHTS, block, _NO_ROWS, student[block])
                self._add(PipelineKind.EMA, block)

    def _add(self, kind: PipelineKind, block: int, rows: Rows = _NO_ROWS, *, is_next: bool = False) -> None:
        self.actions.append(PipelineAction(kind, block, rows, is_next=is_next))

    def _move(
        self, kind: PipelineKind, stream: Stream, index: int, rows: Rows, peer: int, is_next: bool = False
    ) -> None:
        self.actions.append(PipelineAction(kind, index, rows, stream, peer, is_next))
