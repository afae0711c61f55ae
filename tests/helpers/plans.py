"""Random plans for property tests: any job on any ranks, in any row order, with any share."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from hypothesis import strategies as st

from lightning_pipebd.planning.ahead import teaches_ahead, with_teacher_ahead
from lightning_pipebd.planning.plan import Plan, Share

__all__ = ["ahead_plans", "batches", "plans", "whole_jobs"]


@st.composite
def _jobs(draw: st.DrawFn, num_ranks: int) -> tuple[Share, ...]:
    denominator = draw(st.integers(1, 8))
    ranks = draw(st.permutations(range(num_ranks)))[: draw(st.integers(1, min(denominator, num_ranks)))]
    cuts = st.integers(1, denominator - 1) if denominator > 1 else st.nothing()
    inner = draw(st.lists(cuts, min_size=len(ranks) - 1, max_size=len(ranks) - 1, unique=True))
    borders = [0, *sorted(inner), denominator]
    return tuple(
        Share(rank, Fraction(stop - start, denominator))
        for rank, start, stop in zip(ranks, borders, borders[1:], strict=False)
    )


@st.composite
def plans(draw: st.DrawFn, *, max_ranks: int = 5, max_blocks: int = 6, is_ascending: bool = False) -> Plan:
    """Draw a plan; `is_ascending` lists every job's ranks in ascending order, so that it has a text form."""
    num_ranks = draw(st.integers(1, max_ranks))
    num_blocks = draw(st.integers(1, max_blocks))
    sides = [[draw(_jobs(num_ranks)) for _ in range(num_blocks)] for _ in range(2)]
    # The student of a block is often where its teacher is; independent draws alone would hardly ever say so.
    sides[1] = [draw(st.sampled_from([teacher, student])) for teacher, student in zip(*sides, strict=True)]
    if is_ascending:
        sides = [[_with_ascending_ranks(job) for job in jobs] for jobs in sides]
    return Plan(num_ranks=num_ranks, teacher=tuple(sides[0]), student=tuple(sides[1]))


def _with_ascending_ranks(job: tuple[Share, ...]) -> tuple[Share, ...]:
    ranks = sorted(rank for rank, _ in job)
    return tuple(Share(rank, share) for rank, (_, share) in zip(ranks, job, strict=True))


@st.composite
def batches(draw: st.DrawFn) -> tuple[Plan, int, frozenset[int]]:
    """Draw a plan, a number of rows, and the blocks whose loss reads the labels."""
    plan = draw(plans())
    return plan, draw(st.integers(1, 40)), draw(st.frozensets(st.integers(0, plan.num_blocks - 1)))


def whole_jobs(teacher: Sequence[int], student: Sequence[int]) -> Plan:
    """Give the plan of whole jobs that these ranks teach, and learn; one batch ahead, where rows come round."""
    sides = [tuple((Share(rank, Fraction(1)),) for rank in ranks) for ranks in (teacher, student)]
    return with_teacher_ahead(Plan(num_ranks=max(*teacher, *student) + 1, teacher=sides[0], student=sides[1]))


@st.composite
def ahead_plans(draw: st.DrawFn, *, max_ranks: int = 4, max_blocks: int = 6) -> Plan:
    """Draw a plan whose teacher blocks work one batch ahead."""
    num_blocks = draw(st.integers(2, max_blocks))
    ranks = st.lists(st.integers(0, max_ranks - 1), min_size=num_blocks, max_size=num_blocks)
    return draw(st.builds(whole_jobs, ranks, ranks).filter(teaches_ahead))
