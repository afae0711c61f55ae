"""Teachers one batch ahead: which plans, which programs, and that they do what they must."""

from __future__ import annotations

from dataclasses import replace
from textwrap import dedent

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.ahead import compile_ahead, steady_programs, teaches_ahead
from lightning_pipebd.planning.ahead_laws import batch_programs, check_ahead_laws
from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.laws import LawError
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program
from lightning_pipebd.planning.table import format_table
from tests.helpers.plans import ahead_plans, whole_jobs
from tests.planning.arithmetic import train_alone, train_by_programs

THERE_AND_BACK = whole_jobs([0, 1, 0], [0, 1, 0])

Steps = list[tuple[Program, ...]]


@st.composite
def epochs(draw: st.DrawFn) -> tuple[Plan, Steps, frozenset[int]]:
    """Draw a plan, the programs of some consecutive steps, and the blocks whose loss reads the labels."""
    plan = draw(ahead_plans())
    targets = draw(st.frozensets(st.integers(0, plan.num_blocks - 1)))
    rows = draw(st.lists(st.integers(1, 9), min_size=1, max_size=4))
    steps: Steps = []
    is_taught = False
    for index, num_rows in enumerate(rows):
        looks = index + 1 < len(rows) and draw(st.booleans())
        num_next_rows = rows[index + 1] if looks else 0
        steps.append(
            compile_ahead(
                plan,
                num_rows,
                num_next_rows=num_next_rows,
                is_taught=is_taught,
                target_blocks=targets,
                update=draw(st.booleans()),
            )
        )
        is_taught = looks
    return plan, steps, targets


@pytest.mark.parametrize(
    ("plan", "is_ahead"),
    [
        (parse_plan("0|1|2"), False),
        (parse_plan("0*2|1"), False),
        (whole_jobs([0, 1, 2], [2, 2, 2]), False),  # everything goes one way
        (THERE_AND_BACK, True),  # a late teacher block
        (whole_jobs([0, 1], [1, 0]), True),  # a late student block
        (whole_jobs([0, 0, 0], [1, 2, 0]), False),  # its own rows never leave the rank
        (replace(THERE_AND_BACK, teaches_ahead=False), False),  # nobody has asked for it
        (parse_plan("ahead 0|1|2"), False),  # nothing comes round
        (parse_plan("ahead 0,2|1"), True),
    ],
)
def test_teacher_blocks_work_ahead_if_told_to_where_rows_come_round(plan: Plan, is_ahead: bool) -> None:
    assert teaches_ahead(plan) is is_ahead


def test_momentum_teacher_never_works_ahead() -> None:
    assert not teaches_ahead(THERE_AND_BACK, has_momentum=True)
    assert steady_programs(THERE_AND_BACK, 4, has_momentum=True) == compile_programs(THERE_AND_BACK, 4)


def test_batch_with_nothing_before_and_after_it_has_the_programs_of_a_batch_alone() -> None:
    assert compile_ahead(THERE_AND_BACK, 4) is compile_programs(THERE_AND_BACK, 4)


def test_first_middle_and_last_step_by_hand() -> None:
    first = compile_ahead(THERE_AND_BACK, 8, num_next_rows=6)
    assert str(first[1]) == laid_out("""
        PROGRAM rank=1 rows=8 next=6
        RECV boundary=1 rows=0:8 from=0
        TEACH block=1 rows=0:8
        SEND boundary=2 rows=0:8 to=0
        RECV boundary=1 rows=0:6 from=0 next
        TEACH block=1 rows=0:6 next
        SEND boundary=2 rows=0:6 to=0 next
        LEARN block=1 rows=0:8
        UPDATE block=1
    """)
    middle = compile_ahead(THERE_AND_BACK, 6, num_next_rows=2, is_taught=True)
    assert str(middle[0]) == laid_out("""
        PROGRAM rank=0 rows=6 next=2 taught
        LOAD rows=0:2 next
        TEACH block=0 rows=0:2 next
        SEND boundary=1 rows=0:2 to=1 next
        LEARN block=0 rows=0:6
        LEARN block=2 rows=0:6
        RECV boundary=2 rows=0:2 from=1 next
        TEACH block=2 rows=0:2 next
        UPDATE block=0
        UPDATE block=2
    """)
    last = compile_ahead(THERE_AND_BACK, 2, is_taught=True, update=False)
    assert str(last[0]) == laid_out("""
        PROGRAM rank=0 rows=2 taught
        LEARN block=0 rows=0:2
        LEARN block=2 rows=0:2
    """)


def test_student_blocks_are_dealt_by_the_blocks_that_rows_come_round_by() -> None:
    # Rank 0 teaches blocks 0, 2 and 6: its rows come back from one block first, and then from three.
    plan = whole_jobs([0, 1, 0, 1, 1, 1, 0], [1, 1, 1, 0, 0, 0, 0])
    kinds = [
        f"{action.kind} {action.index}"
        for action in steady_programs(plan, 4)[0].actions
        if action.kind in (Kind.TEACH, Kind.LEARN)
    ]
    assert kinds == ["TEACH 0", "LEARN 3", "TEACH 2", "LEARN 4", "LEARN 5", "LEARN 6", "TEACH 6"]


def test_what_a_student_block_needs_is_received_when_it_learns_a_step_after_it_was_sent() -> None:
    plan = whole_jobs([0, 1], [1, 0])
    sender, receiver = steady_programs(plan, 4)[1], steady_programs(plan, 4)[0]
    assert Action.parse("SEND boundary=2 rows=0:4 to=0 next") in sender.actions
    assert receiver.actions[-3:-1] == (
        Action.parse("RECV boundary=2 rows=0:4 from=1"),
        Action.parse("LEARN block=1 rows=0:4"),
    )


@settings(max_examples=60)
@given(epoch=epochs())
def test_steps_are_lawful_and_print_what_parses_back(epoch: tuple[Plan, Steps, frozenset[int]]) -> None:
    plan, steps, targets = epoch
    check_ahead_laws(plan, steps, target_blocks=targets)
    assert [[Program.parse(str(program)) for program in programs] for programs in steps] == [
        list(programs) for programs in steps
    ]


@settings(max_examples=40)
@given(
    data=st.data(), plan=ahead_plans(), rows=st.lists(st.lists(st.integers(-9, 9), min_size=1), min_size=1, max_size=4)
)
def test_programs_train_exactly_what_one_process_trains(data: st.DataObject, plan: Plan, rows: list[list[int]]) -> None:
    targets = data.draw(st.frozensets(st.integers(0, plan.num_blocks - 1)))
    updates = [data.draw(st.booleans()) for _ in rows]
    order = data.draw(st.permutations(range(plan.num_ranks)))
    lengths = [*map(len, rows), 0]
    programs = [
        compile_ahead(
            plan,
            lengths[index],
            num_next_rows=lengths[index + 1],
            is_taught=index > 0,
            target_blocks=targets,
            update=update,
        )
        for index, update in enumerate(updates)
    ]
    weights = train_by_programs(plan, rows, target_blocks=targets, steps=updates, order=order, programs=programs)
    alone = train_alone(plan.num_blocks, rows, target_blocks=targets, steps=updates)
    assert weights == [
        {block: alone[block] for block in range(plan.num_blocks) if rank in plan.student_ranks(block)}
        for rank in range(plan.num_ranks)
    ]


@settings(max_examples=40)
@given(plan=ahead_plans(), num_rows=st.integers(1, 9))
def test_rank_keeps_of_the_next_batch_what_its_student_blocks_will_need(plan: Plan, num_rows: int) -> None:
    for program in steady_programs(plan, num_rows):
        dropped, needed = set(program.last_uses_of_next()), program.kept()
        made = {action.index + 1 for action in program.actions if action.kind is Kind.TEACH}
        assert not dropped & needed
        assert made - needed <= dropped


def lawful_steps() -> Steps:
    first = compile_ahead(THERE_AND_BACK, 4, num_next_rows=2)
    return [first, compile_ahead(THERE_AND_BACK, 2, is_taught=True)]


def test_laws_refuse_a_batch_that_nobody_taught() -> None:
    steps = lawful_steps()
    steps[0] = compile_programs(THERE_AND_BACK, 4)
    with pytest.raises(LawError, match="'steps fit together', but it is for 2 rows, and the step before has taught 0"):
        check_ahead_laws(THERE_AND_BACK, steps)


def test_laws_refuse_a_taught_batch_that_does_not_come() -> None:
    with pytest.raises(LawError, match="'steps fit together', but the last step teaches a batch that does not come"):
        check_ahead_laws(THERE_AND_BACK, lawful_steps()[:1])


def test_laws_refuse_a_batch_that_is_taught_in_both_steps() -> None:
    steps = lawful_steps()
    steps[1] = tuple(program._replace(is_taught=True) for program in compile_programs(THERE_AND_BACK, 2))
    with pytest.raises(LawError, match="'taught once', but TEACH 0 has rows 0:2, 0:2"):
        check_ahead_laws(THERE_AND_BACK, steps)


def test_laws_refuse_steps_that_wait_for_each_other() -> None:
    # Rank 0 learns first what it teaches last.
    plan = whole_jobs([0, 1], [1, 0])
    steps = [compile_ahead(plan, 4, num_next_rows=4), compile_ahead(plan, 4, is_taught=True)]
    late = [action for action in steps[0][1].actions if action.is_next]
    early = [action for action in steps[0][1].actions if not action.is_next]
    receive = Action.parse("RECV boundary=2 rows=0:4 from=1 next")
    steps[0] = (
        steps[0][0]._replace(actions=(receive, *steps[0][0].actions)),
        steps[0][1]._replace(actions=(*early, *late)),
    )
    steps[1] = (
        steps[1][0]._replace(
            actions=tuple(action for action in steps[1][0].actions if action != receive._replace(is_next=False))
        ),
        steps[1][1],
    )
    with pytest.raises(LawError, match="'no cycle of waits'"):
        check_ahead_laws(plan, steps)


def test_what_the_steps_do_for_one_batch_is_put_together_in_order() -> None:
    second = batch_programs(lawful_steps(), 1)[0]
    assert [str(action.kind) for action in second.actions] == [
        "LOAD", "TEACH", "SEND", "RECV", "TEACH", "LEARN", "LEARN", "UPDATE", "UPDATE",
    ]  # fmt: skip
    assert not second.is_taught
    assert second.num_rows == 2


def test_table_starts_at_once_what_was_sent_a_step_ago() -> None:
    table = format_table(steady_programs(whole_jobs([0, 1], [1, 0]), 2))
    assert table == laid_out("""
        step  rank 0              rank 1
        0     LOAD 0:2 next       .
        1     SEND 0 0:2 >1 next  .
        2     TEACH 0 0:2 next    .
        3     SEND 1 0:2 >1 next  .
        4     RECV 2 0:2 <1       RECV 1 0:2 <0 next
        5     LEARN 1 0:2         TEACH 1 0:2 next
        6     UPDATE 1            SEND 2 0:2 >0 next
        7                         RECV 0 0:2 <0
        8                         LEARN 0 0:2
        9                         UPDATE 0
    """)


@pytest.mark.parametrize("text", ["LEARN block=0 rows=0:4 next", "UPDATE block=0 next"])
def test_students_never_work_ahead(text: str) -> None:
    with pytest.raises(ValueError, match="must have the form"):
        Action.parse(text)


@pytest.mark.parametrize("header", ["PROGRAM rank=0 rows=8 taught next=4", "PROGRAM rank=0 rows=8 next=", "PROGRAM"])
def test_header_has_one_form(header: str) -> None:
    with pytest.raises(ValueError, match="must start with 'PROGRAM rank=<rank> rows=<rows>'"):
        Program.parse(header)


def test_labels_travel_a_step_before_they_are_read() -> None:
    plan = whole_jobs([0, 1], [1, 0])
    loading, reading = steady_programs(plan, 4, target_blocks=[0])
    assert Action(Kind.SEND, TARGETS, loading.actions[0].rows, peer=1, is_next=True) in loading.actions
    assert Action(Kind.RECV, TARGETS, loading.actions[0].rows, peer=0) in reading.actions


def test_batch_without_rows_and_unknown_target_block_are_refused() -> None:
    with pytest.raises(ValueError, match="`num_rows` must be at least 1, but is 0"):
        compile_ahead(THERE_AND_BACK, 0, is_taught=True)
    with pytest.raises(ValueError, match="`target_blocks` must lie between 0 and 2"):
        compile_ahead(THERE_AND_BACK, 1, is_taught=True, target_blocks=[3])


def laid_out(text: str) -> str:
    return dedent(text).strip()
