"""While training, ranks wait for boundaries alone: no collective, no lock-step, and a fast rank runs ahead."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from torch import Tensor

import lightning_pipebd.strategy
from lightning_pipebd import PipeBDStrategy
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import LinearModule, make_loader, make_module
from tests.test_architecture import COMMUNICATION

pytestmark = pytest.mark.spawn

PLAN = "0-1|2-3"
NUM_BATCHES = 50

#: What two ranks do between themselves.
POINT_TO_POINT = {"send", "recv", "isend", "irecv", "batch_isend_irecv", "P2POp"}


class CollectiveCounter(Callback):
    """Counts calls of torch's collectives from the first batch to the end of the last."""

    def __init__(self) -> None:
        self.calls: list[str] = []
        self.num_batches = 0
        self.patch = pytest.MonkeyPatch()

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if self.num_batches == 0:
            for module in (torch.distributed, torch.distributed.distributed_c10d):
                for name in COMMUNICATION - POINT_TO_POINT:
                    if hasattr(module, name):
                        self.patch.setattr(module, name, self.counting(name, getattr(module, name)))

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        self.num_batches += 1
        if self.num_batches == NUM_BATCHES:
            self.patch.undo()

    def counting(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def counted(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            return function(*args, **kwargs)

        return counted


def count_collectives(make_trainer: MakeTrainer, folder: str, is_silenced: bool) -> tuple[int, list[str]]:
    module, counter = make_module("linear"), CollectiveCounter()
    trainer = make_trainer(
        max_epochs=1, callbacks=[counter], logger=CSVLogger(folder), log_every_n_steps=1, enable_progress_bar=False
    )
    if not is_silenced:
        counter.patch.setattr(lightning_pipebd.strategy, "silence_sigterm_broadcast", lambda trainer: None)
    trainer.fit(module, make_loader(module, 100, 2, shuffle=True))
    return counter.num_batches, counter.calls


def test_no_collective_is_called_in_50_steps(tmp_path: Path) -> None:
    assert under_plan(count_collectives, str(tmp_path), True, plan=PLAN) == [(NUM_BATCHES, [])] * 2


@pytest.mark.skipif(not hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor"), reason="since Lightning 2.5.2")
def test_what_is_switched_off_is_lightnings_broadcast_before_every_batch(tmp_path: Path) -> None:
    # Counting begins behind the first.
    found = under_plan(count_collectives, str(tmp_path), False, plan=PLAN)
    assert found == [(NUM_BATCHES, ["broadcast"] * (NUM_BATCHES - 1))] * 2


class GatedModule(LinearModule):
    """Its last block waits in the first batch until somebody opens the gate, a named pipe."""

    def __init__(self, gate: str) -> None:
        super().__init__()
        self.gate = gate
        self.is_open = False

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        if block == self.num_blocks - 1 and not self.is_open:
            self.is_open = Path(self.gate).read_text() == "open"
        return super().block_loss(block, student_output, teacher_output, targets)


class GateKeeper(Callback):
    """Opens the gate when rank 0 has done so many batches."""

    def __init__(self, gate: str, num_batches: int) -> None:
        self.gate = gate
        self.num_batches = num_batches

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.is_global_zero and batch_idx + 1 == self.num_batches:
            Path(self.gate).write_text("open")


def run_ahead(make_trainer: MakeTrainer, gate: str, max_in_flight: int) -> int:
    torch.manual_seed(11)
    module = GatedModule(gate)
    strategy = PipeBDStrategy(plan=PLAN, max_in_flight=max_in_flight)
    trainer = make_trainer(max_epochs=1, strategy=strategy, callbacks=[GateKeeper(gate, max_in_flight)])
    trainer.fit(module, make_loader(module, 40, 4))
    return trainer.global_step


@pytest.mark.parametrize("max_in_flight", [1, 2, 5])
def test_a_rank_does_so_many_batches_before_the_next_rank_ends_its_first(max_in_flight: int, tmp_path: Path) -> None:
    gate = str(tmp_path / "gate")
    os.mkfifo(gate)
    assert under_plan(run_ahead, gate, max_in_flight, plan=PLAN) == [10, 10]
