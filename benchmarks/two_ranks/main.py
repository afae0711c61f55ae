"""Two ranks with real compute against one process and against Lightning DDP: same module, same batch, same losses.

    python benchmarks/two_ranks/main.py

One thread per process everywhere. The runs are interleaved and the medians are compared, because the machine's speed
drifts. DDP gets half of the batch per process, so that the batch is the same. The ceiling is two processes that each do
half of the work without talking: two single-process runs of half the batch, side by side.
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
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, format_plan

BATCH_SIZE = 64
WORKLOADS = {"digits": (1, 16, (32, 64, 96, 96)), "cnn": (3, 32, (32, 64, 128, 128))}
VARIANTS = {
    "one process": ("auto", 1, None),
    "Lightning DDP": ("ddp", 2, None),
    "pipebd, automatic": ("pipebd", 2, None),
    "pipebd, by hand": ("pipebd", 2, {"digits": "0,1:11/20|1:9/20,2-4", "cnn": "0,1:1/4|1:3/4,2-4"}),
    "pipebd, joint": ("pipebd", 2, {"digits": "joint", "cnn": "joint"}),
}


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two ordinary convolutions."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU(), nn.Conv2d(outputs, outputs, 3, padding=1), nn.ReLU()
    )


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """The same of depthwise-separable convolutions."""
    layers: list[nn.Module] = []
    for width in (inputs, outputs):
        layers += [nn.Conv2d(width, width, 3, padding=1, groups=width), nn.Conv2d(width, outputs, 1), nn.ReLU()]
    return nn.Sequential(*layers)


class Network(nn.Module):
    """Four stages, halved in resolution after the second and the fourth, and a classifier."""

    def __init__(self, make_stage: Any, inputs: int, widths: Sequence[int]) -> None:
        super().__init__()
        pairs = zip((inputs, *widths), widths, strict=False)
        self.stages = nn.ModuleList(make_stage(*pair) for pair in pairs)
        self.classifier = nn.Linear(widths[-1], 10)

    def forward(self, x: Tensor) -> Any:
        for index, stage in enumerate(self.stages):
            x = stage(x)
            if index % 2:
                x = nn.functional.max_pool2d(x, 2)
        return self.classifier(x.mean(dim=(2, 3)))


class Distil(BlockwiseDistillationModule):
    """Five blocks, mean squared error."""

    def __init__(self, workload: str) -> None:
        inputs, size, widths = WORKLOADS[workload]
        paths = [*(f"stages.{index}" for index in range(4)), "classifier"]
        teacher, student = (Network(stage, inputs, widths) for stage in (convolutions, separable))
        super().__init__(teacher, student, dict(zip(paths, paths, strict=True)))
        self.example_input_array = torch.zeros(2, inputs, size, size)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.student.parameters(), lr=1e-3)


class Times(Callback):
    """When each epoch's training began and ended."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The means are exchanged before this hook, so that the epoch has ended on all ranks.
        self.seconds.append(time.perf_counter() - self._start)


def train(workload: str, variant: str, num_batches: int, report: str, batch_size: int) -> None:
    """One run in its own process (or processes: Lightning starts the others)."""
    name, devices, plans = VARIANTS[variant]
    seed_everything(0, verbose=False)
    strategy: Any = PipeBDStrategy(plan=plans[workload] if plans else None) if name == "pipebd" else name
    inputs, size, _ = WORKLOADS[workload]
    data = TensorDataset(torch.randn(batch_size * num_batches, inputs, size, size))
    times = Times()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=4,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    rows = batch_size // 2 if name == "ddp" else batch_size
    trainer.fit(Distil(workload), DataLoader(data, batch_size=rows))
    if trainer.is_global_zero:
        # The first epoch warms up allocators and thread pools.
        step_ms = statistics.median(times.seconds[1:]) / num_batches * 1000
        plan = format_plan(trainer.strategy.plan) if isinstance(trainer.strategy, PipeBDStrategy) else ""
        Path(report).write_text(json.dumps({"step_ms": step_ms, "plan": plan}))


def start(workload: str, variant: str, num_batches: int, report: str, batch_size: int) -> subprocess.Popen[bytes]:
    """Start one run with one thread per process."""
    command = [sys.executable, __file__, "--run", workload, variant, str(num_batches), report, str(batch_size)]
    # Costs are measured in this folder's first automatic run, and used by the others.
    cache = str(Path(report).parent / "costs")
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore", "PIPEBD_CACHE": cache}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def measure(workload: str, variant: str, num_batches: int, folder: str) -> tuple[float, str]:
    """Give time per batch and plan of one run; the ceiling is two runs of half a batch, side by side."""
    is_ceiling = variant == "ceiling"
    name, rows = ("one process", BATCH_SIZE // 2) if is_ceiling else (variant, BATCH_SIZE)
    reports = [f"{folder}/{index}.json" for index in range(2 if is_ceiling else 1)]
    runs = [start(workload, name, num_batches, report, rows) for report in reports]
    if any(run.wait() for run in runs):
        raise RuntimeError(f"{variant} failed on {workload}")
    found = [json.loads(Path(report).read_text()) for report in reports]
    return max(float(each["step_ms"]) for each in found), str(found[0]["plan"])


def main() -> None:
    """Interleave all variants and print a table of medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12)
    parser.add_argument("--workloads", nargs="+", default=list(WORKLOADS))
    parser.add_argument("--run", nargs=5, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        workload, variant, num_batches, report, rows = arguments.run
        train(workload, variant, int(num_batches), report, int(rows))
        return
    names = [*VARIANTS, "ceiling"]
    with tempfile.TemporaryDirectory() as folder:
        for workload in arguments.workloads:
            found: dict[str, list[float]] = {name: [] for name in names}
            plans: dict[str, str] = {}
            for _ in range(arguments.repeats):
                for name in names:
                    step_ms, plans[name] = measure(workload, name, arguments.batches, folder)
                    found[name].append(step_ms)
            medians = {name: statistics.median(values) for name, values in found.items()}
            sys.stdout.write(f"\n{workload}: ms per batch of {BATCH_SIZE}, median of {arguments.repeats} (min-max)\n")
            for name in names:
                spread = f"({min(found[name]):.1f}-{max(found[name]):.1f})"
                to_one, to_ddp = medians["one process"] / medians[name], medians["Lightning DDP"] / medians[name]
                ratios = f"one process / this {to_one:5.2f}   DDP / this {to_ddp:5.2f}"
                sys.stdout.write(f"{name:22}{medians[name]:9.1f} {spread:18} {ratios}   {plans[name]}\n")


if __name__ == "__main__":
    main()
