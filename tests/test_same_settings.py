"""Processes of one run that were started differently: an error on all of them, before they wait for each other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.same_settings import compare_settings
from tests.helpers.ranks import RankError, run_threads
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import LinearModule, make_loader


def test_every_rank_raises_for_the_setting_that_differs_on_one() -> None:
    world = LocalWorld(3)

    def compare(rank: int) -> str:
        with pytest.raises(ValueError, match="`steps` must be the same") as caught:
            compare_settings(world.transports[rank], {"epochs": "3", "steps": "7" if rank == 2 else "5"})
        return str(caught.value)

    (message,) = set(run_threads(3, compare))
    assert "is 5 on rank 0 and 7 on rank 2" in message


def test_ranks_that_agree_go_on() -> None:
    world = LocalWorld(2)
    run_threads(2, lambda rank: compare_settings(world.transports[rank], {"epochs": "3"}))


def fit_differently(make_trainer: MakeTrainer, changes: dict[str, Any]) -> None:
    mine = changes if os.environ["RANK"] == "1" else {}
    module = LinearModule()
    make_trainer(**mine).fit(module, make_loader(module, 8, 4))


@pytest.mark.spawn
def test_a_fit_whose_ranks_have_other_plans_is_refused() -> None:
    changes = {"strategy": PipeBDStrategy(plan="0|1-3")}
    with pytest.raises(RankError, match=r"`plan` must be the same in all processes, but is Plan[^$]* on rank 1"):
        under_plan(fit_differently, changes, plan="0-1|2-3")


def resume_where_one_rank_has_nothing(make_trainer: MakeTrainer, directory: str) -> None:
    # As on two machines that do not see each other's files.
    own = Path(directory) / os.environ["RANK"]
    own.mkdir()
    if os.environ["RANK"] == "0":
        (own / "last.ckpt").touch()
    module = LinearModule()
    trainer = make_trainer(enable_checkpointing=True, callbacks=[ModelCheckpoint(own, save_last=True)])
    trainer.fit(module, make_loader(module, 8, 4), ckpt_path="last")


@pytest.mark.spawn
def test_a_checkpoint_that_only_some_ranks_find_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RankError, match=r"must find a checkpoint on all ranks or on none, but finds none on rank 1"):
        under_plan(resume_where_one_rank_has_nothing, str(tmp_path), plan="0-1|2-3")


class SometimesLogging(LinearModule):
    """Logs a value of each class that it meets."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        _, labels = batch
        for label in labels.tolist():
            self.log(f"class {label}", 1.0, reduce_fx="sum")


def validate_classes(make_trainer: MakeTrainer) -> None:
    module = SometimesLogging()
    make_trainer().validate(module, make_loader(module, 8, 4), verbose=False)


@pytest.mark.spawn
def test_values_that_only_some_ranks_log_are_refused() -> None:
    with pytest.raises(RankError, match="must log the same names in the same order on every rank"):
        under_plan(validate_classes, plan="0-1|2-3")
