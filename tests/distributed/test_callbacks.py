"""Stock callbacks and schedulers decide as in one process, and on every rank alike."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import (
    EarlyStopping,
    GradientAccumulationScheduler,
    ModelCheckpoint,
    ModelSummary,
    Timer,
)
from torch.optim.lr_scheduler import OneCycleLR, ReduceLROnPlateau, StepLR

from tests.helpers.scenarios import Both, MakeTrainer, on_both
from tests.helpers.toy import LinearModule, make_loader

pytestmark = pytest.mark.spawn

PLAN = "0-1|2-3"


class ScheduledModule(LinearModule):
    """Trains with one optimizer and the scheduler that a test asks for."""

    def __init__(self, make_scheduler: Callable[[Any, Any], Any], learning_rate: float) -> None:
        super().__init__()
        self.make_scheduler = make_scheduler
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.trainable_parameters(), lr=self.learning_rate)
        scheduler = self.make_scheduler(optimizer, self.trainer)
        return {"optimizer": optimizer} if scheduler is None else {"optimizer": optimizer, "lr_scheduler": scheduler}


def no_scheduler(optimizer: Any, trainer: Trainer) -> None:
    return None


def step_lr(optimizer: Any, trainer: Trainer) -> Any:
    return {"scheduler": StepLR(optimizer, 2, gamma=0.5), "interval": "step", "frequency": 2}


def one_cycle(optimizer: Any, trainer: Trainer) -> Any:
    steps = int(trainer.estimated_stepping_batches)
    return {"scheduler": OneCycleLR(optimizer, 1.0, total_steps=steps), "interval": "step"}


def plateau(optimizer: Any, trainer: Trainer, monitor: str, **config: Any) -> Any:
    return {"scheduler": ReduceLROnPlateau(optimizer, patience=0, threshold=0.5), "monitor": monitor, **config}


class Students(Callback):
    """The student as the user's hooks find it behind the last step of an epoch."""

    def __init__(self) -> None:
        self.found: list[dict[str, Any]] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.found.append({name: value.clone() for name, value in pl_module.student.state_dict().items()})

    def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
        self.on_train_epoch_end(trainer, pl_module)


class Losses(Callback):
    """What a user's callback reads from `outputs`, and the learning rate."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.learning_rates: list[float] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.losses.append(outputs["loss"].item())
        self.learning_rates.append(trainer.optimizers[0].param_groups[0]["lr"])


SCHEDULERS: dict[str, Callable[[Any, Any], Any]] = {
    "a scheduler per two steps": step_lr,
    "a scheduler over all steps": one_cycle,
    "a plateau of the validation": partial(plateau, monitor="val_acc"),
    "a plateau of the training": partial(plateau, monitor="train/loss_epoch"),
    "a plateau of a block's training": partial(plateau, monitor="train/block/02/loss_epoch"),
}

CALLBACKS: dict[str, Callable[[], list[Callback]]] = {
    "early stopping by validation": lambda: [EarlyStopping("val_acc", mode="max", min_delta=2, patience=2)],
    "early stopping by training": lambda: [EarlyStopping("train/loss_epoch", min_delta=1e6, patience=1)],
    "early stopping by a block": lambda: [
        EarlyStopping("train/block/03/loss_epoch", min_delta=1e6, check_on_train_epoch_end=True)
    ],
    "early stopping that finds no number": lambda: [EarlyStopping("train/loss_epoch", stopping_threshold=1e9)],
    "the best by validation": lambda: [ModelCheckpoint(monitor="val_acc", mode="max", save_top_k=2)],
    "the best by training": lambda: [ModelCheckpoint(monitor="train/loss_epoch", save_top_k=1)],
    "the worst by a block": lambda: [ModelCheckpoint(monitor="train/block/02/loss_epoch", mode="max", save_top_k=2)],
    "metrics in the name": lambda: [
        ModelCheckpoint(filename="{epoch}-{val_acc:.3f}-{train/loss_epoch:.3f}", auto_insert_metric_name=False)
    ],
    "every second step": lambda: [ModelCheckpoint(every_n_train_steps=2, save_top_k=-1)],
    "every second step, and the last": lambda: [ModelCheckpoint(every_n_train_steps=2, save_last=True)],
    "a link to the last": lambda: [ModelCheckpoint(monitor="val_acc", save_last="link")],
    "two checkpoints": lambda: [
        ModelCheckpoint(monitor="val_acc", filename="a-{step}"),
        ModelCheckpoint(every_n_epochs=2, filename="b-{step}", save_on_train_epoch_end=True),
    ],
    "more accumulation from epoch 1": lambda: [GradientAccumulationScheduler({0: 1, 1: 2})],
    "a timer": lambda: [Timer("00:01:00:00", interval="epoch")],
    "a summary": lambda: [ModelSummary(max_depth=3)],
}


def fit(make_trainer: MakeTrainer, name: str, folder: str) -> dict[str, Any]:
    torch.manual_seed(11)
    module = ScheduledModule(SCHEDULERS.get(name, no_scheduler), 0.1)
    found = Losses()
    callbacks = CALLBACKS[name]() if name in CALLBACKS else []
    root = Path(folder) / name / make_trainer().strategy.__class__.__name__
    trainer = make_trainer(
        max_epochs=4,
        callbacks=[*callbacks, found],
        default_root_dir=root,
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
    )
    trainer.fit(module, make_loader(module, 22, 4), make_loader(module, 14, 4))
    checkpoints = trainer.checkpoint_callbacks
    return {
        "progress": (trainer.global_step, trainer.current_epoch),
        "learning rates": found.learning_rates,
        "losses": found.losses,
        "best": [Path(callback.best_model_path).name for callback in checkpoints],
        "best score": [
            None if callback.best_model_score is None else round(callback.best_model_score.item(), 6)
            for callback in checkpoints
        ],
        "files": sorted(path.name for path in root.rglob("*.ckpt")),
        "student": module.student.state_dict(),
    }


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    folder = str(tmp_path_factory.mktemp("fits"))
    return on_both(fit, [*SCHEDULERS, *CALLBACKS], folder, plan=PLAN)


@pytest.mark.parametrize("name", [*SCHEDULERS, *CALLBACKS])
def test_fit_ends_as_in_one_process(name: str, fits: dict[str, Both]) -> None:
    one, ranks = fits[name]
    for rank in ranks:
        for key in ("progress", "learning rates", "best", "best score", "files"):
            assert rank[key] == one[key], key
        torch.testing.assert_close(rank["student"], one["student"], rtol=0, atol=0)


def test_cases_do_what_they_are_named_for(fits: dict[str, Both]) -> None:
    assert fits["early stopping by validation"].one["progress"] == (18, 3)
    assert fits["early stopping by training"].one["progress"] == (12, 2)
    assert len(set(fits["a plateau of the training"].one["learning rates"])) > 1
    assert len(fits["the best by training"].one["files"]) == 1
    assert len(fits["every second step, and the last"].one["files"]) == 2


def watch_students(make_trainer: MakeTrainer, name: str) -> list[dict[str, Any]]:
    torch.manual_seed(11)
    module, students = ScheduledModule(no_scheduler, 0.1), Students()
    # The last epoch ends in its middle.
    make_trainer(max_epochs=3, max_steps=8, callbacks=[students]).fit(module, make_loader(module, 12, 4))
    return students.found


def test_hooks_at_the_end_of_an_epoch_find_the_whole_student_on_every_rank() -> None:
    one, ranks = on_both(watch_students, ["students"], plan=PLAN)["students"]
    assert len(one) == 4
    torch.testing.assert_close(ranks, [one, one], rtol=0, atol=0)


def test_outputs_of_all_ranks_add_up_to_the_loss_of_one_process(fits: dict[str, Both]) -> None:
    one, ranks = fits["more accumulation from epoch 1"]
    sums = [sum(losses) for losses in zip(*(rank["losses"] for rank in ranks), strict=True)]
    assert sums == pytest.approx(one["losses"], rel=1e-6)
