"""The joint plan: every rank does every job on its part of the rows; unequal devices get unequal parts."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import BlockTimes, CostTable
from lightning_pipebd.planning.plan import Plan, Share

__all__ = ["joint_plan"]


def joint_plan(costs: CostTable, cluster: Cluster, num_rows: int) -> Plan:
    """Give every rank of a class of devices an equal part of every job, and every class so much that all end together.

    Example:
        >>> from lightning_pipebd.planning.costs import BlockSizes, Curve, DeviceTimes
        >>> devices = [
        ...     DeviceTimes(device_class=name, blocks=[BlockTimes(teach_ms=curve, learn_ms=curve)])
        ...     for name, curve in [("fast", Curve([(1, 1.0)])), ("slow", Curve([(1, 3.0)]))]
        ... ]
        >>> costs = CostTable(blocks=[BlockSizes(name="only")], devices=devices, boundary_bytes_per_row=[1, 1])
        >>> cluster = Cluster(device_class=["fast", "slow"], node=[0, 0], memory_limit_bytes=[None, None])
        >>> [str(share) for _, share in joint_plan(costs, cluster, 8).teacher[0]]
        ['3/4', '1/4']
    """
    if len(set(cluster.device_class)) == 1:
        return Plan.joint(costs.num_blocks, cluster.num_ranks)
    times = [costs.times(name) for name in cluster.device_class]
    rows = _deal(times, num_rows)
    shares = tuple(Share(rank, Fraction(count, num_rows)) for rank, count in enumerate(rows) if count)
    return Plan(num_ranks=cluster.num_ranks, teacher=(shares,) * costs.num_blocks, student=(shares,) * costs.num_blocks)


def _deal(times: Sequence[Sequence[BlockTimes]], num_rows: int) -> list[int]:
    """Deal rows one after another, each to the rank that would be done with it first."""
    rows = [0] * len(times)
    next_ms = [_rank_ms(blocks, 1) for blocks in times]
    for _ in range(num_rows):
        rank = min(range(len(times)), key=next_ms.__getitem__)
        rows[rank] += 1
        next_ms[rank] = _rank_ms(times[rank], rows[rank] + 1)
    return rows


def _rank_ms(blocks: Sequence[BlockTimes], rows: int) -> float:
    return sum(block.teach_ms.at(rows) + block.learn_ms.at(rows) + block.update_ms for block in blocks)
