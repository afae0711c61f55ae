"""A rank that raises ends all ranks at once, and the first error is the one that is shown."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor
from torch.utils.data import DataLoader

from tests.helpers.ranks import RankError
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import LinearModule, ToyData, make_loader

pytestmark = pytest.mark.spawn

PLAN, NUM_RANKS = "0-1|2|3", 3


class Failure(Exception):
    """Raised where a test says."""


#: The call of a method that raises.
CALLS = {
    "block_loss": 3,
    "unpack_batch": 3,
    "validation_step": 2,
    "on_train_batch_start": 3,
    "on_train_epoch_end": 1,
    "configure_optimizers": 1,
}


class FailingModule(LinearModule):
    """Raises on one rank in one of its methods."""

    def __init__(self, where: str, rank: int) -> None:
        super().__init__()
        self.where = where
        self.rank = rank
        self.num_calls = 0

    def fail(self, where: str) -> None:
        if where == self.where and self.global_rank == self.rank:
            self.num_calls += 1
            if self.num_calls == CALLS[where]:
                raise Failure(f"{where} of rank {self.rank} failed")

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        self.fail("block_loss")
        return super().block_loss(block, student_output, teacher_output, targets)

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        self.fail("unpack_batch")
        return super().unpack_batch(batch)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.fail("validation_step")
        super().validation_step(batch, batch_idx)

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        self.fail("on_train_batch_start")

    def on_train_epoch_end(self) -> None:
        self.fail("on_train_epoch_end")

    def configure_optimizers(self) -> Any:
        self.fail("configure_optimizers")
        return super().configure_optimizers()


class FailingData(ToyData):
    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == 9:
            raise Failure("row 9 of rank 0 failed")
        return super().__getitem__(index)


class FailingCallback(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 1 and batch_idx == 2:
            raise Failure("callback of rank 1 failed")


def fit(make_trainer: MakeTrainer, where: str, rank: int) -> None:
    torch.manual_seed(11)
    module = FailingModule(where, rank)
    data = FailingData(20, module.shape) if where == "row 9" else ToyData(20, module.shape)
    callbacks = [FailingCallback()] if where == "callback" else []
    trainer = make_trainer(callbacks=callbacks, num_sanity_val_steps=0)
    trainer.fit(module, DataLoader(data, batch_size=2), make_loader(module, 20, 4))


@pytest.mark.parametrize(
    ("where", "rank"),
    [
        ("block_loss", 0),
        ("block_loss", 1),
        ("block_loss", 2),
        ("unpack_batch", 0),
        ("row 9", 0),
        ("validation_step", 0),
        ("validation_step", 2),
        ("on_train_batch_start", 1),
        ("on_train_epoch_end", 1),
        ("configure_optimizers", 2),
        ("callback", 1),
    ],
)
def test_an_error_of_one_rank_ends_all_ranks(where: str, rank: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # The others may take their time on a busy machine, but must not wait for ever.
    monkeypatch.setattr("tests.helpers.ranks._GRACE_S", 30.0)
    with pytest.raises(RankError) as caught:
        under_plan(fit, where, rank, plan=PLAN, num_ranks=NUM_RANKS)
    assert caught.value.rank == rank
    assert isinstance(caught.value.__cause__, Failure)
    assert f"{where} of rank {rank} failed" in str(caught.value)
    assert str(caught.value).count("\nThen rank ") == NUM_RANKS - 1


SCRIPT = """
import torch
from lightning.pytorch import Trainer
from tests.helpers.toy import LinearModule, make_loader

class FailingModule(LinearModule):
    def block_loss(self, block, student_output, teacher_output, targets=None):
        if block == 3 and self.trainer.global_step == 2:
            raise ArithmeticError("block 3 does not converge")
        return super().block_loss(block, student_output, teacher_output, targets)

module = FailingModule()
trainer = Trainer(accelerator="cpu", devices=2, strategy="pipebd", logger=False, enable_checkpointing=False)
trainer.fit(module, make_loader(module, 40, 4))
"""


@pytest.mark.slow
def test_a_script_ends_with_the_error_of_the_process_that_it_launched(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script)], env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=90
    )
    assert done.returncode != 0
    assert "ArithmeticError: block 3 does not converge" in done.stderr
