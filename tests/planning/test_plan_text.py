from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given

from lightning_pipebd.planning.plan import Plan, PlanError, Share
from lightning_pipebd.planning.plan_text import format_plan, has_text_form, parse_plan
from tests.helpers.plans import ahead_plans, plans

WHOLE = Fraction(1)
QUARTER = Fraction(1, 4)


@pytest.mark.parametrize(
    ("text", "plan"),
    [
        ("0", Plan.straight([1])),
        ("0-1|2", Plan.straight([2, 1])),
        ("0|-|1", Plan.straight([1, 0, 1])),
        ("0|-*2|1", Plan.straight([1, 0, 0, 1])),
        ("0-1*2|2-5", Plan.hybrid([(2, 2), (4, 1)])),
        ("0|1-2*3", Plan.hybrid([(1, 1), (2, 3)])),
        ("0-5*4", Plan.joint(num_blocks=6, num_ranks=4)),
    ],
)
def test_text_of_a_known_family_reads_and_prints_as_expected(text: str, plan: Plan) -> None:
    assert parse_plan(text) == plan
    assert format_plan(plan) == text


def test_letter_gives_away_one_job_of_a_block() -> None:
    plan = parse_plan("0-1,T2|S2,3")
    first, second = (Share(0, WHOLE),), (Share(1, WHOLE),)
    assert plan.teacher == (first, first, first, second)
    assert plan.student == (first, first, second, second)


def test_share_divides_a_block_between_neighbours() -> None:
    plan = parse_plan("0-1,2:1/4|2:3/4,3-5")
    assert plan.teacher[2] == (Share(0, QUARTER), Share(1, 3 * QUARTER))
    assert plan.student[2] == plan.teacher[2]


def test_share_of_a_stage_is_divided_evenly_among_its_ranks() -> None:
    plan = parse_plan("0,1:1/2*2|1:1/2")
    assert plan.teacher[0] == (Share(0, Fraction(1, 2)), Share(1, Fraction(1, 2)))
    assert plan.teacher[1] == (Share(0, QUARTER), Share(1, QUARTER), Share(2, Fraction(1, 2)))


def test_teacher_and_student_of_one_block_may_have_different_shares() -> None:
    plan = parse_plan("0,T1:1/4,S1:3/4|T1:3/4,S1:1/4")
    assert plan.teacher[1] == (Share(0, QUARTER), Share(1, 3 * QUARTER))
    assert plan.student[1] == (Share(0, 3 * QUARTER), Share(1, QUARTER))


@pytest.mark.parametrize(
    "text",
    [
        "0-1,2:1/4|2:3/4,3-5",
        "0-1,T2|S2,3",
        "0,1:1/2*2|1:1/2",
        "0-1,S3|T2-3|S2",
        "T0-3|S0-3",
        "T0:1/2,S0|T0:1/2,1",
        "ahead 0,2|1",
    ],
)
def test_canonical_text_prints_as_it_was_read(text: str) -> None:
    assert format_plan(parse_plan(text)) == text


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        (" 0 - 1 , T 2 |\tS2 , 3 : 1 / 1 ", "0-1,T2|S2,3"),
        ("2,0,1|3", "0-2|3"),
        ("T0,S0|1", "0|1"),
        ("0:2/4|0:1/2", "0*2"),
        ("0-1*1|2", "0-1|2"),
        (" ahead\t0,2 |1", "ahead 0,2|1"),
    ],
)
def test_other_ways_to_write_a_plan_print_in_canonical_form(text: str, canonical: str) -> None:
    assert format_plan(parse_plan(text)) == canonical


def test_joint_needs_only_the_number_of_ranks_where_blocks_are_known() -> None:
    assert parse_plan(" joint * 4 ", num_blocks=6) == Plan.joint(num_blocks=6, num_ranks=4)


@given(plan=plans(is_ascending=True))
def test_plan_with_ascending_ranks_comes_back_from_its_text(plan: Plan) -> None:
    assert parse_plan(format_plan(plan), num_blocks=plan.num_blocks) == plan


@given(plan=ahead_plans())
def test_plan_that_teaches_ahead_comes_back_from_its_text_and_its_dictionary(plan: Plan) -> None:
    assert plan.teaches_ahead
    assert parse_plan(format_plan(plan), num_blocks=plan.num_blocks) == Plan.from_dict(plan.to_dict()) == plan


@given(plan=plans())
def test_plan_has_a_text_form_exactly_when_its_ranks_ascend(plan: Plan) -> None:
    ascending = all([rank for rank, _ in job] == sorted(rank for rank, _ in job) for job in plan.teacher + plan.student)
    assert has_text_form(plan) is ascending


def test_plan_in_another_row_order_has_no_text_form() -> None:
    job = (Share(1, WHOLE / 2), Share(0, WHOLE / 2))
    with pytest.raises(PlanError, match=r"ascending order to have a text form.*`plan.to_dict\(\)` to a YAML file"):
        format_plan(Plan(num_ranks=2, teacher=(job,), student=(job,)))


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0|x|1", "token 'x' at character 3 is not understood"),
        ("0, 1;2 |3", "token '1;2' at character 4 is not understood"),
        ("0||1", "token '' at character 3 is not understood"),
        ("", "token '' at character 1 is not understood"),
        ("0,", "token '' at character 3 is not understood"),
        ("0 1|2", "token '0 1' at character 1 is not understood"),
        ("t0|S0", "token 't0' at character 1 is not understood"),
        ("0,-", "token '-' at character 3 is not understood"),
        ("0:0.5|0:0.5", r"token '0:0\.5' at character 1 is not understood"),
        ("0*2,1", "token '2,1' at character 3 is not a number of ranks"),
        ("0|1*0", "token '0' at character 5 is not a number of ranks"),
        ("0|1*", "token '' at character 5 is not a number of ranks"),
        ("0|3-1", "token '3-1' at character 3 ends before it starts"),
        ("0:5/4", "token '0:5/4' at character 1 has a share that is not above 0 and at most 1"),
        ("0:0|0", "token '0:0' at character 1 has a share that is not above 0"),
        ("0:1/0|0", "token '0:1/0' at character 1 has a share that is not above 0"),
        ("ahead 0,2|x", r"token 'x' at character 11 is not understood \(in 'ahead 0,2\|x'\)"),
        ("ahead0|1", "token 'ahead0' at character 1 is not understood"),
        ("ahead joint", "token 'joint' at character 7 is not understood"),
        ("ahead 0*2", "`teaches_ahead` must be false for a plan that divides the rows of a job, but is true"),
        ("0|1,T1", "token 'T1' at character 5 names the teacher of block 1 twice"),
        ("0:1/2,S0:1/2|0:1/2", "token 'S0:1/2' at character 7 names the student of block 0 twice"),
    ],
)
def test_token_that_is_not_understood_is_named_with_its_position(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(text)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("0|2", "name every block from 0 to 2, but block 1 is missing"),
        ("-", "must name blocks, but is '-'"),
        ("0|0-1", r"give away the student of block 0 exactly once, but its shares sum to 2 \(rank 0: 1, rank 1: 1"),
        ("0:1/4|0:1/4", r"give away the student of block 0 exactly once, but its shares sum to 1/2"),
        ("0,T1", "must give away the student of block 1, but names only its other job .* Add `S1` to a stage"),
        ("0,S1", "must give away the teacher of block 1, but names only its other job"),
        ("joint", "must say how many ranks are joint, but is 'joint'. Write for example `joint.4`"),
        ("jointly", "must say how many ranks are joint, but is 'jointly'"),
        ("joint*2", r"must name its blocks where their number is not known.*`num_blocks`.*`0-3\*2`"),
    ],
)
def test_text_that_describes_no_plan_is_refused(text: str, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        parse_plan(text)


def test_joint_on_no_rank_is_refused() -> None:
    with pytest.raises(PlanError, match="must have at least 1 rank"):
        parse_plan("joint*0", num_blocks=2)


def test_block_the_models_do_not_have_is_refused() -> None:
    with pytest.raises(PlanError, match=r"must name blocks from 0 to 2, but names block 3 .* models have 3 blocks"):
        parse_plan("0-1|2-3", num_blocks=3)


def test_plan_that_leaves_out_the_last_blocks_is_refused() -> None:
    with pytest.raises(PlanError, match="name every block from 0 to 3, but block 2 is missing"):
        parse_plan("0|1", num_blocks=4)
