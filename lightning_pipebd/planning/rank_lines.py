"""Rank lines: how ranks are handed out to one stage after another, and what is worth remembering on the way.

Ranks are of one *kind* if they have the same class of device and the same memory; a stage has ranks of one kind. For a
given cost of the slowest stage it is worth remembering, for every cut point,

    one kind, one node       the least number of ranks that reach it
    several kinds            the least numbers of each kind; a way that uses more of every kind than another is dropped.
                             With several nodes, links are priced as if they left the node
    one kind, several nodes  for each node, the first place that is free behind a way that ends in it. Ranks stand in
                             line, node by node; a stage takes neighbours, and ranks may stay idle. A stage's way in
                             leaves the node if the last rank of the stage before is on another node than one of its
                             own; its way out, if its own last rank is the last one of its node
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Iterator
from itertools import product
from math import ceil, inf
from operator import le
from typing import NamedTuple

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.stage_costs import StageCosts
from lightning_pipebd.planning.stage_parts import Crossing

__all__ = ["Placement", "RankKind", "Reach", "make_reach"]

_MAX_FRONT = 4096


class RankKind(NamedTuple):
    """Equal ranks, in line: node by node."""

    device_class: str
    limit_bytes: float
    ranks: tuple[int, ...]


class Placement(NamedTuple):
    """A stage on its ranks, and the stages before it.

    Args:
        start: Index of the stage's first cut point.
        stop: Index of its last one.
        kind: Number of its ranks' kind.
        place: Place of its first rank in the line of that kind.
        num_ranks: Its ranks.
        bottleneck_ms: Cost of the slowest stage so far.
        before: The stage before.
    """

    start: int
    stop: int
    kind: int
    place: int
    num_ranks: int
    bottleneck_ms: float
    before: Placement | None

    def way(self) -> list[Placement]:
        """List the stages from the first one to this one."""
        way: list[Placement] = []
        placement = self
        while placement.before is not None:
            way.append(placement)
            placement = placement.before
        return way[::-1]

    def followed_by(self, stop: int, kind: int, place: int, num_ranks: int, cost_ms: float) -> Placement:
        """Give the next stage."""
        return Placement(self.stop, stop, kind, place, num_ranks, max(self.bottleneck_ms, cost_ms), self)


_NO_STAGE = Placement(0, 0, 0, 0, 0, 0.0, None)

#: For one cut point and each at which a stage from it may stop: the numbers of ranks that make the stage cheaper than
#: any fewer, and their costs with a minus sign, which ascend.
_Row = list[tuple[int, list[float], list[int]]]


class Reach(ABC):
    """Answers how the end of the chain can be reached if no stage may cost more than something.

    Args:
        costs: Costs of all stages.
        cluster: Ranks to hand out.
        kinds: The same ranks, sorted.
        max_replicas: Most ranks of one stage.
        ceiling_ms: Stages that cost more are not even tabulated.
    """

    def __init__(
        self, costs: StageCosts, cluster: Cluster, kinds: tuple[RankKind, ...], *, max_replicas: int, ceiling_ms: float
    ) -> None:
        self.kinds = kinds
        self.last = len(costs.points) - 1
        self._costs = costs
        self._max_replicas = min(max_replicas, costs.parts.num_rows)
        self._ceiling_ms = ceiling_ms
        self._num_ranks = cluster.num_ranks
        self._needs = [
            tuple(ceil(work_ms / ceiling_ms - 1e-9) if ceiling_ms else 0 for work_ms in costs.parts.least_work(point))
            for point in costs.points
        ]

    @abstractmethod
    def end(self, limit_ms: float) -> Placement | None:
        """Give the last stage of a way with as few ranks as possible whose stages cost at most `limit_ms`."""

    def ranks(self, placement: Placement) -> tuple[int, ...]:
        """Give the ranks of a stage."""
        return self.kinds[placement.kind].ranks[placement.place : placement.place + placement.num_ranks]

    def _tabulate(self, kind: RankKind, crossing: Crossing) -> list[_Row]:
        return [self._row(start, kind, crossing) for start in range(self.last)]

    def _row(self, start: int, kind: RankKind, crossing: Crossing) -> _Row:
        found: dict[int, tuple[list[float], list[int]]] = {}
        # What lies before and behind a stage needs ranks, too.
        spare = self._num_ranks - self._needs[start][0]
        for num_ranks in range(1, min(self._max_replicas, len(kind.ranks), spare) + 1):
            for stop, cost_ms, _ in self._costs.column(
                start,
                num_ranks,
                kind.device_class,
                crossing=crossing,
                limit_bytes=kind.limit_bytes,
                ceiling_ms=self._ceiling_ms,
            ):
                if num_ranks + self._needs[stop][1] > spare:
                    continue
                gains, numbers = found.setdefault(stop, ([], []))
                if not gains or -cost_ms > gains[-1]:
                    gains.append(-cost_ms)
                    numbers.append(num_ranks)
        return [(stop, gains, numbers) for stop, (gains, numbers) in found.items()]


class _OneCount(Reach):
    """One kind of ranks on one node."""

    def __init__(
        self, costs: StageCosts, cluster: Cluster, kinds: tuple[RankKind, ...], *, max_replicas: int, ceiling_ms: float
    ) -> None:
        super().__init__(costs, cluster, kinds, max_replicas=max_replicas, ceiling_ms=ceiling_ms)
        self._table = self._tabulate(kinds[0], Crossing())

    def end(self, limit_ms: float) -> Placement | None:
        most = self._num_ranks
        used = [0] + [most + 1] * self.last
        last_stages = [(0, 0, 0.0)] * (self.last + 1)
        for start, row in enumerate(self._table):
            place = used[start]
            if place >= most:
                continue
            for stop, gains, numbers in row:
                index = bisect_left(gains, -limit_ms)
                if index < len(gains) and place + numbers[index] < used[stop]:
                    used[stop] = place + numbers[index]
                    last_stages[stop] = (start, numbers[index], -gains[index])
        return self._placement(self.last, used, last_stages) if used[self.last] <= most else None

    def _placement(self, stop: int, used: list[int], last_stages: list[tuple[int, int, float]]) -> Placement:
        stages = []
        while stop:
            start, num_ranks, cost_ms = last_stages[stop]
            stages.append((stop, 0, used[start], num_ranks, cost_ms))
            stop = start
        placement = _NO_STAGE
        for stage in reversed(stages):
            placement = placement.followed_by(*stage)
        return placement


class _Counts(Reach):
    """Several kinds of ranks."""

    def __init__(
        self, costs: StageCosts, cluster: Cluster, kinds: tuple[RankKind, ...], *, max_replicas: int, ceiling_ms: float
    ) -> None:
        super().__init__(costs, cluster, kinds, max_replicas=max_replicas, ceiling_ms=ceiling_ms)
        is_far = cluster.num_nodes > 1
        self._tables = [
            self._tabulate(kind, Crossing(not cluster.are_on_one_node(kind.ranks), is_far, is_far)) for kind in kinds
        ]

    def end(self, limit_ms: float) -> Placement | None:
        nothing = (0,) * len(self.kinds)
        fronts: list[dict[tuple[int, ...], Placement]] = [{} for _ in range(self.last + 1)]
        fronts[0] = {nothing: _NO_STAGE}
        for start in range(self.last):
            front = _drop_dominated(fronts[start])
            for kind, table in enumerate(self._tables):
                most = len(self.kinds[kind].ranks)
                for stop, gains, numbers in table[start]:
                    index = bisect_left(gains, -limit_ms)
                    if index == len(gains):
                        continue
                    for counts, before in front.items():
                        count = counts[kind] + numbers[index]
                        after = (*counts[:kind], count, *counts[kind + 1 :])
                        if count <= most and after not in fronts[stop]:
                            fronts[stop][after] = before.followed_by(
                                stop, kind, counts[kind], numbers[index], -gains[index]
                            )
        return min(fronts[self.last].items(), key=lambda entry: (sum(entry[0]), entry[0]))[1] if fronts[-1] else None


def _drop_dominated(front: dict[tuple[int, ...], Placement]) -> dict[tuple[int, ...], Placement]:
    """Keep the ways that use fewer ranks of some kind than any other; of very many those with the fewest ranks."""
    kept: dict[tuple[int, ...], Placement] = {}
    for counts in sorted(front, key=lambda counts: (sum(counts), counts))[:_MAX_FRONT]:
        if not any(all(map(le, other, counts)) for other in kept):
            kept[counts] = front[counts]
    return kept


class _Nodes(Reach):
    """One kind of ranks on several nodes."""

    def __init__(
        self, costs: StageCosts, cluster: Cluster, kinds: tuple[RankKind, ...], *, max_replicas: int, ceiling_ms: float
    ) -> None:
        super().__init__(costs, cluster, kinds, max_replicas=max_replicas, ceiling_ms=ceiling_ms)
        names = [cluster.node[rank] for rank in kinds[0].ranks]
        self._starts = [place for place, name in enumerate(names) if not place or names[place - 1] != name]
        self._stops = [*self._starts[1:], len(names)]
        self._are_equal = len({stop - start for start, stop in zip(self._starts, self._stops, strict=True)}) == 1
        # A stage across nodes always has a rank that is not on the node of the last rank before.
        crossings = [Crossing(*flags) for flags in product((False, True), repeat=3) if flags[1] or not flags[0]]
        self._rows: list[dict[int, dict[Crossing, tuple[list[float], list[int]]]]] = [{} for _ in range(self.last)]
        for crossing in crossings:
            for start, row in enumerate(self._tabulate(kinds[0], crossing)):
                for stop, gains, numbers in row:
                    self._rows[start].setdefault(stop, {})[crossing] = (gains, numbers)

    def end(self, limit_ms: float) -> Placement | None:
        # For each point and node the way that ends in the node with the first free place behind it.
        ways: list[dict[int, Placement]] = [{} for _ in range(self.last + 1)]
        ways[0] = {0: _NO_STAGE}
        for start in range(self.last):
            for stop, stages in self._rows[start].items():
                cheap = {crossing: _cheap_enough(*lists, limit_ms) for crossing, lists in stages.items()}
                cheap = {crossing: found for crossing, found in cheap.items() if found[0]}
                most = self._num_ranks - self._needs[stop][1]
                for node, before in ways[start].items() if cheap else ():
                    for place, num_ranks, cost_ms in self._places(node, before, cheap):
                        end = place + num_ranks
                        if end > most:
                            continue
                        known = ways[stop].get(end_node := bisect_left(self._stops, end))
                        if known is None or end < known.place + known.num_ranks:
                            ways[stop][end_node] = before.followed_by(stop, 0, place, num_ranks, cost_ms)
        return min(ways[self.last].values(), key=lambda way: way.place + way.num_ranks, default=None)

    def _places(
        self, node: int, before: Placement, cheap: dict[Crossing, tuple[int, float]]
    ) -> Iterator[tuple[int, int, float]]:
        """Give (place, number of ranks, cost) of the next stage, for each node that it may end in."""
        free, num_nodes = before.place + before.num_ranks, len(self._stops)
        # Equal nodes: whoever leaves a whole one idle could as well use it.
        for home in range(node, min(node + 2, num_nodes) if self._are_equal else num_nodes):
            first, home_stop, is_far = max(free, self._starts[home]), self._stops[home], home != node
            if first >= home_stop:
                continue
            num_ranks, cost_ms = cheap.get(Crossing(False, is_far, False), _TOO_MANY)
            if first + num_ranks < home_stop:
                yield first, num_ranks, cost_ms
            num_ranks, cost_ms = cheap.get(Crossing(False, is_far, True), _TOO_MANY)
            if first + num_ranks <= home_stop:
                yield home_stop - num_ranks, num_ranks, cost_ms
            yield from self._places_across(first, home, cheap)

    def _places_across(
        self, first: int, home: int, cheap: dict[Crossing, tuple[int, float]]
    ) -> Iterator[tuple[int, int, float]]:
        """The same for stages that start in `home`, not before `first`, and end in a later node."""
        inner, inner_ms = cheap.get(Crossing(True, True, False), _TOO_MANY)
        outer, outer_ms = cheap.get(Crossing(True, True, True), _TOO_MANY)
        home_stop = self._stops[home]
        for start, stop in zip(self._starts[home + 1 :], self._stops[home + 1 :], strict=True):
            end = max(first + inner, start + 1)
            if end < stop and end - inner < home_stop:
                yield end - inner, inner, inner_ms
            if first <= stop - outer < home_stop:
                yield stop - outer, outer, outer_ms


_TOO_MANY = (10**9, inf)


def _cheap_enough(gains: list[float], numbers: list[int], limit_ms: float) -> tuple[int, float]:
    """Give the least number of ranks that costs no more than the limit, with its cost; 0 if there is none."""
    index = bisect_left(gains, -limit_ms)
    return (numbers[index], -gains[index]) if index < len(gains) else (0, inf)


def make_reach(
    costs: StageCosts,
    cluster: Cluster,
    kinds: tuple[RankKind, ...],
    *,
    max_replicas: int,
    ceiling_ms: float,
    ignores_nodes: bool = False,
) -> Reach:
    """Give the answerer that fits the ranks; `ignores_nodes` takes one kind of ranks as if they were on one node."""
    if len(kinds) > 1:
        return _Counts(costs, cluster, kinds, max_replicas=max_replicas, ceiling_ms=ceiling_ms)
    cls = _OneCount if ignores_nodes or cluster.num_nodes == 1 else _Nodes
    return cls(costs, cluster, kinds, max_replicas=max_replicas, ceiling_ms=ceiling_ms)
