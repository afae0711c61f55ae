"""Each fault on some ranks: how soon all the others have ended, how, and what became of the checkpoints."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from faults.breaking import SAVING_FAULTS, FaultyData, FaultyModule, FaultyStream, break_saving, note_moment
from lightning_pipebd import CheckedCheckpointIO, PipeBDStrategy
from tests.helpers.hosts import Hosts, be_on_host, joined_hosts, why_not
from tests.helpers.ranks import find_free_port
from tests.helpers.toy import ToyData

__all__ = ["FAULTS", "Fault", "Trial", "format_matrix", "try_fault"]

PLANS = {2: "0-1|2-3", 4: "0|1|2|3"}
STEP, EVERY, NUM_STEPS, STALL_S, PATIENCE_S, REST_S = 12, 5, 100, 3.0, 60.0, 15.0


class Fault(NamedTuple):
    """What goes wrong, and what is promised for it.

    Args:
        key: Its name in :mod:`faults.breaking`.
        is_first: Whether it happens to the first rank, which loads and saves, or to the last.
        last_step: The newest checkpoint has this step at least.
        is_survived: Whether the run goes on to its end.
        is_on_hosts: Whether the ranks are on two hosts, where the fault is that of none of them.
    """

    key: str
    is_first: bool = False
    last_step: int = STEP // EVERY * EVERY
    is_survived: bool = False
    is_on_hosts: bool = False


FAULTS = {
    "a rank is killed (SIGKILL)": Fault("kill"),
    "a loading rank with workers is killed": Fault("kill with workers", is_first=True),
    "a rank is told to end (SIGTERM)": Fault("terminate"),
    "user code raises on one rank": Fault("raise"),
    "a block never returns": Fault("sleep"),
    "a rank is stopped (SIGSTOP)": Fault("stop"),
    "the loader never returns": Fault("loader", is_first=True),
    "a rank has fewer batches": Fault("batches"),
    "a rank never starts": Fault("start", last_step=0),
    "a loss is not a number": Fault("nan"),
    "killed while it saves": Fault("kill in save", is_first=True),
    "the disk is full": Fault("full", is_first=True),
    '... with `on_save_error="warn"`': Fault("full, goes on", is_first=True, is_survived=True),
    "the network between two hosts is cut": Fault("cut", is_first=True, is_on_hosts=True),
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
        left: Processes and shared memory that outlive the run.
    """

    fault: str
    num_ranks: int
    detected_s: float
    exit_codes: tuple[int, ...]
    last_step: int
    num_damaged: int
    left: tuple[str, ...] = ()

    @property
    def is_as_promised(self) -> bool:
        """Whether all ended, none with status 0 unless it survives, the checkpoints are intact, and nothing is left."""
        fault = FAULTS[self.fault]
        has_ended = self.detected_s < PATIENCE_S and (set(self.exit_codes) == {0}) == fault.is_survived
        all_failed = fault.is_survived or 0 not in self.exit_codes
        return has_ended and all_failed and not self.num_damaged and self.last_step >= fault.last_step and not self.left


def try_fault(name: str, num_ranks: int) -> Trial | None:
    """Start a run, let it fail, and look at what is left; nothing where hosts cannot be had."""
    fault = FAULTS[name]
    if fault.is_on_hosts and why_not():
        return None
    faulty = 0 if fault.is_first else num_ranks - 1
    with tempfile.TemporaryDirectory() as directory, joined_hosts() if fault.is_on_hosts else nullcontext() as hosts:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "lightning", "lightning_pipebd", "faults.matrix"])
        port = find_free_port()
        processes: list[Any] = [
            context.Process(target=_run, args=(rank, num_ranks, port, fault.key, faulty, directory, hosts))
            for rank in range(num_ranks)
        ]
        for process in processes:
            process.start()
        pids = [process.pid for process in processes]
        has_culprit = not (fault.is_survived or fault.is_on_hosts)
        others = [process for rank, process in enumerate(processes) if rank != faulty or not has_culprit]
        deadline = time.time() + PATIENCE_S
        # Asked once per round: of processes that end between two questions none would be left to wait for.
        while (alive := [process for process in others if process.is_alive()]) and time.time() < deadline:
            wait([process.sentinel for process in alive], deadline - time.time())
        now, has_ended = time.time(), not alive
        for process in processes:
            process.kill()
            process.join()
        moment = Path(directory) / "moment"
        detected_s = now - float(moment.read_text()) if has_ended and moment.exists() else float("inf")
        codes = tuple(process.exitcode for process in others)
        return Trial(name, num_ranks, detected_s, codes, *_look_at(Path(directory)), _find_left(pids))


def format_matrix(trials: Sequence[Trial]) -> str:
    """Make a table of the trials, one row for each fault and number of ranks."""
    left = "".join(f"Left by {each.fault}: {', '.join(each.left)}. " for each in trials if each.left).strip()
    lines = [
        f"With `stall_timeout` and `start_timeout` {STALL_S:g} s and a checkpoint every {EVERY} steps; the fault comes "
        f"in step {STEP}. {left or 'Nothing was left: no process, no shared memory.'}",
        "",
        "| fault | ranks | tried | as promised | all others ended after (median, slowest) | exit codes | lost |",
        "|---|---|---|---|---|---|---|",
    ]
    for fault, num_ranks in dict.fromkeys((trial.fault, trial.num_ranks) for trial in trials):
        same = [trial for trial in trials if (trial.fault, trial.num_ranks) == (fault, num_ranks)]
        times = [trial.detected_s for trial in same]
        codes = sorted({code for trial in same for code in trial.exit_codes})
        damaged = sum(trial.num_damaged for trial in same)
        num_lost = max(0, STEP - min(trial.last_step for trial in same)) if FAULTS[fault].last_step else 0
        lines.append(
            f"| {fault} | {num_ranks} | {len(same)} | {sum(trial.is_as_promised for trial in same)} | "
            f"{statistics.median(times):.1f} s, {max(times):.1f} s | {', '.join(map(str, codes))} | "
            f"{num_lost} steps, {damaged} files |"
        )
    return "\n".join([*lines, ""])


def _look_at(directory: Path) -> tuple[int, int]:
    paths = list(directory.glob("*.ckpt"))
    damaged = [path for path in paths if CheckedCheckpointIO().find_damage(path)]
    steps = [torch.load(path, weights_only=True)["global_step"] for path in paths if path not in damaged]
    return max(steps, default=0), len(damaged)


def _find_left(pids: Sequence[int]) -> tuple[str, ...]:
    """Find what the ranks' sessions have left: a worker whose rank was killed may take some seconds to notice."""
    deadline = time.monotonic() + REST_S
    while (left := [*_processes_of(pids)]) and time.monotonic() < deadline:
        time.sleep(0.2)
    folder = Path("/dev/shm")
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return (*left, *(name for name in names if any(name.startswith(f"torch_{pid}_") for pid in pids)))


def _processes_of(sessions: Sequence[int]) -> Iterator[str]:
    for path in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError):
            name, _, rest = path.read_text().rpartition(")")
            state, _, _, session = rest.split()[:4]
            if int(session) in sessions and state != "Z":
                yield f"process {name})"


def _run(
    rank: int, num_ranks: int, port: int, fault: str, faulty: int, directory: str, hosts: Hosts | None = None
) -> None:
    os.setsid()  # all that it starts can be told by its session
    # What would be on the terminal is of no interest here, only how it ends.
    with (Path(directory) / f"rank-{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(num_ranks)}
    os.environ.update(address, NODE_RANK="0", RANK=str(rank), LOCAL_RANK=str(rank), OMP_NUM_THREADS="1")
    if hosts is not None:
        be_on_host(rank * 2 // num_ranks, hosts)
    multiprocessing.set_start_method(None, force=True)
    torch.set_num_threads(1)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seed_everything(3, verbose=False)
    moment = Path(directory) / "moment"
    if fault == "start" and rank == faulty:
        time.sleep(1000)
    if fault == "start" and rank == 0:
        note_moment(moment)
    module = FaultyModule(fault, faulty, moment, STEP)
    io = CheckedCheckpointIO(on_save_error="warn" if "goes on" in fault else "raise")
    if rank == faulty and fault in SAVING_FAULTS:
        module.disturb = lambda: break_saving(fault)
    if rank == faulty and hosts is not None:
        module.disturb = hosts.cut
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy=PipeBDStrategy(
            plan="joint" if fault == "batches" else PLANS[num_ranks],
            stall_timeout=timedelta(seconds=STALL_S),
            start_timeout=timedelta(seconds=STALL_S if fault == "start" else 60),
            checkpoint_io=io,
        ),
        callbacks=[ModelCheckpoint(directory, every_n_train_steps=EVERY, save_last=True)],
        max_epochs=1,
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, _loader(fault, module, moment, is_faulty=rank == faulty))


def _loader(fault: str, module: FaultyModule, moment: Path, *, is_faulty: bool) -> Any:
    data: Any = ToyData(4 * NUM_STEPS, module.shape)
    if fault == "loader":
        data = FaultyData(4 * NUM_STEPS, module.shape, moment, 4 * STEP)
    if fault == "batches":
        return DataLoader(FaultyStream(data, moment, 4 * STEP if is_faulty else None), batch_size=4)
    return DataLoader(data, batch_size=4, num_workers=2 if "workers" in fault else 0)
