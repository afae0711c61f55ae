"""What a module logs by itself: the same values, whether Lightning checks each of them at each step or not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_only

import lightning_pipebd.module as module_file
from tests.helpers.toy import LinearModule, make_loader, make_module

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no `val_dataloader`"),
]


class Rows(CSVLogger):
    """Keeps what it is told."""

    def __init__(self, path: Any) -> None:
        super().__init__(path)
        self.rows: list[tuple[int | None, dict[str, float]]] = []

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:
        self.rows.append((step, {key: float(value) for key, value in metrics.items()}))


class Seen(Callback):
    """Keeps what callbacks and the progress bar see after every batch."""

    def __init__(self) -> None:
        self.seen: list[dict[str, float]] = []

    def _note(self, trainer: Trainer, *_: Any) -> None:
        self.seen.append({key: float(value) for key, value in trainer.callback_metrics.items()})
        self.seen.append({key: float(value) for key, value in trainer.progress_bar_metrics.items()})

    on_train_batch_start = on_train_batch_end = on_train_epoch_end = on_validation_end = _note  # type: ignore[assignment]


class Logging(LinearModule):
    """Logs in another hook, too."""

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("own", 1.0)


def train(path: Any, **settings: Any) -> tuple[Any, Any]:
    torch.manual_seed(0)
    module, logger, seen = Logging(), Rows(path), Seen()
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=3,
        logger=logger,
        callbacks=[seen],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        log_every_n_steps=2,
        **settings,
    )
    trainer.fit(module, make_loader(module, 20, 4), make_loader(module, 8, 4))
    return logger.rows, seen.seen


@pytest.mark.parametrize("settings", [{}, {"accumulate_grad_batches": 2}, {"val_check_interval": 2}], ids=str)
def test_values_are_those_that_lightning_logs_its_own_way(
    settings: dict[str, Any], tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[bool] = []
    log_again = module_file.log_again
    monkeypatch.setattr(module_file, "log_again", lambda *args: given.append(log_again(*args)) or given[-1])
    rows, seen = train(tmp_path, **settings)
    assert given.count(True) > given.count(False) > 0
    monkeypatch.setattr(module_file, "log_again", lambda *_: False)
    assert (rows, seen) == train(tmp_path, **settings)


class Renaming(LinearModule):
    def log(self, name: str, *args: Any, **kwargs: Any) -> None:
        super().log(f"mine/{name}", *args, **kwargs)


def test_a_log_of_the_users_gets_every_value(tmp_path: Any) -> None:
    module, logger = Renaming(), Rows(tmp_path)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=logger,
        enable_checkpointing=False,
        enable_progress_bar=False,
        log_every_n_steps=1,
    ).fit(module, make_loader(module, 12, 4))
    losses = [row["mine/train/loss"] for _, row in logger.rows if "mine/train/loss" in row]
    assert len(losses) == len(set(losses)) == 3


def test_a_measured_module_logs_nothing_again() -> None:
    module = make_module("linear")
    with module.not_logging():
        assert not module_file.log_again(module, {}, 1)
