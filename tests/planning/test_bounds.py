from __future__ import annotations

from collections.abc import Sequence
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.bounds import Bounds, find_bounds
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes, LinkCost, LoaderCost
from lightning_pipebd.planning.curve import Curve
from tests.planning.cost_tables import constant_costs


def costs_of_classes(times: Sequence[Sequence[float]]) -> CostTable:
    """Give classes `a`, `b`, ... whose student blocks take these times for 8 rows, in proportion to rows."""
    return CostTable(
        blocks=tuple(BlockSizes(name=str(block)) for block in range(len(times[0]))),
        devices=tuple(
            DeviceTimes(
                device_class=name,
                blocks=tuple(BlockTimes(teach_ms=Curve([(8, 0)]), learn_ms=Curve([(8, ms)])) for ms in blocks),
            )
            for name, blocks in zip("abc", times, strict=False)
        ),
        boundary_bytes_per_row=(0,) * (len(times[0]) + 1),
    )


def cluster_of(classes: str) -> Cluster:
    return Cluster(device_class=tuple(classes), node=(0,) * len(classes), memory_limit_bytes=(None,) * len(classes))


def test_work_is_spread_evenly_at_the_best_measured_rate() -> None:
    times = BlockTimes(teach_ms=Curve([(2, 1), (8, 8)]), learn_ms=Curve([(2, 4), (8, 12)]), update_ms=1)
    costs = CostTable(
        blocks=(BlockSizes(name="only"),),
        devices=(DeviceTimes(device_class="default", blocks=(times,)),),
        boundary_bytes_per_row=(0, 0),
    )
    # Teaching is best with 2 rows at a time (0.5 per row), learning with 8 (1.5 per row).
    assert find_bounds(costs, Cluster.uniform(2), num_rows=8).work_ms == (4 + 12 + 1) / 2


def test_block_is_bounded_by_its_finest_division_with_its_reduction() -> None:
    costs = constant_costs([(0, 6), (9, 2)], update_ms=1, link=LinkCost(latency_ms=0.5))
    bounds = find_bounds(costs, Cluster.uniform(4), num_rows=8, whole_students=[1])
    assert bounds.block_ms == 6 + 1
    proportional = costs_of_classes([[8.0]])
    assert find_bounds(proportional, cluster_of("aaaa"), num_rows=8).block_ms == 2
    assert find_bounds(proportional, cluster_of("aaaa"), num_rows=8, divides_rows=False).block_ms == 8


def test_loader_is_bounded_by_all_ranks_loading_unless_rows_may_not_be_divided() -> None:
    costs = constant_costs([(0, 1)], loader=LoaderCost(fixed_ms=1, per_row_ms=2, occupation=0.25))
    assert find_bounds(costs, Cluster.uniform(4), num_rows=8).loader_ms == 0.75 * 5
    assert find_bounds(costs, Cluster.uniform(4), num_rows=8, divides_rows=False).loader_ms == 0.75 * 17


def test_bound_of_all_is_the_largest() -> None:
    assert Bounds(1, 3, 2).step_time_ms == 3


def test_unequal_devices_share_work_by_their_speed() -> None:
    # One fast device does what three slow ones do together.
    assert find_bounds(costs_of_classes([[3, 3], [9, 9]]), cluster_of("abbb"), num_rows=8).work_ms == pytest.approx(3)


def test_each_device_does_what_it_is_good_at() -> None:
    costs = costs_of_classes([[1, 10], [10, 1]])
    assert find_bounds(costs, cluster_of("ab"), num_rows=8).work_ms == pytest.approx(1)


@given(
    st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=4),
    st.sampled_from(["ab", "aab", "abb"]),
)
def test_no_division_among_two_classes_beats_the_bound_and_one_nearly_reaches_it(
    jobs: list[tuple[int, int]], classes: str
) -> None:
    bound = find_bounds(costs_of_classes(list(zip(*jobs, strict=True))), cluster_of(classes), num_rows=8).work_ms
    # All ways to give each job in quarters to the two classes, each class dividing its part evenly.
    reached = min(
        max(
            sum(part * a for part, (a, _) in zip(parts, jobs, strict=True)) / 4 / classes.count("a"),
            sum((4 - part) * b for part, (_, b) in zip(parts, jobs, strict=True)) / 4 / classes.count("b"),
        )
        for parts in product(range(5), repeat=len(jobs))
    )
    assert bound <= reached * (1 + 1e-9)
    # In the best division only one job is shared by both classes, and a quarter of it is the rounding.
    assert reached - bound <= max(max(job) for job in jobs) / 4


def test_three_classes_are_bounded_too() -> None:
    costs = costs_of_classes([[2, 8], [8, 2], [4, 4]])
    bound = find_bounds(costs, cluster_of("abc"), num_rows=8).work_ms
    # Class c takes x of each job: (2 - 2x) = 8x gives 1.6.
    assert bound == pytest.approx(1.6, rel=0.02)
    assert bound <= 1.6 * (1 + 1e-9)
