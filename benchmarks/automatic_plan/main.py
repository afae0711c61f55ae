"""The plan that is found against the best of one process, joint, straight and hybrid: is it ever slower?

    python benchmarks/automatic_plan/main.py

Three models on two ranks, one thread each; all variants interleaved in one run, because a machine's speed drifts. The
straight and hybrid plans are the best ones for the costs that the first automatic run has measured.
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
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, save_plan

BATCH_SIZE = 64
NUM_RANKS = 2
VARIANTS = ("automatic", "one process", "joint", "straight", "hybrid")


def convolutional(width: int, *, has_norm: bool) -> nn.Module:
    """Four stages of two convolutions, and a classifier."""
    stages = []
    for inputs, outputs in ((3, width), (width, 2 * width), (2 * width, 2 * width), (2 * width, 4 * width)):
        norms = [nn.BatchNorm2d(outputs) if has_norm else nn.Identity() for _ in range(2)]
        stages.append(
            nn.Sequential(
                *(nn.Conv2d(inputs, outputs, 3, padding=1), norms[0], nn.ReLU()),
                *(nn.Conv2d(outputs, outputs, 3, padding=1), norms[1], nn.ReLU()),
                nn.MaxPool2d(2),
            )
        )
    return nn.Sequential(*stages, nn.Sequential(nn.Flatten(), nn.Linear(16 * width, 10)))


class Mixer(nn.Module):
    """A block of a transformer without attention: two layers with a residual connection."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.layers(x)


MODELS: dict[str, tuple[Any, Any, tuple[int, ...]]] = {
    "cnn": (lambda: convolutional(24, has_norm=False), lambda: convolutional(24, has_norm=False), (3, 32, 32)),
    "cnn with BatchNorm": (
        lambda: convolutional(24, has_norm=True),
        lambda: convolutional(24, has_norm=True),
        (3, 32, 32),
    ),
    "mixer": (
        lambda: nn.Sequential(*(Mixer(128, 512) for _ in range(5))),
        lambda: nn.Sequential(*(Mixer(128, 128) for _ in range(5))),
        (32, 128),
    ),
}


class Distil(BlockwiseDistillationModule):
    """Five blocks, mean squared error."""

    def __init__(self, model: str) -> None:
        teacher, student, _ = MODELS[model]
        super().__init__(teacher(), student(), {str(block): str(block) for block in range(5)})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.trainable_parameters(), lr=1e-4)


class Times(Callback):
    """How long each epoch's training took, until all ranks were done."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self._start)


def train(model: str, variant: str, num_batches: int, folder: str) -> None:
    """One run, as a user would start it."""
    seed_everything(0, verbose=False)
    plans = {"automatic": None, "joint": "joint"}
    is_alone = variant == "one process"
    strategy: Any = "auto" if is_alone else PipeBDStrategy(plan=plans.get(variant, f"{folder}/{variant}.yaml"))
    times = Times()
    trainer = Trainer(
        accelerator="cpu",
        devices=1 if is_alone else NUM_RANKS,
        strategy=strategy,
        max_epochs=4,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = TensorDataset(torch.randn(BATCH_SIZE * num_batches, *MODELS[model][2]))
    trainer.fit(Distil(model), DataLoader(data, batch_size=BATCH_SIZE))
    if not trainer.is_global_zero:
        return
    if variant == "automatic" and strategy.outlook is not None and strategy.outlook.choice is not None:
        for candidate in strategy.outlook.choice.alternatives:
            save_plan(candidate.plan, f"{folder}/{candidate.family}.yaml")
    # The first epoch warms up allocators and fills the pipeline.
    result = {"ms": statistics.median(times.seconds[1:]) / num_batches * 1000, "plan": ""}
    if not is_alone and strategy.outlook is not None:
        result["plan"] = str(strategy.outlook.choice.family if strategy.outlook.choice else "")
    Path(f"{folder}/report.json").write_text(json.dumps(result))


def run(model: str, variant: str, num_batches: int, folder: str) -> tuple[float, str]:
    """Start one run with one thread per process."""
    command = [sys.executable, __file__, "--run", model, variant, str(num_batches), folder]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PIPEBD_CACHE": "", "PYTHONWARNINGS": "ignore"}
    subprocess.run(command, check=True, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL)
    result = json.loads(Path(f"{folder}/report.json").read_text())
    return float(result["ms"]), str(result["plan"])


def main() -> None:
    """Interleave all variants of a model, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--run", nargs=4, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        model, variant, num_batches, folder = arguments.run
        train(model, variant, int(num_batches), folder)
        return
    for model in arguments.models:
        with tempfile.TemporaryDirectory() as folder:
            found: dict[str, list[float]] = {variant: [] for variant in VARIANTS}
            chosen: list[str] = []
            for _ in range(arguments.repeats):
                for variant, times in found.items():
                    # A family without a plan of its own (it is another's, or would change statistics) is left out.
                    if variant in ("straight", "hybrid") and not Path(f"{folder}/{variant}.yaml").exists():
                        continue
                    ms, plan = run(model, variant, arguments.batches, folder)
                    times.append(ms)
                    chosen += [plan] if variant == "automatic" else []
            medians = {variant: statistics.median(times) for variant, times in found.items() if times}
            best = min(ms for variant, ms in medians.items() if variant != "automatic")
            sys.stdout.write(f"\n{model}: ms per batch of {BATCH_SIZE}, median of {arguments.repeats}; ")
            sys.stdout.write(f"chosen: {', '.join(sorted(set(chosen)))}\n")
            for variant, ms in medians.items():
                spread = f"({min(found[variant]):.1f}-{max(found[variant]):.1f})"
                sys.stdout.write(f"{variant:14}{ms:9.1f} {spread:18} best of the others / this {best / ms:5.2f}\n")


if __name__ == "__main__":
    main()
