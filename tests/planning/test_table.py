from __future__ import annotations

from textwrap import dedent

import pytest

from lightning_pipebd.planning.clock import clock_ticks
from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import Action, Kind, Program
from lightning_pipebd.planning.table import format_table


def laid_out(text: str) -> str:
    return dedent(text).strip()


def stuck_programs() -> tuple[Program, Program]:
    """Give two ranks that both receive before they send."""
    rows = Rows(0, 4)
    return (
        Program(0, 4, (Action(Kind.LOAD, 0, rows), Action(Kind.RECV, 2, rows, 1), Action(Kind.SEND, 1, rows, 1))),
        Program(1, 4, (Action(Kind.RECV, 1, rows, 0), Action(Kind.SEND, 2, rows, 0))),
    )


def test_receive_starts_after_its_send_and_reduce_on_all_ranks_at_once() -> None:
    first, second = clock_ticks(compile_programs(parse_plan("0,1:1/4|1:3/4"), 8))
    # Rank 0: LOAD, TEACH, SEND 1, TEACH 1, LEARN 0, LEARN 1, REDUCE 1, UPDATE 0, UPDATE 1.
    assert first == (0, 1, 2, 3, 4, 5, 6, 7, 8)
    # Rank 1: RECV 1, TEACH 1, LEARN 1, REDUCE 1, UPDATE 1.
    assert second == (3, 4, 5, 6, 7)


def test_clock_stops_where_ranks_wait_for_each_other() -> None:
    assert clock_ticks(stuck_programs()) == ((0,), ())


def test_table_of_a_hybrid_plan() -> None:
    assert format_table(compile_programs(parse_plan("0*2|1"), 8, target_blocks=[1])) == laid_out("""
        step  rank 0               rank 1               rank 2
        0     LOAD 0:4             LOAD 4:8             .
        1     SEND targets 0:4 >2  SEND targets 4:8 >2  .
        2     TEACH 0 0:4          TEACH 0 4:8          .
        3     SEND 1 0:4 >2        SEND 1 4:8 >2        .
        4     LEARN 0 0:4          LEARN 0 4:8          RECV 1 0:4 <0
        5     REDUCE 0 with 0,1    REDUCE 0 with 0,1    RECV 1 4:8 <1
        6     UPDATE 0             UPDATE 0             TEACH 1 0:8
        7                                               RECV targets 0:4 <0
        8                                               RECV targets 4:8 <1
        9                                               LEARN 1 0:8
        10                                              UPDATE 1
    """)


def test_dots_show_a_rank_that_waits_for_a_round_trip() -> None:
    assert format_table(compile_programs(parse_plan("0,2|1"), 8)) == laid_out("""
        step  rank 0         rank 1
        0     LOAD 0:8       .
        1     TEACH 0 0:8    .
        2     SEND 1 0:8 >1  .
        3     LEARN 0 0:8    RECV 1 0:8 <0
        4     .              TEACH 1 0:8
        5     .              SEND 2 0:8 >0
        6     RECV 2 0:8 <1  LEARN 1 0:8
        7     TEACH 2 0:8    UPDATE 1
        8     LEARN 2 0:8
        9     UPDATE 0
        10    UPDATE 2
    """)


def test_marker_points_at_one_action_of_one_rank() -> None:
    assert format_table(compile_programs(parse_plan("0*2"), 2), marker=(0, 2)) == laid_out("""
        step  rank 0             rank 1
        0     LOAD 0:1           LOAD 1:2
        1     TEACH 0 0:1        TEACH 0 1:2
        2     LEARN 0 0:1 <--    LEARN 0 1:2
        3     REDUCE 0 with 0,1  REDUCE 0 with 0,1
        4     UPDATE 0           UPDATE 0
    """)


def test_actions_that_never_start_follow_below_the_last_step() -> None:
    assert format_table(stuck_programs(), marker=(0, 1)) == laid_out("""
        step  rank 0             rank 1
        0     LOAD 0:4           .
        -     RECV 2 0:4 <1 <--  RECV 1 0:4 <0
        -     SEND 1 0:4 >1      SEND 2 0:4 >0
    """)


def test_rank_without_actions_has_an_empty_column() -> None:
    assert format_table(compile_programs(parse_plan("-|0"), 1, update=False)) == laid_out("""
        step  rank 0  rank 1
        0             LOAD 0:1
        1             TEACH 0 0:1
        2             LEARN 0 0:1
    """)


@pytest.mark.parametrize("marker", [(0, 5), (2, 0), (0, -1)])
def test_marker_that_points_at_no_action_is_refused(marker: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="`marker` must be the rank and position of an action, but is"):
        format_table(compile_programs(parse_plan("0*2"), 2), marker=marker)
