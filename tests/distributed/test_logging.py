"""Loggers, progress bar and metrics show every block of every rank, as in one process."""

from __future__ import annotations

import contextlib
import csv
import io
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import LearningRateMonitor, TQDMProgressBar
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.helpers.scenarios import MakeTrainer, on_one_process, under_plan
from tests.helpers.toy import make_loader, make_module

pytestmark = pytest.mark.spawn

#: Settings of the trainer, and the plan they are tried with.
CASES: dict[str, tuple[dict[str, Any], str, int]] = {
    "every step": ({"log_every_n_steps": 1}, "0-1|2-4", 2),
    "every third step": ({"log_every_n_steps": 3, "max_epochs": 3}, "0|1-2|3-4", 3),
    "a rank without student and one without anything": ({"log_every_n_steps": 2}, "T0-4|S0-4|-", 3),
    "blocks shared by ranks": ({"log_every_n_steps": 2}, "joint", 2),
    "accumulation": ({"log_every_n_steps": 2, "accumulate_grad_batches": 2}, "0-1|2-4", 2),
    "an end between logging steps": ({"log_every_n_steps": 2, "max_steps": 7}, "0-1|2-4", 2),
}

#: A sum over blocks is added in another precision; what split rows add in another order differs as little.
TOLERANCE = {"rel": 2e-6, "abs": 1e-9}


class UserLogs(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        pl_module.log("user/step", float(trainer.global_step), batch_size=1)


def fit_with_loggers(make_trainer: MakeTrainer, settings: dict[str, Any], folder: str) -> dict[str, Any]:
    module = make_module("conv")
    loggers = [CSVLogger(folder, name="csv", version=0), TensorBoardLogger(folder, name="tb", version=0)]
    callbacks = [LearningRateMonitor(), UserLogs()]
    trainer = make_trainer(logger=loggers, callbacks=callbacks, **settings)
    trainer.fit(module, make_loader(module, 30, 4), make_loader(module, 14, 4))
    return {key: value.item() for key, value in trainer.callback_metrics.items()}


def csv_values(folder: Path) -> dict[tuple[int, str], float]:
    """Give every value that was written, by step and key; a key of a step has one value."""
    rows = csv.DictReader((folder / "csv" / "version_0" / "metrics.csv").read_text().splitlines())
    values: dict[tuple[int, str], list[float]] = defaultdict(list)
    for row in rows:
        for key in row.keys() - {"step"}:
            if row[key]:
                values[int(row["step"]), key].append(float(row[key]))
    assert all(len(set(several)) == 1 for several in values.values())
    return {key: several[0] for key, several in values.items()}


def tensorboard_values(folder: Path) -> dict[tuple[int, str], float]:
    events = EventAccumulator(str(folder / "tb" / "version_0"))
    events.Reload()
    return {(event.step, key): event.value for key in events.Tags()["scalars"] for event in events.Scalars(key)}


@pytest.mark.parametrize("name", CASES)
def test_loggers_get_every_block_of_every_rank_at_the_steps_of_one_process(name: str, tmp_path: Path) -> None:
    settings, plan, num_ranks = CASES[name]
    one = on_one_process(fit_with_loggers, settings, str(tmp_path / "one"))
    ranks = under_plan(fit_with_loggers, settings, str(tmp_path / "many"), plan=plan, num_ranks=num_ranks)
    assert csv_values(tmp_path / "many") == pytest.approx(csv_values(tmp_path / "one"), **TOLERANCE)
    assert tensorboard_values(tmp_path / "many") == pytest.approx(tensorboard_values(tmp_path / "one"), **TOLERANCE)
    for metrics in ranks:
        assert metrics == pytest.approx(one, **TOLERANCE)


def test_a_block_loss_is_logged_with_every_bit(tmp_path: Path) -> None:
    settings = {"log_every_n_steps": 1}
    on_one_process(fit_with_loggers, settings, str(tmp_path / "one"))
    under_plan(fit_with_loggers, settings, str(tmp_path / "many"), plan="0-1|2-4", num_ranks=2)
    one, many = csv_values(tmp_path / "one"), csv_values(tmp_path / "many")
    blocks = {key for key in one if key[1].startswith("train/block") and key[1].endswith("loss")}
    assert len(blocks) == 16 * 5
    assert {key: many[key] for key in blocks} == {key: one[key] for key in blocks}


def fit_with_progress_bar(make_trainer: MakeTrainer) -> tuple[dict[str, float], str]:
    module, text = make_module("conv"), io.StringIO()
    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):
        trainer = make_trainer(enable_progress_bar=True, callbacks=[TQDMProgressBar()], log_every_n_steps=2)
        trainer.fit(module, make_loader(module, 30, 4))
    return dict(trainer.progress_bar_metrics), text.getvalue()


def test_progress_bar_shows_the_sum_of_the_blocks_on_rank_0_alone() -> None:
    metrics, _ = on_one_process(fit_with_progress_bar)
    assert [key for key in metrics if key.startswith("train/")] == ["train/loss"]
    (first_metrics, first_text), (_, second_text) = under_plan(fit_with_progress_bar)
    assert first_metrics == pytest.approx(metrics, **TOLERANCE)
    assert all(f"{key}=" in first_text for key in metrics)
    assert "train/block" not in first_text
    assert second_text == ""
