"""What is foreseen of an end-to-end training, beside what else could have been, for people to read."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_explain import explain_pipeline, pipeline_exactness
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate, PipelineJudge, PipelineJudgement, replicas_ms
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_planner import (
    PipelineChoice,
    find_pipeline,
    micro_batch_counts,
    replica_micro_batches,
)
from lightning_pipebd.planning.pipeline_schedule import Durations, Schedule
from lightning_pipebd.planning.pipeline_simulate import PipelineCosts, PipelineSimulation, simulate_pipeline
from lightning_pipebd.planning.plan import PlanError
from lightning_pipebd.planning.quantities import format_bytes
from lightning_pipebd.planning.table import align_columns

__all__ = ["PipelineOutlook"]


@dataclass(frozen=True, kw_only=True)
class PipelineOutlook:
    """What is foreseen of one way to train a whole student.

    Args:
        candidate: The way.
        measurement: What the prediction is made of.
        cluster: The ranks.
        splits_backward: Whether gradients of weights may wait.
        max_in_flight: Steps by which a rank may run ahead.
        choice: The planner's choice; `None` for a plan that was given.
        numbers: The numbers of micro-batches that the planner could choose from.
        schedules: The schedules that it could choose from.
    """

    candidate: PipelineCandidate
    measurement: PipelineMeasurement
    cluster: Cluster
    splits_backward: bool = False
    max_in_flight: int = 2
    choice: PipelineChoice | None = None
    numbers: tuple[int, ...] = ()
    replica_numbers: tuple[tuple[int, tuple[int, ...]], ...] = ()
    schedules: tuple[Schedule, ...] = ()

    @classmethod
    def find(
        cls,
        measurement: PipelineMeasurement,
        cluster: Cluster,
        *,
        exactness: Exactness | str | None = None,
        num_micro_batches: int | None = None,
        schedule: Schedule | str | None = None,
        splits_backward: bool = False,
        max_in_flight: int = 2,
    ) -> PipelineOutlook:
        """Find the best way for the measured batch.

        Args:
            measurement: What was measured.
            cluster: The ranks.
            exactness: `bitwise` leaves batches whole; `None` and `summation` cut them where that only changes the
                order of sums.
            num_micro_batches: The number of micro-batches, if it is not to be chosen.
            schedule: The schedule, if it is not to be chosen.
            splits_backward: Whether gradients of weights may wait.
            max_in_flight: Steps by which a rank may run ahead.

        Raises:
            PlanError: Nothing fits the memory.
        """
        numbers: tuple[int, ...] = (1,)
        if num_micro_batches is not None:
            numbers = (min(num_micro_batches, measurement.num_rows),)
        elif exactness != Exactness.BITWISE and measurement.may_cut:
            numbers = micro_batch_counts(measurement.num_rows, cluster.num_ranks)
        schedules = tuple(Schedule) if schedule is None else (Schedule(schedule),)
        judge = PipelineJudge(measurement, cluster, splits_backward, max_in_flight)
        others: dict[int, tuple[int, ...]] = {}
        if exactness != Exactness.BITWISE:
            others = replica_micro_batches(measurement, cluster.num_ranks, num_micro_batches)
        return cls._search(judge, numbers, tuple(others.items()), schedules)

    @classmethod
    def _search(
        cls,
        judge: PipelineJudge,
        numbers: tuple[int, ...],
        replica_numbers: tuple[tuple[int, tuple[int, ...]], ...],
        schedules: tuple[Schedule, ...],
    ) -> PipelineOutlook:
        choice = find_pipeline(judge, numbers=numbers, replica_numbers=dict(replica_numbers), schedules=schedules)
        return cls(
            candidate=choice.best.candidate,
            measurement=judge.measurement,
            cluster=judge.cluster,
            splits_backward=judge.splits_backward,
            max_in_flight=judge.max_in_flight,
            choice=choice,
            numbers=numbers,
            replica_numbers=replica_numbers,
            schedules=schedules,
        )

    def found_anew(self, measurement: PipelineMeasurement) -> PipelineOutlook:
        """Find the best way for other costs of the same blocks, among what could be chosen before.

        Raises:
            PlanError: Nothing fits the memory.
        """
        judge = PipelineJudge(measurement, self.cluster, self.splits_backward, self.max_in_flight)
        return self._search(judge, self.numbers, self.replica_numbers, self.schedules)

    @property
    def plan(self) -> PipelinePlan:
        """The plan."""
        return self.candidate.plan

    @cached_property
    def judgement(self) -> PipelineJudgement:
        """What is foreseen."""
        return self._judge.judge(self.candidate)

    @cached_property
    def replicas_ms(self) -> float:
        """Step time of `strategy="ddp"`."""
        return replicas_ms(self.measurement, self.cluster)

    @property
    def step_time_ms(self) -> float:
        """Predicted time of a step."""
        return self.judgement.step_time_ms

    @property
    def exactness(self) -> Exactness:
        """How closely the student of one process is repeated."""
        coupled = self.measurement.coupled_blocks
        return pipeline_exactness(self.candidate.num_micro_batches, coupled, replicas=self.plan.replicas)

    @property
    def durations(self) -> Durations:
        """What the order of the work follows from."""
        return self._judge.durations(self.candidate.num_parts)

    @property
    def costs(self) -> PipelineCosts:
        """What a whole batch takes, cut as it will be."""
        return self._judge.costs(self.candidate.num_parts)

    @property
    def _judge(self) -> PipelineJudge:
        return PipelineJudge(self.measurement, self.cluster, self.splits_backward, self.max_in_flight)

    def simulate(self, num_steps: int) -> PipelineSimulation:
        """Run some steps on a clock, at least 2, with the timeline of every rank."""
        return simulate_pipeline(
            self._judge.programs(self.candidate),
            self.costs,
            num_steps=num_steps,
            max_in_flight=self.max_in_flight,
            with_timeline=True,
        )

    def check_memory(self) -> None:
        """Raise if the plan does not fit.

        Raises:
            PlanError: A rank needs more memory than it may use; the message has the numbers.
        """
        memory = self._judge.memory(self.candidate)
        if not self._judge.fits(memory):
            raise PlanError(
                f"`plan` must fit the memory of every rank, but {self._judge.describe_memory(memory)}. Leave the plan "
                "out to have one found that fits, cut batches more finely, or raise `memory_limit`."
            )

    def __str__(self) -> str:
        explained = explain_pipeline(
            self.plan,
            num_micro_batches=self.candidate.num_micro_batches,
            schedule=self.candidate.schedule,
            looks_ahead=self.measurement.looks_ahead and self.candidate.schedule is not Schedule.TEACHER_FIRST,
            coupled_blocks=self.measurement.coupled_blocks,
            is_full_batch=self.measurement.is_full_batch,
        )
        return "\n".join([*self._block_lines(), "", *self._prediction_lines(), "", explained])

    def to_dict(self) -> dict[str, object]:
        """Describe the outlook in strings, numbers, lists and dictionaries."""
        judgement = self.judgement
        return {
            "plan": self.plan.to_dict(),
            "text": str(self.plan),
            "num_micro_batches": self.candidate.num_micro_batches,
            "schedule": str(self.candidate.schedule),
            "step_time_ms": self.step_time_ms,
            "bound_ms": self.choice.bound_ms if self.choice else None,
            "ddp_ms": self.replicas_ms,
            "utilisation": [busy / self.step_time_ms if self.step_time_ms else 0.0 for busy in judgement.busy_ms],
            "memory_bytes": [use.total_bytes for use in judgement.memory],
            "exactness": str(self.exactness),
        }

    def _block_lines(self) -> Iterator[str]:
        costs, rows = self.measurement, self.measurement.num_rows
        yield f"measured at {rows} rows on {costs.device_class} (noise {costs.noise:.1%}):"
        table = [["block", "teach ms", "forward ms", "backward ms", "update ms", "output", "parameters", "held"]]
        for index, taught in enumerate(costs.teacher):
            table.append(
                [
                    f"teacher {index} ({taught.name})",
                    f"{taught.teach_ms.at(rows):.4g}",
                    *("", "", f"{taught.follow_ms:.4g}" if costs.has_momentum else ""),
                    format_bytes(taught.output_bytes_per_row * rows),
                    format_bytes(taught.parameter_bytes),
                    "",
                ]
            )
        for index, block in enumerate(costs.student):
            table.append(
                [
                    f"student {index} ({block.name})",
                    "",
                    f"{block.forward_ms.at(rows):.4g}",
                    f"{block.backward_ms.at(rows):.4g}",
                    f"{block.update_ms:.4g}",
                    format_bytes(block.output_bytes_per_row * rows),
                    format_bytes(block.parameter_bytes),
                    format_bytes(block.held_bytes_per_row * rows),
                ]
            )
        yield from (f"  {line}".rstrip() for line in align_columns(table))

    def _prediction_lines(self) -> Iterator[str]:
        judgement = self.judgement
        kind = "found" if self.choice else "given plan"
        yield f"predicted: {self.step_time_ms:.4g} ms per step ({kind}), ranks busy {judgement.utilisation:.0%}"
        if self.choice is not None:
            yield from self._alternative_lines(self.choice)
        if self.measurement.whole_reason:
            yield f"  Batches are not cut: {self.measurement.whole_reason}"
        if self.measurement.one_replica_reason:
            yield f"  There is one replica, because {self.measurement.one_replica_reason}."
        parts = ", which has a loss of its own rows" if self.measurement.is_full_batch else ""
        yield f'  {self._beside(self.replicas_ms)}: strategy="ddp", all blocks on every rank{parts}'
        uses = (f"rank {rank} {format_bytes(use.total_bytes)}" for rank, use in enumerate(judgement.memory))
        yield f"  memory: {', '.join(uses)}"

    def _alternative_lines(self, choice: PipelineChoice) -> Iterator[str]:
        yield f"  {choice.bound_ms:.4g} ms: nothing in the search can be faster ({choice.num_judged} simulated)"
        for schedule in Schedule:
            found = choice.fastest(schedule=schedule)
            if found is not None and schedule is not self.candidate.schedule:
                yield f"  {self._beside(found.step_time_ms)}: {schedule}, {_describe(found.candidate)}"
        whole = choice.fastest(is_whole=True)
        for replicas in sorted({own.candidate.plan.replicas for own in choice.judged} - {self.plan.replicas}):
            found = choice.fastest(replicas=replicas)
            assert found is not None
            number = "one replica" if replicas == 1 else f"{replicas} replicas"
            yield f"  {self._beside(found.step_time_ms)}: {number}, {_describe(found.candidate)}"
        if whole is not None and self.candidate.num_parts > 1:
            yield f"  {self._beside(whole.step_time_ms)}: whole batches, which repeat one process bit for bit"

    def _beside(self, other_ms: float) -> str:
        mine = self.step_time_ms
        return f"{other_ms:.4g} ms" + (f" ({other_ms / mine:.3g} times)" if mine else "")


def _describe(candidate: PipelineCandidate) -> str:
    number = candidate.num_micro_batches
    whole = "whole batches" if candidate.num_parts == 1 else "one micro-batch"
    return f"{candidate.plan} with {whole if number == 1 else f'{number} micro-batches'}"
