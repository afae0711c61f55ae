"""The planner: from measured costs to the plan whose steps take least time.

Families of plans are searched from the plainest to the finest: `single`, `straight`, `joint`, `hybrid`, `half cut`,
`scattered`, `fractional`. For all but the last two the stages whose slowest is fastest are found exactly, by the
separable costs that `stage_costs` describes: a stage costs what it asks of its own ranks' threads, links and loaders,
whatever its neighbours do. Each family's best plan is then compiled and simulated, which adds what the stage costs
leave out; the simulator's number is the one that counts. The last two families are searched by moving jobs and rows and
asking the simulator each time. Chosen is the simplest family than whose plan no other is surely faster: a gain must be
larger than what the noise of the costs and the model's own error can explain (see `margin`).

Source: Pipe-BD (arXiv:2301.12443), *Automatic hybrid distribution*, whose exhaustive search of hybrid plans this
replaces by an exact one for any number of blocks, ranks, nodes and kinds of devices, with memory limits.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from lightning_pipebd.planning.bounds import Bounds, find_bounds
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.explain import BlockTraits, Exactness, exactness_reasons
from lightning_pipebd.planning.families import Candidate, Families, Family, Found
from lightning_pipebd.planning.fractional import add_fractional
from lightning_pipebd.planning.judge import Judge
from lightning_pipebd.planning.margin import margin_ms
from lightning_pipebd.planning.plan import Plan, PlanError
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.quantities import format_ms
from lightning_pipebd.planning.scattered import add_scattered
from lightning_pipebd.planning.simulate import check_max_in_flight

__all__ = ["PlanChoice", "find_plan"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanChoice:
    """The plan that was chosen, and why.

    Args:
        plan: The plan.
        family: Its family.
        step_time_ms: Predicted time of a step.
        bounds: What no plan's step time can be below.
        alternatives: The best plan of every family, the simplest family first; the chosen one is among them.
        skipped: Families without a plan of their own, with the reason.
        limits: What takes the whole of the predicted step time.
        reason: Why this plan, in a sentence.
        contenders: The alternatives than which none is surely faster, the simplest first, which is the chosen one.
    """

    plan: Plan
    family: Family
    step_time_ms: float
    bounds: Bounds
    alternatives: tuple[Candidate, ...]
    skipped: tuple[tuple[Family, str], ...]
    limits: tuple[str, ...]
    reason: str
    contenders: tuple[Candidate, ...] = ()

    @property
    def efficiency(self) -> float:
        """The step time that no plan can beat as a fraction of the predicted one."""
        return self.bounds.step_time_ms / self.step_time_ms if self.step_time_ms else 1.0

    def __str__(self) -> str:
        lines = [f"{self.family} plan {_text(self.plan)}: {self.step_time_ms:.4g} ms per step", self.reason]
        lines += [f"limit: {limit}" for limit in self.limits]
        lines.append(
            f"bounds: work {self.bounds.work_ms:.4g} ms, block {self.bounds.block_ms:.4g} ms, "
            f"loader {self.bounds.loader_ms:.4g} ms; efficiency {self.efficiency:.0%}"
        )
        for candidate in self.alternatives:
            by = "" if candidate.is_simulated else " (not simulated)"
            lines.append(f"{candidate.family}: {candidate.step_time_ms:.4g} ms{by}, {_text(candidate.plan)}")
        return "\n".join([*lines, *(f"{family}: none, {why}" for family, why in self.skipped)])


def find_plan(
    costs: CostTable,
    cluster: Cluster,
    *,
    num_rows: int,
    exactness: Exactness | str | None = None,
    traits: Sequence[BlockTraits] = (),
    target_blocks: Collection[int] = (),
    max_in_flight: int = 2,
    has_momentum: bool = False,
    may_teach_ahead: bool = False,
) -> PlanChoice:
    """Find the plan with the smallest steady step time for a batch of `num_rows` rows.

    Gains that may be due to the costs' noise are no reason to leave a simpler family. The exact search of straight and
    hybrid plans takes ``O(B^2 N)`` for `B` blocks on `N` ranks; what could take longer on a large cluster is bounded.

    Args:
        costs: Measured times and sizes.
        cluster: Ranks to use; all are in the plan, but some may have no job.
        num_rows: Rows of the batch; a plan never changes it.
        exactness: How closely the student of one process must be reproduced. `bitwise` divides no rows, `None` and
            `summation` divide the rows of blocks that permit it, `statistics` also others if nothing else fits.
        traits: One entry per block, for exactness; empty if no block has statistics or random draws.
        target_blocks: Student blocks whose loss reads the labels.
        max_in_flight: Steps by which a rank may run ahead.
        has_momentum: Whether each teacher block follows its student block, and must be on ranks that train it.
        may_teach_ahead: Whether the plan may have teacher blocks work one batch ahead.

    Returns:
        The choice; its plan fits the memory of every rank.

    Raises:
        PlanError: Nothing fits the memory; the message has what every rank would need.
        ValueError: A number is below 1, `exactness` unknown, or `traits` or a target block are of another model.

    Example:
        >>> from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, Curve, DeviceTimes
        >>> teach_ms, learn_ms = Curve.affine(0.1, 0), [Curve.affine(ms, 0) for ms in (1, 1, 1, 3.2)]
        >>> times = [BlockTimes(teach_ms=teach_ms, learn_ms=own_ms) for own_ms in learn_ms]
        >>> blocks = [BlockSizes(name=name) for name in "abcd"]
        >>> device = DeviceTimes(device_class="default", blocks=times)
        >>> costs = CostTable(blocks=blocks, devices=[device], boundary_bytes_per_row=[1] * 5)
        >>> choice = find_plan(costs, Cluster.uniform(2), num_rows=64)
        >>> print(choice.family, choice.plan == Plan.straight([3, 1]), round(choice.step_time_ms, 3))
        straight True 3.3
    """
    level = _read_exactness(exactness)
    _check_num_rows(num_rows)
    check_max_in_flight(max_in_flight)
    judge = Judge(
        costs=costs,
        cluster=cluster,
        num_rows=num_rows,
        target_blocks=target_blocks,
        max_in_flight=max_in_flight,
        has_momentum=has_momentum,
        may_teach_ahead=may_teach_ahead,
    )
    return _choose(_find_families(judge, _changing_blocks(costs, traits), level))


def _check_num_rows(num_rows: int) -> None:
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, but is {num_rows}. Give the rows of a batch.")


def _find_families(judge: Judge, changing: tuple[int, ...], level: Exactness) -> Families:
    """Search the families; divide students whose mathematics that changes only if it is allowed and necessary."""
    families = _search(judge, changing, level)
    if not families.found and changing and level is not Exactness.BITWISE:
        divided = _search(judge, (), level)
        if divided.found and level is not Exactness.STATISTICS:
            names = ", ".join(judge.costs.blocks[block].name for block in changing)
            raise PlanError(
                f"`memory_limit_bytes` must leave room for a plan that keeps the student blocks {names} whole, but "
                f"{families.least_memory()}. Splitting their rows would fit, but changes their statistics or random "
                'draws: allow it with `exactness="statistics"`, or synchronise their BatchNorm.'
            )
        families = divided
    if not families.found:
        raise PlanError(
            f"`memory_limit_bytes` must leave room for some plan, but {families.least_memory()}. Use more ranks or "
            "devices with more memory, a smaller batch, smaller blocks or a smaller `max_in_flight`"
            + (", or allow rows to be split." if level is Exactness.BITWISE else ".")
        )
    return families


def _read_exactness(exactness: Exactness | str | None) -> Exactness:
    names = [level.value for level in Exactness]
    if exactness is not None and exactness not in names:
        raise ValueError(f"`exactness` must be one of {', '.join(names)}, but is {exactness!r}. Correct the word.")
    return Exactness.SUMMATION if exactness is None else Exactness(exactness)


def _changing_blocks(costs: CostTable, traits: Sequence[BlockTraits]) -> tuple[int, ...]:
    """List the blocks whose mathematics would change if their student's rows were split."""
    reasons = exactness_reasons(Plan.joint(costs.num_blocks, 2), traits)
    return tuple(sorted({reason.block for reason in reasons if reason.exactness is Exactness.STATISTICS}))


def _search(judge: Judge, whole_students: Collection[int], level: Exactness) -> Families:
    families = Families(
        judge,
        whole_students=whole_students,
        divides_rows=level is not Exactness.BITWISE,
        has_momentum=judge.has_momentum,
    )
    families.find()
    if not judge.has_momentum:
        add_scattered(families)
        add_fractional(families)
    return families


def _choose(families: Families) -> PlanChoice:
    judge = families.judge
    candidates = tuple(entry.candidate for entry in families.found)
    # The found families are in order, so the first is the simplest that is not worse than errors can explain.
    contenders = [
        entry for entry in families.found if not any(_is_faster(other, entry, judge) for other in families.found)
    ]
    chosen = contenders[0]
    return PlanChoice(
        plan=chosen.candidate.plan,
        family=chosen.candidate.family,
        step_time_ms=chosen.candidate.step_time_ms,
        bounds=find_bounds(
            judge.costs,
            judge.cluster,
            num_rows=judge.num_rows,
            whole_students=families.whole_students,
            divides_rows=families.divides_rows,
        ),
        alternatives=candidates,
        skipped=tuple(families.skipped),
        limits=chosen.judgement.limits if chosen.judgement else (),
        reason=_reason(chosen, families),
        contenders=tuple(entry.candidate for entry in contenders),
    )


def _is_faster(other: Found, simple: Found, judge: Judge) -> bool:
    """Tell whether a plan is faster by more than may be an error."""
    gain_ms = simple.candidate.step_time_ms - other.candidate.step_time_ms
    # Rounded, so that nobody goes after the last bits of sums.
    return gain_ms > 1e-9 * simple.candidate.step_time_ms and gain_ms > margin_ms(simple, other, judge) * (1 + 1e-9)


def _reason(entry: Found, families: Families) -> str:
    chosen, candidates = entry.candidate, [found.candidate for found in families.found]
    fastest = min(families.found, key=lambda found: found.candidate.step_time_ms)
    best = fastest.candidate
    simpler = [
        candidate
        for candidate in candidates
        if list(Family).index(candidate.family) < list(Family).index(chosen.family)
    ]
    if best.step_time_ms < chosen.step_time_ms * (1 - 1e-9):
        margin = margin_ms(entry, fastest, families.judge)
        return (
            f"The {best.family} plan would take {format_ms(best.step_time_ms)} ms, but less than "
            f"{format_ms(margin, 2)} ms below the simpler {chosen.family} plan may be an error of the prediction."
        )
    if not simpler:
        return "No plan is faster, and none is simpler."
    next_best = min(simpler, key=lambda candidate: candidate.step_time_ms)
    gain = next_best.step_time_ms / chosen.step_time_ms if chosen.step_time_ms else 1.0
    return f"No plan is faster; the best simpler one, {next_best.family}, takes {gain:.3g} times as long."


def _text(plan: Plan) -> str:
    return format_plan(plan) if has_text_form(plan) else "(no text form)"
