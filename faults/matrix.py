"""Each fault on some ranks: how soon all the others have ended, how, and what became of the checkpoints."""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pipebd import CheckedCheckpointIO, PipeBDStrategy
from tests.helpers.ranks import find_free_port
from tests.helpers.toy import LinearModule, ToyData

__all__ = ["FAULTS", "Trial", "format_matrix", "try_fault"]

PLANS = {2: "0-1|2-3", 4: "0|1|2|3"}
STEP, EVERY, STALL_S, PATIENCE_S = 12, 5, 3.0, 60.0

#: What goes wrong, on the last rank unless it is the loading one's business.
FAULTS = {
    "a rank is killed (SIGKILL)": "kill",
    "user code raises on one rank": "raise",
    "a block never returns": "sleep",
    "a rank is stopped (SIGSTOP)": "stop",
    "the loader never returns": "loader",
    "a loss is not a number": "nan",
}


class Trial(NamedTuple):
    """What was seen of one fault.

    Args:
        fault: Its name.
        num_ranks: Ranks of the run.
        detected_s: Seconds until all ranks but the faulty one had ended; infinite if they did not.
        exit_codes: Of the ranks that were not at fault.
        last_step: Step of the newest checkpoint.
        num_damaged: Checkpoints that are not intact.
    """

    fault: str
    num_ranks: int
    detected_s: float
    exit_codes: tuple[int, ...]
    last_step: int
    num_damaged: int

    @property
    def is_as_promised(self) -> bool:
        """Whether all ended, none with status 0, and the checkpoints are there and intact."""
        has_ended = self.detected_s < PATIENCE_S and 0 not in self.exit_codes
        return has_ended and not self.num_damaged and self.last_step == STEP // EVERY * EVERY


class FaultyModule(LinearModule):
    """Fails in one step on one rank; says when."""

    def __init__(self, fault: str, rank: int, directory: str) -> None:
        super().__init__()
        self.fault = fault
        self.rank = rank
        self.directory = directory

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        loss = super().block_loss(block, student_output, teacher_output, targets)
        if self.global_rank != self.rank or self.trainer.global_step != STEP:
            return loss
        if self.fault in ("kill", "stop", "sleep", "raise", "nan"):
            (Path(self.directory) / "moment").write_text(str(time.time()))
        if self.fault == "sleep":
            time.sleep(1000)
        if self.fault == "raise":
            raise ArithmeticError("does not converge")
        if self.fault in ("kill", "stop"):
            os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)
        return loss * float("nan") if self.fault == "nan" else loss


class FaultyData(ToyData):
    """Blocks at one row."""

    def __init__(self, num_rows: int, shape: tuple[int, ...], moment: Path) -> None:
        super().__init__(num_rows, shape)
        self.moment = moment

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 2 * STEP:
            self.moment.write_text(str(time.time()))
            time.sleep(1000)
        return super().__getitem__(index)


def try_fault(name: str, num_ranks: int) -> Trial:
    """Start a run, let it fail, and look at what is left."""
    fault = FAULTS[name]
    faulty = 0 if fault == "loader" else num_ranks - 1
    with tempfile.TemporaryDirectory() as directory:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "lightning", "lightning_pipebd", "faults.matrix"])
        port = find_free_port()
        processes: list[Any] = [
            context.Process(target=_run, args=(rank, num_ranks, port, fault, faulty, directory))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        others = [process for rank, process in enumerate(processes) if rank != faulty]
        deadline = time.time() + PATIENCE_S
        while any(process.is_alive() for process in others) and time.time() < deadline:
            wait([process.sentinel for process in others if process.is_alive()], deadline - time.time())
        now = time.time()
        has_ended = not any(process.is_alive() for process in others)
        for process in processes:
            process.kill()
            process.join()
        moment = Path(directory) / "moment"
        detected_s = now - float(moment.read_text()) if has_ended and moment.exists() else float("inf")
        codes = tuple(process.exitcode for process in others)
        return Trial(name, num_ranks, detected_s, codes, *_look_at(Path(directory)))


def format_matrix(trials: Sequence[Trial]) -> str:
    """Make a table of the trials, one row for each fault and number of ranks."""
    lines = [
        f"With `stall_timeout` {STALL_S:g} s and a checkpoint every {EVERY} steps; the fault comes in step {STEP}.",
        "",
        "| fault | ranks | tried | as promised | all others ended after (median, slowest) | exit codes | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault, num_ranks in dict.fromkeys((trial.fault, trial.num_ranks) for trial in trials):
        same = [trial for trial in trials if (trial.fault, trial.num_ranks) == (fault, num_ranks)]
        times = [trial.detected_s for trial in same]
        codes = sorted({code for trial in same for code in trial.exit_codes})
        damaged = sum(trial.num_damaged for trial in same)
        lost = f"{STEP - min(trial.last_step for trial in same)} steps, {damaged} files"
        lines.append(
            f"| {fault} | {num_ranks} | {len(same)} | {sum(trial.is_as_promised for trial in same)} | "
            f"{statistics.median(times):.1f} s, {max(times):.1f} s | {', '.join(map(str, codes))} | {lost} |"
        )
    return "\n".join([*lines, ""])


def _look_at(directory: Path) -> tuple[int, int]:
    paths = list(directory.glob("*.ckpt"))
    damaged = [path for path in paths if CheckedCheckpointIO().find_damage(path)]
    steps = [torch.load(path, weights_only=True)["global_step"] for path in paths if path not in damaged]
    return max(steps, default=0), len(damaged)


def _run(rank: int, num_ranks: int, port: int, fault: str, faulty: int, directory: str) -> None:
    # What would be on the terminal is of no interest here, only how it ends.
    with (Path(directory) / f"rank-{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    os.environ.update(address, NODE_RANK="0", RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seed_everything(3, verbose=False)
    module = FaultyModule(fault, faulty, directory)
    moment = Path(directory) / "moment"
    data = FaultyData(400, module.shape, moment) if fault == "loader" else ToyData(400, module.shape)
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=PipeBDStrategy(plan=PLANS[num_ranks], stall_timeout=timedelta(seconds=STALL_S)),
        callbacks=[ModelCheckpoint(directory, every_n_train_steps=EVERY, save_last=True)],
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(data, batch_size=2))
