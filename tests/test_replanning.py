"""Freezing blocks, and what is asked and told before a plan changes."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.converged_blocks import ConvergedBlocks
from lightning_pipebd.replanning import can_move
from tests.helpers.hearing import heard
from tests.helpers.toy import ToyData, ToyStream, make_loader, make_module


class Odd(BatchSampler):
    """Knows by itself which epoch it is in."""


class Stateful(DataLoader[Any]):
    """Keeps its own place."""

    def state_dict(self) -> dict[str, Any]:
        return {}


DATA = ToyData(8, (3,))


@pytest.mark.parametrize(
    ("loader", "is_possible"),
    [
        (DataLoader(DATA, batch_size=4, shuffle=True), True),
        (DataLoader(DATA, batch_sampler=Odd(SequentialSampler(DATA), 4, False)), False),
        (DataLoader(ToyStream(DATA), batch_size=4), False),
        (Stateful(DATA, batch_size=4), False),
        ([torch.zeros(1)], False),
    ],
)
def test_only_a_loader_whose_memory_is_in_generators_changes_hands(loader: Any, is_possible: bool) -> None:
    assert can_move(loader) is is_possible


@pytest.mark.parametrize("trials", [-1, 1])
def test_a_trial_without_a_comparison_is_refused(trials: int) -> None:
    with pytest.raises(ValueError, match=f"`trials` must be 0, or at least 2 plans to compare, but is {trials}"):
        PipeBDStrategy(trials=trials)


def test_another_word_for_replan_is_refused() -> None:
    with pytest.raises(ValueError, match="`replan` must be 'epoch' or None, but is 'step'"):
        PipeBDStrategy(replan="step")


@pytest.mark.filterwarnings("ignore")
def test_a_frozen_block_stays_as_it_is_and_tells_its_loss() -> None:
    module = make_module("linear")
    module.freeze_block(1)
    before = [[own.clone() for own in module.block_parameters(block)] for block in range(module.num_blocks)]
    trainer = Trainer(
        accelerator="cpu",
        devices=1,
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, make_loader(module, 8, 4))
    for block, values in enumerate(before):
        after = module.block_parameters(block)
        assert all(map(torch.equal, values, after)) is (block == 1)
    assert float(trainer.callback_metrics[f"{module.block_key(1)}_epoch"]) > 0
    assert module.frozen_blocks == {1}


def test_a_block_that_does_not_exist_cannot_be_frozen() -> None:
    with pytest.raises(ValueError, match="`block` must be below 4, but is 4"):
        make_module("linear").freeze_block(4)


def test_the_last_trained_block_cannot_be_frozen() -> None:
    module = make_module("linear")
    for block in range(3):
        module.freeze_block(block)
    with pytest.raises(ValueError, match="`block` must leave another block to train, but 3 is the last one"):
        module.freeze_block(3)


def test_frozen_blocks_are_kept_in_checkpoints() -> None:
    module, other = make_module("linear"), make_module("linear")
    checkpoint: dict[str, Any] = {}
    module.on_save_checkpoint(checkpoint)
    assert "frozen_blocks" not in checkpoint
    module.freeze_block(2)
    module.on_save_checkpoint(checkpoint)
    other.on_load_checkpoint(checkpoint)
    assert other.frozen_blocks == {2}


class Epochs:
    """A trainer as far as the callback looks at it: one more epoch's means at every step."""

    def __init__(self, module: Any, means: Iterator[dict[int, float]]) -> None:
        self.module, self.means = module, means

    @property
    def callback_metrics(self) -> dict[str, float]:
        return {f"{self.module.block_key(block)}_epoch": mean for block, mean in next(self.means).items()}


def test_a_loss_that_falls_no_more_is_told_once() -> None:
    module = make_module("linear")
    means = [{0: 1.0, 1: 1 / epoch} for epoch in range(1, 8)]
    callback = ConvergedBlocks()
    trainer: Any = Epochs(module, (values for values in means for _ in range(module.num_blocks)))
    with heard() as lines:
        for _ in range(5):
            callback.on_train_epoch_start(trainer, module)
    assert len(lines) == 1
    assert lines[0].startswith("Block 0 (")
    assert "`module.freeze_block(0)` saves its backward pass and update" in lines[0]
