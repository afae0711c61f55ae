"""A rank that stalls, is stopped or is killed ends all ranks, and every one says which it was."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from lightning_pipebd import PipeBDStrategy
from tests.helpers.ranks import RankError
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import LinearModule, ToyData

pytestmark = pytest.mark.spawn

PLAN, NUM_RANKS = "0-1|2|3", 3
STEP = 12


class FaultyModule(LinearModule):
    """Does something to its own process in one block of one step."""

    def __init__(self, fault: str, rank: int) -> None:
        super().__init__()
        self.fault = fault
        self.rank = rank

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        if self.global_rank == self.rank and self.trainer.global_step == STEP:
            if self.fault == "sleep":
                time.sleep(1000)
            os.kill(os.getpid(), {"stop": signal.SIGSTOP, "kill": signal.SIGKILL}[self.fault])
        return super().block_loss(block, student_output, teacher_output, targets)


class BlockedData(ToyData):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 2 * STEP:
            time.sleep(1000)
        return super().__getitem__(index)


def fit(make_trainer: MakeTrainer, fault: str, rank: int, directory: str) -> None:
    me = os.environ["RANK"]
    with (Path(directory) / f"rank-{me}.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    torch.manual_seed(11)
    module = LinearModule() if fault == "loader" else FaultyModule(fault, rank)
    data = BlockedData(200, module.shape) if fault == "loader" else ToyData(200, module.shape)
    strategy = PipeBDStrategy(plan=PLAN, stall_timeout=timedelta(seconds=2))
    make_trainer(strategy=strategy, max_epochs=50).fit(module, DataLoader(data, batch_size=2))


@pytest.mark.parametrize(
    ("fault", "rank", "expected"),
    [
        ("sleep", 1, r"because rank 1 has made no progress for [\d.]+ s"),
        ("stop", 2, r"because rank 2 has (not been heard of for|made no progress)"),
        ("kill", 0, r"because rank 0 has closed its connections without a word"),
        ("loader", 0, r"because rank 0 has made no progress for [\d.]+ s"),
    ],
)
def test_every_other_rank_ends_and_names_the_rank_at_fault(
    fault: str, rank: int, expected: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # The others end by themselves in this time, or their logs lack the report.
    monkeypatch.setattr("tests.helpers.ranks._GRACE_S", 10.0)
    with pytest.raises((RankError, TimeoutError)):
        under_plan(fit, fault, rank, str(tmp_path), plan=PLAN, num_ranks=NUM_RANKS, timeout=40.0)
    logs = [(tmp_path / f"rank-{index}.txt").read_text() for index in range(NUM_RANKS)]
    assert all(re.search(expected, log) for index, log in enumerate(logs) if index != rank), logs
    assert all(f"->rank {rank} on " in log for index, log in enumerate(logs) if index != rank), logs


class LeavingRank(Callback):
    """Ends the training on one rank, and tells nobody."""

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        trainer.should_stop = trainer.global_rank == 2 and trainer.global_step >= STEP


def fit_with_a_leaving_rank(make_trainer: MakeTrainer, directory: str) -> None:
    with (Path(directory) / f"rank-{os.environ['RANK']}.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    module = LinearModule()
    strategy = PipeBDStrategy(plan=PLAN, stall_timeout=timedelta(seconds=2))
    trainer = make_trainer(strategy=strategy, max_epochs=2, callbacks=[LeavingRank()])
    trainer.fit(module, DataLoader(ToyData(200, module.shape), batch_size=2))


def test_a_rank_that_leaves_an_epoch_alone_ends_all_ranks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.helpers.ranks._GRACE_S", 10.0)
    with pytest.raises((RankError, TimeoutError)):
        under_plan(fit_with_a_leaving_rank, str(tmp_path), plan=PLAN, num_ranks=NUM_RANKS, timeout=40.0)
    logs = [(tmp_path / f"rank-{index}.txt").read_text() for index in range(NUM_RANKS)]
    assert all("wait for each other" in log for log in logs), logs
    assert all("rank 2 on " in log and "meeting all ranks, waits for rank 0, 1" in log for log in logs), logs


LATE = """
import os, time
if os.environ.get("LOCAL_RANK") == "1":
    time.sleep(1000)
from datetime import timedelta
from lightning.pytorch import Trainer
from lightning_pipebd import PipeBDStrategy
from tests.helpers.toy import LinearModule, make_loader

module = LinearModule()
strategy = PipeBDStrategy(start_timeout=timedelta(seconds=1))
trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
trainer.fit(module, make_loader(module, 40, 4))
"""


@pytest.mark.slow
def test_a_run_whose_second_process_never_starts_ends_with_the_reason_and_leaves_no_process(tmp_path: Path) -> None:
    script = tmp_path / "late_start.py"
    script.write_text(LATE)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    # Ends only when the launched process has closed its outputs, too: no orphan is left.
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 1
    assert "All 2 processes must start within `start_timeout` (0:00:01), but rank 0 on" in done.stderr
