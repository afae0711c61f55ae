"""Fractional plans: neighbouring stages share the rows of a job, so that the work can be balanced to single rows.

Two searches follow each other. The first is the exact one of all stages, between points that divide jobs into a few
parts, with and without divided student jobs: where a student job is shared, its ranks wait for each other, which the
stage costs do not see. The second moves the cuts of the best stages so far, by smaller and smaller numbers of rows, and
asks the simulator, which sees everything.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from lightning_pipebd.planning.cut_points import CutPoint, Stage, are_in_order, fraction_points, stage_rows
from lightning_pipebd.planning.families import Families, Family
from lightning_pipebd.planning.judge import Judgement

__all__ = ["add_fractional"]

#: Stages that each of the first searches may tabulate.
_MAX_STAGES = 150_000
#: Actions that the second search may have simulated, and how often it may ask.
_MAX_ACTIONS = 30_000
_MAX_JUDGEMENTS = 200
_MAX_STARTS = 2
_MANY_REPLICAS = 8


def add_fractional(families: Families) -> None:
    """Add the best fractional plan, if there is one."""
    if not families.divides_rows or families.judge.cluster.num_ranks == 1:
        reason = "it divides rows" if not families.divides_rows else "there is one rank"
        families.skipped.append((Family.FRACTIONAL, reason))
        return
    known = [entry for entry in families.found if entry.stages and entry.judgement]
    seeds = [_Seed(families, stages) for stages in _divided_stages(families)]
    seeds = [seed for seed in seeds if seed.is_allowed]
    seeds += [_Seed(families, entry.stages, entry.judgement) for entry in known]
    if not seeds:
        families.skipped.append((Family.FRACTIONAL, "no such plan fits the memory, or it is too large to simulate"))
        return
    # The fastest stages are not always those that end up fastest: moving cuts ends where no single move helps.
    nearest = sorted(seeds, key=lambda seed: seed.judgement.score)[:_MAX_STARTS]
    best = min((seed.improved() for seed in nearest), key=lambda seed: seed.judgement.score)
    if best.divides_jobs:
        families.add(Family.FRACTIONAL, best.plan, best.stages)
    else:
        families.skipped.append((Family.FRACTIONAL, "no divided job was faster"))


def _divided_stages(families: Families) -> Iterator[tuple[Stage, ...]]:
    """Search stages between points inside jobs, as finely as can be afforded; then without divided student jobs."""
    num_blocks, num_rows = families.judge.costs.num_blocks, families.judge.num_rows
    for num_parts in (16, 8, 4, 2):
        points = fraction_points(num_blocks, num_rows, num_parts, whole_students=families.whole_students)
        if families.affordable_replicas(len(points), _MAX_STAGES) >= min(
            _MANY_REPLICAS, families.judge.cluster.num_ranks
        ):
            break
    else:
        return
    whole = [point for point in points if point.student_rows == 0]
    for chosen in (points, whole):
        solution = families.search(families.stage_costs(chosen), max_stages=_MAX_STAGES)
        if solution is not None:
            yield solution.stages


class _Seed:
    """Stages with what the simulator says of them."""

    def __init__(self, families: Families, stages: Sequence[Stage], judgement: Judgement | None = None) -> None:
        self.families = families
        self.stages = tuple(stages)
        self.plan = families.plan(stages)
        self.judgement = judgement or families.judge.judge(self.plan)
        self.is_allowed = families.judge.fits(self.judgement.memory)

    @property
    def divides_jobs(self) -> bool:
        """Whether any cut lies inside a job."""
        num_rows = self.families.judge.num_rows
        return any(point.teacher_rows % num_rows or point.student_rows % num_rows for point, _, _ in self.stages)

    def improved(self) -> _Seed:
        """Move cuts towards the busiest stages as long as that helps and may be tried."""
        best, num_actions, num_judgements = self, 0, 0
        delta = self.families.judge.num_rows
        while delta:
            better = None
            for stages in best.moved(delta):
                if num_actions > _MAX_ACTIONS or num_judgements > _MAX_JUDGEMENTS:
                    return best
                trial = _Seed(self.families, stages)
                num_actions += trial.judgement.num_actions
                num_judgements += 1
                if trial.is_allowed and trial.judgement.score < best.judgement.score:
                    better = trial
                    break
            if better is None:
                delta //= 2
            else:
                best = better
        return best

    def moved(self, delta: int) -> Iterator[list[Stage]]:
        """Give the stages that differ in one cut, which makes one of the two busiest stages smaller."""
        busy_ms = self.judgement.busy_ms
        numbers = sorted(
            range(len(self.stages)), key=lambda number: -max(busy_ms[r] for r in self.stages[number].ranks)
        )
        for number in numbers[:2]:
            for border, sign in ((number, 1), (number + 1, -1)):
                if not 0 < border < len(self.stages):
                    continue
                for point in _moved_points(self.stages[border].start, sign * delta, self.families.judge.num_rows):
                    stages = list(self.stages)
                    stages[border - 1] = stages[border - 1]._replace(stop=point)
                    stages[border] = stages[border]._replace(start=point)
                    if self._is_lawful(stages):
                        yield stages

    def _is_lawful(self, stages: Sequence[Stage]) -> bool:
        """Tell whether every stage has something to do and no student job is divided that must stay whole."""
        if not are_in_order([stages[0].start, *(stage.stop for stage in stages)]):
            return False
        num_rows = self.families.judge.num_rows
        for start, stop, ranks in stages:
            for block in self.families.whole_students:
                rows = stage_rows(start, stop, block, num_rows)[1] if start.block <= block <= stop.block else 0
                if 0 < rows < num_rows or (rows and len(ranks) > 1):
                    return False
        return True


def _moved_points(point: CutPoint, delta: int, num_rows: int) -> Iterator[CutPoint]:
    """Move a cut by some rows of the teacher job, the student job or both, into the next block if need be."""
    places = [point]
    if point.block and not any(point[1:]):
        places.append(CutPoint(point.block - 1, num_rows, num_rows))
    for block, taught, learned in places:
        for taught_by, learned_by in ((delta, delta), (delta, 0), (0, delta)):
            rows = [min(max(rows, 0), num_rows) for rows in (taught + taught_by, learned + learned_by)]
            if rows[0] >= rows[1] and rows != [taught, learned]:
                yield CutPoint(block + 1) if rows[1] == num_rows else CutPoint(block, *rows)
