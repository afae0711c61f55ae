from __future__ import annotations

import json
from fractions import Fraction
from typing import Any

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.plan import Plan, PlanError, Rows, Share
from tests.helpers.plans import plans

HALF = Fraction(1, 2)
WHOLE = Fraction(1)


def plan_of(*shares: tuple[int, Fraction], num_ranks: int = 2) -> Plan:
    """Build a plan of one block whose teacher has these shares."""
    return Plan(num_ranks=num_ranks, teacher=[shares], student=[[(0, WHOLE)]])  # type: ignore[arg-type]  # pairs do


def test_rows_know_their_number_and_print_as_an_interval() -> None:
    assert (Rows(2, 5).num_rows, Rows(2, 5).is_empty, str(Rows(2, 5))) == (3, False, "2:5")


def test_rows_that_do_not_meet_intersect_in_nothing() -> None:
    assert Rows(0, 2).intersect(Rows(4, 6)).is_empty
    assert Rows(4, 6).intersect(Rows(0, 2)).num_rows == 0


@pytest.mark.parametrize(
    ("other", "expected"),
    [(Rows(2, 5), True), (Rows(3, 4), True), (Rows(1, 3), False), (Rows(4, 6), False), (Rows(9, 9), True)],
)
def test_rows_contain_what_lies_inside_and_whatever_is_empty(other: Rows, expected: bool) -> None:
    assert Rows(2, 5).contains(other) is expected


def test_straight_plan_gives_consecutive_blocks_to_one_rank_each() -> None:
    job = [(Share(0, WHOLE),), (Share(0, WHOLE),), (Share(1, WHOLE),)]
    assert Plan.straight([2, 1]) == Plan(num_ranks=2, teacher=tuple(job), student=tuple(job))


def test_straight_plan_may_leave_a_rank_without_a_job() -> None:
    assert Plan.straight([1, 0, 1]).student_ranks(1) == (2,)
    assert Plan.straight([1, 0, 1]).num_ranks == 3


def test_joint_plan_gives_every_rank_an_equal_part_of_every_job() -> None:
    job = (Share(0, HALF), Share(1, HALF))
    assert Plan.joint(num_blocks=3, num_ranks=2) == Plan(num_ranks=2, teacher=(job,) * 3, student=(job,) * 3)


def test_hybrid_plan_divides_the_rows_evenly_inside_a_stage() -> None:
    plan = Plan.hybrid([(1, 2), (2, 1)])
    assert plan.teacher == ((Share(0, HALF), Share(1, HALF)), (Share(2, WHOLE),), (Share(2, WHOLE),))
    assert plan.student == plan.teacher


@pytest.mark.parametrize(
    ("num_rows", "expected"),
    [
        (1, {0: Rows(0, 1), 1: Rows(1, 1), 2: Rows(1, 1)}),
        (2, {0: Rows(0, 1), 1: Rows(1, 2), 2: Rows(2, 2)}),
        (7, {0: Rows(0, 3), 1: Rows(3, 5), 2: Rows(5, 7)}),
        (9, {0: Rows(0, 3), 1: Rows(3, 6), 2: Rows(6, 9)}),
    ],
)
def test_cuts_between_ranks_are_rounded_up_and_leave_no_row_out(num_rows: int, expected: dict[int, Rows]) -> None:
    assert Plan.joint(num_blocks=1, num_ranks=3).teacher_rows(0, num_rows) == expected


def test_cuts_are_exact_where_floating_point_is_not() -> None:
    # In floating point 0.07 * 100 is a little more than 7, which would round up to 8.
    plan = plan_of((0, Fraction(7, 100)), (1, Fraction(93, 100)))
    assert plan.teacher_rows(0, 100) == {0: Rows(0, 7), 1: Rows(7, 100)}


def test_first_listed_rank_has_the_first_rows_and_owns_the_student() -> None:
    job = (Share(1, HALF), Share(0, HALF))
    plan = Plan(num_ranks=2, teacher=(job,), student=(job,))
    assert plan.student_rows(0, 4) == {1: Rows(0, 2), 0: Rows(2, 4)}
    assert (plan.owner(0), plan.student_ranks(0), plan.loading_ranks) == (1, (0, 1), (1, 0))


@pytest.mark.parametrize(
    ("teacher", "student", "expected"),
    [
        ([(0, WHOLE)], [(0, WHOLE)], (False, False)),
        ([(0, HALF), (1, HALF)], [(0, WHOLE)], (True, False)),
        ([(0, WHOLE)], [(0, HALF), (1, HALF)], (False, True)),
    ],
)
def test_plan_knows_which_side_is_split(teacher: Any, student: Any, expected: tuple[bool, bool]) -> None:
    plan = Plan(num_ranks=2, teacher=(teacher,), student=(student,))
    assert (plan.has_split_teachers, plan.has_split_students) == expected


def test_plan_made_of_lists_is_hashable_and_equal_to_one_made_of_tuples() -> None:
    plan = plan_of((0, HALF), (1, HALF))
    same = Plan(num_ranks=2, teacher=((Share(0, HALF), Share(1, HALF)),), student=((Share(0, WHOLE),),))
    assert hash(plan) == hash(same)
    assert plan == same


@pytest.mark.parametrize(
    ("shares", "message"),
    [
        ([(0, HALF)], r"`teacher\[0\]` must have shares that sum to exactly 1, but they sum to 1/2 \(rank 0: 1/2\)"),
        ([(0, HALF), (1, WHOLE)], r"sum to exactly 1, but they sum to 3/2"),
        ([], r"sum to exactly 1, but they sum to 0 \(no rank\)"),
        ([(0, WHOLE), (1, Fraction(0))], r"`teacher\[0\]` must have positive shares, but rank 1 has 0"),
        ([(0, Fraction(3, 2)), (1, -HALF)], r"must have positive shares, but rank 1 has -1/2"),
        ([(2, WHOLE)], r"`teacher\[0\]` must name ranks from 0 to 1, but names rank 2"),
        ([(-1, WHOLE)], r"must name ranks from 0 to 1, but names rank -1"),
        ([(0, HALF), (0, HALF)], r"`teacher\[0\]` must name a rank at most once, but names rank 0 twice"),
    ],
)
def test_shares_that_break_a_law_are_refused(shares: list[tuple[int, Fraction]], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        plan_of(*shares)


def test_refusal_names_the_student_job_that_is_wrong() -> None:
    good, bad = (Share(0, WHOLE),), (Share(0, HALF),)
    with pytest.raises(PlanError, match=r"`student\[1\]` must have shares that sum"):
        Plan(num_ranks=1, teacher=(good, good), student=(good, bad))


def test_float_share_is_refused_because_it_is_not_exact() -> None:
    with pytest.raises(TypeError, match=r"`teacher\[0\]` must have shares that are exact fractions.*0\.5 \(float\)"):
        plan_of((0, 0.5), (1, 0.5))  # type: ignore[arg-type]  # the refused kind


def test_rank_that_is_no_integer_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`teacher\[0\]` must name ranks by integers, but names '0'"):
        plan_of(("0", WHOLE))  # type: ignore[arg-type]  # the refused kind


def test_teacher_and_student_of_different_length_are_refused() -> None:
    with pytest.raises(PlanError, match="same number of blocks, but `teacher` has 2 and `student` has 1"):
        Plan(num_ranks=1, teacher=((Share(0, WHOLE),),) * 2, student=((Share(0, WHOLE),),))


def test_plan_without_blocks_is_refused() -> None:
    with pytest.raises(PlanError, match="must have at least one block"):
        Plan.straight([0])


def test_plan_without_ranks_is_refused() -> None:
    with pytest.raises(PlanError, match="`num_ranks` must be at least 1, but is 0"):
        Plan(num_ranks=0, teacher=((Share(0, WHOLE),),), student=((Share(0, WHOLE),),))


@pytest.mark.parametrize("stage", [(1, 0), (-1, 1)])
def test_stage_without_ranks_or_with_negative_blocks_is_refused(stage: tuple[int, int]) -> None:
    with pytest.raises(PlanError, match=r"`stages\[1\]` must have at least 0 blocks and 1 rank"):
        Plan.hybrid([(1, 1), stage])


def test_dictionary_holds_only_strings_integers_and_lists() -> None:
    assert plan_of((0, Fraction(1, 3)), (1, Fraction(2, 3))).to_dict() == {
        "num_ranks": 2,
        "teacher": [[[0, "1/3"], [1, "2/3"]]],
        "student": [[[0, "1"]]],
    }


@given(plan=plans())
def test_plan_comes_back_from_its_dictionary_through_yaml_and_json(plan: Plan) -> None:
    assert Plan.from_dict(yaml.safe_load(yaml.safe_dump(plan.to_dict()))) == plan
    assert Plan.from_dict(json.loads(json.dumps(plan.to_dict()))) == plan


def test_hand_written_yaml_needs_no_quotes() -> None:
    text = """
    num_ranks: 2
    teacher: [[[0, 1]], [[0, 1/4], [1, 3/4]]]
    student: [[[0, 1]], [[0, 0.25], [1, 0.75]]]
    """
    split = (Share(0, Fraction(1, 4)), Share(1, Fraction(3, 4)))
    jobs = ((Share(0, WHOLE),), split)
    assert Plan.from_dict(yaml.safe_load(text)) == Plan(num_ranks=2, teacher=jobs, student=jobs)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 2}, r"keys must be `num_ranks`, `teacher` and `student`, with or.*, but are .*'ranks'"),
        ({"teaches_ahead": 1}, "`teaches_ahead` must be true or false, but is 1"),
        ({"num_ranks": "2"}, "`num_ranks` must be an integer, but is '2'"),
        ({"teacher": "0"}, "`teacher` must be a list with one entry per block, but is '0'"),
        ({"teacher": [0]}, r"`teacher\[0\]` must be a list of `\[rank, share\]` pairs, but is 0"),
        ({"student": [[0]]}, r"`student\[0\]` must list pairs `\[rank, share\]`, but lists 0"),
        ({"student": [[[0, "1", 2]]]}, r"`student\[0\]` must list pairs"),
        ({"student": [[["0", "1"]]]}, r"`student\[0\]` must list pairs"),
        ({"student": [[[0, "all"]]]}, r"`student\[0\]` must have shares written as fractions, but rank 0 has 'all'"),
        ({"student": [[[0, "1/0"]]]}, "must have shares written as fractions, but rank 0 has '1/0'"),
        ({"student": [[[0, None]]]}, "must have shares written as fractions, but rank 0 has None"),
        ({"student": [[[0, "1/2"]]]}, r"`student\[0\]` must have shares that sum to exactly 1"),
    ],
)
def test_malformed_dictionary_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(PlanError, match=message):
        Plan.from_dict(Plan.straight([1]).to_dict() | change)


def test_dictionary_without_a_key_is_refused() -> None:
    with pytest.raises(PlanError, match="keys must be"):
        Plan.from_dict({"num_ranks": 1})


@given(plan=plans(max_blocks=1), num_rows=st.integers(1, 200))
def test_every_row_of_a_job_goes_to_exactly_one_rank(plan: Plan, num_rows: int) -> None:
    dealt = list(plan.teacher_rows(0, num_rows).values())
    assert [row for rows in dealt for row in range(rows.start, rows.stop)] == list(range(num_rows))


@given(share=st.fractions(Fraction(1, 8), Fraction(7, 8), max_denominator=8), num_rows=st.integers(1, 40))
def test_equal_cuts_give_equal_rows_however_the_rest_is_divided(share: Fraction, num_rows: int) -> None:
    coarse = plan_of((0, share), (1, 1 - share), num_ranks=3)
    fine = plan_of((2, share / 3), (0, share * 2 / 3), (1, 1 - share), num_ranks=3)
    assert coarse.teacher_rows(0, num_rows)[1] == fine.teacher_rows(0, num_rows)[1]
