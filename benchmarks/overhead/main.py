"""What the module and the strategy cost beside the computation, against a loop written by hand.

    python -m benchmarks.overhead.main

One process, one thread, the same blocks, data, losses and optimizer in all variants:

* *by hand*: a loop of torch alone, block after block;
* *Lightning*: a plain LightningModule that does the same in its `training_step`: the difference is Lightning's share;
* *module*: our module under `strategy="auto"`;
* *pipebd*: our module under `strategy="pipebd", devices=1`.

The variants take turns, each in a process of its own. The time of a step is the median over its steps of what the
process computes (`time.process_time`; wall time beside it), and ratios are taken within a turn. Figures are medians
over the turns, with the least and the greatest. Memory is the peak of the process, imports included.
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.shared.tables import interleave, markdown_table, ratios, spread
from lightning_pipebd import BlockwiseDistillationModule

NUM_BLOCKS = 4
NUM_WARM_UP = 10
# As this process found it: Lightning adds the address of its process group.
_ENVIRONMENT = dict(os.environ)
WORKLOADS = {"tiny": (16, 16, 150), "10 ms": (512, 448, 20)}  # width, rows, steps of a turn
_ANSWER = "overhead: "


def make_models(width: int, *layers: nn.Module) -> tuple[nn.Sequential, nn.Sequential]:
    """Give teacher and student of equal blocks, each with further layers at its end."""

    def make() -> nn.Sequential:
        blocks = (nn.Sequential(nn.Linear(width, width), nn.ReLU(), *layers) for _ in range(NUM_BLOCKS))
        return nn.Sequential(*blocks)

    seed_everything(0, verbose=False)
    return make(), make()


class Clock(Callback):
    """Times of the steps, from the end of one to the end of the next."""

    def __init__(self) -> None:
        self.marks: list[tuple[float, float]] = []

    def mark(self) -> None:
        """Note that a step has ended."""
        self.marks.append((time.process_time(), time.perf_counter()))

    def on_train_batch_end(self, *_: Any) -> None:
        self.mark()

    def step_ms(self) -> tuple[float, float]:
        """Give the median times of a step: of the process, and of the wall."""
        pairs = list(zip(self.marks[NUM_WARM_UP:], self.marks[NUM_WARM_UP + 1 :], strict=False))
        cpu, wall = (statistics.median(after[i] - before[i] for before, after in pairs) * 1000 for i in (0, 1))
        return cpu, wall


class ByHand(LightningModule):
    """The same training as a plain LightningModule."""

    def __init__(self, teacher: nn.Sequential, student: nn.Sequential) -> None:
        super().__init__()
        self.student = student
        self._teacher = [teacher.eval().requires_grad_(False)]

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return sum_of_losses(self._teacher[0], self.student, batch[0])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=1e-3)


class Distil(BlockwiseDistillationModule):
    """Equal blocks, mean squared error."""

    def __init__(self, teacher: nn.Sequential, student: nn.Sequential) -> None:
        paths = [str(index) for index in range(NUM_BLOCKS)]
        super().__init__(teacher, student, dict(zip(paths, paths, strict=True)))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.student.parameters(), lr=1e-3)


def sum_of_losses(teacher: nn.Sequential, student: nn.Sequential, boundary: Tensor) -> Tensor:
    """Give the sum of all blocks' losses."""
    losses = []
    for theirs, mine in zip(teacher, student, strict=True):
        with torch.no_grad():
            output = theirs(boundary)
        losses.append(nn.functional.mse_loss(mine(boundary), output))
        boundary = output
    return torch.stack(losses).sum()


def make_loader(workload: str) -> DataLoader[Any]:
    """Give the batches of a turn."""
    width, rows, steps = WORKLOADS[workload]
    return DataLoader(TensorDataset(torch.randn(rows * (steps + NUM_WARM_UP), width)), batch_size=rows)


def loop_by_hand(workload: str) -> Clock:
    """Train without Lightning."""
    teacher, student = make_models(WORKLOADS[workload][0])
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    clock = Clock()
    for (inputs,) in make_loader(workload):
        optimizer.zero_grad()
        boundary = inputs
        for theirs, mine in zip(teacher, student, strict=True):
            with torch.no_grad():
                output = theirs(boundary)
            torch.autograd.backward(nn.functional.mse_loss(mine(boundary), output))
            boundary = output
        optimizer.step()
        clock.mark()
    return clock


def fit(module: LightningModule, strategy: str, loader: DataLoader[Any], clock: Clock) -> None:
    """Train with a Trainer that does nothing else."""
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        strategy=strategy,
        max_epochs=1,
        callbacks=[clock],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


def train(workload: str, make: Callable[[nn.Sequential, nn.Sequential], LightningModule], strategy: str) -> Clock:
    """Train a turn."""
    clock = Clock()
    fit(make(*make_models(WORKLOADS[workload][0])), strategy, make_loader(workload), clock)
    return clock


VARIANTS: dict[str, Callable[[str], Clock]] = {
    "by hand": loop_by_hand,
    "Lightning": lambda workload: train(workload, ByHand, "auto"),
    "module": lambda workload: train(workload, Distil, "auto"),
    "pipebd": lambda workload: train(workload, Distil, "pipebd"),
}


class Turn(NamedTuple):
    """What a variant took for a step: medians of a turn."""

    cpu_ms: float
    wall_ms: float


class Runner:
    """A process of its own that trains one variant, turn by turn when it is told to.

    What one variant does to the C library's memory (pipebd has it keep what a step frees) would help the next one.
    """

    def __init__(self, workload: str, variant: str) -> None:
        command = [sys.executable, "-m", "benchmarks.overhead.main", "--serve", workload, variant]
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(
            command, stdin=pipe, stdout=pipe, stderr=subprocess.DEVNULL, env=_ENVIRONMENT, text=True
        )

    def turn(self) -> Turn:
        """Train once."""
        assert self._process.stdin is not None
        self._process.stdin.write("turn\n")
        self._process.stdin.flush()
        return Turn(*map(float, self._answer().split()))

    def end(self) -> float:
        """End the process; give the peak of its memory in MiB."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        peak = float(self._answer())
        self._process.wait()
        return peak

    def _answer(self) -> str:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.startswith(_ANSWER):
                return line.removeprefix(_ANSWER)
        raise RuntimeError("A variant ended before it had answered. Run it by itself: `--serve`.")


def serve(workload: str, variant: str) -> None:
    """Train a turn for every line of the standard input, and tell its times; then the peak of the memory."""
    for _ in sys.stdin:
        # Trainers are circles: those of the turns before would lie between the memory of this one.
        gc.collect()
        cpu_ms, wall_ms = VARIANTS[variant](workload).step_ms()
        sys.stdout.write(f"\n{_ANSWER}{cpu_ms} {wall_ms}\n")
        sys.stdout.flush()
    # Not `ru_maxrss`, which a child process takes over from its parent.
    status = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    peak = next(line for line in status if line.startswith("VmHWM:"))
    sys.stdout.write(f"\n{_ANSWER}{int(peak.split()[1]) / 1024}\n")


def measure(workload: str, repeats: int) -> str:
    """Measure all variants in turn, and give the table; the first turn warms up."""
    runners = {name: Runner(workload, name) for name in VARIANTS}
    turns = interleave(runners, repeats + 1, lambda name: runners[name].turn())
    cpu = {name: [turn.cpu_ms for turn in found[1:]] for name, found in turns.items()}
    rows = [
        {
            workload: name,
            "ms per step": f"{spread(times):.2f}",
            "wall": f"{statistics.median(turn.wall_ms for turn in turns[name][1:]):.2f}",
            "/ by hand": f"{ratios(times, cpu['by hand']):.3f}",
            "/ Lightning": f"{ratios(times, cpu['Lightning']):.3f}",
            "MiB": f"{runners[name].end():.0f}",
        }
        for name, times in cpu.items()
    ]
    return markdown_table(list(rows[0]), rows)


def main() -> None:
    """Print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=7)
    parser.add_argument("--workloads", nargs="+", choices=list(WORKLOADS), default=list(WORKLOADS))
    parser.add_argument("--serve", nargs=2, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    if arguments.serve:
        serve(*arguments.serve)
        return
    for workload in arguments.workloads:
        load = os.getloadavg()[0]
        sys.stdout.write(f"\n{NUM_BLOCKS} blocks; load of the machine at the start: {load:.1f}\n\n")
        sys.stdout.write(f"{measure(workload, arguments.repeats)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
