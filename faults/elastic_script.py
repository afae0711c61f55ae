"""The training script that torchrun starts: ``python elastic_script.py DIRECTORY [RANK:STEP ...]``.

Every process trains the same toy module, and goes on from the last checkpoint in the directory. Each ``RANK:STEP``
kills that rank once, after that step. The final states are written by rank 0.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.runtime import shared_memory
from tests.helpers.resuming import states_of
from tests.helpers.toy import ToyData, make_module

#: By the number of ranks that have come: a restart with fewer ranks has another plan.

PLANS = {1: "0-3", 2: "0-1|2-3"}


class Paced(Callback):
    """Gives a machine the time to be lost in the middle of the training."""

    def on_train_batch_end(self, *args: object) -> None:
        """Wait."""
        time.sleep(0.2)


class KillOnce(Callback):
    """Kills its process after a step, in the first start only."""

    def __init__(self, directory: Path, rank: int, step: int) -> None:
        self.mark = directory / f"killed-{rank}-{step}"
        self.rank = rank
        self.step = step

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        """Leave a mark, and end."""
        if trainer.global_rank == self.rank and trainer.global_step == self.step and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)


class Diary(Callback):
    """Notes where each start goes on, and on how many ranks."""

    def __init__(self, directory: Path) -> None:
        self.path = directory / "starts.txt"

    def on_train_start(self, trainer: Trainer, *args: object) -> None:
        """Write a line."""
        if trainer.is_global_zero:
            with self.path.open("a") as file:
                file.write(f"{trainer.world_size} {trainer.global_step}\n")


def main() -> None:
    """Train."""
    directory, kills = Path(sys.argv[1]), [tuple(map(int, kill.split(":"))) for kill in sys.argv[2:]]
    (directory / f"pid-{os.environ['AGENT']}-{os.getpid()}").touch()
    if "HOST" in os.environ:
        # Hosts that are network namespaces of one machine must not share memory.
        shared_memory._boot = lambda: os.environ["HOST"]
    torch.set_num_threads(1)
    seed_everything(3, verbose=False)
    module = make_module("dropout")
    num_ranks = int(os.environ.get("WORLD_SIZE", "1"))
    nodes = int(os.environ.get("GROUP_WORLD_SIZE", "1"))
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks // nodes,
        num_nodes=nodes,
        strategy=PipeBDStrategy(plan=PLANS[num_ranks]),
        max_epochs=3,
        callbacks=[
            ModelCheckpoint(directory, every_n_train_steps=3, save_last=True),
            Diary(directory),
            *([] if kills else [Paced()]),
            *(KillOnce(directory, rank, step) for rank, step in kills),
        ],
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    loader = DataLoader(ToyData(42, module.shape), batch_size=4, shuffle=True)
    trainer.fit(module, loader, ckpt_path="last")
    states = states_of(trainer, module)
    if trainer.is_global_zero:
        torch.save(states, directory / "states.pt")


if __name__ == "__main__":
    main()
