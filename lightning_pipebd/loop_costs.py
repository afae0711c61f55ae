"""What Lightning's own loop takes between two programs: measured on a fit of a module that does nothing."""

from __future__ import annotations

import logging
import statistics
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader, TensorDataset
from typing_extensions import override

from lightning_pipebd.runtime.side_effects import preserved_random_states

__all__ = ["measure_loop"]

_NUM_STEPS = 30


class _Idle(LightningModule):
    """Does what every module does at a step, and nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    @override
    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.weight * 0.0

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute nothing: what a backward pass takes is measured with the blocks."""

    @override
    def configure_optimizers(self) -> Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.0)


class _Stamps(Callback):
    """Notes when each batch ends."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds.append(time.perf_counter())


def measure_loop() -> float:
    """Give the ms that a step of Lightning's loop takes on this rank, beside the blocks and their updates.

    A trainer of its own runs on the CPU, without callbacks, loggers and progress bar of the user's: what those take is
    not in it, nor what is logged. Random states and the trainer that may be running are left alone.
    """
    stamps = _Stamps()
    with preserved_random_states(), _silence(), torch.enable_grad():
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            # Not the cluster's, which would want its number of tasks.
            plugins=[LightningEnvironment()],
            max_steps=_NUM_STEPS,
            callbacks=[stamps],
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(_Idle(), DataLoader(TensorDataset(torch.zeros(_NUM_STEPS, 1)), batch_size=1))
    # The first steps build Lightning's tables of results.
    durations = [after - before for before, after in zip(stamps.seconds[4:], stamps.seconds[5:], strict=False)]
    return statistics.median(durations) * 1000


@contextmanager
def _silence() -> Iterator[None]:
    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
