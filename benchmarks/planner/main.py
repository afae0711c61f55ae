"""How long planning takes, and how far the families of plans reach, on random costs.

    python benchmarks/planner/main.py speed
    python benchmarks/planner/main.py families

`speed` times the exact search of straight and hybrid plans, the simulator, and the whole planner, in CPU seconds of one
core. `families` compares every family with the bound that no plan can beat, over random models in several regimes.
"""

from __future__ import annotations

import platform
import sys
import time
from collections.abc import Callable
from random import Random
from statistics import mean
from typing import TypeVar

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes, LinkCost
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.cut_points import border_points
from lightning_pipebd.planning.families import Family
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.planner import find_plan
from lightning_pipebd.planning.simulate import simulate
from lightning_pipebd.planning.stage_costs import StageCosts
from lightning_pipebd.planning.stage_search import search_stages

T = TypeVar("T")

#: The families whose plans are also plans of a family.
CONTAINED = {
    Family.STRAIGHT: list(Family)[:2],
    Family.JOINT: [Family.JOINT],
    Family.HYBRID: list(Family)[:4],
    Family.HALF_CUT: list(Family)[:5],
    Family.SCATTERED: [Family.SINGLE, Family.STRAIGHT, Family.SCATTERED],
    Family.FRACTIONAL: [*list(Family)[:5], Family.FRACTIONAL],
}

NUM_ROWS = 64
NUM_SEEDS = 10


def random_costs(num_blocks: int, *, seed: int, fixed: float, gradient_bytes: int = 100_000) -> CostTable:
    """Draw block times of `fixed` times a random overhead plus a random time per row."""
    rng = Random(seed)
    times = [
        BlockTimes(
            teach_ms=Curve.affine(fixed * rng.uniform(0.5, 1.5), rng.uniform(0.5, 1.5) / 10),
            learn_ms=Curve.affine(fixed * rng.uniform(2, 4), rng.uniform(0.3, 3) / 10),
            update_ms=0.05,
        )
        for _ in range(num_blocks)
    ]
    return CostTable(
        blocks=tuple(BlockSizes(name=f"block{block}", gradient_bytes=gradient_bytes) for block in range(num_blocks)),
        devices=(DeviceTimes(device_class="default", blocks=tuple(times)),),
        boundary_bytes_per_row=(10_000,) * (num_blocks + 1),
        same_node=LinkCost(latency_ms=0.02, bytes_per_ms=1e7),
        other_node=LinkCost(latency_ms=0.1, bytes_per_ms=1e6),
    )


def timed(call: Callable[[], T]) -> tuple[T, float]:
    """Give a call's result and its CPU seconds."""
    start = time.process_time()
    found = call()
    return found, time.process_time() - start


def search_seconds(num_blocks: int, num_ranks: int, ranks_per_node: int | None) -> float:
    """Time the exact search of straight and hybrid plans."""
    costs = StageCosts(random_costs(num_blocks, seed=1, fixed=1), border_points(num_blocks), 256)
    cluster = Cluster.uniform(num_ranks, ranks_per_node=ranks_per_node)

    def search() -> None:
        straight = search_stages(costs, cluster, max_replicas=1)
        assert straight is not None
        search_stages(costs, cluster, max_replicas=num_ranks, ceiling_ms=straight.cost_ms)

    return timed(search)[1]


def show(line: str) -> None:
    """Write a line at once."""
    sys.stdout.write(line + "\n")
    sys.stdout.flush()


def speed() -> None:
    """Time searches, simulations and whole plannings."""
    show(f"Python {platform.python_version()}, {platform.machine()}")
    for num_blocks, num_ranks, per_node in [(96, 64, None), (96, 64, 8), (200, 256, None), (200, 256, 8)]:
        seconds = search_seconds(num_blocks, num_ranks, per_node)
        nodes = f", {per_node} per node" if per_node else ""
        show(f"search of straight and hybrid, {num_blocks} blocks, {num_ranks} ranks{nodes}: {seconds:.2f} s")
    plans = {"straight": Plan.straight([3] * 16), "hybrid": Plan.hybrid([(12, 4)] * 4), "joint": Plan.joint(48, 16)}
    for name, plan in plans.items():
        costs = random_costs(48, seed=1, fixed=1)
        seconds = timed(lambda: simulate(plan, costs, Cluster.uniform(16), num_rows=256, num_steps=50))[1]  # noqa: B023
        show(f"simulation of 50 steps, 48 blocks, 16 ranks, {name}: {seconds:.2f} s")
    for num_blocks, num_ranks in [(6, 4), (24, 8), (48, 16), (96, 64), (200, 256)]:
        costs = random_costs(num_blocks, seed=1, fixed=1)
        choice, seconds = timed(lambda: find_plan(costs, Cluster.uniform(num_ranks), num_rows=256))  # noqa: B023
        show(f"find_plan, {num_blocks} blocks, {num_ranks} ranks: {seconds:.1f} s, {choice.family}")


def families() -> None:
    """Compare the families' step times with the work bound, in means over seeds."""
    show("| fixed | gradients | blocks, ranks | " + " | ".join(list(Family)[1:]) + " | chosen, no row divided |")
    regimes = [(0.0, 0), (0.3, 100_000), (10.0, 100_000), (0.3, 20_000_000)]
    for fixed, gradient_bytes in regimes:
        for num_blocks, num_ranks in [(6, 4), (12, 8)]:
            reached: dict[str, list[float]] = {family: [] for family in [*list(Family)[1:], "bitwise"]}
            for seed in range(NUM_SEEDS):
                costs = random_costs(num_blocks, seed=seed, fixed=fixed, gradient_bytes=gradient_bytes)
                cluster = Cluster.uniform(num_ranks)
                choice = find_plan(costs, cluster, num_rows=NUM_ROWS)
                found = {candidate.family: candidate.step_time_ms for candidate in choice.alternatives}
                for family in list(Family)[1:]:
                    # A family without a plan of its own is as good as the best family that it contains.
                    contained = [found[other] for other in CONTAINED[family] if other in found]
                    reached[family].append(min(contained) / choice.bounds.work_ms)
                bitwise = find_plan(costs, cluster, num_rows=NUM_ROWS, exactness="bitwise")
                reached["bitwise"].append(bitwise.step_time_ms / choice.bounds.work_ms)
            means = " | ".join(f"{mean(values):.3f}" for values in reached.values())
            show(f"| {fixed} | {gradient_bytes:,} | {num_blocks}, {num_ranks} | {means} |")


if __name__ == "__main__":
    {"speed": speed, "families": families}[sys.argv[1]]()
