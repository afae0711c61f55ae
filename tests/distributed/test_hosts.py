"""Ranks on two hosts with addresses of their own: the same student, and a clear end when the cable is cut."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from lightning_pipebd import PipeBDStrategy
from tests.helpers.hosts import Hosts, be_on_host, joined_hosts, why_not
from tests.helpers.ranks import RankError, run_processes
from tests.helpers.resuming import Leg, run_leg, train_leg
from tests.helpers.toy import LinearModule, ToyData
from tests.helpers.training import assert_same_checkpoint

REASON = why_not()
pytestmark = [pytest.mark.spawn, pytest.mark.skipif(bool(REASON), reason=REASON)]


@pytest.fixture
def hosts() -> Iterator[Hosts]:
    with joined_hosts() as found:
        yield found


def train_on_host(rank: int, hosts: Hosts, leg: Leg, directory: str) -> Any:
    be_on_host(rank, hosts)
    return train_leg(rank, leg, directory)


def test_two_hosts_train_the_student_of_one_process(hosts: Hosts, tmp_path: Path) -> None:
    leg = Leg(plan="0-1|2-3", num_ranks=2, module="dropout")
    states = run_processes(2, train_on_host, hosts, leg, str(tmp_path))[0]
    reference = run_leg(Leg(plan=None, num_ranks=1, module="dropout"), tmp_path / "reference")
    assert_same_checkpoint(reference, states)


class Cutter(Callback):
    def __init__(self, hosts: Hosts) -> None:
        self.hosts = hosts

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_rank == 0 and trainer.global_step == 12:
            self.hosts.cut()


def lose_the_other_host(rank: int, hosts: Hosts, directory: str) -> None:
    be_on_host(rank, hosts)
    with (Path(directory) / f"rank-{rank}.txt").open("w") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    module = LinearModule()
    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=PipeBDStrategy(plan="0-1|2-3", stall_timeout=timedelta(seconds=2)),
        callbacks=[Cutter(hosts)],
        max_epochs=500,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, DataLoader(ToyData(200, module.shape), batch_size=2))


def test_a_cut_cable_ends_both_hosts_each_naming_the_other(
    hosts: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tests.helpers.ranks._GRACE_S", 20.0)
    with pytest.raises(RankError, match="ended with exit code 1"):
        run_processes(2, lose_the_other_host, hosts, str(tmp_path), timeout=40.0)
    for rank in range(2):
        log = (tmp_path / f"rank-{rank}.txt").read_text()
        assert re.search(rf"because rank {1 - rank} has not been heard of for [\d.]+ s", log), log
        assert f"->rank {1 - rank} on " in log
