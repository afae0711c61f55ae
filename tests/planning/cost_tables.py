"""Cost tables for tests: round numbers by hand, and random ones."""

from __future__ import annotations

from collections.abc import Sequence
from random import Random

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import (
    BlockSizes,
    BlockTimes,
    CostTable,
    DeviceTimes,
    LinkCost,
    LoaderCost,
    Overheads,
)
from lightning_pipebd.planning.curve import Curve

__all__ = ["constant_costs", "random_cluster", "random_costs"]


def constant_costs(
    times_ms: Sequence[tuple[float, float]],
    *,
    update_ms: float = 0.0,
    gradient_bytes: int = 0,
    boundary_bytes: int = 0,
    link: LinkCost = LinkCost(),  # noqa: B008 - a constant
    loader: LoaderCost = LoaderCost(),  # noqa: B008 - a constant
    noise: float = 0.0,
) -> CostTable:
    """Give every block a teacher and a student time that do not depend on rows."""
    times = [
        BlockTimes(teach_ms=Curve.affine(teach, 0), learn_ms=Curve.affine(learn, 0), update_ms=update_ms)
        for teach, learn in times_ms
    ]
    return CostTable(
        blocks=tuple(BlockSizes(name=f"block{block}", gradient_bytes=gradient_bytes) for block in range(len(times))),
        devices=(DeviceTimes(device_class="default", blocks=tuple(times)),),
        boundary_bytes_per_row=(boundary_bytes,) * (len(times) + 1),
        same_node=link,
        other_node=link,
        loader=loader,
        noise=noise,
    )


def random_costs(
    rng: Random, num_blocks: int, *, device_classes: Sequence[str] = ("default",), has_links: bool = True
) -> CostTable:
    """Draw a table in which everything costs something, in comparable amounts."""

    def block_times(speed: float) -> BlockTimes:
        return BlockTimes(
            teach_ms=Curve([(rows, speed * rng.uniform(0.5, 1.5) * (2 + rows / 4)) for rows in (2, 8, 16)]),
            learn_ms=Curve([(rows, speed * rng.uniform(0.5, 1.5) * (4 + rows / 2)) for rows in (1, 4, 16)]),
            update_ms=rng.uniform(0, 0.5),
        )

    def link(slowness: float) -> LinkCost:
        return LinkCost(
            latency_ms=slowness * rng.uniform(0, 1),
            bytes_per_ms=rng.uniform(20, 200) / slowness,
            send_occupation=rng.choice([0, 0, 0.5, 1]),
            receive_occupation=rng.choice([0, 0, 0.5, 1]),
            reduce_occupation=rng.choice([0, 0.3]),
        )

    return CostTable(
        blocks=tuple(
            BlockSizes(
                name=f"block{block}",
                teacher_parameter_bytes=rng.randrange(100),
                student_parameter_bytes=rng.randrange(100),
                gradient_bytes=rng.randrange(100),
                optimizer_bytes=rng.randrange(200),
                teach_bytes_per_row=rng.randrange(10),
                learn_bytes_per_row=rng.randrange(30),
            )
            for block in range(num_blocks)
        ),
        devices=tuple(
            DeviceTimes(
                device_class=name,
                blocks=tuple(block_times(speed) for speed in [rng.uniform(0.5, 2)] for _ in range(num_blocks)),
            )
            for name in device_classes
        ),
        boundary_bytes_per_row=tuple(rng.randrange(1, 40) for _ in range(num_blocks + 1)),
        target_bytes_per_row=rng.randrange(8),
        loader=LoaderCost(
            fixed_ms=rng.uniform(0, 2), per_row_ms=rng.uniform(0, 0.3), occupation=rng.choice([0, 0.5, 1])
        ),
        same_node=link(1) if has_links else LinkCost(),
        other_node=link(5) if has_links else LinkCost(),
        overheads=Overheads(step_ms=rng.uniform(0, 0.5), recv_ms=rng.uniform(0, 0.1), learn_ms=rng.uniform(0, 0.1)),
    )


def random_cluster(
    rng: Random, num_ranks: int, *, device_classes: Sequence[str] = ("default",), ranks_per_node: int | None = None
) -> Cluster:
    """Draw a cluster whose memory is sometimes short."""
    limit = rng.choice([None, None, rng.randrange(500, 5000)])
    return Cluster(
        device_class=tuple(rng.choice(device_classes) for _ in range(num_ranks)),
        node=tuple(rank // (ranks_per_node or num_ranks) for rank in range(num_ranks)),
        memory_limit_bytes=(limit,) * num_ranks,
    )
