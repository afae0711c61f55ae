"""All ways to divide a chain into stages, one by one: the slow and plain counterpart of the stage search.

Nothing is remembered and nothing is left out early; the costs are the planner's own, which have their own reference.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from math import inf

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.stage_costs import StageCosts
from lightning_pipebd.planning.stage_parts import Crossing
from lightning_pipebd.planning.stage_search import rank_kinds

__all__ = ["least_cost_of_counts", "least_cost_on_nodes"]


class _Prices:
    """What each stage costs; infinite if it does not fit the memory."""

    def __init__(self, costs: StageCosts, cluster: Cluster) -> None:
        self.costs = costs
        self.kinds = rank_kinds(cluster)
        self.column = lru_cache(maxsize=None)(self._column)

    def _column(self, start: int, num_ranks: int, kind: int, crossing: Crossing) -> dict[int, float]:
        name, limit, _ = self.kinds[kind]
        column = self.costs.column(start, num_ranks, name, crossing=crossing, limit_bytes=limit)
        return {use.stop: use.cost_ms for use in column}


def least_cost_of_counts(costs: StageCosts, cluster: Cluster, *, max_replicas: int) -> float:
    """Give the least cost of the slowest stage over all ways to hand out ranks of each kind."""
    prices, last = _Prices(costs, cluster), len(costs.points) - 1
    is_far = cluster.num_nodes > 1
    crossings = [Crossing(not cluster.are_on_one_node(kind.ranks), is_far, is_far) for kind in prices.kinds]

    def ways(start: int, left: tuple[int, ...], slowest: float) -> Iterator[float]:
        if start == last:
            yield slowest
            return
        for kind, count in enumerate(left):
            for num_ranks in range(1, min(count, max_replicas, costs.parts.num_rows) + 1):
                rest = (*left[:kind], count - num_ranks, *left[kind + 1 :])
                for stop, cost in prices.column(start, num_ranks, kind, crossings[kind]).items():
                    yield from ways(stop, rest, max(slowest, cost))

    return min(ways(0, tuple(len(kind.ranks) for kind in prices.kinds), 0.0), default=inf)


def least_cost_on_nodes(costs: StageCosts, cluster: Cluster, *, max_replicas: int) -> float:
    """Give the least cost of the slowest stage over all ways to put stages on neighbouring ranks, in their order."""
    prices, last, node = _Prices(costs, cluster), len(costs.points) - 1, cluster.node

    def crossing(place: int, num_ranks: int, sender: int | None) -> Crossing:
        ranks = tuple(range(place, place + num_ranks))
        senders = () if sender is None else (sender,)
        after = tuple(rank for rank in (place + num_ranks,) if rank < cluster.num_ranks)
        return Crossing(
            not cluster.are_on_one_node(ranks),
            not cluster.are_on_one_node((*senders, *ranks)),
            not cluster.are_on_one_node((ranks[-1], *after)),
        )

    def ways(start: int, free: int, sender: int | None, slowest: float) -> Iterator[float]:
        if start == last:
            yield slowest
            return
        for place in range(free, cluster.num_ranks):
            for num_ranks in range(1, min(cluster.num_ranks - place, max_replicas, costs.parts.num_rows) + 1):
                end = place + num_ranks
                for stop, cost in prices.column(start, num_ranks, 0, crossing(place, num_ranks, sender)).items():
                    yield from ways(stop, end, end - 1, max(slowest, cost))

    assert list(node) == sorted(node)
    return min(ways(0, 0, None, 0.0), default=inf)
