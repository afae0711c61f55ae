"""How benchmarks train: a trainer that does nothing else, and a clock for its batches."""

from __future__ import annotations

import resource
import time
from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = ["StepClock", "peak_memory_bytes", "plain_trainer"]


class StepClock(Callback):
    """Notes when each batch ended on this rank."""

    def __init__(self) -> None:
        self.stamps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.stamps.append(time.perf_counter())

    def pace_ms(self, num_skipped: int, num_measured: int) -> float:
        """Give the mean time of some steps; the first ones warm up allocators and fill the queues.

        The slowest rank's pace is everybody's: where ranks run ahead of each other, take the greatest of all.
        """
        first, last = self.stamps[num_skipped - 1], self.stamps[num_skipped + num_measured - 1]
        return (last - first) / num_measured * 1000


def plain_trainer(strategy: Any, num_ranks: int, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """Give a trainer of one epoch on CPU, without logger, checkpoints and output unless `settings` say otherwise."""
    quiet = {
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(
        accelerator="cpu", devices=num_ranks, strategy=strategy, callbacks=list(callbacks), **(quiet | settings)
    )


def peak_memory_bytes() -> int:
    """Give the most memory that this process held at one time, what it has in common with others included."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
