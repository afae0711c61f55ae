"""Train, be killed somewhere, go on from the last checkpoint: what must end as if nothing had happened."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_pipebd import PipeBDStrategy
from tests.helpers.ranks import RankError, run_processes
from tests.helpers.toy import ToyData, ToyStream, make_module

__all__ = ["Leg", "run_leg", "states_of", "train_leg"]

NUM_ROWS, BATCH_SIZE, NUM_EPOCHS = 42, 4, 3


class NoisyData(ToyData):
    """Rows with random augmentation, drawn from the process's own random stream."""

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        inputs, label = super().__getitem__(index)
        return inputs + 0.1 * torch.randn_like(inputs), label


@dataclass(frozen=True, kw_only=True)
class Leg:
    """One start of the training script.

    Args:
        plan: Text of a plan; ``None`` trains under plain Lightning in one process.
        num_ranks: Processes.
        module: Name of a toy module.
        loader: `"plain"`, `"workers"`, `"noisy"`, `"generator"`, `"stream"`, `"stateful"` or `"stateful-workers"`.
        every: Steps between two checkpoints.
        kill_at: Step after which a rank is killed; ``None`` trains to the end.
        kill_rank: That rank.
        kills_all: Whether all ranks are killed with it.
    """

    plan: str | None
    num_ranks: int
    module: str = "linear"
    loader: str = "plain"
    every: int = 3
    kill_at: int | None = None
    kill_rank: int = 0
    kills_all: bool = False


class Killer(Callback):
    def __init__(self, leg: Leg) -> None:
        self.leg = leg
        self.pids = [os.getpid()]

    def on_train_start(self, trainer: Trainer, pl_module: object) -> None:
        if self.leg.kills_all and self.leg.num_ranks > 1:
            everyone: list[Any] = [None] * self.leg.num_ranks
            torch.distributed.all_gather_object(everyone, os.getpid())
            self.pids = sorted(everyone, key=lambda pid: pid == os.getpid())

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == self.leg.kill_at and trainer.global_rank == self.leg.kill_rank:
            for pid in self.pids:
                os.kill(pid, signal.SIGKILL)


def run_leg(leg: Leg, directory: Path, *, timeout: float = 100.0) -> dict[str, Any] | None:
    """Start the script once; gives the final states, or nothing if it was killed."""
    if leg.kill_at is None:
        states: dict[str, Any] = run_processes(leg.num_ranks, train_leg, leg, str(directory), timeout=timeout)[0]
        return states
    with contextlib.suppress(RankError):
        run_processes(leg.num_ranks, train_leg, leg, str(directory), timeout=timeout)
    return None


def states_of(trainer: Trainer, module: Any) -> dict[str, Any]:
    """Give everything that training has changed; all ranks must ask."""
    parameters = trainer.strategy.lightning_module_state_dict()
    return {
        "module": {name: value.clone() for name, value in parameters.items()},
        "optimizer": trainer.strategy.optimizer_state(trainer.optimizers[0]),
        "schedule": [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs],
        "steps": (trainer.global_step, trainer.current_epoch),
    }


def _make_loader(leg: Leg, module: Any) -> DataLoader[Any]:
    data = (NoisyData if leg.loader == "noisy" else ToyData)(NUM_ROWS, module.shape, tokens=module.tokens)
    if leg.loader == "stream":
        stream: IterableDataset[Any] = ToyStream(data)
        return DataLoader(stream, batch_size=BATCH_SIZE)
    options: dict[str, Any] = {"num_workers": 2} if "workers" in leg.loader else {}
    if leg.loader.startswith("stateful"):
        from torchdata.stateful_dataloader import StatefulDataLoader

        stateful: DataLoader[Any] = StatefulDataLoader(data, batch_size=BATCH_SIZE, shuffle=True, **options)
        return stateful
    if leg.loader == "generator":
        options["generator"] = torch.Generator().manual_seed(8)
    return DataLoader(data, batch_size=BATCH_SIZE, shuffle=True, **options)


def train_leg(rank: int, leg: Leg, directory: str) -> dict[str, Any]:
    """Train on one rank."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seed_everything(3, verbose=False)
    module = make_module(leg.module)
    saving = ModelCheckpoint(directory, every_n_train_steps=leg.every, save_top_k=1, save_last=True)
    trainer = Trainer(
        accelerator="cpu",
        devices=leg.num_ranks,
        strategy="auto" if leg.plan is None else PipeBDStrategy(plan=leg.plan),
        max_epochs=NUM_EPOCHS,
        callbacks=[Killer(leg)] if leg.plan is None else [saving, Killer(leg)],
        enable_checkpointing=leg.plan is not None,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _make_loader(leg, module), ckpt_path=None if leg.plan is None else "last")
    return states_of(trainer, module)
