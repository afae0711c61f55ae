"""The stage search: divide the chain of jobs into stages, and the ranks among stages, so that the slowest is fastest.

Exact for the separable costs of `stage_costs`. The least possible cost of the slowest stage is found by bisection: for
a given cost, the best that can be done is to reach every cut point with as few ranks as possible, and what lies behind
a point does not care how it was reached. The last question is whether anything costs less than what was found; the
answer no makes the result exact. What "as few as possible" means depends on the ranks, see `rank_lines`.
"""

from __future__ import annotations

from math import inf, nextafter
from typing import NamedTuple

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.cut_points import Stage
from lightning_pipebd.planning.rank_lines import Placement, RankKind, Reach, make_reach
from lightning_pipebd.planning.stage_costs import StageCosts
from lightning_pipebd.planning.stage_parts import Crossing

__all__ = ["Solution", "rank_kinds", "search_stages"]


class Solution(NamedTuple):
    """Stages, and the cost of the slowest one."""

    cost_ms: float
    stages: tuple[Stage, ...]


def rank_kinds(cluster: Cluster) -> tuple[RankKind, ...]:
    """Sort a cluster's ranks into kinds.

    Example:
        >>> [kind.ranks for kind in rank_kinds(Cluster.uniform(4, ranks_per_node=2))]
        [(0, 1, 2, 3)]
    """
    kinds: dict[tuple[str, float], list[int]] = {}
    for rank in sorted(range(cluster.num_ranks), key=lambda rank: (cluster.node[rank], rank)):
        limit = cluster.memory_limit_bytes[rank]
        kinds.setdefault((cluster.device_class[rank], inf if limit is None else limit), []).append(rank)
    return tuple(RankKind(*key, tuple(ranks)) for key, ranks in kinds.items())


def search_stages(
    costs: StageCosts,
    cluster: Cluster,
    *,
    max_replicas: int,
    ceiling_ms: float = inf,
) -> Solution | None:
    """Find the stages whose slowest is fastest.

    Args:
        costs: Costs of all stages.
        cluster: Ranks to hand out; some may get no stage.
        max_replicas: Most ranks of one stage.
        ceiling_ms: Solutions that cost more are of no interest.

    Returns:
        The best stages, with as few ranks as they can do with; `None` if there are none below the ceiling that fit the
        ranks and their memory.
    """
    kinds = rank_kinds(cluster)
    floor_ms = 0.0
    if len(kinds) == 1 and cluster.num_nodes > 1 and _is_dearer(costs.parts.costs):
        # Nodes rarely bind: if the best stages for one big node cost no more on these nodes, they are the best here.
        reach = make_reach(costs, cluster, kinds, max_replicas=max_replicas, ceiling_ms=ceiling_ms, ignores_nodes=True)
        end = _minimise(reach, floor_ms, ceiling_ms)
        if end is None:
            return None
        floor_ms, found_ms = end.bottleneck_ms, _cost_on_nodes(costs, cluster, kinds[0], end)
        if found_ms <= floor_ms:
            return _solution(costs, reach, end)
        ceiling_ms = min(ceiling_ms, found_ms)
    reach = make_reach(costs, cluster, kinds, max_replicas=max_replicas, ceiling_ms=ceiling_ms)
    end = _minimise(reach, floor_ms, ceiling_ms)
    return None if end is None else _solution(costs, reach, end)


def _solution(costs: StageCosts, reach: Reach, end: Placement) -> Solution:
    points = costs.points
    stages = (Stage(points[placement.start], points[placement.stop], reach.ranks(placement)) for placement in end.way())
    return Solution(end.bottleneck_ms, tuple(stages))


def _is_dearer(costs: CostTable) -> bool:
    """Tell whether nothing is cheaper between nodes than on one node."""
    near, far = costs.same_node, costs.other_node
    names = ("latency_ms", "send_occupation", "receive_occupation", "reduce_occupation")
    return (
        near.reduces == far.reduces == ()
        and near.bytes_per_ms >= far.bytes_per_ms
        and all(getattr(near, name) <= getattr(far, name) for name in names)
    )


def _cost_on_nodes(costs: StageCosts, cluster: Cluster, kind: RankKind, end: Placement) -> float:
    """Give what stages that were found for one node cost where their ranks really are."""
    slowest = 0.0
    for stage in end.way():
        ranks = kind.ranks[stage.place : stage.place + stage.num_ranks]
        after = kind.ranks[stage.place + stage.num_ranks : stage.place + stage.num_ranks + 1]
        crossing = Crossing(
            not cluster.are_on_one_node(ranks),
            not cluster.are_on_one_node(kind.ranks[max(stage.place - 1, 0) : stage.place] + ranks),
            not cluster.are_on_one_node(ranks[-1:] + after),
        )
        column = costs.column(stage.start, stage.num_ranks, kind.device_class, crossing=crossing)
        slowest = max(slowest, next(use.cost_ms for use in column if use.stop == stage.stop))
    return slowest


def _minimise(reach: Reach, floor_ms: float, ceiling_ms: float) -> Placement | None:
    """Find the last placement of the way whose slowest stage is fastest."""
    best, low = reach.end(ceiling_ms), floor_ms
    while best is not None:
        high = best.bottleneck_ms
        # Near the end ask for anything better at all: the answer no ends the search exactly.
        is_close = high - low <= 1e-6 * high
        middle = nextafter(high, -inf) if is_close else (low + high) / 2
        better = reach.end(middle)
        if better is not None:
            best = better
        elif is_close:
            break
        else:
            low = middle
    return best
