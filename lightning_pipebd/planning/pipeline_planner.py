"""The planner of end-to-end training: the cuts of both models, the micro-batches and the schedule of least step time.

Cuts are looked at in the order of the heaviest rank's load, for all numbers of micro-batches at once. That load is what
a step takes at least, so the search ends when no cut that was not simulated can be faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from heapq import heappop, heappush
from itertools import islice
from math import inf
from typing import NoReturn

from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate, PipelineJudge, PipelineJudgement
from lightning_pipebd.planning.pipeline_memory import stage_bytes
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.pipeline_search import Loads, Split, splits_by_load
from lightning_pipebd.planning.pipeline_simulate import PipelineCosts
from lightning_pipebd.planning.plan import PlanError

__all__ = ["PipelineChoice", "find_pipeline", "micro_batch_counts", "replica_micro_batches"]

_MOST_SPLITS = 8
_MOST_LOOKS = 100
_MOST_TASKS = 2000
_MOST_SMALL = 24
# Another schedule is simulated where it may still be the best: "1f1b" rarely loses by much.
_NEAR = 1.1
_ORDER = (Schedule.ONE_FORWARD_ONE_BACKWARD, Schedule.TEACHER_FIRST, Schedule.GPIPE)


@dataclass(frozen=True, kw_only=True)
class PipelineChoice:
    """What the planner found.

    Args:
        best: The candidate to train with.
        judged: Everything that was simulated and fits.
        bound_ms: No candidate of the search takes less than this.
        num_judged: How many were simulated.
    """

    best: PipelineJudgement
    judged: tuple[PipelineJudgement, ...]
    bound_ms: float
    num_judged: int

    def fastest(
        self, *, schedule: Schedule | None = None, is_whole: bool = False, replicas: int | None = None
    ) -> PipelineJudgement | None:
        """Give the fastest of a kind, if one was simulated."""
        found = [
            own
            for own in self.judged
            if schedule in (None, own.candidate.schedule)
            and (own.candidate.num_parts == 1 or not is_whole)
            and replicas in (None, own.candidate.plan.replicas)
        ]
        return min(found, key=lambda own: own.step_time_ms, default=None)


def micro_batch_counts(num_rows: int, num_ranks: int) -> tuple[int, ...]:
    """Choose numbers of micro-batches to look at: the whole batch, and up to four for each rank.

    Example:
        >>> micro_batch_counts(64, 2), micro_batch_counts(64, 3), micro_batch_counts(3, 4)
        ((1, 2, 4, 8), (1, 2, 3, 4, 6, 8, 12), (1, 2, 3))
    """
    numbers = {1, num_ranks, 2 * num_ranks, 4 * num_ranks} | {
        2**power for power in range(1, (4 * num_ranks).bit_length()) if 2**power <= 4 * num_ranks
    }
    return tuple(sorted({min(number, num_rows) for number in numbers}))


def replica_micro_batches(
    measured: PipelineMeasurement, num_ranks: int, num_micro_batches: int | None = None
) -> dict[int, tuple[int, ...]]:
    """Choose numbers of replicas to look at, and for each of them numbers of micro-batches.

    Args:
        measured: Says whether there may be replicas at all.
        num_ranks: Ranks.
        num_micro_batches: The number of micro-batches, if it is not to be chosen.
    """
    found: dict[int, tuple[int, ...]] = {}
    for replicas in range(2, num_ranks + 1 if measured.may_replicate else 0):
        rows = measured.num_rows // replicas
        if num_ranks % replicas == 0 and rows:
            # A rank that is alone has no gap to fill with micro-batches.
            numbers = (1,) if replicas == num_ranks else micro_batch_counts(rows, num_ranks // replicas)
            found[replicas] = numbers if num_micro_batches is None else (min(num_micro_batches, rows),)
    return found


def find_pipeline(
    judge: PipelineJudge,
    *,
    numbers: Sequence[int],
    replica_numbers: Mapping[int, Sequence[int]] | None = None,
    schedules: Sequence[Schedule] = _ORDER,
    tolerance: float = 0.01,
    effort: int | None = _MOST_SPLITS,
) -> PipelineChoice:
    """Find the way to train with the least step time.

    Cuts are those into consecutive blocks, dealt to the ranks in order; a momentum teacher's blocks stay with their
    student's. Among what is as fast as the best but for the measurement's noise, batches are cut as little as possible.

    Args:
        judge: Judges candidates.
        numbers: Numbers of micro-batches to choose from.
        replica_numbers: For every number of replicas to look at, divisors of the number of ranks, the numbers of
            micro-batches of a replica's rows; ``None`` looks at one replica alone.
        schedules: Schedules to choose from.
        tolerance: Gain for which the search is not continued, as a part of the step time.
        effort: Cuts to simulate for each number of micro-batches at most; `None` simulates whatever might be the best,
            under every schedule.

    Raises:
        PlanError: Nothing fits the memory; the message has what the ranks would need.
    """
    planners: list[_Planner] = []
    for replicas, own in {1: numbers, **(replica_numbers or {})}.items():
        fastest_ms = min((planner.fastest_ms for planner in planners), default=inf)
        planners.append(_Planner(judge, own, schedules, tolerance, effort, replicas, fastest_ms))
        planners[-1].search()
    if not any(planner.judged for planner in planners):
        for planner in planners:
            planner.search_small()
    judged = [own for planner in planners for own in planner.judged]
    if not judged:
        planners[0].refuse()
    fastest_ms = min(own.step_time_ms for own in judged)
    good = [own for own in judged if own.step_time_ms <= fastest_ms * (1 + judge.measurement.noise) + 1e-9]
    return PipelineChoice(
        best=min(good, key=_complexity),
        judged=tuple(judged),
        bound_ms=min(fastest_ms, *(planner.bound_ms for planner in planners)),
        num_judged=len(judged),
    )


class _Planner:
    """Looks for the best cuts with one number of replicas."""

    def __init__(
        self,
        judge: PipelineJudge,
        numbers: Sequence[int],
        schedules: Sequence[Schedule],
        tolerance: float,
        effort: int | None,
        replicas: int,
        fastest_ms: float,
    ) -> None:
        self.judge = judge
        self.numbers = tuple(numbers)
        self.schedules = tuple(schedule for schedule in _ORDER if schedule in schedules)
        self.tolerance = tolerance
        self.effort = effort
        self.replicas = replicas
        self.judged: list[PipelineJudgement] = []
        self.num_considered = dict.fromkeys(numbers, 0)
        self.num_tasks = 0
        self.num_looks = dict.fromkeys(numbers, 0)
        self.fastest_ms = fastest_ms
        self.bound_ms = inf
        self.least: PipelineJudgement | None = None

    def search(self) -> None:
        """Simulate cuts, best first; what all others take at least is known then."""
        self.bound_ms = min(self.bound_ms, self._search())

    def _search(self) -> float:
        """Simulate cuts; give what those take at least that were not looked at when the search ended."""
        heap: list[tuple[float, int, int, Split]] = []
        sources = {number: self._splits(number) for number in self.numbers}
        # Every number's first cut before any number's second: what is found early saves what comes late.
        for number, splits in sources.items():
            self._consider(number, next(splits, None))
            self._push(heap, number, splits)
        while heap:
            bound_ms, number, _, split = heappop(heap)
            if self._is_hopeless(bound_ms) or (self.effort is not None and self.num_tasks > _MOST_TASKS):
                return bound_ms
            if self.effort is not None and self.num_considered[number] >= self.effort:
                self.bound_ms = min(self.bound_ms, bound_ms)
                continue
            self._consider(number, split)
            self._push(heap, number, sources[number])
        return inf

    def _push(self, heap: list[tuple[float, int, int, Split]], number: int, splits: Iterator[Split]) -> None:
        for split in splits:
            self.num_looks[number] += 1
            bound_ms = max(split.load, self._span_ms(self._plan(split), number))
            if not self._is_hopeless(bound_ms):
                heappush(heap, (bound_ms, number, len(self.judged), split))
                return
            # Cuts come by load: beyond a load that is hopeless, all are.
            if self._is_hopeless(split.load):
                return
            if self.effort is not None and self.num_looks[number] >= _MOST_LOOKS:
                self.bound_ms = min(self.bound_ms, split.load)
                return

    def _is_hopeless(self, bound_ms: float) -> bool:
        return bound_ms * (1 + self.tolerance) >= self.fastest_ms - 1e-9

    def _splits(self, number: int) -> Iterator[Split]:
        costs, measured = self._costs(number), self.judge.measurement
        follow = costs.follow_ms if measured.has_momentum else (0.0,) * len(costs.teach_ms)
        teacher = [teach + after for teach, after in zip(costs.teach_ms, follow, strict=True)]
        student = [sum(own) for own in zip(costs.forward_ms, costs.backward_ms, costs.update_ms, strict=True)]
        student[0] += costs.load_ms + costs.step_ms
        student[-1] += costs.loss_ms
        teacher_bytes, student_bytes = stage_bytes(measured)
        loads = Loads(
            teacher=teacher,
            student=student,
            teacher_bytes=teacher_bytes,
            student_bytes=student_bytes,
            room=self._room(),
        )
        return splits_by_load(loads, is_aligned=measured.has_momentum, below=lambda: self.fastest_ms)

    def _plan(self, split: Split) -> PipelinePlan:
        num_ranks = self.judge.cluster.num_ranks
        return PipelinePlan(num_ranks=num_ranks, teacher=split.teacher, student=split.student, replicas=self.replicas)

    def _costs(self, number: int) -> PipelineCosts:
        """Give the times of one replica's rows."""
        costs = self.judge.costs(self.replicas * number)

        def part(times: tuple[float, ...]) -> tuple[float, ...]:
            return tuple(time / self.replicas for time in times)

        return replace(
            costs,
            teach_ms=part(costs.teach_ms),
            forward_ms=part(costs.forward_ms),
            backward_ms=part(costs.backward_ms),
            loss_ms=costs.loss_ms / (1 if self.judge.measurement.is_full_batch else self.replicas),
        )

    def _room(self) -> tuple[float | None, ...]:
        """Give what every rank of a replica may use: what the least of those that share its blocks may."""
        limits = self.judge.cluster.memory_limit_bytes
        num_ranks = len(limits) // self.replicas
        sharing = [[limit for limit in limits[rank::num_ranks] if limit is not None] for rank in range(num_ranks)]
        return tuple(min(own, default=None) for own in sharing)

    def _consider(self, number: int, split: Split | None) -> None:
        if split is None:
            return
        self.num_considered[number] += 1
        plan, first_ms = self._plan(split), inf
        for schedule in self._different(number):
            if self.effort is None or first_ms == inf or first_ms <= _NEAR * self.fastest_ms:
                found_ms = self._judge(PipelineCandidate(plan, number, schedule))
                first_ms = min(first_ms, found_ms)

    def _different(self, number: int) -> list[Schedule]:
        """Give the schedules that differ: with one micro-batch, gpipe is 1f1b."""
        is_full_batch = self.judge.measurement.is_full_batch
        if self.replicas == self.judge.cluster.num_ranks > 1 and not is_full_batch:
            # Ranks that are alone wait for nobody.
            return list(self.schedules[:1])
        is_same = number == 1 or is_full_batch
        others: list[Schedule] = [schedule for schedule in self.schedules if schedule is not Schedule.GPIPE]
        return others if is_same and others else list(self.schedules)

    def _judge(self, candidate: PipelineCandidate) -> float:
        """Simulate a candidate if it fits; give its step time, or infinity."""
        self.num_tasks += candidate.num_micro_batches * candidate.plan.num_ranks
        memory = self.judge.memory(candidate)
        if self.judge.fits(memory):
            self.judged.append(self.judge.judge(candidate))
            self.fastest_ms = min(self.fastest_ms, self.judged[-1].step_time_ms)
            return self.judged[-1].step_time_ms
        rejected = PipelineJudgement(candidate, inf, (), memory)
        if self.least is None or _peak(rejected) < _peak(self.least):
            self.least = rejected
        return inf

    def _span_ms(self, plan: PipelinePlan, number: int) -> float:
        """Give what a step takes at least for the way through the stages and, with replicas, for the sums.

        The first micro-batch must come back before backward begins. A rank sums gradients after all forwards, those of
        its first block after all backwards.
        """
        costs = self._costs(number)
        span = way = 0.0
        for rank, first, last in reversed(plan.student_stages):
            own = slice(first, last + 1)
            forward, backward, after = (
                sum(costs.forward_ms[own]),
                sum(costs.backward_ms[own]),
                sum(costs.update_ms[own]),
            )
            first_ms, sums_ms = (self._sum_ms(plan, rank, first, end) for end in (first, last))
            span = max(span, forward / number + way + backward + first_ms + after, forward + sums_ms + after)
            way += (forward + backward) / number
        return span

    def _sum_ms(self, plan: PipelinePlan, rank: int, first: int, last: int) -> float:
        """Give what the sum of some blocks' gradients takes at least: as one."""
        if plan.replicas == 1:
            return 0.0
        link = self.judge.costs(1).link(*plan.sharing_ranks(rank))
        blocks = self.judge.measurement.student[first : last + 1]
        return link.reduce_ms(sum(block.gradient_bytes for block in blocks), plan.replicas)

    def search_small(self) -> None:
        """Simulate cuts that need little memory; only what fits is kept."""
        measured, number = self.judge.measurement, max(self.numbers)
        rows = -(-measured.num_rows // (number * self.replicas))
        teacher_bytes, student_bytes = stage_bytes(measured)
        loads = Loads(
            teacher=[
                size + block.output_bytes_per_row * rows
                for size, block in zip(teacher_bytes, measured.teacher, strict=True)
            ],
            student=[
                size + block.held_bytes_per_row * rows
                for size, block in zip(student_bytes, measured.student, strict=True)
            ],
            room=(None,) * (self.judge.cluster.num_ranks // self.replicas),
        )
        for split in islice(splits_by_load(loads, is_aligned=measured.has_momentum), _MOST_SMALL):
            for schedule in self._different(number):
                self._judge(PipelineCandidate(self._plan(split), number, schedule))

    def refuse(self) -> NoReturn:
        """Say what the ranks would need.

        Raises:
            PlanError: Always.
        """
        assert self.least is not None
        candidate = self.least.candidate
        raise PlanError(
            f"`plan` must fit the memory of every rank, but with {candidate.plan}, {candidate.num_micro_batches} "
            f"micro-batches and {candidate.schedule}, which need least of what was tried, "
            f"{self.judge.describe_memory(self.least.memory)}. Use more ranks or smaller batches, or raise "
            "`memory_limit`."
        )


def _complexity(own: PipelineJudgement) -> tuple[float, ...]:
    return (own.candidate.num_parts, own.step_time_ms, _ORDER.index(own.candidate.schedule))


def _peak(judgement: PipelineJudgement) -> int:
    return max(use.total_bytes for use in judgement.memory)
