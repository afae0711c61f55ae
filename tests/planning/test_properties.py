"""What holds for every plan: any ranks, any shares, any row order, any number of rows."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.explain import Exactness, exactness_of, explain_plan
from lightning_pipebd.planning.laws import check_laws
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Kind
from lightning_pipebd.planning.table import format_table
from tests.helpers.plans import batches, plans
from tests.planning.arithmetic import train_alone, train_by_programs

Batch = tuple[Plan, int, frozenset[int]]

small_batches = st.lists(st.lists(st.integers(-9, 9), min_size=1, max_size=9), min_size=1, max_size=3)
stages = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=3)


@settings(max_examples=200)
@given(batch=batches(), update=st.booleans())
def test_every_compiled_program_is_lawful(batch: Batch, update: bool) -> None:
    plan, num_rows, target_blocks = batch
    programs = compile_programs(plan, num_rows, target_blocks=target_blocks, update=update)
    check_laws(plan, programs, target_blocks=target_blocks)


@given(batch=batches())
def test_every_row_is_taught_and_learned_once_and_sent_as_often_as_received(batch: Batch) -> None:
    plan, num_rows, target_blocks = batch
    programs = compile_programs(plan, num_rows, target_blocks=target_blocks)
    done = dict.fromkeys(Kind, 0)
    for program in programs:
        for action in program.actions:
            done[action.kind] += action.rows.num_rows
    assert done[Kind.LOAD] == num_rows
    assert done[Kind.TEACH] == done[Kind.LEARN] == num_rows * plan.num_blocks
    assert done[Kind.SEND] == done[Kind.RECV]


@given(batch=batches())
def test_programs_of_a_plan_without_split_students_hold_no_reduce(batch: Batch) -> None:
    plan, num_rows, _ = batch
    kinds = {action.kind for program in compile_programs(plan, num_rows) for action in program.actions}
    assert (Kind.REDUCE in kinds) is plan.has_split_students


@given(sizes=stages, num_rows=st.integers(1, 40))
def test_rank_of_a_hybrid_plan_never_learns_before_it_has_sent(sizes: list[tuple[int, int]], num_rows: int) -> None:
    programs = compile_programs(Plan.hybrid(sizes), num_rows)
    before = (Kind.LOAD, Kind.RECV, Kind.SEND)
    others = [[action.kind for action in program.actions if action.kind is not Kind.TEACH] for program in programs]
    is_relay = [[kind in before for kind in kinds] for kinds in others]
    assert is_relay == [sorted(flags, reverse=True) for flags in is_relay]


@given(batch=batches())
def test_table_shows_every_action_once(batch: Batch) -> None:
    plan, num_rows, target_blocks = batch
    programs = compile_programs(plan, num_rows, target_blocks=target_blocks)
    table = format_table(programs)
    assert [table.count(f"{kind} ") for kind in Kind] == [
        sum(action.kind is kind for program in programs for action in program.actions) for kind in Kind
    ]


@given(batch=batches())
def test_plan_is_bitwise_exact_unless_a_job_is_split(batch: Batch) -> None:
    plan, num_rows, target_blocks = batch
    is_split = plan.has_split_students or plan.has_split_teachers
    assert (exactness_of(plan) is Exactness.BITWISE) is not is_split
    assert f"exactness: {exactness_of(plan)}" in explain_plan(plan, num_rows=num_rows, target_blocks=target_blocks)


@settings(max_examples=100)
@given(data=st.data(), plan=plans(max_ranks=4, max_blocks=4), rows=small_batches)
def test_programs_train_exactly_what_one_process_trains(data: st.DataObject, plan: Plan, rows: list[list[int]]) -> None:
    target_blocks = data.draw(st.frozensets(st.integers(0, plan.num_blocks - 1)))
    steps = [data.draw(st.booleans()) for _ in rows]
    order = data.draw(st.permutations(range(plan.num_ranks)))
    weights = train_by_programs(plan, rows, target_blocks=target_blocks, steps=steps, order=order)
    alone = train_alone(plan.num_blocks, rows, target_blocks=target_blocks, steps=steps)
    trained = [
        {block: alone[block] for block in range(plan.num_blocks) if rank in plan.student_ranks(block)}
        for rank in range(plan.num_ranks)
    ]
    assert weights == trained


def test_one_step_of_the_arithmetic_by_hand() -> None:
    # One row 2: boundary 1 is 6, w = 0, so the gradient is (0 - 6) * 2 = -12.
    assert train_alone(1, [[2]], target_blocks=[], steps=[True]) == [Fraction(12, 1000)]
    # The label of row 2 is 14 % 11 = 3, which makes it (0 - 9) * 2 = -18; row 0 halves the mean.
    assert train_alone(1, [[2, 0]], target_blocks=[0], steps=[True]) == [Fraction(9, 1000)]
    assert train_alone(1, [[2]], target_blocks=[], steps=[False]) == [Fraction(0)]
