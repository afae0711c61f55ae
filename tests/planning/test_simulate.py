from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from itertools import pairwise
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.bounds import find_bounds
from lightning_pipebd.planning.buckets import BUCKET_BYTES
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable, LinkCost, LoaderCost, Overheads
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import Kind
from lightning_pipebd.planning.simulate import Simulation, TimelineSpan, simulate
from tests.helpers.plans import plans
from tests.planning.cost_tables import constant_costs, random_costs

#: (kind, start, stop) of one action.
Line = tuple[str, float, float]


def run(text: str, costs: CostTable, *, num_rows: int = 8, num_steps: int = 32, max_in_flight: int = 2) -> Simulation:
    plan = parse_plan(text)
    cluster = Cluster.uniform(plan.num_ranks)
    return simulate(plan, costs, cluster, num_rows=num_rows, num_steps=num_steps, max_in_flight=max_in_flight)


def lines(simulation: Simulation, *, rank: int, step: int) -> list[Line]:
    spans = [span for span in simulation.timeline if (span.rank, span.step) == (rank, step)]
    return [(str(span.action.kind), span.start_ms, span.stop_ms) for span in spans]


def spans_of(simulation: Simulation, kind: Kind, *, rank: int) -> list[TimelineSpan]:
    return [span for span in simulation.timeline if span.rank == rank and span.action.kind is kind]


TWO_BLOCKS = constant_costs([(1, 2), (1, 4)], update_ms=0.25, link=LinkCost(latency_ms=0.5))


def test_two_ranks_and_three_steps_by_hand() -> None:
    found = run("0|1", TWO_BLOCKS, num_steps=3)
    first = [[("LOAD", 0), ("TEACH", 1), ("SEND", 1), ("LEARN", 3), ("UPDATE", 3.25)]] * 3
    assert [[(kind, stop) for kind, _, stop in lines(found, rank=0, step=step)] for step in range(3)] == [
        [(kind, stop + 3.25 * step) for kind, stop in row] for step, row in enumerate(first)
    ]
    assert [lines(found, rank=1, step=step) for step in range(3)] == [
        [("RECV", 0, 1.5), ("TEACH", 1.5, 2.5), ("LEARN", 2.5, 6.5), ("UPDATE", 6.5, 6.75)],
        [("RECV", 6.75, 6.75), ("TEACH", 6.75, 7.75), ("LEARN", 7.75, 11.75), ("UPDATE", 11.75, 12)],
        [("RECV", 12, 12), ("TEACH", 12, 13), ("LEARN", 13, 17), ("UPDATE", 17, 17.25)],
    ]
    assert (found.step_time_ms, found.fill_ms) == (5.25, 1.5)
    assert found.busy_ms == (3.25, 5.25)
    assert found.utilisation == (3.25 / 5.25, 1.0)
    assert found.bubble_fraction == pytest.approx((1 - 3.25 / 5.25) / 2)


def test_sender_waits_for_the_delivery_of_the_step_that_many_steps_ago() -> None:
    found = run("0|1", TWO_BLOCKS, num_steps=6, max_in_flight=1)
    # Step 4 leaves when step 3 has been taken, at the begin of step 3 on rank 1 at 17.25; half a ms later it is there.
    assert [span.wait_ms for span in spans_of(found, Kind.SEND, rank=0)] == [0, 0, 0, 0, 0, 0.5]
    assert spans_of(found, Kind.SEND, rank=0)[-1].stop_ms == 17.75


def test_rank_runs_ahead_by_the_queue_and_what_is_on_its_way() -> None:
    found = run("0|1", constant_costs([(0, 1), (0, 10)]), num_steps=20, max_in_flight=3)
    begins = [span.start_ms for span in spans_of(found, Kind.TEACH, rank=1)]
    sends = [span.stop_ms for span in spans_of(found, Kind.SEND, rank=0)]
    ahead = [sum(begin <= sent for begin in begins) for sent in sends]
    # While rank 1 works on one step, three later ones are on its shelf or in its hand, and three more under way.
    assert max(step + 1 - begun for step, begun in enumerate(ahead)) == 6


def test_way_out_carries_one_transfer_after_another() -> None:
    costs = constant_costs([(1, 0), (0, 1)], boundary_bytes=10, link=LinkCost(bytes_per_ms=20))
    found = run("0|1*2", costs, num_steps=2)
    assert [lines(found, rank=rank, step=0)[0] for rank in (1, 2)] == [("RECV", 0, 3), ("RECV", 0, 5)]
    assert found.traffic_bytes == {(0, 1): 40, (0, 2): 40}


def test_reduction_runs_beside_later_students_and_ends_before_the_updates() -> None:
    costs = constant_costs([(1, 2), (1, 4)], update_ms=0.25, gradient_bytes=BUCKET_BYTES, link=LinkCost(latency_ms=1.5))
    found = run("0-1*2", costs, num_steps=2)
    # Each REDUCE takes 3: the first is over when the second block has been learned, the second is waited for.
    assert lines(found, rank=1, step=0)[1:] == [
        ("TEACH", 0, 1),
        ("LEARN", 1, 3),
        ("REDUCE", 3, 3),
        ("TEACH", 3, 4),
        ("LEARN", 4, 8),
        ("REDUCE", 8, 8),
        ("UPDATE", 8, 11.25),
        ("UPDATE", 11.25, 11.5),
    ]
    assert found.step_time_ms == 11.5
    assert spans_of(found, Kind.UPDATE, rank=0)[0].wait_ms == 3


def test_small_gradients_are_summed_with_those_of_the_last_block() -> None:
    link = LinkCost(latency_ms=1, bytes_per_ms=8, reduce_occupation=0.5)
    costs = constant_costs([(0, 2), (0, 4), (0, 1)], gradient_bytes=8, link=link)
    found = run("0-2*2", replace(costs, overheads=Overheads(reduce_ms=0.25)), num_steps=2)
    # The sum takes 2 hops of half of 24 bytes: 5, of which 2.5 occupy the ranks, and the price of one REDUCE.
    assert [(span.start_ms, span.stop_ms) for span in spans_of(found, Kind.REDUCE, rank=0)[:3]] == [
        (2, 2),
        (6, 6),
        (7, 9.75),
    ]
    assert found.step_time_ms == 12


def test_reduction_waits_for_its_last_rank() -> None:
    costs = constant_costs([(0, 1), (0, 2)], link=LinkCost(latency_ms=0.5))
    found = run("0,1:1/2|1:1/2", costs, num_steps=2)
    # Rank 0 learns block 1 from 1 to 3, rank 1 gets boundary 1 at 0.5 and is done at 2.5.
    assert [spans_of(found, Kind.UPDATE, rank=rank)[0].stop_ms for rank in (0, 1)] == [4, 4]


def test_occupation_takes_time_of_the_threads() -> None:
    link = LinkCost(latency_ms=1, bytes_per_ms=8, send_occupation=0.5, receive_occupation=0.25)
    found = run("0|1", constant_costs([(1, 1), (1, 1)], boundary_bytes=1, link=link), num_steps=2)
    # A transfer takes 2: it starts with SEND at 1, holds rank 0 until 2, arrives at 3 and holds rank 1 until 3.5.
    assert lines(found, rank=0, step=0)[2] == ("SEND", 1, 2)
    assert lines(found, rank=1, step=0)[0] == ("RECV", 0, 3.5)


def test_reduction_occupies_what_its_link_says() -> None:
    link = LinkCost(latency_ms=1, reduce_occupation=0.5)
    found = run("0*2", constant_costs([(0, 1)], link=link), num_steps=2)
    assert lines(found, rank=0, step=0)[-2:] == [("REDUCE", 1, 2), ("UPDATE", 2, 3)]


def test_loader_with_workers_loads_ahead_and_without_them_in_the_thread() -> None:
    loader = LoaderCost(fixed_ms=2, per_row_ms=0.5)
    beside = run("0", constant_costs([(1, 2)], loader=loader))
    inside = run("0", constant_costs([(1, 2)], loader=replace(loader, occupation=1.0)))
    assert (beside.step_time_ms, beside.busy_ms) == (6, (3,))
    assert (inside.step_time_ms, inside.busy_ms) == (9, (9,))


def test_overheads_are_paid_per_step_and_per_action() -> None:
    overheads = Overheads(
        step_ms=64, load_ms=1, recv_ms=2, teach_ms=4, send_ms=8, learn_ms=16, reduce_ms=32, update_ms=128
    )
    costs = replace(constant_costs([(0, 0), (0, 0)]), overheads=overheads)
    assert run("0|1", costs).busy_ms == (64 + 1 + 4 + 8 + 16 + 128, 64 + 2 + 4 + 16 + 128)
    # Both blocks are one sum.
    assert run("0-1*2", costs).busy_ms == (64 + 1 + 2 * (4 + 16 + 128) + 32,) * 2


def test_links_between_nodes_have_their_own_cost() -> None:
    costs = replace(TWO_BLOCKS, other_node=LinkCost(latency_ms=3))
    plan = Plan.straight([1, 1])
    cluster = Cluster.uniform(2, ranks_per_node=1)
    assert simulate(plan, costs, cluster, num_rows=8).timeline[0].start_ms == 0
    receives = spans_of(simulate(plan, costs, cluster, num_rows=8), Kind.RECV, rank=1)
    assert receives[0].stop_ms == 4


def test_unequal_devices_have_their_own_times() -> None:
    costs = random_costs(Random(1), 2, device_classes=("a", "b"), has_links=False)
    times = {
        name: [simulate(Plan.straight([2]), costs, Cluster.uniform(1, device_class=name), num_rows=4)] for name in "ab"
    }
    assert times["a"][0].step_time_ms != times["b"][0].step_time_ms


def test_rank_without_job_is_idle() -> None:
    found = run("0|-", constant_costs([(1, 2)]))
    assert (found.utilisation, found.bubble_fraction) == ((1.0, 0.0), 0.5)


def test_costs_of_nothing_take_no_time() -> None:
    found = run("0|1", constant_costs([(0, 0), (0, 0)]))
    assert (found.step_time_ms, found.utilisation, found.bubble_fraction) == (0, (0, 0), 1)


straight_plans = st.lists(st.integers(1, 2), min_size=2, max_size=4)


@settings(max_examples=40)
@given(sizes=straight_plans, seed=st.integers(0, 10**6), depth=st.integers(1, 4))
def test_deeper_queue_is_never_slower(sizes: list[int], seed: int, depth: int) -> None:
    costs, cluster = random_costs(Random(seed), sum(sizes)), Cluster.uniform(len(sizes))
    shallow, deep = (
        simulate(Plan.straight(sizes), costs, cluster, num_rows=16, max_in_flight=number).timeline[-1].stop_ms
        for number in (depth, depth + 1)
    )
    assert deep <= shallow * (1 + 1e-9)


@settings(max_examples=40)
@given(sizes=straight_plans, seed=st.integers(0, 10**6))
def test_faster_link_is_never_slower(sizes: list[int], seed: int) -> None:
    costs, cluster = random_costs(Random(seed), sum(sizes)), Cluster.uniform(len(sizes))
    faster = replace(costs, same_node=replace(costs.same_node, latency_ms=0, bytes_per_ms=10**9))
    slow, fast = (simulate(Plan.straight(sizes), table, cluster, num_rows=16) for table in (costs, faster))
    assert fast.step_time_ms <= slow.step_time_ms * (1 + 1e-9)


@settings(max_examples=150)
@given(
    plan=plans(max_ranks=4, max_blocks=4),
    num_rows=st.integers(1, 16),
    seed=st.integers(0, 10**6),
    depth=st.integers(1, 3),
)
def test_no_plan_beats_the_bounds_or_uses_a_rank_twice(plan: Plan, num_rows: int, seed: int, depth: int) -> None:
    rng = Random(seed)
    costs = random_costs(rng, plan.num_blocks)
    cluster = Cluster.uniform(plan.num_ranks, ranks_per_node=rng.randint(1, 4))
    found = simulate(plan, costs, cluster, num_rows=num_rows, num_steps=8, max_in_flight=depth)
    bounds = find_bounds(costs, cluster, num_rows=num_rows)
    assert found.step_time_ms >= bounds.step_time_ms * (1 - 1e-9)
    assert max(found.utilisation) <= 1 + 1e-9
    assert found.fill_ms >= 0
    for rank in range(plan.num_ranks):
        spans = [span for span in found.timeline if span.rank == rank]
        assert all(earlier.stop_ms <= later.start_ms for earlier, later in pairwise(spans))
        assert all(0 <= span.wait_ms <= span.stop_ms - span.start_ms + 1e-9 for span in spans)


@settings(max_examples=100)
@given(
    plan=plans(max_ranks=4, max_blocks=4),
    num_rows=st.integers(1, 16),
    seed=st.integers(0, 10**6),
    depth=st.integers(1, 3),
)
def test_nothing_is_received_before_it_could_arrive_or_too_early(
    plan: Plan, num_rows: int, seed: int, depth: int
) -> None:
    costs = random_costs(Random(seed), plan.num_blocks)
    cluster = Cluster.uniform(plan.num_ranks)
    found = simulate(plan, costs, cluster, num_rows=num_rows, num_steps=6, max_in_flight=depth)
    sends = {
        (span.step, span.rank, span.action.peer, span.action.index, span.action.rows): span.start_ms + span.wait_ms
        for span in found.timeline
        if span.action.kind is Kind.SEND
    }
    receives = [span for span in found.timeline if span.action.kind is Kind.RECV]
    assert len(receives) == len(sends)
    for span in receives:
        action = span.action
        sent = sends[span.step, action.peer, span.rank, action.index, action.rows]
        assert span.start_ms + span.wait_ms >= sent + costs.same_node.latency_ms * (1 - 1e-9)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: run("0|1|2", TWO_BLOCKS), CostError, "`costs` must describe the plan's 3 blocks, but describe 2"),
        (
            lambda: simulate(Plan.straight([1, 1]), TWO_BLOCKS, Cluster.uniform(3), num_rows=8),
            CostError,
            "`cluster` must have the plan's 2 ranks, but has 3",
        ),
        (
            lambda: simulate(Plan.straight([2]), TWO_BLOCKS, Cluster.uniform(1, device_class="x"), num_rows=8),
            CostError,
            "`device_class` must be one of default, but is 'x'",
        ),
        (lambda: run("0|1", TWO_BLOCKS, num_steps=1), ValueError, "`num_steps` must be at least 2, but is 1"),
        (lambda: run("0|1", TWO_BLOCKS, max_in_flight=0), ValueError, "`max_in_flight` must be at least 1, but is 0"),
        (lambda: run("0|1", TWO_BLOCKS, num_rows=0), ValueError, "`num_rows` must be at least 1, but is 0"),
    ],
)
def test_what_does_not_fit_together_is_refused(
    call: Callable[[], object], error: type[ValueError], message: str
) -> None:
    with pytest.raises(error, match=message):
        call()
