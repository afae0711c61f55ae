"""Step time of the real runtime when blocks only sleep: is anything but the slowest rank on the critical path?

    python benchmarks/sleeping_blocks/main.py --ranks 4

Teacher blocks sleep 10 ms, student blocks 30 ms; activations of 256 KB are relayed. Compute needs no core, so four
ranks run on two. Everything else is real: processes, gloo, Lightning's loop, logging. A rank's
work is also measured: what one of the blocks takes alone in one process, where plain Lightning's loop, the loss and the
optimizer have their share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy

TEACHER_S, STUDENT_S = 0.010, 0.030
NUM_STEPS = 60
WIDTH = 1024  # 64 rows of 1024 floats: 256 KB
OVERSLEEP_S = 0.0005


def sleep(seconds: float) -> None:
    """Sleep exactly: the system wakes a sleeper some 0.2 ms late, which is no work of the block's."""
    stop = time.perf_counter() + seconds
    time.sleep(max(0.0, seconds - OVERSLEEP_S))
    while time.perf_counter() < stop:
        pass


class Sleep(torch.autograd.Function):
    """Sleeps in the forward pass, and twice as long in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, seconds: float) -> Tensor:
        ctx.seconds = seconds
        sleep(seconds)
        return x * scale

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[None, Tensor, None]:
        sleep(2 * ctx.seconds)
        return None, gradient.sum().reshape(1), None


class SleepingBlock(nn.Module):
    """Computes next to nothing, slowly."""

    def __init__(self, seconds: float) -> None:
        super().__init__()
        self.seconds = seconds
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        return Sleep.apply(x, self.scale, self.seconds)


class SleepingModule(BlockwiseDistillationModule):
    """As many blocks as asked for."""

    def __init__(self, num_blocks: int) -> None:
        teacher = nn.Sequential(*(SleepingBlock(TEACHER_S) for _ in range(num_blocks)))
        student = nn.Sequential(*(SleepingBlock(STUDENT_S / 3) for _ in range(num_blocks)))
        super().__init__(teacher, student, {str(block): str(block) for block in range(num_blocks)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=1e-3)


class StepTimes(Callback):
    """Time from the end of one batch to the end of the next."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.stamps.append(time.perf_counter())


def train(num_ranks: int, strategy: str, report: str) -> None:
    """One run, as a user would start it."""
    module, times = SleepingModule(1 if strategy == "alone" else 4), StepTimes()
    # Batches that are there already: what loading costs is not the question here.
    batches = [torch.randn(64, WIDTH)] * NUM_STEPS
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=PipeBDStrategy(plan="|".join(str(block) for block in range(4))) if strategy == "pipebd" else "auto",
        max_epochs=1,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        # The last rank's pace is everybody's pace once the queues are full: skip the fill.
        steady = times.stamps[NUM_STEPS // 3 :]
        Path(report).write_text(json.dumps((steady[-1] - steady[0]) / (len(steady) - 1) * 1000))


def main() -> None:
    """Interleave runs of one process and four ranks, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        train(int(arguments.run[0]), arguments.run[1], arguments.run[2])
        return
    results: dict[str, list[float]] = {"auto": [], "alone": [], "pipebd": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for strategy, ranks in (("auto", 1), ("alone", 1), ("pipebd", arguments.ranks)):
                report = f"{folder}/report.json"
                command = [sys.executable, __file__, "--run", str(ranks), strategy, report]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(
                    command, check=True, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                )
                results[strategy].append(json.loads(Path(report).read_text()))
    work_ms = (TEACHER_S + STUDENT_S) * 1000
    one, alone, many = (statistics.median(results[name]) for name in ("auto", "alone", "pipebd"))
    sys.stdout.write(f"one process  {one:7.1f} ms/step   (work {4 * work_ms:.0f} ms)   runs {results['auto']}\n")
    sys.stdout.write(f"one block    {alone:7.1f} ms/step   (work {work_ms:.0f} ms)   runs {results['alone']}\n")
    sys.stdout.write(
        f"{arguments.ranks} ranks      {many:7.1f} ms/step   (work {work_ms:.0f} ms)   runs {results['pipebd']}\n"
    )
    sys.stdout.write(f"ranks / one block {many / alone:.3f}; ranks / sleep {many / work_ms:.3f}; ")
    sys.stdout.write(f"speed-up {one / many:.2f}\n")


if __name__ == "__main__":
    main()
