from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import TARGETS
from lightning_pipebd.planning.routing import Message, merge_rows, route, subtract_rows
from tests.helpers.plans import batches

intervals = st.builds(lambda start, length: Rows(start, start + length), st.integers(0, 20), st.integers(0, 6))


def members(parts: tuple[Rows, ...]) -> list[int]:
    return [row for rows in parts for row in range(rows.start, rows.stop)]


@given(parts=st.lists(intervals, max_size=6))
def test_merged_intervals_have_the_same_rows_once_in_order_with_gaps_between(parts: list[Rows]) -> None:
    merged = merge_rows(parts)
    assert members(merged) == sorted({row for rows in parts for row in range(rows.start, rows.stop)})
    assert all(left.stop < right.start for left, right in pairwise(merged))


@given(rows=intervals, taken=intervals)
def test_subtracted_rows_are_those_not_taken(rows: Rows, taken: Rows) -> None:
    left = [row for row in range(rows.start, rows.stop) if not taken.start <= row < taken.stop]
    assert members(subtract_rows(rows, taken)) == left


def test_boundary_travels_from_where_it_is_taught_to_where_it_is_used() -> None:
    assert route(parse_plan("0-1,T2|S2,3"), 4, target_blocks=[3]) == (
        Message(TARGETS, Rows(0, 4), sender=0, receiver=1),
        Message(2, Rows(0, 4), sender=0, receiver=1),
        Message(3, Rows(0, 4), sender=0, receiver=1),
    )


def test_labels_travel_only_for_blocks_that_read_them() -> None:
    assert route(parse_plan("0|1"), 4) == (Message(1, Rows(0, 4), sender=0, receiver=1),)


def test_rows_needed_for_two_jobs_of_a_rank_travel_once() -> None:
    # Rank 1 teaches rows 2:8 and learns rows 4:8 of block 1.
    messages = route(parse_plan("0,T1:1/4,S1:1/2|T1:3/4,S1:1/2"), 8)
    assert messages == (
        Message(1, Rows(2, 8), sender=0, receiver=1),
        Message(2, Rows(2, 4), sender=1, receiver=0),
    )


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("0*2|1*3", ["0:2 0>2", "2:3 0>3", "3:4 1>3", "4:6 1>4"]),
        ("0*3|1*2", ["0:2 0>3", "2:3 1>3", "3:4 1>4", "4:6 2>4"]),
    ],
)
def test_stages_of_different_width_exchange_the_overlaps_of_their_rows(text: str, expected: list[str]) -> None:
    messages = route(parse_plan(text), 6)
    assert [f"{rows} {sender}>{receiver}" for _, rows, sender, receiver in messages] == expected


@given(batch=batches())
def test_no_row_of_a_boundary_reaches_a_rank_twice_or_a_rank_that_makes_it(
    batch: tuple[Plan, int, frozenset[int]],
) -> None:
    plan, num_rows, target_blocks = batch
    arrived = {
        (boundary, rank): list(members((plan.teacher_rows(max(boundary - 1, 0), num_rows).get(rank, Rows(0, 0)),)))
        for boundary in range(TARGETS, plan.num_blocks + 1)
        for rank in range(plan.num_ranks)
    }
    for message in route(plan, num_rows, target_blocks=target_blocks):
        arrived[message.boundary, message.receiver] += members((message.rows,))
    assert all(len(set(rows)) == len(rows) for rows in arrived.values())
