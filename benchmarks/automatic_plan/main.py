"""The plan that is found against the best of one process, joint, straight and hybrid: is it ever slower?

    python -m benchmarks.automatic_plan.main

Three models on two ranks, one thread each. One pair of processes runs all variants of a model, interleaved, because a
machine's speed drifts. Every round measures the blocks anew and finds a plan anew; the straight, hybrid and half-cut
plans are the best ones for the costs that the first round has measured, and all predictions are made of these.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections import Counter
from typing import Any, NamedTuple

import torch
import torch.distributed
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.shared.ranks import run_ranks
from benchmarks.shared.tables import markdown_table, spread
from benchmarks.shared.training import plain_trainer
from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, Plan, format_plan
from lightning_pipebd.planning.families import Family
from lightning_pipebd.planning.outlook import Outlook

BATCH_SIZE = 64
NUM_RANKS = 2
FAMILIES = (Family.STRAIGHT, Family.JOINT, Family.HYBRID, Family.HALF_CUT)


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


class Result(NamedTuple):
    """One fit: its time per batch, the plan, and the plan's family if it was found."""

    ms: float
    plan: str
    family: str = ""


def fit(model: str, strategy: Any, num_batches: int) -> float:
    """Train, as a user would; give ms per batch without the first epoch, which warms up and fills the pipeline."""
    seed_everything(0, verbose=False)
    times = Times()
    trainer = plain_trainer(strategy, 1 if strategy == "auto" else NUM_RANKS, [times], max_epochs=2)
    data = TensorDataset(torch.randn(BATCH_SIZE * num_batches, *MODELS[model][2]))
    trainer.fit(Distil(model), DataLoader(data, batch_size=BATCH_SIZE))
    return times.seconds[-1] / num_batches * 1000


class Rounds:
    """All variants of a model in turn, on every rank of one pair of processes."""

    def __init__(self, model: str, num_batches: int) -> None:
        self.model = model
        self.num_batches = num_batches
        self.found: dict[str, list[Result]] = {}
        self.predicted: dict[str, float] = {}
        self.others: dict[str, Plan] = {}

    def run(self) -> None:
        """Run every variant once."""
        outlook = self._automatic()
        if not self.others:
            assert outlook.choice is not None
            chosen = {candidate.family: candidate for candidate in outlook.choice.alternatives}
            self.others = {str(family): chosen[family].plan for family in FAMILIES if family in chosen}
            self.predicted = {str(family): chosen[family].step_time_ms for family in FAMILIES if family in chosen}
            self.predicted |= {"automatic": outlook.step_time_ms}
            if Family.SINGLE in chosen:
                self.predicted["one process"] = chosen[Family.SINGLE].step_time_ms
        if int(os.environ["LOCAL_RANK"]) == 0:
            self._note("one process", Result(fit(self.model, "auto", self.num_batches), "-"))
        torch.distributed.barrier()
        for name, plan in self.others.items():
            ms = fit(self.model, PipeBDStrategy(plan), self.num_batches)
            self._note(name, Result(ms, format_plan(plan)))

    def _automatic(self) -> Outlook:
        strategy = PipeBDStrategy()
        ms = fit(self.model, strategy, self.num_batches)
        outlook = strategy.outlook
        assert outlook is not None
        assert outlook.choice is not None
        self._note("automatic", Result(ms, format_plan(outlook.plan), str(outlook.choice.family)))
        return outlook

    def _note(self, variant: str, result: Result) -> None:
        self.found.setdefault(variant, []).append(result)


def run(model: str, repeats: int, num_batches: int) -> Rounds:
    """Run all rounds on one rank; rank 0 has all results."""
    rounds = Rounds(model, num_batches)
    for _ in range(repeats):
        rounds.run()
    return rounds


def table(rounds: Rounds) -> str:
    """Write the results as a Markdown table."""
    times = {name: [result.ms for result in results] for name, results in rounds.found.items()}
    best = min(statistics.median(found) for name, found in times.items() if name != "automatic")
    rows = []
    for name, results in rounds.found.items():
        plans = Counter(f"`{result.plan}`" + f" ({result.family})" * bool(result.family) for result in results)
        predicted = f"{rounds.predicted[name]:.1f}" if name in rounds.predicted else ""
        found = ", ".join(f"{plan}, {count} of {len(results)}" for plan, count in plans.most_common())
        share = f"{best / statistics.median(times[name]):.2f}"
        rows.append([name, f"{spread(times[name]):.1f}", predicted, share, found])
    return markdown_table(["variant", "ms per batch", "predicted ms", "best of the others / this", "plans"], rows)


def main() -> None:
    """Run all variants of each model in a pair of processes, and print their tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--batches", type=int, default=16)
    parser.add_argument("--models", nargs="+", default=list(MODELS), choices=list(MODELS))
    arguments = parser.parse_args()
    # Every round measures anew.
    os.environ["PIPEBD_CACHE"] = ""
    for model in arguments.models:
        rounds = run_ranks(run, NUM_RANKS, model, arguments.repeats, arguments.batches)[0]
        sys.stdout.write(f"\n{model}, batches of {BATCH_SIZE}, {arguments.repeats} rounds\n\n{table(rounds)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
