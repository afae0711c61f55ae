"""`pytorch_lightning` is a copy of Lightning with classes of its own: what is mixed is refused with the way out."""

from __future__ import annotations

import sys
from types import ModuleType
from typing import cast

import pytest
import torch
from lightning.fabric.strategies.registry import _StrategyRegistry
from lightning.pytorch import Callback, Trainer

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.other_lightning import refuse_other_trainer
from tests.helpers.toy import make_module


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> _StrategyRegistry:
    """The registry that the other package's Trainer looks names up in."""
    strategies = ModuleType("pytorch_lightning.strategies")
    strategies.StrategyRegistry = found = _StrategyRegistry()
    monkeypatch.setitem(sys.modules, "pytorch_lightning.strategies", strategies)
    return found


def test_the_other_trainer_says_what_to_import_once_a_module_is_made(registry: _StrategyRegistry) -> None:
    make_module("linear")
    with pytest.raises(TypeError, match=r"given to the Trainer of `lightning`, .*from lightning\.pytorch import"):
        registry.get("pipebd")


def test_refusing_twice_changes_nothing(registry: _StrategyRegistry) -> None:
    refuse_other_trainer("pipebd")
    refuse_other_trainer("pipebd")
    assert registry.available_strategies() == ["pipebd"]


def test_without_the_other_package_nothing_happens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "pytorch_lightning.strategies", raising=False)
    refuse_other_trainer("pipebd")
    assert "pytorch_lightning.strategies" not in sys.modules


def test_a_callback_of_the_other_package_is_refused_before_other_processes_start() -> None:
    class Checkpoints:
        """As the other package's callbacks: no subclass of Lightning's."""

    Checkpoints.__module__ = "pytorch_lightning.callbacks.model_checkpoint"

    class Mine(Checkpoints):
        def __getattr__(self, name: str) -> object:
            return lambda *args, **kwargs: None

    trainer = Trainer(
        accelerator="cpu",
        devices=2,
        strategy=PipeBDStrategy("0|1-3"),
        callbacks=[cast(Callback, Mine())],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    module = make_module("linear")
    with pytest.raises(TypeError, match=r"`callbacks` must be made of classes of `lightning`, but Mine is made of"):
        trainer.fit(module, torch.utils.data.DataLoader([torch.zeros(1)]))
