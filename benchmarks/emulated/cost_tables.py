"""Cost tables whose blocks are emulated: Pipe-BD's, random chains, and a chain of equal blocks as of a decoder."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

from lightning_pipebd.planning.bounds import find_bounds
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes, LinkCost, LoaderCost
from lightning_pipebd.planning.curve import Curve
from tests.helpers.pipe_bd import pipe_bd_costs

__all__ = ["TABLES", "Table", "scaled", "work_bound_ms"]

_NUM_ROWS = 64
#: A boundary of 256 KiB, whatever the model's would be: what relaying more costs is another question.
_BOUNDARY_BYTES = 2**18
#: What gloo takes between processes on few cores, about.
_LINK = LinkCost(latency_ms=0.5, bytes_per_ms=1e6)
#: Part of a block's time on the whole batch that fewer rows do not save.
_FIXED = 0.02


class Table(NamedTuple):
    """Costs and the batch that they are of."""

    costs: CostTable
    num_rows: int


def _chain(teach_ms: Sequence[float], learn_ms: Sequence[float]) -> Table:
    def curve(ms: float) -> Curve:
        return Curve.affine(_FIXED * ms, (1 - _FIXED) * ms / _NUM_ROWS)

    times = [
        BlockTimes(teach_ms=curve(teach), learn_ms=curve(learn))
        for teach, learn in zip(teach_ms, learn_ms, strict=True)
    ]
    return _emulated(
        CostTable(
            blocks=tuple(BlockSizes(name=str(block), gradient_bytes=4) for block in range(len(times))),
            devices=(DeviceTimes(device_class="default", blocks=tuple(times)),),
            boundary_bytes_per_row=(0,) * (len(times) + 1),
        ),
        _NUM_ROWS,
    )


def _random_chain(seed: int, num_blocks: int = 24) -> Table:
    draw = random.Random(seed)
    return _chain(*([mean * draw.expovariate(1) for _ in range(num_blocks)] for mean in (1, 3)))


def _emulated(costs: CostTable, num_rows: int) -> Table:
    sizes = (_BOUNDARY_BYTES // num_rows,) * len(costs.boundary_bytes_per_row)
    return Table(replace(costs, boundary_bytes_per_row=sizes, same_node=_LINK, noise=0.01), num_rows)


TABLES = {
    "Pipe-BD": _emulated(pipe_bd_costs(receive_occupation=0.0), 256),
    "random 1": _random_chain(1),
    "random 2": _random_chain(2),
    "48 equal": _chain([1.0] * 48, [3.0] * 48),
}
"""By name. Random: 24 blocks whose times are drawn from exponential distributions, students thrice as slow."""


def work_bound_ms(table: Table, num_ranks: int) -> float:
    """Give the time of a step if its work, loading on a rank's own thread included, were spread evenly."""
    loader = table.costs.loader
    bounds = find_bounds(table.costs, Cluster.uniform(num_ranks), num_rows=table.num_rows)
    return bounds.work_ms + loader.occupation * loader.load_ms(table.num_rows) / num_ranks


def scaled(table: Table, num_ranks: int, work_ms: float) -> Table:
    """Give the table with all times multiplied so that its work bound is so long."""
    costs = table.costs
    factor = work_ms / work_bound_ms(table, num_ranks)

    def times(curve: Curve) -> Curve:
        return Curve((rows, factor * ms) for rows, ms in curve)

    blocks = tuple(
        BlockTimes(teach_ms=times(block.teach_ms), learn_ms=times(block.learn_ms)) for block in costs.devices[0].blocks
    )
    loader = costs.loader
    return table._replace(
        costs=replace(
            costs,
            devices=(replace(costs.devices[0], blocks=blocks),),
            loader=LoaderCost(
                fixed_ms=factor * loader.fixed_ms,
                per_row_ms=factor * loader.per_row_ms,
                occupation=loader.occupation,
            ),
        )
    )
