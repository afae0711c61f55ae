"""The planner of end-to-end training: the cuts of both models, the micro-batches and the schedule of least step time.

Cuts are looked at in the order of the heaviest rank's load, for all numbers of micro-batches at once. That load is what
a step takes at least, so the search ends when no cut that was not simulated can be faster.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import islice
from math import inf

from lightning_pipebd.planning.pipeline_judge import PipelineCandidate, PipelineJudge, PipelineJudgement
from lightning_pipebd.planning.pipeline_memory import stage_bytes
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.pipeline_search import Loads, Split, splits_by_load
from lightning_pipebd.planning.plan import PlanError

__all__ = ["PipelineChoice", "find_pipeline", "micro_batch_counts"]

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

    def fastest(self, *, schedule: Schedule | None = None, is_whole: bool = False) -> PipelineJudgement | None:
        """Give the fastest of a kind, if one was simulated."""
        found = [
            own
            for own in self.judged
            if schedule in (None, own.candidate.schedule) and (own.candidate.num_micro_batches == 1 or not is_whole)
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


def find_pipeline(
    judge: PipelineJudge,
    *,
    numbers: Sequence[int],
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
        schedules: Schedules to choose from.
        tolerance: Gain for which the search is not continued, as a part of the step time.
        effort: Cuts to simulate for each number of micro-batches at most; `None` simulates whatever might be the best,
            under every schedule.

    Raises:
        PlanError: Nothing fits the memory; the message has what the ranks would need.
    """
    return _Planner(judge, numbers, schedules, tolerance, effort).run()


class _Planner:
    def __init__(
        self,
        judge: PipelineJudge,
        numbers: Sequence[int],
        schedules: Sequence[Schedule],
        tolerance: float,
        effort: int | None,
    ) -> None:
        self.judge = judge
        self.numbers = tuple(numbers)
        self.schedules = tuple(schedule for schedule in _ORDER if schedule in schedules)
        self.tolerance = tolerance
        self.effort = effort
        self.judged: list[PipelineJudgement] = []
        self.num_judged = 0
        self.num_considered = dict.fromkeys(numbers, 0)
        self.num_tasks = 0
        self.num_looks = dict.fromkeys(numbers, 0)
        self.fastest_ms = inf
        self.left_ms = inf
        self.least: PipelineJudgement | None = None

    def run(self) -> PipelineChoice:
        bound_ms = self._search()
        if not self.judged:
            self._search_small()
        if not self.judged:
            self._refuse()
        fastest = self.fastest_ms
        good = [own for own in self.judged if own.step_time_ms <= fastest * (1 + self.judge.measurement.noise) + 1e-9]
        best = min(good, key=self._complexity)
        return PipelineChoice(
            best=best,
            judged=tuple(self.judged),
            bound_ms=min(bound_ms, self.left_ms, fastest),
            num_judged=self.num_judged,
        )

    def _complexity(self, own: PipelineJudgement) -> tuple[float, ...]:
        candidate = own.candidate
        return (candidate.num_micro_batches, own.step_time_ms, _ORDER.index(candidate.schedule))

    def _search(self) -> float:
        """Simulate cuts, best first; give what all others take at least."""
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
                self.left_ms = min(self.left_ms, bound_ms)
                continue
            self._consider(number, split)
            self._push(heap, number, sources[number])
        return inf

    def _push(self, heap: list[tuple[float, int, int, Split]], number: int, splits: Iterator[Split]) -> None:
        for split in splits:
            self.num_looks[number] += 1
            bound_ms = max(split.load, self._span_ms(self._plan(split), number))
            if not self._is_hopeless(bound_ms):
                heappush(heap, (bound_ms, number, self.num_judged, split))
                return
            # Cuts come by load: beyond a load that is hopeless, all are.
            if self._is_hopeless(split.load):
                return
            if self.effort is not None and self.num_looks[number] >= _MOST_LOOKS:
                self.left_ms = min(self.left_ms, split.load)
                return

    def _is_hopeless(self, bound_ms: float) -> bool:
        return bound_ms * (1 + self.tolerance) >= self.fastest_ms - 1e-9

    def _splits(self, number: int) -> Iterator[Split]:
        costs, measured = self.judge.costs(number), self.judge.measurement
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
            room=self.judge.cluster.memory_limit_bytes,
        )
        return splits_by_load(loads, is_aligned=measured.has_momentum, below=lambda: self.fastest_ms)

    def _plan(self, split: Split) -> PipelinePlan:
        return PipelinePlan(num_ranks=self.judge.cluster.num_ranks, teacher=split.teacher, student=split.student)

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
        """Leave out gpipe where it is the order of 1f1b."""
        is_same = number == 1 or self.judge.measurement.is_full_batch
        others: list[Schedule] = [schedule for schedule in self.schedules if schedule is not Schedule.GPIPE]
        return others if is_same and others else list(self.schedules)

    def _judge(self, candidate: PipelineCandidate) -> float:
        """Simulate a candidate if it fits; give its step time, or infinity."""
        self.num_tasks += candidate.num_micro_batches * candidate.plan.num_ranks
        memory = self.judge.memory(candidate)
        if self.judge.fits(memory):
            self.judged.append(self.judge.judge(candidate))
            self.num_judged += 1
            self.fastest_ms = min(self.fastest_ms, self.judged[-1].step_time_ms)
            return self.judged[-1].step_time_ms
        rejected = PipelineJudgement(candidate, inf, (), memory)
        if self.least is None or _peak(rejected) < _peak(self.least):
            self.least = rejected
        return inf

    def _span_ms(self, plan: PipelinePlan, number: int) -> float:
        """Give what a step takes at least because the first micro-batch must come back before backward begins."""
        costs = self.judge.costs(number)
        span = way = 0.0
        for _, first, last in reversed(plan.student_stages):
            own = slice(first, last + 1)
            forward, backward = sum(costs.forward_ms[own]), sum(costs.backward_ms[own])
            span = max(span, forward / number + way + backward + sum(costs.update_ms[own]))
            way += (forward + backward) / number
        return span

    def _search_small(self) -> None:
        """Simulate cuts that need little memory; only what fits is kept."""
        measured, number = self.judge.measurement, max(self.numbers)
        rows = -(-measured.num_rows // number)
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
            room=(None,) * self.judge.cluster.num_ranks,
        )
        for split in islice(splits_by_load(loads, is_aligned=measured.has_momentum), _MOST_SMALL):
            for schedule in self._different(number):
                self._judge(PipelineCandidate(self._plan(split), number, schedule))

    def _refuse(self) -> None:
        assert self.least is not None
        candidate = self.least.candidate
        raise PlanError(
            f"`plan` must fit the memory of every rank, but with {candidate.plan}, {candidate.num_micro_batches} "
            f"micro-batches and {candidate.schedule}, which need least of what was tried, "
            f"{self.judge.describe_memory(self.least.memory)}. Use more ranks or smaller batches, or raise "
            "`memory_limit`."
        )


def _peak(judgement: PipelineJudgement) -> int:
    return max(use.total_bytes for use in judgement.memory)
