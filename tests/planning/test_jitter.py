from __future__ import annotations

from dataclasses import replace
from random import Random
from statistics import fmean

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import BlockTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.jitter import expected_latest_ms, lateness
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.planner import find_plan
from lightning_pipebd.planning.simulate import simulate
from tests.planning.cost_tables import constant_costs

ARRIVALS = st.lists(st.tuples(st.floats(0, 1e6), st.floats(0, 1e4)), min_size=1, max_size=8)


@pytest.mark.parametrize("arrivals", [[(0, 1)] * 2, [(0, 1)] * 8, [(0, 4), (1, 1)], [(5, 1), (5, 9), (4, 25), (0, 1)]])
def test_expected_latest_is_that_of_many_draws(arrivals: list[tuple[float, float]]) -> None:
    rng = Random(0)
    seen = fmean(max(rng.gauss(mean, variance**0.5) for mean, variance in arrivals) for _ in range(20_000))
    assert expected_latest_ms(arrivals) == pytest.approx(seen, abs=0.08)


@given(arrivals=ARRIVALS, seed=st.integers(0, 100))
def test_latest_is_never_before_any_rank_and_knows_no_order(arrivals: list[tuple[float, float]], seed: int) -> None:
    latest = expected_latest_ms(arrivals)
    assert latest >= max(mean for mean, _ in arrivals) * (1 - 1e-12)
    assert expected_latest_ms(Random(seed).sample(arrivals, len(arrivals))) == latest


@given(times=st.lists(st.floats(0, 1e6), min_size=1))
def test_without_variance_the_latest_is_the_last(times: list[float]) -> None:
    assert expected_latest_ms([(time, 0.0) for time in times]) == pytest.approx(max(times), rel=1e-12)


def test_time_of_day_does_not_matter() -> None:
    assert expected_latest_ms([(1e9, 2.0), (1e9, 2.0)]) - 1e9 == pytest.approx(expected_latest_ms([(0, 2), (0, 2)]))


def step_ms(text: str, jitter_ms: float, *, shape: list[tuple[float, float]]) -> float:
    plan = parse_plan(text)
    costs = replace(constant_costs(shape), jitter_ms=jitter_ms)
    return simulate(plan, costs, Cluster.uniform(plan.num_ranks), num_rows=8).step_time_ms


def test_joint_plan_waits_once_a_step_for_the_last_rank() -> None:
    # Work of 100 ms with a standard deviation of 5 ms; how many blocks it is divided into does not matter.
    assert step_ms("0*2", 0.25, shape=[(40, 60)]) == pytest.approx(100 + 5 * lateness(2))
    assert step_ms("0-3*2", 0.25, shape=[(10, 15)] * 4) == pytest.approx(100 + 5 * lateness(2))
    assert step_ms("0*4", 0.25, shape=[(40, 60)]) == pytest.approx(100 + 5 * lateness(4))


def test_plan_that_shares_no_student_waits_for_nobody() -> None:
    assert step_ms("0|1", 0.25, shape=[(40, 60)] * 2) == 100


def test_waiting_that_later_work_hides_costs_nothing() -> None:
    # Both ranks share block 0, and rank 1 learns another block before it needs the sum.
    shape: list[tuple[float, float]] = [(0, 10), (0, 60)]
    assert step_ms("0:1/2|0:1/2,1", 0.25, shape=shape) == 70


def test_planner_leaves_plans_that_wait_when_ranks_are_unsteady() -> None:
    def proportional(teach_ms: float, learn_ms: float) -> BlockTimes:
        return BlockTimes(teach_ms=Curve([(8, teach_ms)]), learn_ms=Curve([(8, learn_ms)]))

    costs = constant_costs([(0, 0)] * 2)
    blocks = (proportional(10, 40), proportional(10, 44))
    costs = replace(costs, devices=(replace(costs.devices[0], blocks=blocks),))
    found = [
        find_plan(replace(costs, jitter_ms=jitter_ms), Cluster.uniform(2), num_rows=8, exactness="summation").plan
        for jitter_ms in (0.0, 4.0)
    ]
    assert found[0] == Plan.joint(2, 2)
    assert not found[1].has_split_students
