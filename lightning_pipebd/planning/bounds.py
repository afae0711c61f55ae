"""Bounds: step times that no plan can beat, so that a plan's distance from the best possible is known."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator, Sequence
from typing import NamedTuple

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable

__all__ = ["Bounds", "find_bounds"]

_MAX_PRICE_CHANGES = 20


class Bounds(NamedTuple):
    """Least possible step times, in ms.

    Args:
        work_ms: All jobs at the best rate that was measured for them, spread evenly over all ranks.
        block_ms: The student block that takes longest even if it is divided as finely as it may be.
        loader_ms: Loading, by as many ranks as may load.
    """

    work_ms: float
    block_ms: float
    loader_ms: float

    @property
    def step_time_ms(self) -> float:
        """The largest of the three."""
        return max(self)


def find_bounds(
    costs: CostTable,
    cluster: Cluster,
    *,
    num_rows: int,
    whole_students: Collection[int] = (),
    divides_rows: bool = True,
) -> Bounds:
    """Give what no plan's step time can be below.

    Args:
        costs: Measurements.
        cluster: Ranks that may be used.
        num_rows: Rows of the batch.
        whole_students: Blocks whose student job must stay on one rank.
        divides_rows: Whether the rows of any job may be divided at all.

    Example:
        >>> from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, Curve, DeviceTimes
        >>> times = BlockTimes(teach_ms=Curve([(8, 1.0)]), learn_ms=Curve([(8, 3.0)]))
        >>> devices = [DeviceTimes(device_class="default", blocks=[times])]
        >>> costs = CostTable(blocks=[BlockSizes(name="only")], devices=devices, boundary_bytes_per_row=[1, 1])
        >>> find_bounds(costs, Cluster.uniform(2), num_rows=8, divides_rows=False)
        Bounds(work_ms=2.0, block_ms=3.0, loader_ms=0.0)
    """
    counts = Counter(cluster.device_class)
    num_ranks = min(cluster.num_ranks, num_rows) if divides_rows else 1
    whole = range(costs.num_blocks) if not divides_rows else whole_students
    loader = costs.loader
    load_ms = loader.load_ms(-(-num_rows // num_ranks))
    return Bounds(
        _work_ms([_least_jobs(costs, name, num_rows) for name in counts], list(counts.values())),
        max(
            _block_ms(costs, counts, block, num_rows, 1 if block in whole else num_ranks)
            for block in range(costs.num_blocks)
        ),
        max(loader.occupation, 1 - loader.occupation) * load_ms,
    )


def _least_jobs(costs: CostTable, device_class: str, num_rows: int) -> list[float]:
    """List the least time of every job on a class of devices."""
    jobs: list[float] = []
    for times in costs.times(device_class):
        jobs.append(num_rows * times.teach_ms.least_rate(num_rows))
        jobs.append(num_rows * times.learn_ms.least_rate(num_rows) + times.update_ms)
    return jobs


def _work_ms(jobs: Sequence[Sequence[float]], counts: Sequence[int]) -> float:
    """Bound the time in which so many devices of each class can do all jobs, divided at will.

    Give every class a price per ms. Each job costs at least its cheapest class, and all devices together earn at most
    the step time times their prices: a bound for any prices. One price after another is set where it helps most, which
    makes some job equally dear on two classes; with two classes that gives the best bound, with more a good one.
    """
    prices = [1 / sum(times) if sum(times) else 1.0 for times in jobs]
    best = _priced_ms(jobs, counts, prices)
    for _ in range(_MAX_PRICE_CHANGES if len(counts) > 1 else 0):
        trials = [
            [*prices[:index], price, *prices[index + 1 :]]
            for index in range(len(prices))
            for price in _equal_prices(jobs, prices, index)
        ]
        found, trial = max(((_priced_ms(jobs, counts, trial), trial) for trial in trials), default=(best, prices))
        if found <= best:
            break
        best, prices = found, trial
    return best


def _priced_ms(jobs: Sequence[Sequence[float]], counts: Sequence[int], prices: Sequence[float]) -> float:
    cheapest: Iterator[float] = (
        min(price * time for price, time in zip(prices, times, strict=True)) for times in zip(*jobs, strict=True)
    )
    earned = sum(price * count for price, count in zip(prices, counts, strict=True))
    return sum(cheapest) / earned if earned else 0.0


def _equal_prices(jobs: Sequence[Sequence[float]], prices: Sequence[float], index: int) -> list[float]:
    """List the prices of one class at which a job is as dear there as at the cheapest of the others."""
    found = []
    for times in zip(*jobs, strict=True):
        others = [prices[other] * time for other, time in enumerate(times) if other != index]
        if times[index] > 0:
            found.append(min(others) / times[index])
    return found


def _block_ms(costs: CostTable, counts: Collection[str], block: int, num_rows: int, most_ranks: int) -> float:
    """Give the least time of a student job: of a rank with the most rows, with its REDUCE and update."""
    gradient_bytes = costs.blocks[block].gradient_bytes
    found = []
    for num_ranks in range(1, most_ranks + 1):
        reduce_ms = min(link.reduce_ms(gradient_bytes, num_ranks) for link in (costs.same_node, costs.other_node))
        least = -(-num_rows // num_ranks)
        for name in counts:
            times = costs.times(name)[block]
            found.append(times.learn_ms.least_time(least, num_rows) + reduce_ms + times.update_ms)
    return costs.overheads.step_ms + min(found)
