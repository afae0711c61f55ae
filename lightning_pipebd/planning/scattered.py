"""Scattered plans: whole jobs on any ranks, which balances coarse blocks best without dividing a single row.

Teachers are stateless and students are independent, so nothing asks that a rank's jobs be neighbours; the price is that
more boundaries travel, and that rows come round by other ranks, for which all teachers may work one batch ahead. To
balance whole jobs best is as hard as packing, so this is a local search: jobs of the busiest rank are moved to other
ranks or exchanged for other jobs, the most promising by their times first, and kept if the simulator, which knows the
price, agrees.
"""

from __future__ import annotations

from collections.abc import Iterator
from fractions import Fraction
from heapq import nsmallest
from math import ceil

from lightning_pipebd.planning.ahead import with_teacher_ahead
from lightning_pipebd.planning.balance import balanced_sizes
from lightning_pipebd.planning.families import Families, Family
from lightning_pipebd.planning.judge import Judgement
from lightning_pipebd.planning.plan import Plan, Share

__all__ = ["add_scattered"]

#: Actions that the search may have simulated, and moves that it tries before it gives up on a plan.
_MAX_ACTIONS = 30_000
_MAX_MOVES = 12


def add_scattered(families: Families) -> None:
    """Add the best scattered plan, if there is one that the other families do not have."""
    if families.judge.cluster.num_ranks == 1:
        families.skipped.append((Family.SCATTERED, "there is one rank"))
        return
    times = _job_times(families)
    whole = [
        entry.candidate
        for entry in families.found
        if entry.judgement
        and not entry.candidate.plan.has_split_students
        and not entry.candidate.plan.has_split_teachers
    ]
    starts = _starts(times)
    if whole:
        best = min(whole, key=lambda candidate: candidate.step_time_ms).plan
        starts.append(tuple(job[0].rank for jobs in zip(best.teacher, best.student, strict=True) for job in jobs))
    trials = [_Trial(families, times, ranks) for ranks in dict.fromkeys(starts)]
    fitting = [trial.improved() for trial in trials if trial.fits]
    if fitting:
        families.add(Family.SCATTERED, min(fitting, key=lambda trial: trial.rating).plan)
    else:
        families.skipped.append((Family.SCATTERED, "no such plan was found that fits the memory"))


def _job_times(families: Families) -> list[list[float]]:
    """Give the time of every job on every rank: teacher and student of block 0, of block 1, and so on."""
    costs, cluster, num_rows = families.judge.costs, families.judge.cluster, families.judge.num_rows
    times: list[list[float]] = []
    for block in range(costs.num_blocks):
        of_ranks = [costs.times(name)[block] for name in cluster.device_class]
        # Whoever teaches the first block loads the batch.
        load_ms = 0.0 if block else costs.loader.occupation * costs.loader.load_ms(num_rows)
        times.append([entry.teach_ms.at(num_rows) + load_ms for entry in of_ranks])
        times.append([entry.learn_ms.at(num_rows) + entry.update_ms for entry in of_ranks])
    return times


def _starts(times: list[list[float]]) -> list[tuple[int, ...]]:
    """Pack all jobs; and pack the students beside a chain of teachers, for which no rows come round."""
    weights = [min(job) for job in times[::2]]
    share = sum(map(min, times)) / len(times[0])
    fewest = max(1, min(ceil(sum(weights) / share), len(times[0]))) if share else 1
    starts = [_packed(times, {})]
    for num_parts in range(fewest, min(fewest + 2, len(times[0]) + 1)):
        sizes = balanced_sizes(weights, num_parts)
        chain = [rank for rank, size in enumerate(sizes) for _ in range(size)]
        starts.append(_packed(times, {2 * block: rank for block, rank in enumerate(chain)}))
    return starts


def _packed(times: list[list[float]], fixed: dict[int, int]) -> tuple[int, ...]:
    """Put one job after another, the longest first, where it ends first; some have their ranks already."""
    loads = [0.0] * len(times[0])
    ranks = dict(fixed)
    for job, rank in fixed.items():
        loads[rank] += times[job][rank]
    for job in sorted(set(range(len(times))) - set(fixed), key=lambda job: (-min(times[job]), job)):
        ranks[job] = min(range(len(loads)), key=lambda rank: loads[rank] + times[job][rank])
        loads[ranks[job]] += times[job][ranks[job]]
    return tuple(ranks[job] for job in range(len(times)))


class _Trial:
    """A scattered plan with what the simulator says of it."""

    def __init__(self, families: Families, times: list[list[float]], ranks: tuple[int, ...]) -> None:
        self.families = families
        self.times = times
        self.ranks = ranks
        jobs = [(Share(rank, Fraction(1)),) for rank in ranks]
        plan = Plan(num_ranks=len(times[0]), teacher=tuple(jobs[::2]), student=tuple(jobs[1::2]))
        may_teach_ahead = families.judge.may_teach_ahead and not families.judge.has_momentum
        self.plan = with_teacher_ahead(plan) if may_teach_ahead else plan
        self.judgement: Judgement = families.judge.judge(self.plan)
        self.fits = families.judge.fits(self.judgement.memory)

    @property
    def rating(self) -> tuple[float, bool, float]:
        """How good the plan is, less being better; of equally fast ones it is the one that works on one batch only."""
        step_time_ms, busy = self.judgement.score
        return step_time_ms, self.plan.teaches_ahead, busy

    def improved(self) -> _Trial:
        """Move jobs as long as that helps and may be tried."""
        best, num_actions = self, 0
        while True:
            better = None
            for ranks in best.moved():
                trial = _Trial(self.families, self.times, ranks)
                num_actions += trial.judgement.num_actions
                if trial.fits and trial.judgement.score < best.judgement.score:
                    better = trial
                    break
            if better is None or num_actions > _MAX_ACTIONS:
                return better or best
            best = better

    def moved(self) -> Iterator[tuple[int, ...]]:
        """Give plans in which the busiest rank gave up a job or exchanged it, the best balanced first."""
        loads = [0.0] * len(self.times[0])
        for job, rank in enumerate(self.ranks):
            loads[rank] += self.times[job][rank]
        busiest = max(range(len(loads)), key=lambda rank: (self.judgement.busy_ms[rank], loads[rank]))
        moves = (move for move in self._moves(busiest, loads) if move[0] < loads[busiest])
        for _, job, rank, other in nsmallest(_MAX_MOVES, moves):
            ranks = list(self.ranks)
            ranks[job] = rank
            if other >= 0:
                ranks[other] = busiest
            yield tuple(ranks)

    def _moves(self, busiest: int, loads: list[float]) -> Iterator[tuple[float, int, int, int]]:
        """Give the load of the busier of two ranks, the job that moves, where to, and what comes back (-1: nothing)."""
        times = self.times
        for job in [job for job, rank in enumerate(self.ranks) if rank == busiest]:
            left = loads[busiest] - times[job][busiest]
            for rank, load in enumerate(loads):
                if rank != busiest:
                    yield max(left, load + times[job][rank]), job, rank, -1
            for other, rank in enumerate(self.ranks):
                if rank != busiest:
                    lost = loads[rank] - times[other][rank] + times[job][rank]
                    yield max(left + times[other][busiest], lost), job, rank, other
