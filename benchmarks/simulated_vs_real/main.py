"""Predicted against measured step times: is the simulator's number what the real runtime takes?

    python -m benchmarks.simulated_vs_real.main

Two ranks compute for real; four and eight ranks sleep instead of computing, so that they need no cores. Unsteady ranks
sleep a quarter to seven quarters of their time, drawn at random. Everything else is real: processes, transport,
Lightning's loop. Each plan is measured and predicted in one run: the costs are those that the run itself measures
before it begins, and the step time is that of its slowest rank.
"""

from __future__ import annotations

import argparse
import os
import sys
from random import Random

import torch
from lightning.pytorch import seed_everything
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.shared.ranks import run_ranks
from benchmarks.shared.sleeping import Sleep, SleepingBlock
from benchmarks.shared.tables import interleave, markdown_table, ratios, spread
from benchmarks.shared.training import plain_trainer
from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy
from lightning_pipebd.planning.curve import Curve

BATCH_SIZE = 64
WIDTH = 1024  # 64 rows of 1024 floats: 256 KiB
NUM_STEPS = 40

#: Name of the workload -> ranks, and a plan of each family. A hybrid plan of two ranks would be the joint one.
CASES: dict[str, tuple[int, dict[str, str]]] = {
    "real 2": (
        2,
        {
            "straight": "0-1|2-4",
            "half cut": "0,T1|S1,2-4",
            "fractional": "0,1:1/4|1:3/4,2-4",
            "joint": "joint",
        },
    ),
    "sleeping 4": (
        4,
        {
            "straight": "0|1-2|3-4|5",
            "hybrid": "0-1*2|2-4|5",
            "half cut": "0,T1|S1,2|3,T4|S4,5",
            "fractional": "0,1:1/2|1:1/2,2|3,4:1/2|4:1/2,5",
            "joint": "joint",
        },
    ),
    "sleeping 8": (
        8,
        {
            "straight": "0|1|2|3|4|5|6-7|8-9",
            "hybrid": "0-1*2|2-3*2|4-5*2|6-7|8-9",
            "half cut": "0,T1|S1|2,T3|S3|4,T5|S5|6-7|8-9",
            "fractional": "0,1:1/4|1:3/4|2,3:1/4|3:3/4|4,5:1/4|5:3/4|6-7|8-9",
            "joint": "joint",
        },
    ),
    "unsteady 4": (4, {"straight": "0|1-2|3-4|5", "hybrid": "0-1*2|2-4|5", "joint": "joint"}),
}


class UnsteadyBlock(SleepingBlock):
    """Sleeps as long as it is told to on average, and every time another time; on each rank another one."""

    def __init__(self, forward_ms: Curve) -> None:
        super().__init__(forward_ms)
        self._rng = Random()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Sleep."""
        output: torch.Tensor = Sleep.apply(
            x, self.scale, self._rng.uniform(0.25, 1.75) * self.forward_ms.at(len(x)) / 1000
        )
        return output


def sleeping(num_blocks: int, kind: type[SleepingBlock]) -> tuple[nn.Module, nn.Module, list[str]]:
    """Teacher and student whose blocks differ by a factor of two."""
    times = [0.15 * (1 + block % 3 / 2) for block in range(num_blocks)]
    teacher, student = (nn.Sequential(*(kind(Curve.affine(1, ms)) for ms in times)) for _ in range(2))
    return teacher, student, [str(block) for block in range(num_blocks)]


def computing() -> tuple[nn.Module, nn.Module, list[str]]:
    """Teacher and student of convolutions."""

    def network(width: int) -> nn.Sequential:
        widths = [(3, width), (width, 2 * width), (2 * width, 2 * width), (2 * width, 2 * width)]
        stages = [
            nn.Sequential(
                nn.Conv2d(*pair, 3, padding=1), nn.ReLU(), nn.Conv2d(pair[1], pair[1], 3, padding=1), nn.ReLU()
            )
            for pair in widths
        ]
        return nn.Sequential(*stages, nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)))

    return network(32), network(32), [str(block) for block in range(5)]


class Distil(BlockwiseDistillationModule):
    """The models of a workload."""

    def __init__(self, workload: str) -> None:
        kind, ranks = workload.split()
        block = UnsteadyBlock if kind == "unsteady" else SleepingBlock
        teacher, student, paths = computing() if kind == "real" else sleeping(6 if ranks == "4" else 10, block)
        super().__init__(teacher, student, dict(zip(paths, paths, strict=True)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trainable_parameters(), lr=1e-4)


def train(workload: str, family: str) -> tuple[float, float]:
    """One rank of one run, as a user would start it; give predicted and measured ms."""
    seed_everything(0, verbose=False)
    ranks, plans = CASES[workload]
    is_real = workload.startswith("real")
    shape = (3, 12, 12) if is_real else (WIDTH,)
    data = TensorDataset(torch.randn(BATCH_SIZE, 1).expand(-1, torch.Size(shape).numel()).reshape(BATCH_SIZE, *shape))
    indices = [list(range(BATCH_SIZE))] * NUM_STEPS
    # A memory limit beyond all needs has the costs of a given plan measured.
    strategy = PipeBDStrategy(plan=plans[family], memory_limit="1TiB")
    plain_trainer(strategy, ranks).fit(Distil(workload), DataLoader(data, batch_sampler=indices))
    assert strategy.outlook is not None
    assert strategy.session is not None
    assert strategy.session.step_time_ms is not None
    return strategy.outlook.step_time_ms, strategy.session.step_time_ms


def main() -> None:
    """Interleave all plans of a workload, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--workloads", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--plans", nargs="+", help="families of plans; all by default")
    arguments = parser.parse_args()
    # Nothing comes from the cache.
    os.environ["PIPEBD_CACHE"] = ""
    rows = []
    for workload in arguments.workloads:
        num_ranks, plans = CASES[workload]
        families = [family for family in plans if family in (arguments.plans or plans)]
        runs = interleave(
            families,
            arguments.repeats,
            lambda family, workload=workload, num_ranks=num_ranks: run_ranks(train, num_ranks, workload, family)[0],
        )
        for family, results in runs.items():
            predicted, measured = ([run[side] for run in results] for side in (0, 1))
            cells = [workload, family, f"{spread(predicted):.1f}", f"{spread(measured):.1f}"]
            rows.append([*cells, f"{ratios(measured, predicted):.3f}"])
    header = ["workload and ranks", "plan", "predicted ms", "measured ms", "measured / predicted"]
    sys.stdout.write(markdown_table(header, rows) + "\n")


if __name__ == "__main__":
    main()
