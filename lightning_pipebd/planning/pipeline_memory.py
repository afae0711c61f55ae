"""The memory model of end-to-end training: what a rank holds while it works off its program.

weights    parameters of its blocks of both models, gradients and optimizer state of the student's
working    the most that is alive at one action: micro-batches between forward and backward, the teacher's outputs
           until the loss, gradients under way, and what the block at work needs for a while
queues     one step of everything the rank sends and receives: nobody is a whole step ahead, because gradients come
           back
"""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pipebd.planning.memory import MemoryUse
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, PipelineProgram, Stream

__all__ = ["pipeline_memory", "stage_bytes", "stream_row_bytes"]


def stream_row_bytes(costs: PipelineMeasurement) -> dict[Stream, list[int]]:
    """Give the bytes per row of what each stream has at each boundary."""
    hidden = [costs.student_input_bytes_per_row, *(block.output_bytes_per_row for block in costs.student)]
    return {
        Stream.BOUNDARY: [costs.teacher_input_bytes_per_row, *(block.output_bytes_per_row for block in costs.teacher)],
        Stream.HIDDEN: hidden,
        Stream.GRADIENT: hidden,
        Stream.TARGETS: [costs.target_bytes_per_row],
    }


def stage_bytes(costs: PipelineMeasurement) -> tuple[list[int], list[int]]:
    """Give what every block of the teacher and of the student occupies wherever it is."""
    return [block.parameter_bytes for block in costs.teacher], [block.trained_bytes for block in costs.student]


def pipeline_memory(
    plan: PipelinePlan, programs: Sequence[PipelineProgram], costs: PipelineMeasurement
) -> tuple[MemoryUse, ...]:
    """Give what every rank holds at its peak.

    Args:
        plan: Which blocks each rank has.
        programs: One program per rank, of a step in the steady state.
        costs: Sizes of blocks and boundaries.
    """
    sizes, blocks = stream_row_bytes(costs), stage_bytes(costs)
    uses = []
    for program in programs:
        place = plan.place(program.rank)[1]
        weights = sum(
            own[block]
            for own, ranks in zip(blocks, (plan.teacher, plan.student), strict=True)
            for block, rank in enumerate(ranks)
            if rank == place
        )
        # Sums over replicas go through a copy.
        weights += sum(
            costs.student[action.index].gradient_bytes
            for action in program.actions
            if action.kind is PipelineKind.REDUCE
        )
        queues = sum(
            _row_bytes(sizes, action) * action.rows.num_rows
            for action in program.actions
            if action.kind in (PipelineKind.SEND, PipelineKind.RECV) and action.stream is not Stream.WEIGHTS
        )
        weights += sum(
            costs.student[action.index].parameter_bytes
            for action in program.actions
            if action.stream is Stream.WEIGHTS and action.kind is PipelineKind.SEND
        )
        uses.append(MemoryUse(weights, _Walk(plan, program, costs, sizes).peak(), queues))
    return tuple(uses)


def _row_bytes(sizes: dict[Stream, list[int]], action: PipelineAction) -> int:
    """Give the bytes per row of a message, or of what is loaded."""
    if action.kind is not PipelineKind.LOAD and action.stream is not Stream.INPUTS:
        return sizes[action.stream][action.index]
    is_teachers = action.kind is PipelineKind.LOAD and action.is_next
    streams = (Stream.BOUNDARY,) if is_teachers else (Stream.BOUNDARY, Stream.HIDDEN, Stream.TARGETS)
    return sum(sizes[stream][0] for stream in streams)


class _Walk:
    """Goes through one program and counts."""

    def __init__(
        self,
        plan: PipelinePlan,
        program: PipelineProgram,
        costs: PipelineMeasurement,
        sizes: dict[Stream, list[int]],
    ) -> None:
        self.plan = plan
        self.program = program
        self.costs = costs
        self.sizes = sizes
        self.replica, self.rank = plan.place(program.rank)
        self.loads = self.rank == plan.loading_rank
        self.is_shared = costs.is_full_batch and plan.replicas > 1
        self.has_loss = program.rank in plan.loss_ranks(is_full_batch=costs.is_full_batch)
        is_split = any(action.kind is PipelineKind.BACKWARD_WEIGHT for action in program.actions)
        self.last = PipelineKind.BACKWARD_WEIGHT if is_split else PipelineKind.BACKWARD

    def peak(self) -> int:
        alive = 0
        num_rows = self.plan.rows(self.replica, self.program.num_rows).num_rows if self.program.num_next_rows else 0
        if self.has_loss:
            # What was taught a step ahead, perhaps in all replicas.
            num_taught = self.program.num_rows if self.is_shared and num_rows else num_rows
            alive = self.sizes[Stream.BOUNDARY][-1] * num_taught
        if self.replica and self.loads:
            # What was sent a step ahead.
            alive += sum(self.sizes[stream][0] for stream in (Stream.HIDDEN, Stream.TARGETS)) * num_rows
        peak = alive
        for action in self.program.actions:
            new, work, gone = self._changes(action)
            alive += new
            peak = max(peak, alive + work)
            alive -= gone
        return peak

    def _changes(self, action: PipelineAction) -> tuple[int, int, int]:
        """Give what an action brings, what it needs for a while, and what is gone after it; in bytes."""
        kind, rows, index = action.kind, action.rows.num_rows, action.index
        is_received = kind is PipelineKind.RECV and action.stream is not Stream.WEIGHTS
        if kind is PipelineKind.LOAD or is_received:
            return _row_bytes(self.sizes, action) * rows, 0, 0
        if kind is PipelineKind.SEND and action.stream is Stream.GRADIENT:
            return 0, 0, self.sizes[Stream.GRADIENT][index] * rows
        if kind is PipelineKind.SEND and action.stream is Stream.BOUNDARY and index:
            return 0, 0, self.sizes[Stream.BOUNDARY][index] * rows
        if kind is PipelineKind.TEACH:
            return self._teach(index, rows)
        if kind is PipelineKind.FORWARD:
            block = self.costs.student[index]
            return block.held_bytes_per_row * rows, block.work_bytes_per_row * rows, 0
        if kind is PipelineKind.LOSS:
            return self._loss(rows)
        if kind in (PipelineKind.BACKWARD, PipelineKind.BACKWARD_INPUT, PipelineKind.BACKWARD_WEIGHT):
            return self._backward(kind, index, rows)
        return 0, 0, 0

    def _teach(self, index: int, rows: int) -> tuple[int, int, int]:
        block = self.costs.teacher[index]
        is_loaded = index == 0 and self.loads
        gone = 0 if is_loaded else self.sizes[Stream.BOUNDARY][index]
        return block.output_bytes_per_row * rows, block.teach_bytes_per_row * rows, gone * rows

    def _loss(self, rows: int) -> tuple[int, int, int]:
        hidden, taught = self.sizes[Stream.HIDDEN][-1], self.sizes[Stream.BOUNDARY][-1]
        gone = (taught + (0 if self.loads else self.costs.target_bytes_per_row)) * rows
        if not self.is_shared:
            return hidden * rows, 0, gone
        # The parts of all replicas are joined; those that came from others are not needed any more.
        num_received = rows - self.plan.rows(self.replica, self.program.num_rows).num_rows
        return hidden * rows, (hidden + taught) * rows, gone + hidden * num_received

    def _backward(self, kind: PipelineKind, index: int, rows: int) -> tuple[int, int, int]:
        block, hidden = self.costs.student[index], self.sizes[Stream.HIDDEN]
        new = 0 if kind is PipelineKind.BACKWARD_WEIGHT or not index else hidden[index] * rows
        gone = 0 if kind is PipelineKind.BACKWARD_WEIGHT else hidden[index + 1] * rows
        if kind is self.last:
            was_received = index > 0 and self.plan.student[index - 1] != self.plan.student[index]
            gone += (block.held_bytes_per_row + (hidden[index] if was_received else 0)) * rows
        return new, block.work_bytes_per_row * rows, gone
