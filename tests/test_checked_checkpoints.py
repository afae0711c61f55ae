"""Which blocks of a checkpoint do not fit, and which file `ckpt_path="last"` takes."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import pytest
import torch
from lightning.fabric.plugins import TorchCheckpointIO
from lightning.pytorch.callbacks import ModelCheckpoint

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.checked_checkpoints import find_differences
from lightning_pipebd.checkpoint_io import CheckedCheckpointIO
from tests.helpers.ranks import RankError
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import ConvModule, make_loader, make_module


def test_every_block_that_differs_is_named_with_what_differs() -> None:
    module = make_module("linear")
    state = module.state_dict()
    del state["student.0.0.bias"]
    state["student.2.0.weight"] = torch.zeros(2, 3)
    state["student.9.weight"] = torch.zeros(1)
    assert find_differences(module, state) == [
        f"block {module.block_pairs.names[0]} (student.0.0.bias is missing)",
        f"block {module.block_pairs.names[2]} (student.2.0.weight is (2, 3) instead of (6, 6))",
        "no block of this model (student.9.weight is too much)",
    ]
    assert find_differences(module, module.state_dict()) == []


def test_parameters_and_buffers_of_a_block_have_its_digest(tmp_path: Path) -> None:
    strategy = PipeBDStrategy()
    module = ConvModule()
    strategy.connect(module)
    assert isinstance(strategy.checkpoint_io, CheckedCheckpointIO)
    names = [name for name in module.state_dict() if strategy.checkpoint_io.block_of(name) is None]
    assert names == []


def test_a_checkpoint_io_of_the_user_is_used() -> None:
    own = TorchCheckpointIO()
    assert PipeBDStrategy(checkpoint_io=own).checkpoint_io is own


def fit_and_damage(make_trainer: MakeTrainer, directory: str) -> None:
    module = make_module("linear")
    loader = make_loader(module, 40, 4)
    saving = ModelCheckpoint(directory, every_n_train_steps=4, save_top_k=-1, save_last=True)
    make_trainer(max_epochs=1, callbacks=[saving], enable_checkpointing=True).fit(module, loader)


def resume_last(make_trainer: MakeTrainer, directory: str) -> tuple[int, list[str]]:
    module = make_module("linear")
    saving = ModelCheckpoint(directory, every_n_train_steps=4, save_top_k=-1, save_last=True)
    trainer = make_trainer(max_epochs=1, max_steps=8, callbacks=[saving], enable_checkpointing=True)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trainer.fit(module, make_loader(module, 40, 4), ckpt_path="last")
    return trainer.global_step, [str(warning.message) for warning in caught]


def resume_other(make_trainer: MakeTrainer, path: str) -> None:
    module = ConvModule()
    make_trainer().fit(module, make_loader(module, 40, 4), ckpt_path=path)


@pytest.mark.spawn
def test_last_means_the_newest_intact_checkpoint(tmp_path: Path) -> None:
    under_plan(fit_and_damage, str(tmp_path), plan="0-1|2-3")
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "epoch=0-step=4.ckpt",
        "epoch=0-step=8.ckpt",
        "last.ckpt",
    ]
    last, newest = tmp_path / "last.ckpt", tmp_path / "epoch=0-step=8.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    os.utime(newest, (2_000_000_000, 2_000_000_000))
    (steps, messages), other = under_plan(resume_last, str(tmp_path), plan="0-1|2-3")
    assert (steps, other[0]) == (8, 8)
    (message,) = [message for message in messages if "is damaged" in message]
    assert "last.ckpt is damaged: its end is missing" in message
    assert message.endswith("step=8.ckpt.")


@pytest.mark.spawn
def test_a_checkpoint_of_another_model_is_refused_with_its_blocks(tmp_path: Path) -> None:
    under_plan(fit_and_damage, str(tmp_path), plan="0-1|2-3")
    expected = r"must be of this model, but differs in .*block head \(student\.head\.bias is missing"
    with pytest.raises(RankError, match=expected):
        under_plan(resume_other, str(tmp_path / "last.ckpt"), plan="0-1|2-4")
