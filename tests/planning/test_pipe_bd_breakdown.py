"""The breakdown of Pipe-BD's poster, and what our plans make of the same blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import LoaderCost
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.families import Family
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.planner import find_plan
from lightning_pipebd.planning.simulate import simulate
from tests.helpers.pipe_bd import pipe_bd_costs

IDEAL_MS = 8.31
THEIR_PLAN = Plan.straight([1, 1, 2, 2])


def test_their_plan_reaches_what_the_poster_shows() -> None:
    found = simulate(THEIR_PLAN, pipe_bd_costs(receive_occupation=1.0), Cluster.uniform(4), num_rows=256)
    assert found.busy_ms == pytest.approx((10.06, 10.50, 10.56, 6.30), abs=0.01)
    assert pytest.approx(0.78, abs=0.01) == IDEAL_MS / found.step_time_ms


def test_receiving_beside_the_computation_leaves_the_imbalance() -> None:
    found = simulate(THEIR_PLAN, pipe_bd_costs(receive_occupation=0.0), Cluster.uniform(4), num_rows=256)
    assert found.busy_ms == pytest.approx((10.06, 8.10, 9.76, 5.70))
    assert pytest.approx(0.826, abs=0.001) == IDEAL_MS / found.step_time_ms


@pytest.mark.parametrize(("may_teach_ahead", "step_time_ms"), [(False, 8.89), (True, 8.58)])
def test_whole_jobs_anywhere_remove_most_of_the_imbalance(may_teach_ahead: bool, step_time_ms: float) -> None:
    costs = pipe_bd_costs(receive_occupation=0.0)
    choice = find_plan(costs, Cluster.uniform(4), num_rows=256, exactness="bitwise", may_teach_ahead=may_teach_ahead)
    times = {candidate.family: candidate.step_time_ms for candidate in choice.alternatives}
    # The first block with its loading is heavier than a quarter of the work, so no cut of the chain helps.
    assert (times[Family.STRAIGHT], times[Family.HALF_CUT]) == pytest.approx((10.06, 10.06))
    assert choice.family is Family.SCATTERED
    # Its rows come round: with the teacher a batch ahead, nobody waits for them.
    assert choice.plan.teaches_ahead is may_teach_ahead
    assert choice.step_time_ms == pytest.approx(step_time_ms, abs=0.01)
    assert IDEAL_MS / choice.step_time_ms > (0.96 if may_teach_ahead else 0.92)


def test_data_parallel_training_of_all_blocks_is_twice_as_slow() -> None:
    costs = pipe_bd_costs(receive_occupation=0.0)
    joint = simulate(Plan.joint(6, 4), costs, Cluster.uniform(4), num_rows=256)
    straight = simulate(THEIR_PLAN, costs, Cluster.uniform(4), num_rows=256)
    assert joint.step_time_ms / straight.step_time_ms == pytest.approx(2.23, abs=0.01)


def test_kernels_whose_time_follows_the_rows_would_leave_nothing_to_gain_from_pipelines() -> None:
    costs = pipe_bd_costs(receive_occupation=0.0)
    blocks = tuple(
        replace(block, teach_ms=Curve([block.teach_ms[-1]]), learn_ms=Curve([block.learn_ms[-1]]))
        for block in costs.devices[0].blocks
    )
    costs = replace(costs, devices=(replace(costs.devices[0], blocks=blocks),), loader=LoaderCost())
    choice = find_plan(costs, Cluster.uniform(4), num_rows=256)
    assert choice.family is Family.JOINT
    assert choice.efficiency == pytest.approx(1)
