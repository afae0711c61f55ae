"""Families: the best plan of each kind, from the plainest to the finest."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from enum import Enum
from math import inf
from typing import NamedTuple

from lightning_pipebd.planning.cut_points import CutPoint, Stage, border_points, half_cut_points, stages_to_plan
from lightning_pipebd.planning.joint import joint_plan
from lightning_pipebd.planning.judge import Judge, Judgement
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.rank_lines import RankKind
from lightning_pipebd.planning.stage_costs import StageCosts, StageMemory
from lightning_pipebd.planning.stage_parts import Crossing
from lightning_pipebd.planning.stage_search import Solution, rank_kinds, search_stages

__all__ = ["Candidate", "Families", "Family", "Found"]

#: Stages that a search may tabulate, about; a stage then has no more ranks than that allows. Some seconds.
_MAX_STAGES = 6_000_000
_STRANGER = "a teacher block must be where its student block is trained, because it follows it"


class Family(str, Enum):
    """Kinds of plans, the simplest first.

    `single`: everything on one rank. `straight`: consecutive blocks on one rank each. `joint`: every job on all ranks,
    which divides all rows and adds up all gradients. `hybrid`: consecutive blocks on a stage of ranks. `half cut`: a
    stage may end between a block's teacher and its student. `scattered`: every job on any one rank. `fractional`:
    neighbouring stages may share the rows of a job.
    """

    SINGLE = "single"
    STRAIGHT = "straight"
    JOINT = "joint"
    HYBRID = "hybrid"
    HALF_CUT = "half cut"
    SCATTERED = "scattered"
    FRACTIONAL = "fractional"

    def __str__(self) -> str:
        return self.value


class Candidate(NamedTuple):
    """The best plan of a family.

    Args:
        family: Kind of plan.
        plan: The plan.
        step_time_ms: Predicted time of a step.
        is_simulated: Whether that is the simulator's prediction; for enormous plans it is the stage model's.
    """

    family: Family
    plan: Plan
    step_time_ms: float
    is_simulated: bool


class Found(NamedTuple):
    """A candidate with what is known of it.

    Args:
        candidate: The candidate.
        stages: Its stages; empty for a plan that is not made of stages.
        judgement: What the simulator says, if it was asked.
    """

    candidate: Candidate
    stages: tuple[Stage, ...]
    judgement: Judgement | None


class Families:
    """Finds the best plan of each family.

    Args:
        judge: Says what a plan takes.
        whole_students: Blocks whose student job must stay on one rank.
        divides_rows: Whether the rows of any job may be divided at all.
        has_momentum: Whether a teacher block must be where its student block is trained, because it follows it.

    Attributes:
        found: A plan of every family that has one which differs from the simpler families' plans.
        skipped: The other families, with the reason.
    """

    def __init__(
        self, judge: Judge, *, whole_students: Collection[int], divides_rows: bool, has_momentum: bool = False
    ) -> None:
        self.judge = judge
        self.whole_students = frozenset(whole_students)
        self.divides_rows = divides_rows
        self.has_momentum = has_momentum
        self.found: list[Found] = []
        self.skipped: list[tuple[Family, str]] = []
        self._num_ranks = judge.cluster.num_ranks
        # The least cost of a solution that finer families contain; they need not look at anything that costs more.
        self._ceiling_ms = inf

    def find(self) -> None:
        """Fill `found` and `skipped` with the families that are searched exactly."""
        num_blocks, num_rows = self.judge.costs.num_blocks, self.judge.num_rows
        borders = self.stage_costs(border_points(num_blocks))
        self._add_single(borders)
        if self._num_ranks == 1:
            self.skipped += [(family, "there is one rank") for family in list(Family)[1:5]]
            return
        self._add_stages(Family.STRAIGHT, search_stages(borders, self.judge.cluster, max_replicas=1))
        self._add_joint(borders)
        if self.divides_rows:
            self._add_stages(Family.HYBRID, self.search(borders))
        else:
            self.skipped.append((Family.HYBRID, "it divides rows"))
        if self.has_momentum:
            finer = (Family.HALF_CUT, Family.SCATTERED, Family.FRACTIONAL)
            self.skipped += [(family, _STRANGER) for family in finer]
            return
        halves = self.stage_costs(half_cut_points(num_blocks, num_rows))
        self._add_stages(Family.HALF_CUT, self.search(halves, max_stages=_MAX_STAGES // 3))

    def least_memory(self) -> str:
        """Say what every rank needs under the plan that asks least of the ranks' memory."""
        num_blocks, num_rows = self.judge.costs.num_blocks, self.judge.num_rows
        points = border_points(num_blocks) if self.has_momentum else half_cut_points(num_blocks, num_rows)
        most = max(1, self.affordable_replicas(len(points), _MAX_STAGES)) if self.divides_rows else 1
        solution = search_stages(self.stage_costs(points, StageMemory), self.judge.cluster, max_replicas=most)
        assert solution is not None, "one rank can have everything if it needs no room"
        plan = self.plan(solution.stages)
        need = self.judge.describe_memory(self.judge.judge(plan).memory)
        name = f", `{format_plan(plan)}`," if has_text_form(plan) else ""
        return f"even the one with the least need{name} does not fit: {need}"

    def stage_costs(self, points: Sequence[CutPoint], kind: type[StageCosts] = StageCosts) -> StageCosts:
        """Give the costs of all stages between these points."""
        return kind(
            self.judge.costs,
            points,
            self.judge.num_rows,
            target_blocks=self.judge.target_blocks,
            whole_students=self.whole_students,
            max_in_flight=self.judge.max_in_flight,
        )

    def search(self, costs: StageCosts, *, max_stages: int = _MAX_STAGES) -> Solution | None:
        """Find the best stages between these points that beat, or are, those of the families they contain."""
        return search_stages(
            costs,
            self.judge.cluster,
            max_replicas=max(1, self.affordable_replicas(len(costs.points), max_stages)) if self.divides_rows else 1,
            ceiling_ms=self._ceiling_ms,
        )

    def affordable_replicas(self, num_points: int, max_stages: int) -> int:
        """Give the most ranks per stage for which no more than `max_stages` stages have to be tabulated."""
        kinds = rank_kinds(self.judge.cluster)
        # Rank lines on several nodes tabulate every stage for each of its five places between nodes.
        num_tables = len(kinds) if len(kinds) > 1 or self.judge.cluster.num_nodes == 1 else 5
        # Stages of `r` of `n` ranks reach about `r / n` of the chain before they are too slow to be of interest.
        num_pairs = num_tables * num_points**2 / 2
        for replicas in range(self._num_ranks, 0, -1):
            if num_pairs * replicas * (replicas + 1) / (2 * self._num_ranks) <= max_stages:
                return replicas
        return 0

    def add(self, family: Family, plan: Plan, stages: Sequence[Stage] = (), model_ms: float = inf) -> None:
        """Judge a plan and keep it, unless a simpler family has it or it does not fit."""
        same = next((entry.candidate.family for entry in self.found if entry.candidate.plan == plan), None)
        if same is not None:
            self.skipped.append((family, f"its best plan is the {same} one"))
        elif self.has_momentum and any(plan.strangers(block) for block in range(plan.num_blocks)):
            self.skipped.append((family, _STRANGER))
        elif not self.judge.can_simulate(plan):
            if model_ms < inf:
                self.found.append(Found(Candidate(family, plan, model_ms, False), tuple(stages), None))
            else:
                self.skipped.append((family, "it does not fit the memory, or is too large to simulate"))
        else:
            judgement = self.judge.judge(plan)
            if self.judge.fits(judgement.memory):
                candidate = Candidate(family, plan, judgement.step_time_ms, True)
                self.found.append(Found(candidate, tuple(stages), judgement))
            else:
                need = self.judge.describe_memory(judgement.memory)
                self.skipped.append((family, f"it does not fit the memory: {need}"))

    def plan(self, stages: Sequence[Stage]) -> Plan:
        """Make a plan of stages."""
        return stages_to_plan(stages, self.judge.costs.num_blocks, self.judge.num_rows, self._num_ranks)

    def _add_stages(self, family: Family, solution: Solution | None) -> None:
        if solution is None:
            reason = "no such plan fits the memory" if self._ceiling_ms == inf else "no such plan was faster"
            self.skipped.append((family, reason))
            return
        self._ceiling_ms = min(self._ceiling_ms, solution.cost_ms)
        self.add(family, self.plan(solution.stages), solution.stages, solution.cost_ms)

    def _add_single(self, borders: StageCosts) -> None:
        solutions = [
            solution
            for kind in rank_kinds(self.judge.cluster)
            if (solution := _whole_chain(borders, kind, kind.ranks[:1], Crossing()))
        ]
        self._add_stages(Family.SINGLE, min(solutions, default=None))

    def _add_joint(self, borders: StageCosts) -> None:
        if not self.divides_rows or self.whole_students:
            names = ", ".join(self.judge.costs.blocks[block].name for block in sorted(self.whole_students))
            self.skipped.append((Family.JOINT, f"it divides the rows of {names}" if names else "it divides rows"))
            return
        cluster = self.judge.cluster
        plan = joint_plan(self.judge.costs, cluster, self.judge.num_rows)
        kinds = rank_kinds(cluster)
        stages = None
        if len(kinds) == 1 and self._num_ranks <= self.judge.num_rows:
            stages = _whole_chain(borders, kinds[0], kinds[0].ranks, Crossing(inside=cluster.num_nodes > 1))
        self.add(Family.JOINT, plan, *(reversed(stages) if stages else ()))


def _whole_chain(costs: StageCosts, kind: RankKind, ranks: tuple[int, ...], crossing: Crossing) -> Solution | None:
    """Give one stage of everything on some ranks; `None` if it does not fit their memory."""
    column = costs.column(0, len(ranks), kind.device_class, crossing=crossing, limit_bytes=kind.limit_bytes)
    stage = Stage(costs.points[0], costs.points[-1], ranks)
    whole = len(costs.points) - 1
    return next((Solution(use.cost_ms, (stage,)) for use in column if use.stop == whole), None)
