"""The stage search against all ways one by one; the costs of stages have their own reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf
from random import Random

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import LinkCost
from lightning_pipebd.planning.cut_points import (
    CutPoint,
    are_in_order,
    border_points,
    fraction_points,
    half_cut_points,
    stages_to_plan,
)
from lightning_pipebd.planning.plan_text import format_plan
from lightning_pipebd.planning.stage_costs import StageCosts
from lightning_pipebd.planning.stage_search import Solution, rank_kinds, search_stages
from tests.planning.cost_tables import constant_costs, random_cluster, random_costs
from tests.planning.stage_enumeration import least_cost_of_counts, least_cost_on_nodes

#: Gives the points of a chain of blocks for a number of rows.
Points = Callable[[int, int], list[CutPoint]]
Instance = tuple[StageCosts, Cluster, int]


def borders(num_blocks: int, num_rows: int) -> list[CutPoint]:
    return border_points(num_blocks)


def halves_of_jobs(num_blocks: int, num_rows: int) -> list[CutPoint]:
    return fraction_points(num_blocks, num_rows, 2)


def instance(
    seed: int,
    points: Points,
    *,
    max_blocks: int,
    max_ranks: int,
    device_classes: Sequence[str] = ("default",),
    on_nodes: bool = False,
) -> Instance:
    """Draw costs, a cluster, and the most ranks a stage may have."""
    rng = Random(seed)
    num_blocks, num_ranks, num_rows = rng.randint(1, max_blocks), rng.randint(1, max_ranks), rng.choice([2, 5, 16])
    costs = random_costs(rng, num_blocks, device_classes=device_classes)
    per_node = rng.randint(1, 3) if on_nodes else None
    cluster = random_cluster(rng, num_ranks, device_classes=device_classes, ranks_per_node=per_node)
    blocks = range(num_blocks)
    stages = StageCosts(
        costs,
        points(num_blocks, num_rows),
        num_rows,
        target_blocks=[block for block in blocks if rng.random() < 0.3],
        whole_students=[block for block in blocks if rng.random() < 0.2],
    )
    return stages, cluster, rng.choice([1, num_ranks])


def brute_force(stages: StageCosts, cluster: Cluster, max_replicas: int) -> float:
    is_line = len(rank_kinds(cluster)) == 1 and cluster.num_nodes > 1
    least_cost = least_cost_on_nodes if is_line else least_cost_of_counts
    return least_cost(stages, cluster, max_replicas=max_replicas)


def searched(stages: StageCosts, cluster: Cluster, max_replicas: int) -> float:
    solution = search_stages(stages, cluster, max_replicas=max_replicas)
    return inf if solution is None else solution.cost_ms


@pytest.mark.parametrize(
    ("num_seeds", "points", "options"),
    [
        pytest.param(600, borders, {"max_blocks": 6, "max_ranks": 5}, id="hybrid"),
        pytest.param(150, half_cut_points, {"max_blocks": 4, "max_ranks": 4}, id="half cut"),
        pytest.param(60, halves_of_jobs, {"max_blocks": 2, "max_ranks": 4}, id="fractional"),
        pytest.param(400, borders, {"max_blocks": 5, "max_ranks": 5, "device_classes": "ab"}, id="two kinds"),
        pytest.param(200, borders, {"max_blocks": 5, "max_ranks": 5, "on_nodes": True}, id="nodes"),
        pytest.param(50, half_cut_points, {"max_blocks": 3, "max_ranks": 4, "on_nodes": True}, id="half cut on nodes"),
        pytest.param(
            100, borders, {"max_blocks": 4, "max_ranks": 5, "device_classes": "ab", "on_nodes": True}, id="both"
        ),
    ],
)
def test_search_finds_the_least_cost_of_all_ways(num_seeds: int, points: Points, options: dict[str, object]) -> None:
    instances = [instance(seed, points, **options) for seed in range(num_seeds)]  # type: ignore[arg-type]
    assert [searched(*entry) for entry in instances] == [brute_force(*entry) for entry in instances]


def flaws(solution: Solution, stages: StageCosts, cluster: Cluster) -> list[str]:
    """List what is wrong with a solution, asking only for the cost of each stage."""
    ranks = [rank for stage in solution.stages for rank in stage.ranks]
    cuts = [stages.points[0], *(stage.stop for stage in solution.stages)]
    found = [] if len(set(ranks)) == len(ranks) else ["a rank has two stages"]
    found += [] if are_in_order(cuts) and cuts[-1] == stages.points[-1] else ["the chain is not covered"]
    found += [] if [stage.start for stage in solution.stages] == cuts[:-1] else ["stages do not meet"]
    for stage in solution.stages:
        kinds = {(cluster.device_class[rank], cluster.memory_limit_bytes[rank]) for rank in stage.ranks}
        found += [] if len(kinds) == 1 else ["a stage has ranks of two kinds"]
    return found


@pytest.mark.parametrize("seed", range(40))
def test_stages_cover_the_chain_once_with_ranks_of_their_own(seed: int) -> None:
    options = [{}, {"device_classes": "ab"}, {"on_nodes": True}][seed % 3]
    stages, cluster, most = instance(seed, half_cut_points, max_blocks=6, max_ranks=6, **options)  # type: ignore[arg-type]
    solution = search_stages(stages, cluster, max_replicas=most)
    assert solution is None or flaws(solution, stages, cluster) == []


def plan_of(solution: Solution | None, num_blocks: int, num_rows: int, num_ranks: int) -> str:
    assert solution is not None
    return format_plan(stages_to_plan(solution.stages, num_blocks, num_rows, num_ranks))


def test_search_uses_no_more_ranks_than_help() -> None:
    stages = StageCosts(constant_costs([(0, 1), (0, 9), (0, 1)]), border_points(3), 8)
    solution = search_stages(stages, Cluster.uniform(4), max_replicas=1)
    assert plan_of(solution, 3, 8, 4) == "0|1|2|-"
    stages = StageCosts(constant_costs([(0, 9), (0, 4), (0, 5)]), border_points(3), 8)
    assert plan_of(search_stages(stages, Cluster.uniform(4), max_replicas=1), 3, 8, 4) == "0|1-2|-*2"


def test_nothing_above_the_ceiling_is_found() -> None:
    stages = StageCosts(constant_costs([(0, 3), (0, 3)]), border_points(2), 8)
    assert search_stages(stages, Cluster.uniform(2), max_replicas=1, ceiling_ms=2.9) is None
    found = search_stages(stages, Cluster.uniform(2), max_replicas=1, ceiling_ms=3)
    assert found is not None
    assert found.cost_ms == 3


def test_stages_avoid_to_reduce_across_nodes() -> None:
    costs = random_costs(Random(0), 2, has_links=False)
    costs = constant_costs([(0, 8), (0, 8)], gradient_bytes=10)
    costs = type(costs).from_dict({**costs.to_dict(), "other_node": {"latency_ms": 50.0}})
    assert costs.other_node == LinkCost(latency_ms=50)
    stages = StageCosts(costs, border_points(2), 8)
    cluster = Cluster(device_class=("default",) * 3, node=(0, 1, 1), memory_limit_bytes=(None,) * 3)
    # A message may take 50 ms on its way, so the two stages must lie on one node: ranks 1 and 2.
    assert plan_of(search_stages(stages, cluster, max_replicas=3), 2, 8, 3) == "-|0|1"


def test_ranks_with_other_memory_are_of_another_kind() -> None:
    cluster = Cluster(device_class=("a", "a", "a"), node=(0, 0, 0), memory_limit_bytes=(5, None, 5))
    assert [(kind.limit_bytes, kind.ranks) for kind in rank_kinds(cluster)] == [(5, (0, 2)), (inf, (1,))]
