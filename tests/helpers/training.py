"""Train a toy module in one process or under a plan, and give everything that must be equal."""

from __future__ import annotations

import logging
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd import PipeBDStrategy
from tests.helpers.ranks import run_processes
from tests.helpers.toy import make_loader, make_module

__all__ = ["Run", "assert_same_checkpoint", "max_difference", "train"]


@dataclass(frozen=True, kw_only=True)
class Run:
    """One call of ``fit``.

    Args:
        module: Name of a toy module.
        plan: Text or dictionary of a plan; ``None`` trains under plain Lightning in one process.
        num_ranks: Processes.
        num_rows: Rows of the training data.
        batch_size: Rows of a batch.
        trainer: Further arguments of the trainer.
        resume: Checkpoint to go on from.
        double: Whether to compute in float64.
    """

    module: str = "conv"
    plan: str | dict[str, Any] | None = None
    num_ranks: int = 1
    num_rows: int = 40
    batch_size: int = 8
    shuffle: bool = True
    stream: bool = False
    validate: bool = False
    double: bool = False
    resume: str | None = None
    trainer: dict[str, Any] = field(default_factory=dict)


def train(run: Run, path: Path, *, timeout: float = 100.0) -> dict[str, Any]:
    """Train in processes of their own and give the checkpoint that rank 0 saves after the fit."""
    run_processes(run.num_ranks, _train_rank, run, str(path), timeout=timeout)
    return load(path)


def load(path: str | Path) -> dict[str, Any]:
    """Read a checkpoint without trusting it."""
    checkpoint: dict[str, Any] = torch.load(path, weights_only=True)
    # The one entry that plain Lightning does not write.
    checkpoint.pop("data_position", None)
    return checkpoint


def _train_rank(rank: int, run: Run, path: str) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    seed_everything(3)
    if run.double:
        torch.set_default_dtype(torch.float64)
    module = make_module(run.module)
    loader = make_loader(module, run.num_rows, run.batch_size, shuffle=run.shuffle, stream=run.stream)
    validation = make_loader(module, 20, 6) if run.validate else None
    defaults: dict[str, Any] = {
        "max_epochs": 4,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    strategy = "auto" if run.plan is None else PipeBDStrategy(plan=run.plan)
    trainer = Trainer(accelerator="cpu", devices=run.num_ranks, strategy=strategy, **{**defaults, **run.trainer})
    trainer.fit(module, loader, validation, ckpt_path=run.resume)
    trainer.save_checkpoint(path)


def max_difference(first: Any, second: Any) -> float:
    """Give the largest difference between two trees of tensors of one form."""
    firsts, form = pytree.tree_flatten(first)
    seconds, other_form = pytree.tree_flatten(second)
    assert form == other_form
    return max(
        float((a.double() - b.double()).abs().max())
        for a, b in zip(firsts, seconds, strict=True)
        if isinstance(a, Tensor) and a.numel()
    )


def assert_same_checkpoint(first: Any, second: Any, where: str = "checkpoint") -> None:
    """Assert that two checkpoints are equal, key by key and bit by bit."""
    assert type(first) is type(second), where
    if isinstance(first, dict):
        assert list(first) == list(second), where
        for key, value in first.items():
            assert_same_checkpoint(value, second[key], f"{where}[{key!r}]")
    elif isinstance(first, (list, tuple)):
        assert len(first) == len(second), where
        for index, (left, right) in enumerate(zip(first, second, strict=True)):
            assert_same_checkpoint(left, right, f"{where}[{index}]")
    elif isinstance(first, Tensor):
        assert first.dtype == second.dtype, where
        assert torch.equal(first, second), where
    else:
        assert first == second, where
