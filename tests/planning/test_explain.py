from __future__ import annotations

from fractions import Fraction
from textwrap import dedent

import pytest

from lightning_pipebd.planning.explain import BlockTraits, Exactness, exactness_of, exactness_reasons, explain_plan
from lightning_pipebd.planning.plan import Plan, Share
from lightning_pipebd.planning.plan_text import parse_plan

PLAIN = BlockTraits(name="plain")
NORMED = BlockTraits(name="normed", has_batch_statistics=True)
SYNCHRONISED = BlockTraits(name="normed", has_batch_statistics=True, is_synchronised=True)
RANDOM = BlockTraits(name="random", is_stochastic=True)
RANDOM_SYNCHRONISED = BlockTraits(name="both", has_batch_statistics=True, is_synchronised=True, is_stochastic=True)


@pytest.mark.parametrize(
    ("text", "traits", "expected"),
    [
        ("0|1", (), Exactness.BITWISE),
        ("0|1", (NORMED, RANDOM), Exactness.BITWISE),
        ("T0|S0,1", (PLAIN, PLAIN), Exactness.BITWISE),
        ("0,T1:1/2,S1|T1:1/2", (PLAIN, NORMED), Exactness.SUMMATION),
        ("0,T1,S1:1/2|S1:1/2", (PLAIN, PLAIN), Exactness.SUMMATION),
        ("0,T1,S1:1/2|S1:1/2", (), Exactness.SUMMATION),
        ("0,1:1/2|1:1/2", (NORMED, PLAIN), Exactness.SUMMATION),
        ("0,1:1/2|1:1/2", (PLAIN, NORMED), Exactness.STATISTICS),
        ("0,1:1/2|1:1/2", (PLAIN, SYNCHRONISED), Exactness.SUMMATION),
        ("0,1:1/2|1:1/2", (PLAIN, RANDOM), Exactness.STATISTICS),
        ("0,1:1/2|1:1/2", (PLAIN, RANDOM_SYNCHRONISED), Exactness.STATISTICS),
        ("0,T1:1/2,S1|T1:1/2", (PLAIN, RANDOM), Exactness.SUMMATION),
    ],
)
def test_class_of_exactness_is_that_of_the_least_exact_block(
    text: str, traits: tuple[BlockTraits, ...], expected: Exactness
) -> None:
    assert exactness_of(parse_plan(text), traits) is expected


def test_classes_of_exactness_print_as_plain_words() -> None:
    assert [str(level) for level in Exactness] == ["bitwise", "summation", "statistics"]
    assert f"{Exactness.SUMMATION}" == "summation"


def test_every_reason_names_its_block_and_its_ranks() -> None:
    both = BlockTraits(name="both", has_batch_statistics=True, is_stochastic=True)
    reasons = exactness_reasons(parse_plan("0,1:1/2|1:1/2"), (PLAIN, both))
    assert [(reason.block, reason.exactness.value) for reason in reasons] == [
        (1, "summation"),
        (1, "statistics"),
        (1, "statistics"),
    ]
    assert [reason.sentence for reason in reasons] == [
        "block 1 (both): ranks 0, 1 share the teacher's rows; "
        "a kernel may add in another order for another number of rows (summation).",
        "block 1 (both): ranks 0, 1 share the student's rows; "
        "its batch statistics see one rank's rows only (statistics).",
        "block 1 (both): ranks 0, 1 share the student's rows; its random draws differ from one process (statistics).",
    ]


def test_explanation_of_a_fractional_plan_with_sizes() -> None:
    traits = (
        BlockTraits(name="stem", boundary_bytes_per_row=4096),
        BlockTraits(name="body", boundary_bytes_per_row=512),
        BlockTraits(name="head"),
    )
    plan = parse_plan("0,1:1/4|1:3/4,2")
    text = explain_plan(plan, traits, num_rows=64, input_bytes_per_row=1 << 20, target_blocks=[2])
    assert (
        text
        == dedent("""
        plan: 0,1:1/4|1:3/4,2 (3 blocks, 2 ranks)

        job               rank 0  rank 1
        teacher 0 (stem)  1       -
        student 0 (stem)  1       -
        teacher 1 (body)  1/4     3/4
        student 1 (body)  1/4     3/4
        teacher 2 (head)  -       1
        student 2 (head)  -       1

        relay per batch:
          rank 0 to rank 1: targets, 64 of 64 rows
          rank 0 to rank 1: boundary 1, 48 of 64 rows, 192 KiB
          rank 0 to rank 1: boundary 2, 16 of 64 rows, 8 KiB
        reduce per batch:
          block 1 (body): ranks 0, 1
        exactness: summation
          block 1 (body): ranks 0, 1 share the teacher's rows; a kernel may add in another order for another number \
of rows (summation).
          block 1 (body): ranks 0, 1 share the student's rows; their gradients are added in another order (summation).
    """).strip()
    )


def test_shares_of_a_batch_are_printed_where_its_rows_are_unknown() -> None:
    traits = (BlockTraits(name="", boundary_bytes_per_row=1536), PLAIN, PLAIN)
    lines = explain_plan(parse_plan("0,1:1/3|1:2/3,2"), traits).splitlines()
    assert "  rank 0 to rank 1: boundary 1, 2/3 of the rows, 1.5 KiB per row" in lines
    assert "  rank 0 to rank 1: boundary 2, 1/3 of the rows" in lines


def test_input_that_travels_is_counted_with_its_own_size() -> None:
    lines = explain_plan(parse_plan("T0|S0"), num_rows=2, input_bytes_per_row=3).splitlines()
    assert "  rank 0 to rank 1: boundary 0, 2 of 2 rows, 6 B" in lines
    assert "  rank 0 to rank 1: boundary 1, 2 of 2 rows" in lines


def test_rows_that_travel_apart_over_one_link_are_added_up() -> None:
    # Rank 1 imitates the first quarter of boundary 1 and reads the last one.
    quarter = Fraction(1, 4)
    student = ((Share(1, quarter), Share(0, 3 * quarter)), (Share(0, 3 * quarter), Share(1, quarter)))
    plan = Plan(num_ranks=2, teacher=((Share(0, Fraction(1)),),) * 2, student=student)
    lines = explain_plan(plan, num_rows=8).splitlines()
    assert "plan: (no text form) (2 blocks, 2 ranks)" in lines
    assert "  rank 0 to rank 1: boundary 0, 2 of 8 rows" in lines
    assert "  rank 0 to rank 1: boundary 1, 4 of 8 rows" in lines


def test_joint_plan_relays_nothing() -> None:
    assert "relay per batch: nothing" in explain_plan(Plan.joint(2, 2)).splitlines()


@pytest.mark.parametrize("traits", [(PLAIN,), (PLAIN,) * 3])
def test_traits_of_another_number_of_blocks_are_refused(traits: tuple[BlockTraits, ...]) -> None:
    with pytest.raises(ValueError, match=f"`traits` must be empty .* but has {len(traits)} entries for 2 blocks"):
        explain_plan(parse_plan("0|1"), traits)
