"""The outlook: what a plan is predicted to take, beside what else could have been, for people to read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property

from lightning_pipebd.planning.bounds import Bounds, find_bounds
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.explain import BlockTraits, Exactness, exactness_of, exactness_reasons, explain_plan
from lightning_pipebd.planning.families import Candidate, Family
from lightning_pipebd.planning.judge import Judge, Judgement
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.plan import Plan, PlanError
from lightning_pipebd.planning.planner import PlanChoice
from lightning_pipebd.planning.quantities import format_bytes, format_ms
from lightning_pipebd.planning.simulate import Simulation, simulate
from lightning_pipebd.planning.table import align_columns

__all__ = ["Outlook", "check_exactness"]

_COMPARED = {
    Family.STRAIGHT: "straight, whole blocks in a row",
    Family.JOINT: "joint, all blocks on every rank",
    Family.SINGLE: "one device",
}


@dataclass(frozen=True, kw_only=True)
class Outlook:
    """What is foreseen of a plan.

    Args:
        plan: The plan.
        measurement: What the prediction is made of.
        cluster: The ranks.
        max_in_flight: Steps by which a rank may run ahead.
        choice: The planner's choice; `None` for a plan that was given.
        exactness_wanted: What the planner was told; see :func:`find_plan`.
        may_teach_ahead: What it was told of that.
    """

    plan: Plan
    measurement: Measurement
    cluster: Cluster
    max_in_flight: int = 2
    choice: PlanChoice | None = None
    exactness_wanted: Exactness | str | None = None
    may_teach_ahead: bool = False

    @classmethod
    def find(
        cls,
        measurement: Measurement,
        cluster: Cluster,
        *,
        exactness: Exactness | str | None = None,
        max_in_flight: int = 2,
        may_teach_ahead: bool = False,
    ) -> Outlook:
        """Find the best plan; see :meth:`Measurement.find_plan`.

        Raises:
            PlanError: Nothing fits the memory.
        """
        choice = measurement.find_plan(
            cluster, exactness=exactness, max_in_flight=max_in_flight, may_teach_ahead=may_teach_ahead
        )
        return cls(
            plan=choice.plan,
            measurement=measurement,
            cluster=cluster,
            max_in_flight=max_in_flight,
            choice=choice,
            exactness_wanted=exactness,
            may_teach_ahead=may_teach_ahead,
        )

    @cached_property
    def judgement(self) -> Judgement:
        """What the simulator says of the plan."""
        return self._judge.judge(self.plan)

    @property
    def step_time_ms(self) -> float:
        """Predicted time of a step."""
        return self.judgement.step_time_ms

    @property
    def exactness(self) -> Exactness:
        """The plan's class of exactness."""
        return exactness_of(self.plan, self.measurement.traits)

    @property
    def bounds(self) -> Bounds:
        """Step times that no plan can be below."""
        if self.choice is not None:
            return self.choice.bounds
        return find_bounds(self.measurement.costs, self.cluster, num_rows=self.measurement.num_rows)

    @property
    def _judge(self) -> Judge:
        return Judge(
            costs=self.measurement.costs,
            cluster=self.cluster,
            num_rows=self.measurement.num_rows,
            target_blocks=self.measurement.target_blocks,
            max_in_flight=self.max_in_flight,
            has_momentum=self.measurement.has_momentum,
        )

    def simulate(self, num_steps: int) -> Simulation:
        """Run some steps on a clock, at least 2, with the timeline of every rank."""
        return simulate(
            self.plan,
            self.measurement.costs,
            self.cluster,
            num_rows=self.measurement.num_rows,
            num_steps=num_steps,
            max_in_flight=self.max_in_flight,
            target_blocks=self.measurement.target_blocks,
            has_momentum=self.measurement.has_momentum,
        )

    def check_memory(self) -> None:
        """Raise if the plan does not fit.

        Raises:
            PlanError: A rank needs more memory than it may use; the message has the numbers.
        """
        if not self._judge.fits(self.judgement.memory):
            raise PlanError(
                f"`plan` must fit the memory of every rank, but {self._judge.describe_memory(self.judgement.memory)}. "
                "Leave the plan out to have one found that fits, or raise `memory_limit`."
            )

    def __str__(self) -> str:
        measurement = self.measurement
        explained = explain_plan(
            self.plan,
            measurement.traits,
            num_rows=measurement.num_rows,
            input_bytes_per_row=measurement.costs.boundary_bytes_per_row[0],
            target_blocks=measurement.target_blocks,
            has_momentum=measurement.has_momentum,
        )
        return "\n".join([*self._block_lines(), "", *self._prediction_lines(), "", explained])

    def _block_lines(self) -> Iterator[str]:
        costs, rows = self.measurement.costs, self.measurement.num_rows
        for device in costs.devices:
            yield f"measured at {rows} rows on {device.device_class} (noise {costs.noise:.1%}):"
            table = [["block", "teach ms", "learn ms", "update ms", "boundary", "parameters", "activations"]]
            for index, (block, times) in enumerate(zip(costs.blocks, device.blocks, strict=True)):
                table.append(
                    [
                        f"{index} ({block.name})",
                        format_ms(times.teach_ms.at(rows)),
                        format_ms(times.learn_ms.at(rows)),
                        format_ms(times.update_ms),
                        format_bytes(costs.boundary_bytes_per_row[index + 1] * rows),
                        format_bytes(block.teacher_parameter_bytes + block.student_parameter_bytes),
                        format_bytes(block.learn_bytes_per_row * rows),
                    ]
                )
            yield from (f"  {line}" for line in align_columns(table))

    def _prediction_lines(self) -> Iterator[str]:
        mine = self.step_time_ms
        kind = f"{self.choice.family} plan" if self.choice else "given plan"
        yield f"predicted: {format_ms(mine)} ms per step ({kind})"
        bound = format_ms(self.bounds.step_time_ms)
        yield f"  {bound} ms: no plan can be faster ({self._efficiency():.0%} of the prediction)"
        if self.choice is not None:
            found = {candidate.family: candidate for candidate in self.choice.alternatives}
            why = dict(self.choice.skipped)
            for family, words in _COMPARED.items():
                if family in found:
                    yield f"  {format_ms(found[family].step_time_ms)} ms: {words}" + self._beside(found[family])
                else:
                    yield f"  {words}: none, {why.get(family, 'not searched')}"
            yield f"  {self.choice.reason}"
        if self.measurement.whole_reason:
            yield f"  No rows are divided: {self.measurement.whole_reason}"
        yield from (f"  limit: {limit}" for limit in self.judgement.limits)
        uses = (f"rank {rank} {format_bytes(use.total_bytes)}" for rank, use in enumerate(self.judgement.memory))
        yield f"  memory: {', '.join(uses)}"

    def _beside(self, other: Candidate) -> str:
        if other.plan == self.plan:
            return " (this plan)"
        return f" ({other.step_time_ms / self.step_time_ms:.3g} times)" if self.step_time_ms else ""

    def _efficiency(self) -> float:
        return self.bounds.step_time_ms / self.step_time_ms if self.step_time_ms else 1.0


def check_exactness(plan: Plan, traits: Sequence[BlockTraits], level: Exactness) -> None:
    """Raise if a plan is less exact than it must be.

    Raises:
        PlanError: Names the worst block.
    """
    order = list(Exactness)
    if order.index(exactness_of(plan, traits)) > order.index(level):
        worst = max(exactness_reasons(plan, traits), key=lambda reason: order.index(reason.exactness))
        raise PlanError(
            f"`plan` must be {level}, because `exactness` says so, but {worst.sentence} "
            "Leave one of both out, or keep that block's rows together."
        )
