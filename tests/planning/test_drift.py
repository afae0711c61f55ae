"""When training takes other times than were measured: what would be better now."""

from __future__ import annotations

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.drift import adjust_costs, find_better
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
