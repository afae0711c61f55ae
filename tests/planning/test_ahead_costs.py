"""What plans whose teacher blocks work one batch ahead take, and what they hold."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.ahead import compile_ahead, steady_programs
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import BlockSizes, CostTable, LinkCost
from lightning_pipebd.planning.explain import explain_plan
from lightning_pipebd.planning.families import Family
from lightning_pipebd.planning.judge import Judge
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.memory import MemoryUse, rank_memory
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.planner import find_plan
from lightning_pipebd.planning.simulate import simulate
from tests.helpers.plans import ahead_plans, whole_jobs
from tests.planning.cost_tables import constant_costs

THERE_AND_BACK = whole_jobs([0, 1, 0], [0, 1, 0])
#: Both ranks have 8 ms of work, and rank 0's rows take 6 ms to come back.
COSTS = constant_costs([(1, 3), (5, 3), (1, 3)], link=LinkCost(latency_ms=0.5))


def test_rank_learns_while_its_rows_come_round() -> None:
    ahead = simulate(THERE_AND_BACK, COSTS, Cluster.uniform(2), num_rows=8)
    assert ahead.step_time_ms == pytest.approx(8.0)
    assert ahead.utilisation == pytest.approx((1.0, 1.0))
    # Within a batch rank 0 has 3 ms of learning for them.
    alone = simulate(THERE_AND_BACK, COSTS, Cluster.uniform(2), num_rows=8, has_momentum=True)
    assert alone.step_time_ms == pytest.approx(11.0)


def test_second_step_by_hand() -> None:
    found = simulate(THERE_AND_BACK, COSTS, Cluster.uniform(2), num_rows=8, num_steps=3)
    spans = [
        [(str(span.action).partition(" rows")[0], span.start_ms + span.wait_ms, span.stop_ms) for span in own]
        for own in ([span for span in found.timeline if (span.rank, span.step) == (rank, 1)] for rank in (0, 1))
    ]
    assert spans[0] == [
        ("LOAD", 8.0, 8.0),
        ("TEACH block=0", 8.0, 9.0),
        ("SEND boundary=1", 9.0, 9.0),
        ("LEARN block=0", 9.0, 12.0),
        ("LEARN block=2", 12.0, 15.0),
        ("RECV boundary=2", 15.0, 15.0),
        ("TEACH block=2", 15.0, 16.0),
        ("UPDATE block=0", 16.0, 16.0),
        ("UPDATE block=2", 16.0, 16.0),
    ]
    assert spans[1] == [
        ("RECV boundary=1", 9.5, 9.5),
        ("TEACH block=1", 9.5, 14.5),
        ("SEND boundary=2", 14.5, 14.5),
        ("LEARN block=1", 14.5, 17.5),
        ("UPDATE block=1", 17.5, 17.5),
    ]


def test_what_a_student_block_waits_for_was_sent_in_the_step_before() -> None:
    # Rank 0 alone is slow: what rank 1 made of a batch is there long before rank 0 learns from it.
    costs = constant_costs([(1, 1), (1, 9)], link=LinkCost(latency_ms=2))
    found = simulate(whole_jobs([0, 1], [1, 0]), costs, Cluster.uniform(2), num_rows=8)
    assert found.step_time_ms == pytest.approx(10.0)


@settings(max_examples=40, deadline=None)
@given(plan=ahead_plans(), max_in_flight=st.integers(1, 3))
def test_simulated_steps_end_and_are_never_faster_than_the_busiest_rank(plan: Plan, max_in_flight: int) -> None:
    costs = constant_costs([(1, 3), (2, 2), (3, 1), (1, 2), (2, 4), (1, 1)][: plan.num_blocks])
    found = simulate(plan, costs, Cluster.uniform(plan.num_ranks), num_rows=8, max_in_flight=max_in_flight)
    assert found.step_time_ms >= max(found.busy_ms) - 1e-9


def sized_costs() -> CostTable:
    blocks = tuple(BlockSizes(name=name, learn_bytes_per_row=50) for name in "abc")
    return replace(COSTS, blocks=blocks, boundary_bytes_per_row=(1, 10, 100, 1000), target_bytes_per_row=2)


def test_boundaries_of_student_blocks_are_held_from_one_step_to_the_next() -> None:
    first, second = steady_programs(THERE_AND_BACK, 10)
    # Of both batches: 0 to 3. While block 0 learns: those of its batch, boundaries 0 and 1 of the next, and 50 a row.
    assert rank_memory(THERE_AND_BACK, first, sized_costs()) == MemoryUse(0, 10 * (1111 + 11) + 500 + 0, 2 * 10 * 110)
    # Rank 1 keeps boundaries 1 and 2 of each batch, and nothing else.
    assert rank_memory(THERE_AND_BACK, second, sized_costs()).working_bytes == 2 * 10 * 110 + 500


def test_what_was_sent_a_step_ago_is_in_the_queue_beside_what_comes_early() -> None:
    plan = whole_jobs([0, 1], [1, 0])
    received = rank_memory(plan, steady_programs(plan, 10)[0], sized_costs_of_two(), max_in_flight=2).queue_bytes
    # Boundary 2 stays for a third step; boundaries 0 and 1 are sent.
    assert received == 10 * (3 * 100 + 2 * (1 + 10))


def sized_costs_of_two() -> CostTable:
    costs = constant_costs([(1, 1), (1, 1)])
    return replace(costs, boundary_bytes_per_row=(1, 10, 100))


@pytest.mark.parametrize(
    ("options", "is_ahead", "step_time_ms"),
    [
        ({}, False, 10.0),
        ({"may_teach_ahead": True}, True, 9.0),
        ({"may_teach_ahead": True, "has_momentum": True}, False, 12.0),
    ],
)
def test_planner_teaches_ahead_where_it_may_unless_the_teacher_has_momentum(
    options: dict[str, bool], is_ahead: bool, step_time_ms: float
) -> None:
    costs = constant_costs([(2, 1), (2, 7), (2, 4)])
    found = find_plan(costs, Cluster.uniform(2), num_rows=8, exactness="bitwise", **options)
    assert found.step_time_ms == pytest.approx(step_time_ms)
    assert found.plan.teaches_ahead is is_ahead
    assert not is_ahead or found.family is Family.SCATTERED


def test_given_plan_of_a_momentum_teacher_has_the_price_of_its_own_programs() -> None:
    judge = Judge(costs=COSTS, cluster=Cluster.uniform(2), num_rows=8)
    assert judge.judge(THERE_AND_BACK).step_time_ms == pytest.approx(8.0)
    assert replace(judge, has_momentum=True).judge(THERE_AND_BACK).step_time_ms == pytest.approx(11.0)


@pytest.mark.parametrize(("has_momentum", "step_time_ms"), [(False, 8.0), (True, 11.0)])
def test_outlook_foresees_explains_and_draws_what_the_programs_do(has_momentum: bool, step_time_ms: float) -> None:
    measurement = Measurement(costs=COSTS, num_rows=8, has_momentum=has_momentum)
    outlook = Outlook(plan=THERE_AND_BACK, measurement=measurement, cluster=Cluster.uniform(2))
    assert outlook.step_time_ms == pytest.approx(step_time_ms)
    assert ("teacher blocks work one batch ahead" in str(outlook)) is not has_momentum
    assert any(span.action.is_next for span in outlook.simulate(2).timeline) is not has_momentum  # type: ignore[union-attr]


def test_explanation_says_who_works_ahead() -> None:
    assert "\nteacher blocks work one batch ahead: rows come round" in explain_plan(THERE_AND_BACK)
    assert "ahead" not in explain_plan(Plan.straight([1, 2]))


def test_first_step_of_an_epoch_has_twice_the_teacher_and_the_last_one_none() -> None:
    first = compile_ahead(THERE_AND_BACK, 8, num_next_rows=8)
    last = compile_ahead(THERE_AND_BACK, 8, is_taught=True)
    counts = [sum(str(action).startswith("TEACH") for action in programs[0].actions) for programs in (first, last)]
    assert counts == [4, 0]
