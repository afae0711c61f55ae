"""Blocks whose ranks meet while they learn."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.meetings import find_missed_meeting
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import Action, Kind, Program
from tests.helpers.plans import plans

stages = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3)


def sharers(plan: Plan) -> dict[int, tuple[int, ...]]:
    return {block: ranks for block in range(plan.num_blocks) if len(ranks := plan.student_ranks(block)) > 1}


@given(sizes=stages, num_rows=st.integers(9, 40))
def test_ranks_of_a_hybrid_plan_always_meet(sizes: list[tuple[int, int]], num_rows: int) -> None:
    plan = Plan.hybrid(sizes)
    assert find_missed_meeting(compile_programs(plan, num_rows), sharers(plan)) is None


@given(plan=plans(), num_rows=st.integers(1, 40))
def test_ranks_that_meet_nowhere_miss_nothing(plan: Plan, num_rows: int) -> None:
    assert find_missed_meeting(compile_programs(plan, num_rows), {}) is None


def learn(*blocks: int) -> tuple[Action, ...]:
    return tuple(Action(Kind.LEARN, block, Rows(0, 4)) for block in blocks)


def test_ranks_that_learn_in_two_orders_wait_for_each_other_unless_they_meet_in_one_block_only() -> None:
    programs = [Program(0, 8, learn(0, 1)), Program(1, 8, learn(1, 0))]
    missed = find_missed_meeting(programs, {0: (0, 1), 1: (0, 1)})
    assert missed is not None
    assert (missed[0], missed[1].kind, missed[1].index) == (0, Kind.LEARN, 0)
    assert find_missed_meeting(programs, {1: (0, 1)}) is None


def test_ranks_whose_rows_come_round_may_learn_in_two_orders() -> None:
    # Each learns, while it waits for its rows, the one block whose inputs it has: rank 0 the first, rank 1 the second.
    half = Fraction(1, 2)
    plan = Plan(
        num_ranks=2,
        teacher=tuple(((rank, Fraction(1)),) for rank in (0, 1, 0, 1)),
        student=(((0, half), (1, half)),) * 4,
    )
    missed = find_missed_meeting(compile_programs(plan, 8), sharers(plan))
    assert missed == (0, Action(Kind.LEARN, 0, Rows(0, 4)))
    assert find_missed_meeting(compile_programs(plan, 8), {3: (0, 1)}) is None


def test_sums_that_are_under_way_hold_nobody_up() -> None:
    reduce = Action(Kind.REDUCE, 0, ranks=(0, 1))
    programs = [Program(0, 8, (*learn(0), reduce, *learn(1))), Program(1, 8, (*learn(0, 1), reduce))]
    assert find_missed_meeting(programs, {0: (0, 1), 1: (0, 1)}) is None
