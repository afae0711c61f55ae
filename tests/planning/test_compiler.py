from __future__ import annotations

from fractions import Fraction
from textwrap import dedent

import pytest

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan, Share
from lightning_pipebd.planning.plan_text import parse_plan


def lines_of(text: str, num_rows: int, *, target_blocks: tuple[int, ...] = (), update: bool = True) -> str:
    """Print the programs of a plan one after another."""
    programs = compile_programs(parse_plan(text), num_rows, target_blocks=target_blocks, update=update)
    return "\n".join(map(str, programs))


def laid_out(text: str) -> str:
    return dedent(text).strip()


def test_straight_plan_relays_before_it_learns() -> None:
    assert lines_of("0-1|2", 8) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=0:8
        TEACH block=0 rows=0:8
        TEACH block=1 rows=0:8
        SEND boundary=2 rows=0:8 to=1
        LEARN block=0 rows=0:8
        LEARN block=1 rows=0:8
        UPDATE block=0
        UPDATE block=1
        PROGRAM rank=1 rows=8
        RECV boundary=2 rows=0:8 from=0
        TEACH block=2 rows=0:8
        LEARN block=2 rows=0:8
        UPDATE block=2
    """)


def test_joint_plan_sends_nothing_and_learns_and_reduces_what_it_has_just_taught() -> None:
    assert lines_of("0-1*2", 5) == laid_out("""
        PROGRAM rank=0 rows=5
        LOAD rows=0:3
        TEACH block=0 rows=0:3
        LEARN block=0 rows=0:3
        REDUCE block=0 ranks=0,1
        TEACH block=1 rows=0:3
        LEARN block=1 rows=0:3
        REDUCE block=1 ranks=0,1
        UPDATE block=0
        UPDATE block=1
        PROGRAM rank=1 rows=5
        LOAD rows=3:5
        TEACH block=0 rows=3:5
        LEARN block=0 rows=3:5
        REDUCE block=0 ranks=0,1
        TEACH block=1 rows=3:5
        LEARN block=1 rows=3:5
        REDUCE block=1 ranks=0,1
        UPDATE block=0
        UPDATE block=1
    """)


def test_two_ranks_before_one_send_it_their_rows_and_their_labels() -> None:
    assert lines_of("0*2|1", 8, target_blocks=(1,)) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=0:4
        SEND boundary=targets rows=0:4 to=2
        TEACH block=0 rows=0:4
        SEND boundary=1 rows=0:4 to=2
        LEARN block=0 rows=0:4
        REDUCE block=0 ranks=0,1
        UPDATE block=0
        PROGRAM rank=1 rows=8
        LOAD rows=4:8
        SEND boundary=targets rows=4:8 to=2
        TEACH block=0 rows=4:8
        SEND boundary=1 rows=4:8 to=2
        LEARN block=0 rows=4:8
        REDUCE block=0 ranks=0,1
        UPDATE block=0
        PROGRAM rank=2 rows=8
        RECV boundary=1 rows=0:4 from=0
        RECV boundary=1 rows=4:8 from=1
        TEACH block=1 rows=0:8
        RECV boundary=targets rows=0:4 from=0
        RECV boundary=targets rows=4:8 from=1
        LEARN block=1 rows=0:8
        UPDATE block=1
    """)


def test_one_rank_before_two_sends_each_its_part() -> None:
    assert lines_of("0|1*2", 7) == laid_out("""
        PROGRAM rank=0 rows=7
        LOAD rows=0:7
        TEACH block=0 rows=0:7
        SEND boundary=1 rows=0:4 to=1
        SEND boundary=1 rows=4:7 to=2
        LEARN block=0 rows=0:7
        UPDATE block=0
        PROGRAM rank=1 rows=7
        RECV boundary=1 rows=0:4 from=0
        TEACH block=1 rows=0:4
        LEARN block=1 rows=0:4
        REDUCE block=1 ranks=1,2
        UPDATE block=1
        PROGRAM rank=2 rows=7
        RECV boundary=1 rows=4:7 from=0
        TEACH block=1 rows=4:7
        LEARN block=1 rows=4:7
        REDUCE block=1 ranks=1,2
        UPDATE block=1
    """)


def test_half_cut_receives_what_only_the_student_needs_after_the_teacher_work() -> None:
    assert lines_of("0-1,T2|S2,3", 8) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=0:8
        TEACH block=0 rows=0:8
        TEACH block=1 rows=0:8
        SEND boundary=2 rows=0:8 to=1
        TEACH block=2 rows=0:8
        SEND boundary=3 rows=0:8 to=1
        LEARN block=0 rows=0:8
        LEARN block=1 rows=0:8
        UPDATE block=0
        UPDATE block=1
        PROGRAM rank=1 rows=8
        RECV boundary=3 rows=0:8 from=0
        TEACH block=3 rows=0:8
        RECV boundary=2 rows=0:8 from=0
        LEARN block=2 rows=0:8
        LEARN block=3 rows=0:8
        UPDATE block=2
        UPDATE block=3
    """)


def test_fractional_border_shares_one_block_and_completes_its_output() -> None:
    assert lines_of("0,1:1/4|1:3/4,2", 8) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=0:8
        TEACH block=0 rows=0:8
        SEND boundary=1 rows=2:8 to=1
        TEACH block=1 rows=0:2
        SEND boundary=2 rows=0:2 to=1
        LEARN block=0 rows=0:8
        LEARN block=1 rows=0:2
        REDUCE block=1 ranks=0,1
        UPDATE block=0
        UPDATE block=1
        PROGRAM rank=1 rows=8
        RECV boundary=1 rows=2:8 from=0
        TEACH block=1 rows=2:8
        RECV boundary=2 rows=0:2 from=0
        TEACH block=2 rows=0:8
        LEARN block=1 rows=2:8
        REDUCE block=1 ranks=0,1
        LEARN block=2 rows=0:8
        UPDATE block=1
        UPDATE block=2
    """)


def test_rank_learns_while_its_rows_travel_through_another_rank() -> None:
    assert lines_of("0,2|1", 8, target_blocks=(1,)) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=0:8
        SEND boundary=targets rows=0:8 to=1
        TEACH block=0 rows=0:8
        SEND boundary=1 rows=0:8 to=1
        LEARN block=0 rows=0:8
        RECV boundary=2 rows=0:8 from=1
        TEACH block=2 rows=0:8
        LEARN block=2 rows=0:8
        UPDATE block=0
        UPDATE block=2
        PROGRAM rank=1 rows=8
        RECV boundary=1 rows=0:8 from=0
        TEACH block=1 rows=0:8
        SEND boundary=2 rows=0:8 to=0
        RECV boundary=targets rows=0:8 from=0
        LEARN block=1 rows=0:8
        UPDATE block=1
    """)


def test_rank_learns_while_its_rows_travel_through_two_other_ranks() -> None:
    assert lines_of("0,3|1|2", 4).splitlines()[:6] == [
        "PROGRAM rank=0 rows=4",
        "LOAD rows=0:4",
        "TEACH block=0 rows=0:4",
        "SEND boundary=1 rows=0:4 to=1",
        "LEARN block=0 rows=0:4",
        "RECV boundary=3 rows=0:4 from=2",
    ]


def test_round_trip_is_also_one_that_a_busy_rank_makes_of_it() -> None:
    # Rank 1 makes rows 2:4 of boundary 3 without anything from rank 0, but only after it has taught rank 0's rows 0:2.
    half, whole = Fraction(1, 2), Fraction(1)
    plan = Plan(
        num_ranks=3,
        teacher=tuple((Share(first, half), Share(second, half)) for first, second in [(0, 2), (1, 2), (2, 1), (2, 0)]),
        student=((Share(0, half), Share(2, half)), *((Share(2, whole),) for _ in range(3))),
    )
    assert str(compile_programs(plan, 4)[0]).splitlines()[:7] == [
        "PROGRAM rank=0 rows=4",
        "LOAD rows=0:2",
        "TEACH block=0 rows=0:2",
        "SEND boundary=1 rows=0:2 to=1",
        "SEND boundary=1 rows=0:2 to=2",
        "LEARN block=0 rows=0:2",
        "RECV boundary=3 rows=2:4 from=1",
    ]


def test_rank_does_not_learn_before_a_receive_that_needs_nothing_of_it() -> None:
    # Rank 1 has rows of its own to learn, but what it waits for is already on the way: teaching on comes first.
    assert str(compile_programs(parse_plan("0:1/2|0:1/2,1"), 8)[1]) == laid_out("""
        PROGRAM rank=1 rows=8
        LOAD rows=4:8
        TEACH block=0 rows=4:8
        RECV boundary=1 rows=0:4 from=0
        TEACH block=1 rows=0:8
        LEARN block=0 rows=4:8
        REDUCE block=0 ranks=0,1
        LEARN block=1 rows=0:8
        UPDATE block=0
        UPDATE block=1
    """)


def test_reduce_waits_for_the_last_send_even_where_its_learn_comes_early() -> None:
    # Rank 1 gets to its REDUCE only once it has the rows that rank 0 teaches after its early LEARN.
    assert lines_of("0:1/2,2|0:1/2,1,3", 8) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=0:4
        TEACH block=0 rows=0:4
        SEND boundary=1 rows=0:4 to=1
        LEARN block=0 rows=0:4
        RECV boundary=2 rows=0:8 from=1
        TEACH block=2 rows=0:8
        SEND boundary=3 rows=0:8 to=1
        REDUCE block=0 ranks=0,1
        LEARN block=2 rows=0:8
        UPDATE block=0
        UPDATE block=2
        PROGRAM rank=1 rows=8
        LOAD rows=4:8
        TEACH block=0 rows=4:8
        RECV boundary=1 rows=0:4 from=0
        TEACH block=1 rows=0:8
        SEND boundary=2 rows=0:8 to=0
        LEARN block=0 rows=4:8
        LEARN block=1 rows=0:8
        RECV boundary=3 rows=0:8 from=0
        TEACH block=3 rows=0:8
        REDUCE block=0 ranks=0,1
        LEARN block=3 rows=0:8
        UPDATE block=0
        UPDATE block=1
        UPDATE block=3
    """)


def test_later_block_learned_early_is_still_reduced_in_block_order() -> None:
    assert lines_of("0,T1:1/2,S1,2:1/2|T1:1/2,2:1/2", 8) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=0:8
        TEACH block=0 rows=0:8
        SEND boundary=1 rows=4:8 to=1
        LEARN block=0 rows=0:8
        TEACH block=1 rows=0:4
        TEACH block=2 rows=0:4
        LEARN block=2 rows=0:4
        RECV boundary=2 rows=4:8 from=1
        LEARN block=1 rows=0:8
        REDUCE block=2 ranks=0,1
        UPDATE block=0
        UPDATE block=1
        UPDATE block=2
        PROGRAM rank=1 rows=8
        RECV boundary=1 rows=4:8 from=0
        TEACH block=1 rows=4:8
        SEND boundary=2 rows=4:8 to=0
        TEACH block=2 rows=4:8
        LEARN block=2 rows=4:8
        REDUCE block=2 ranks=0,1
        UPDATE block=2
    """)


def test_rows_that_another_rank_teaches_on_are_sent_first() -> None:
    assert lines_of("T0|S0|1", 4).splitlines()[:6] == [
        "PROGRAM rank=0 rows=4",
        "LOAD rows=0:4",
        "SEND boundary=0 rows=0:4 to=1",
        "TEACH block=0 rows=0:4",
        "SEND boundary=1 rows=0:4 to=2",
        "SEND boundary=1 rows=0:4 to=1",
    ]


def test_rank_without_rows_in_a_short_batch_still_reduces_and_updates() -> None:
    assert lines_of("0*3", 1) == laid_out("""
        PROGRAM rank=0 rows=1
        LOAD rows=0:1
        TEACH block=0 rows=0:1
        LEARN block=0 rows=0:1
        REDUCE block=0 ranks=0,1,2
        UPDATE block=0
        PROGRAM rank=1 rows=1
        REDUCE block=0 ranks=0,1,2
        UPDATE block=0
        PROGRAM rank=2 rows=1
        REDUCE block=0 ranks=0,1,2
        UPDATE block=0
    """)


def test_batch_that_only_accumulates_neither_reduces_nor_updates() -> None:
    assert lines_of("0*2", 2, update=False) == laid_out("""
        PROGRAM rank=0 rows=2
        LOAD rows=0:1
        TEACH block=0 rows=0:1
        LEARN block=0 rows=0:1
        PROGRAM rank=1 rows=2
        LOAD rows=1:2
        TEACH block=0 rows=1:2
        LEARN block=0 rows=1:2
    """)


def test_rank_without_a_job_has_a_program_without_actions() -> None:
    assert compile_programs(parse_plan("0|-"), 4)[1].actions == ()


def test_rows_that_lie_apart_travel_apart() -> None:
    quarter, half = Fraction(1, 4), Fraction(1, 2)
    teacher = (Share(1, quarter), Share(0, half), Share(2, quarter))
    plan = Plan(num_ranks=3, teacher=(teacher,), student=((Share(0, Fraction(1)),),))
    assert str(compile_programs(plan, 8)[0]) == laid_out("""
        PROGRAM rank=0 rows=8
        LOAD rows=2:6
        TEACH block=0 rows=2:6
        RECV boundary=0 rows=0:2 from=1
        RECV boundary=0 rows=6:8 from=2
        RECV boundary=1 rows=0:2 from=1
        RECV boundary=1 rows=6:8 from=2
        LEARN block=0 rows=0:8
        UPDATE block=0
    """)


def test_same_arguments_give_the_same_programs_from_the_cache() -> None:
    first = compile_programs(Plan.straight([1, 1]), 8, target_blocks=[1])
    assert compile_programs(Plan.straight([1, 1]), 8, target_blocks={1}) is first


@pytest.mark.parametrize("num_rows", [0, -1])
def test_batch_without_rows_is_refused(num_rows: int) -> None:
    with pytest.raises(ValueError, match=f"`num_rows` must be at least 1, but is {num_rows}"):
        compile_programs(Plan.straight([1]), num_rows)


def test_target_block_that_does_not_exist_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`target_blocks` must lie between 0 and 1, but contains \[-1, 2\]"):
        compile_programs(Plan.straight([2]), 4, target_blocks=[2, -1, 0])
