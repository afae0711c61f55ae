"""What people are told of a plan before it runs."""

from __future__ import annotations

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.explain import BlockTraits, Exactness
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook, check_exactness
from lightning_pipebd.planning.plan import Plan, PlanError
from lightning_pipebd.planning.quantities import parse_bytes
from tests.planning.cost_tables import constant_costs

TRAITS = (BlockTraits(name="stem", has_batch_statistics=True), BlockTraits(name="middle"), BlockTraits(name="head"))


def make_measurement(whole_reason: str = "") -> Measurement:
    costs = constant_costs([(1, 3), (1, 3), (2, 6)], gradient_bytes=100, boundary_bytes=10)
    return Measurement(costs=costs, num_rows=8, traits=TRAITS, whole_reason=whole_reason)


def test_the_best_plan_is_told_beside_the_others() -> None:
    outlook = Outlook.find(make_measurement(), Cluster.uniform(2))
    assert (outlook.plan, outlook.step_time_ms, outlook.exactness) == (Plan.straight([2, 1]), 8.0, Exactness.BITWISE)
    lines = str(outlook).splitlines()
    assert lines[0] == "measured at 8 rows on default (noise 0.0%):"
    assert lines[2].split() == ["0", "(block0)", "1", "3", "0", "80", "B", "0", "B", "0", "B"]
    assert "predicted: 8 ms per step (straight plan)" in lines
    assert "  8 ms: no plan can be faster (100% of the prediction)" in lines
    assert "  joint, all blocks on every rank: none, it divides the rows of block0" in lines
    assert "  8 ms: straight, whole blocks in a row (this plan)" in lines
    assert "  16 ms: one device (2 times)" in lines
    assert "  limit: thread of rank 0" in lines
    assert "exactness: bitwise" in lines


def test_times_of_seconds_are_told_without_exponents() -> None:
    costs = constant_costs([(10_000, 33_333.3), (10_000, 33_333.3)])
    text = str(Outlook.find(Measurement(costs=costs, num_rows=8), Cluster.uniform(2)))
    assert "predicted: 43333 ms per step (straight plan)" in text
    assert "e+" not in text


def test_a_given_plan_is_told_without_others() -> None:
    text = str(Outlook(plan=Plan.straight([1, 2]), measurement=make_measurement(), cluster=Cluster.uniform(2)))
    assert "predicted: 12 ms per step (given plan)" in text
    assert "one device" not in text


def test_a_reason_not_to_divide_rows_is_obeyed_and_told() -> None:
    measurement = make_measurement("teacher block head mixes rows")
    outlook = Outlook.find(measurement, Cluster.uniform(3), exactness="summation")
    assert outlook.exactness is Exactness.BITWISE
    assert "No rows are divided: teacher block head mixes rows" in str(outlook)


def test_a_given_plan_that_does_not_fit_is_refused_with_the_numbers() -> None:
    cluster = Cluster.uniform(2, memory_limit_bytes=250)
    plan = Plan.straight([2, 1])
    with pytest.raises(PlanError, match=r"must fit the memory of every rank, but rank 0 needs [0-9,]+ of 250 bytes"):
        Outlook(plan=plan, measurement=make_measurement(), cluster=cluster).check_memory()
    Outlook(plan=plan, measurement=make_measurement(), cluster=Cluster.uniform(2)).check_memory()


@pytest.mark.parametrize(
    ("plan", "level", "message"),
    [
        (Plan.joint(3, 2), Exactness.SUMMATION, r"must be summation.*block 0 \(stem\).*\(statistics\)"),
        (Plan.hybrid([(1, 1), (2, 2)]), Exactness.BITWISE, r"must be bitwise.*block 1 \(middle\).*\(summation\)"),
    ],
)
def test_a_plan_that_is_not_exact_enough_is_refused(plan: Plan, level: Exactness, message: str) -> None:
    with pytest.raises(PlanError, match=message):
        check_exactness(plan, TRAITS, level)


def test_a_plan_that_is_exact_enough_passes() -> None:
    check_exactness(Plan.straight([1, 2]), TRAITS, Exactness.BITWISE)
    check_exactness(Plan.hybrid([(1, 1), (2, 2)]), TRAITS, Exactness.SUMMATION)


@pytest.mark.parametrize(
    ("text", "expected"), [("16GiB", 16 * 1024**3), ("1.5 MB", 1_500_000), ("2e9", 2 * 10**9), (77, 77), ("8B", 8)]
)
def test_bytes_are_read_with_their_unit(text: str | int, expected: int) -> None:
    assert parse_bytes(text, "memory") == expected


@pytest.mark.parametrize("text", ["", "GiB", "-1", "0", "3 parsec", "1.2.3", "nan"])
def test_what_is_no_number_of_bytes_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="`memory` must be bytes above 0"):
        parse_bytes(text, "memory")
