"""When training takes other times than were measured: what would be better now."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.drift import adjust_costs, find_better, freeze_costs
from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Kind
from tests.planning.cost_tables import constant_costs


def make_outlook() -> Outlook:
    measurement = Measurement(costs=constant_costs([(1, 3), (1, 3), (1, 3), (1, 3)]), num_rows=8)
    outlook = Outlook.find(measurement, Cluster.uniform(2), exactness="bitwise")
    assert outlook.plan == Plan.straight([2, 2])
    return outlook


def test_observed_times_scale_a_block_s_curves() -> None:
    outlook = make_outlook()
    observed = {(0, Kind.LEARN, 0, 8): 6.0, (0, Kind.TEACH, 1, 8): 0.5}
    times = adjust_costs(outlook, observed).times("default")
    assert [time.learn_ms.at(8) for time in times] == [6, 3, 3, 3]
    assert [time.teach_ms.at(4) for time in times] == [1, 0.5, 1, 1]


def test_ranks_that_share_a_job_count_equally() -> None:
    observed = {(0, Kind.LEARN, 0, 4): 3.0, (1, Kind.LEARN, 0, 4): 9.0}
    assert adjust_costs(make_outlook(), observed).times("default")[0].learn_ms.at(8) == pytest.approx(6.0)


def test_a_better_plan_is_offered_of_the_same_exactness() -> None:
    found = find_better(make_outlook(), {(0, Kind.LEARN, 0, 8): 11.0})
    assert found is not None
    present, better = found
    assert (present.plan, present.step_time_ms) == (Plan.straight([2, 2]), 16.0)
    assert (better.step_time_ms, better.exactness) == (12.0, Exactness.BITWISE)


def test_nothing_is_offered_where_nothing_is_better() -> None:
    everything = {(block // 2, kind, block, 8): 20.0 for block in range(4) for kind in (Kind.TEACH, Kind.LEARN)}
    assert find_better(make_outlook(), everything) is None
    assert find_better(make_outlook(), {(0, Kind.LEARN, 0, 8): 3.2}) is None


def test_a_frozen_block_has_no_backward_pass_no_update_and_no_gradient() -> None:
    costs = constant_costs([(1, 3), (1, 6)], update_ms=2.0, gradient_bytes=8)
    frozen = freeze_costs(costs, {1})
    assert [times.learn_ms.at(8) for times in frozen.times("default")] == [3, 2]
    assert [times.update_ms for times in frozen.times("default")] == [2, 0]
    assert [sizes.gradient_bytes for sizes in frozen.blocks] == [8, 0]


def test_a_frozen_block_s_observed_time_is_not_cut_again() -> None:
    frozen = freeze_costs(constant_costs([(1, 3), (1, 6)]), {0, 1}, is_observed={1})
    assert [times.learn_ms.at(8) for times in frozen.times("default")] == [1, 6]


def test_freezing_a_block_is_a_reason_for_another_plan() -> None:
    found = find_better(make_outlook(), {}, frozen={0, 1})
    assert found is not None
    present, better = found
    # 2 + 2 on rank 0 against 4 + 4.
    assert (present.plan, present.step_time_ms, better.step_time_ms) == (Plan.straight([2, 2]), 8.0, 6.0)


def test_noise_that_an_epoch_averages_out_hides_no_better_plan() -> None:
    outlook = make_outlook()
    noisy = replace(outlook.measurement, costs=replace(outlook.measurement.costs, noise=0.5))
    found = find_better(replace(outlook, measurement=noisy), {(0, Kind.LEARN, 0, 8): 40.0})
    assert found is not None
    assert found[1].step_time_ms < 0.9 * found[0].step_time_ms
