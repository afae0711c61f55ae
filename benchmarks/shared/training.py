"""How benchmarks train: a trainer that does nothing else, and a clock for its batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

__all__ = [
    "PeakMemory",
    "StepClock",
    "forget_peak_memory",
    "peak_memory_bytes",
    "plain_trainer",
    "present_memory_bytes",
]


class StepClock(Callback):
    """Notes when each batch ended on this rank."""

    def __init__(self) -> None:
        self.stamps: list[float] = []
        self._cpu_stamps: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self.stamps.append(time.perf_counter())
        self._cpu_stamps.append(time.process_time())

    def pace_ms(self, num_skipped: int, num_measured: int) -> float:
        """Give the mean time of some steps; the first ones warm up allocators and fill the queues.

        The slowest rank's pace is everybody's: where ranks run ahead of each other, take the greatest of all.
        """
        return _mean_ms(self.stamps, num_skipped, num_measured)

    def processor_ms(self, num_skipped: int, num_measured: int) -> float:
        """Give the mean processor time of these steps, of all threads of this process."""
        return _mean_ms(self._cpu_stamps, num_skipped, num_measured)


def _mean_ms(stamps: Sequence[float], num_skipped: int, num_measured: int) -> float:
    return (stamps[num_skipped + num_measured - 1] - stamps[num_skipped - 1]) / num_measured * 1000


def plain_trainer(strategy: Any, num_ranks: int, callbacks: Sequence[Callback] = (), **settings: Any) -> Trainer:
    """Give a trainer of one epoch on CPU, without logger, checkpoints and output unless `settings` say otherwise."""
    quiet: dict[str, Any] = {
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "max_epochs": 1,
    }
    return Trainer(devices=num_ranks, strategy=strategy, callbacks=list(callbacks), **(quiet | settings))


def present_memory_bytes() -> int:
    """Give the memory that this process holds, what it has in common with others included."""
    return _status_bytes("VmRSS")


def forget_peak_memory() -> None:
    """Begin anew to find the most memory that this process holds; on Linux only."""
    # Linux forgets the peak when it is told 5.
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory_bytes() -> int:
    """Give the most memory that this process held at one time, since it was last forgotten; on Linux only."""
    return _status_bytes("VmHWM")


class PeakMemory(Callback):
    """Finds the most memory that this process held at one time while it trained; on Linux only."""

    def __init__(self) -> None:
        self.peak_bytes = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # What setting up and measuring took is not the question.
        forget_peak_memory()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.peak_bytes = peak_memory_bytes()


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
