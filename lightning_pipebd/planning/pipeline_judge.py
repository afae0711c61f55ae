"""The judge of end-to-end training: what a way to train takes, how busy it keeps the ranks, and whether it fits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.memory import MemoryUse
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_memory import pipeline_memory, stream_row_bytes
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineProgram, Stream
from lightning_pipebd.planning.pipeline_schedule import Durations, Schedule
from lightning_pipebd.planning.pipeline_simulate import PipelineCosts, simulate_pipeline
from lightning_pipebd.planning.quantities import format_bytes

__all__ = ["PipelineCandidate", "PipelineJudge", "PipelineJudgement", "replicas_ms"]

_NUM_STEPS = 10


class PipelineCandidate(NamedTuple):
    """One way to train.

    Args:
        plan: Which rank has which block.
        num_micro_batches: Parts of a batch, or of each replica's rows of it.
        schedule: Order of the work.
    """

    plan: PipelinePlan
    num_micro_batches: int
    schedule: Schedule

    @property
    def num_parts(self) -> int:
        """Parts of a batch, those of all replicas."""
        return self.plan.replicas * self.num_micro_batches


class PipelineJudgement(NamedTuple):
    """What is foreseen of a candidate.

    Args:
        candidate: The candidate.
        step_time_ms: Time of a step in the steady state.
        busy_ms: For every rank the time per step for which it computes.
        memory: For every rank what it holds at its peak.
    """

    candidate: PipelineCandidate
    step_time_ms: float
    busy_ms: tuple[float, ...]
    memory: tuple[MemoryUse, ...]

    @property
    def utilisation(self) -> float:
        """Fraction of all ranks' time for which they compute."""
        return sum(self.busy_ms) / len(self.busy_ms) / self.step_time_ms if self.step_time_ms else 0.0


@dataclass(frozen=True)
class PipelineJudge:
    """Judges candidates by their programs.

    Args:
        measurement: What blocks cost.
        cluster: The ranks.
        splits_backward: Whether gradients of weights may wait.
        max_in_flight: Steps by which a rank may run ahead.
    """

    measurement: PipelineMeasurement
    cluster: Cluster
    splits_backward: bool = False
    max_in_flight: int = 2

    def programs(self, candidate: PipelineCandidate) -> tuple[PipelineProgram, ...]:
        """Give every rank's program of a step in the steady state."""
        costs = self.measurement
        looks_ahead = costs.looks_ahead and candidate.schedule is not Schedule.TEACHER_FIRST
        step = PipelineStep(
            num_rows=costs.num_rows,
            num_micro_batches=candidate.num_micro_batches,
            teaches_own=not looks_ahead,
            num_next_rows=costs.num_rows if looks_ahead else 0,
            is_full_batch=costs.is_full_batch,
            has_targets=True,
            schedule=candidate.schedule,
            splits_backward=self.splits_backward,
            has_momentum=costs.has_momentum,
        )
        return compile_pipeline(candidate.plan, step, self.durations(candidate.num_parts))

    def memory(self, candidate: PipelineCandidate) -> tuple[MemoryUse, ...]:
        """Give what every rank holds at its peak."""
        return pipeline_memory(candidate.plan, self.programs(candidate), self.measurement)

    def fits(self, memory: Sequence[MemoryUse]) -> bool:
        """Tell whether every rank has room."""
        limits = self.cluster.memory_limit_bytes
        return all(limit is None or use.total_bytes <= limit for use, limit in zip(memory, limits, strict=True))

    def judge(self, candidate: PipelineCandidate) -> PipelineJudgement:
        """Simulate a candidate."""
        programs = self.programs(candidate)
        found = simulate_pipeline(
            programs,
            self.costs(candidate.num_parts),
            num_steps=_NUM_STEPS,
            max_in_flight=self.max_in_flight,
        )
        memory = pipeline_memory(candidate.plan, programs, self.measurement)
        return PipelineJudgement(candidate, found.step_time_ms, found.busy_ms, memory)

    def describe_memory(self, memory: Sequence[MemoryUse]) -> str:
        """Say what ranks need that have no room."""
        pairs = enumerate(zip(memory, self.cluster.memory_limit_bytes, strict=True))
        return ", ".join(
            f"rank {rank} needs {format_bytes(use.total_bytes)} of {format_bytes(limit)}"
            for rank, (use, limit) in pairs
            if limit is not None and use.total_bytes > limit
        )

    def durations(self, num_parts: int) -> Durations:
        """Give what the order of the work follows from."""
        costs = self.costs(num_parts)
        return Durations(teacher=costs.teach_ms, student=costs.forward_ms, backward=costs.backward_ms)

    def costs(self, num_parts: int) -> PipelineCosts:
        """Give the times of a whole batch that is cut so."""
        return _pipeline_costs(self.measurement, self.cluster, num_parts)


@cache
def _pipeline_costs(measured: PipelineMeasurement, cluster: Cluster, num_parts: int) -> PipelineCosts:
    number = min(num_parts, measured.num_rows)
    rows = measured.num_rows / number
    load_ms = measured.loader.load_ms(measured.num_rows)
    sizes: dict[Stream, list[float]] = {
        stream: [size * measured.num_rows for size in own] for stream, own in stream_row_bytes(measured).items()
    }
    sizes[Stream.WEIGHTS] = [block.parameter_bytes for block in measured.student]
    return PipelineCosts(
        teach_ms=tuple(number * block.teach_ms.at(rows) for block in measured.teacher),
        forward_ms=tuple(number * block.forward_ms.at(rows) for block in measured.student),
        backward_ms=tuple(number * block.backward_ms.at(rows) for block in measured.student),
        loss_ms=measured.loss_ms.at(measured.num_rows)
        if measured.is_full_batch
        else number * measured.loss_ms.at(rows),
        update_ms=tuple(block.update_ms for block in measured.student),
        follow_ms=tuple(block.follow_ms for block in measured.teacher),
        step_ms=measured.step_ms,
        send_ms=measured.send_ms,
        recv_ms=measured.recv_ms,
        load_ms=measured.loader.occupation * load_ms,
        background_load_ms=(1 - measured.loader.occupation) * load_ms,
        gradient_bytes=tuple(block.gradient_bytes for block in measured.student),
        stream_bytes=sizes,
        links=(measured.same_node, measured.other_node),
        node=cluster.node,
    )


def replicas_ms(measured: PipelineMeasurement, cluster: Cluster) -> float:
    """Give the step time of Lightning's data parallelism: every rank has both models and its equal part of a batch.

    Gradients are reduced beside the backward as far as that does not occupy the ranks' threads.
    """
    rows = -(-measured.num_rows // cluster.num_ranks)
    teach = sum(block.teach_ms.at(rows) for block in measured.teacher)
    forward = sum(block.forward_ms.at(rows) for block in measured.student) + measured.loss_ms.at(rows)
    backward = sum(block.backward_ms.at(rows) for block in measured.student)
    after = sum(block.update_ms for block in measured.student) + sum(block.follow_ms for block in measured.teacher)
    link = measured.same_node if cluster.num_nodes == 1 else measured.other_node
    reduce = link.reduce_ms(sum(block.gradient_bytes for block in measured.student), cluster.num_ranks)
    load = measured.loader.load_ms(rows)
    occupied = teach + forward + after + measured.step_ms + measured.loader.occupation * load
    busy = link.reduce_occupation * reduce
    return max(occupied + max(backward + busy, reduce), (1 - measured.loader.occupation) * load)
