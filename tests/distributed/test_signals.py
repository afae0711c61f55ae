"""SIGTERM and SLURM's requeue signal, on whatever rank they arrive: all ranks follow after the same step."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.utils.data import DataLoader

from lightning_pipebd import CheckedCheckpointIO, PipeBDStrategy
from tests.helpers.ranks import run_processes
from tests.helpers.resuming import states_of
from tests.helpers.toy import ToyData, make_module
from tests.helpers.training import assert_same_checkpoint

pytestmark = pytest.mark.spawn

NUM_STEPS, STEP = 24, 5


class Sender(Callback):
    """Sends signals to its own process: at steps, or while validating."""

    def __init__(self, signals: dict[int, int], *, validating: bool = False) -> None:
        self.signals = signals
        self.validating = validating

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if not self.validating and trainer.global_step in self.signals:
            os.kill(os.getpid(), self.signals[trainer.global_step])

    def on_validation_batch_end(self, trainer: Trainer, *args: object) -> None:
        if self.validating and trainer.global_step in self.signals:
            os.kill(os.getpid(), self.signals[trainer.global_step])


class Requeued(Callback):
    """Is what SLURM does after it was asked to requeue the job: ends it."""

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_rank == 0 and Path(trainer.default_root_dir, "requeued").exists():
            os.kill(os.getpid(), signal.SIGTERM)


def fit(
    directory: str, *callbacks: Callback, plan: str | None, ckpt_path: str | None = None, **options: Any
) -> tuple[int, int, dict[str, Any] | None]:
    """Train; gives the exit status, the steps that were done, and the final states of a run that was not ended."""
    seed_everything(3, verbose=False)
    module = make_module("dropout")
    trainer = Trainer(
        accelerator="cpu",
        devices=int(os.environ["WORLD_SIZE"]),
        strategy="auto" if plan is None else PipeBDStrategy(plan=plan),
        default_root_dir=directory,
        max_steps=NUM_STEPS,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(callback, ModelCheckpoint) for callback in callbacks),
        logger=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        **options,
    )
    validation = DataLoader(ToyData(40, module.shape), batch_size=2) if options.get("limit_val_batches") else None
    loader = DataLoader(ToyData(42, module.shape), batch_size=4, shuffle=True)
    try:
        trainer.fit(module, loader, validation, ckpt_path=ckpt_path)
    except SIGTERMException as error:
        return int(error.code or 0), trainer.global_step, None
    return 0, trainer.global_step, states_of(trainer, module)


def fit_alone(rank: int, directory: str) -> Any:
    return fit(directory, plan=None)[2]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return run_processes(1, fit_alone, str(tmp_path_factory.mktemp("reference")))[0]


def terminate(rank: int, plan: str, targets: tuple[int, ...], directory: str) -> Any:
    saving = ModelCheckpoint(directory, every_n_train_steps=2, save_top_k=-1, save_last=True)
    sender = Sender({STEP: signal.SIGTERM} if rank in targets else {})
    return fit(directory, saving, sender, plan=plan, ckpt_path="last")


def go_on(rank: int, plan: str, directory: str) -> Any:
    saving = ModelCheckpoint(directory, every_n_train_steps=2, save_top_k=-1, save_last=True)
    return fit(directory, saving, plan=plan, ckpt_path="last")[2]


@pytest.mark.parametrize(
    ("plan", "num_ranks", "targets"),
    [("0|1|2-3", 3, (1,)), ("0-1|2-3", 2, (0, 1))],
    ids=["one-rank", "all"],
)
def test_sigterm_ends_all_ranks_after_the_same_step_with_status_143(
    plan: str, num_ranks: int, targets: tuple[int, ...], reference: Any, tmp_path: Path
) -> None:
    ends = run_processes(num_ranks, terminate, plan, targets, str(tmp_path))
    assert {status for status, _, _ in ends} == {143}
    (step,) = {step for _, step, _ in ends}
    assert STEP <= step < NUM_STEPS
    paths = list(tmp_path.glob("*.ckpt"))
    assert paths
    assert not any(CheckedCheckpointIO().find_damage(path) for path in paths)
    assert torch.load(tmp_path / "last.ckpt", weights_only=True)["global_step"] == step // 2 * 2
    if targets == (1,):
        states = run_processes(num_ranks, go_on, plan, str(tmp_path))[0]
        assert_same_checkpoint(reference, states)


def terminate_validation(rank: int, directory: str) -> Any:
    sender = Sender({4: signal.SIGTERM}, validating=True)
    return fit(directory, sender, plan="0-1|2-3", limit_val_batches=20, val_check_interval=4, num_sanity_val_steps=0)


def test_sigterm_ends_a_validation_under_way(tmp_path: Path) -> None:
    assert run_processes(2, terminate_validation, str(tmp_path)) == [(143, 4, None)] * 2


def be_requeued(rank: int, plan: str, directory: str, *, is_told: bool) -> Any:
    os.environ["PATH"] = f"{directory}:{os.environ['PATH']}"
    num_ranks, rank_text = os.environ["WORLD_SIZE"], str(rank)
    os.environ.update(
        SLURM_NTASKS=num_ranks,
        SLURM_NTASKS_PER_NODE=num_ranks,
        SLURM_NNODES="1",
        SLURM_PROCID=rank_text,
        SLURM_LOCALID=rank_text,
        SLURM_NODEID="0",
        SLURM_JOB_ID="4711",
        SLURM_JOB_NAME="distillation",
    )
    sender = Sender({STEP: signal.SIGUSR1} if is_told else {})
    return fit(directory, sender, Requeued(), plan=plan, plugins=[SLURMEnvironment()])


def test_the_requeue_signal_saves_one_step_on_all_ranks_and_the_requeued_job_goes_on_from_it(
    reference: Any, tmp_path: Path
) -> None:
    plan = "0-1|2-3"
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/requeued\n')
    scontrol.chmod(0o755)
    ends = run_processes(2, requeue_first, plan, str(tmp_path))
    assert (tmp_path / "requeued").read_text() == "requeue 4711\n"
    assert {status for status, _, _ in ends} == {143}
    saved = torch.load(tmp_path / "hpc_ckpt_1.ckpt", weights_only=True)["global_step"]
    assert STEP <= saved <= ends[0][1]
    (tmp_path / "requeued").unlink()
    states = run_processes(2, requeue_again, plan, str(tmp_path))[0]
    assert_same_checkpoint(reference, states)


def requeue_first(rank: int, plan: str, directory: str) -> Any:
    return be_requeued(rank, plan, directory, is_told=rank == 1)


def requeue_again(rank: int, plan: str, directory: str) -> Any:
    return be_requeued(rank, plan, directory, is_told=False)[2]
