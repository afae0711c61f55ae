"""Choose a plan by hand: time the blocks, think, and let the simulator say what each plan would give.

    python examples/plan_by_hand.py

Nothing is trained and no process is started. Four convolutional teacher blocks and their students are timed on
scikit-learn's digits, on one thread of this machine; the plans are for two such ranks. The first block is light, so
dealing out the blocks by twos leaves one rank idle; three of them are too many for one rank. What lies between?
"""

from __future__ import annotations

import sys
import time
from argparse import ArgumentParser
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn

from lightning_pipebd import Plan, parse_plan
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.explain import BlockTraits, exactness_of, explain_plan
from lightning_pipebd.planning.simulate import simulate
from lightning_pipebd.planning.table import format_table

NUM_ROWS = 64
CHANNELS = [1, 32, 48, 48, 48]
PLANS = {
    "straight": "0-1|2-3",
    "straight, other cut": "0-2|3",
    "half cut": "0-1,T2|S2,3",
    "fractional": "0-1,2:1/2|2:1/2,3",
    "joint": "0-3*2",
}


def teacher_block(inputs: int, outputs: int) -> nn.Module:
    """A wide convolution."""
    return nn.Sequential(
        nn.Conv2d(inputs, 2 * outputs, 5, padding=2), nn.ReLU(), nn.Conv2d(2 * outputs, outputs, 3, padding=1)
    )


def student_block(inputs: int, outputs: int) -> nn.Module:
    """A narrow one, with statistics over its rows."""
    return nn.Sequential(nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())


def time_ms(work: Callable[[], Any], repeats: int) -> float:
    """Give the least time of several: the one that other work on the machine disturbed least."""
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        times.append(1000 * (time.perf_counter() - start))
    return min(times)


def time_blocks(repeats: int) -> tuple[tuple[BlockTimes, ...], tuple[int, ...]]:
    """Time all blocks for a batch and its half; give the bytes per row of all boundaries too."""
    boundary = torch.from_numpy(load_digits().data[:NUM_ROWS]).float().view(-1, 1, 8, 8) / 16
    times, sizes = [], [boundary[0].nbytes]
    for inputs, outputs in pairwise(CHANNELS):
        teacher, student = teacher_block(inputs, outputs).requires_grad_(False), student_block(inputs, outputs)
        target = teacher(boundary)
        teach, learn = [], []
        for rows in (NUM_ROWS // 2, NUM_ROWS):

            def run_teacher(block: nn.Module = teacher, given: Tensor = boundary[:rows]) -> None:
                block(given)

            def run_student(block: nn.Module = student, given: Tensor = boundary[:rows], to: Tensor = target) -> None:
                nn.functional.mse_loss(block(given), to[: len(given)]).backward()

            teach.append((rows, time_ms(run_teacher, repeats)))
            learn.append((rows, time_ms(run_student, repeats)))
        times.append(BlockTimes(teach_ms=Curve(teach), learn_ms=Curve(learn)))
        boundary = target
        sizes.append(boundary[0].nbytes)
    return tuple(times), tuple(sizes)


def compare(repeats: int) -> str:
    """Give a table of all plans, and how the fastest of those that keep every bit works."""
    times, sizes = time_blocks(repeats)
    costs = CostTable(
        blocks=tuple(BlockSizes(name=f"block {block}") for block in range(len(times))),
        devices=(DeviceTimes(device_class="default", blocks=times),),
        boundary_bytes_per_row=sizes,
    )
    traits = [
        BlockTraits(name=f"block {block}", has_batch_statistics=True, boundary_bytes_per_row=size)
        for block, size in enumerate(sizes[1:])
    ]
    lines = [f"{'block':8}{'teach':>9}{'learn':>9}"]
    for block, spent in enumerate(times):
        lines.append(f"{block:<8}{spent.teach_ms.at(NUM_ROWS):>6.2f} ms{spent.learn_ms.at(NUM_ROWS):>6.2f} ms")
    lines += ["", f"{'plan':40}{'step':>9}{'rank 0':>8}{'rank 1':>8}  exactness"]
    found: dict[str, tuple[Plan, float]] = {}
    for name, text in PLANS.items():
        plan = parse_plan(text)
        seen = simulate(plan, costs, Cluster.uniform(2), num_rows=NUM_ROWS)
        busy = "".join(f"{part:>8.0%}" for part in seen.utilisation)
        level = exactness_of(plan, traits)
        lines.append(f"{name:21}{text:19}{seen.step_time_ms:>6.2f} ms{busy}  {level}")
        if level == "bitwise":
            found[name] = (plan, seen.step_time_ms)
    best = min(found, key=lambda name: found[name][1])
    plan, _ = found[best]
    lines += ["", f"The fastest that keeps every bit: {best}", "", explain_plan(plan, traits, num_rows=NUM_ROWS)]
    return "\n".join([*lines, "", format_table(compile_programs(plan, NUM_ROWS))])


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--repeats", type=int, default=20)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    sys.stdout.write(compare(parser.parse_args().repeats) + "\n")
