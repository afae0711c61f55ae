"""The private names of Lightning that `lightning_internals` stands on: a new version that moves one fails here."""

from __future__ import annotations

import ast
import signal
from inspect import getsource, signature
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.fabric.utilities import data, distributed
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.strategies import DDPStrategy, ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.trainer.connectors.checkpoint_connector import _CheckpointConnector
from lightning.pytorch.trainer.connectors.logger_connector.logger_connector import _LoggerConnector
from lightning.pytorch.trainer.connectors.logger_connector.result import _ResultCollection
from lightning.pytorch.trainer.connectors.signal_connector import _SignalConnector
from torch import nn
from torch.utils.data import DataLoader

import lightning_pipebd.lightning_internals as internals
from lightning_pipebd.fit_callbacks import FitCallback, add_callback, remove_callback, user_callbacks
from lightning_pipebd.lightning_internals.module import (
    _POSITION_OF_SYNC_DIST,
    StagedBatch,
    StagedBatchModule,
    set_device,
)
from lightning_pipebd.lightning_internals.trainer import (
    redirect_signals,
    request_train_loader,
    set_terminated,
    silence_sigterm_broadcast,
    validates_by_time,
    without_train_loader,
)

#: Function, and the names of its parameters that we use.
FUNCTIONS: list[tuple[Any, list[str]]] = [
    (data._auto_add_worker_init_fn, ["dataloader", "rank"]),
    (distributed._get_default_process_group_backend_for_device, ["device"]),
    (distributed._init_dist_connection, ["cluster_environment", "torch_distributed_backend"]),
    (distributed._sync_ddp_if_available, ["result", "group", "reduce_op"]),
    (_SubprocessScriptLauncher.__init__, ["self", "cluster_environment", "num_processes", "num_nodes"]),
    (_SubprocessScriptLauncher.launch, ["self", "function", "args", "trainer", "kwargs"]),
    (_SubprocessScriptLauncher._call_children_scripts, ["self"]),
    (_SubprocessScriptLauncher.kill, ["self", "signum"]),
    (_SignalConnector._slurm_sigusr_handler_fn, ["self", "signum"]),
    (_SignalConnector._sigterm_notifier_fn, ["self", "signum"]),
    (_FitLoop._should_accumulate, ["self"]),
    (LightningModule._on_before_batch_transfer, ["self", "batch", "dataloader_idx"]),
    (ParallelStrategy._configure_launcher, ["self"]),
    (_ResultCollection.update_metrics, ["self", "key", "value", "batch_size"]),
    (_LoggerConnector.should_reset_tensors, ["self", "fx"]),
    (ParallelStrategy.reduce_boolean_decision, ["self", "decision", "all"]),
    (
        _CheckpointConnector._parse_ckpt_path,
        ["self", "state_fn", "ckpt_path", "model_provided", "model_connected"],
    ),
    (_ResultCollection.valid_items, ["self"]),
]


@pytest.mark.parametrize(("function", "names"), FUNCTIONS, ids=[function.__qualname__ for function, _ in FUNCTIONS])
def test_function_has_the_parameters_that_we_use(function: Any, names: list[str]) -> None:
    assert list(signature(function).parameters)[: len(names)] == names


def test_every_private_name_that_we_import_is_pinned_here() -> None:
    files = Path(internals.__file__).parent.glob("*.py")
    imported = {
        alias.name
        for file in files
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("lightning.")
        for alias in node.names
        if alias.name.startswith("_")
    }
    assert imported == {
        "_DeviceDtypeModuleMixin",
        "_auto_add_worker_init_fn",
        "_get_default_process_group_backend_for_device",
        "_init_dist_connection",
        "_sync_ddp_if_available",
        "_SubprocessScriptLauncher",
    }


@pytest.mark.parametrize("name", ["_lightning_module", "_launcher", "_layer_sync"])
def test_strategy_has_the_attribute(name: str) -> None:
    assert hasattr(DDPStrategy(), name)


def test_module_keeps_its_device_where_we_set_it() -> None:
    module = LightningModule()
    module.inner = torch.nn.Sequential(LightningModule())
    set_device(module, torch.device("meta"))
    assert module.device == torch.device("meta")
    assert module.inner[0].device == torch.device("meta")


def test_position_of_sync_dist_behind_name_and_value() -> None:
    names = list(signature(LightningModule.log).parameters)
    assert names[_POSITION_OF_SYNC_DIST + 3] == "sync_dist"
    assert "sync_dist_group" in names


def test_callbacks_keep_the_time_that_preflight_asks_for() -> None:
    assert hasattr(ModelCheckpoint(), "_train_time_interval")
    assert Timer("00:01:00:00")._interval == "step"


def test_trainer_counts_logging_steps_where_we_read() -> None:
    assert Trainer(accelerator="cpu", logger=False).fit_loop.epoch_loop._batches_that_stepped == 0


def test_trainer_tells_whether_it_validates_by_time() -> None:
    assert not validates_by_time(Trainer(accelerator="cpu", logger=False))


def test_the_broadcast_before_every_batch_is_a_method_of_the_epoch_loop() -> None:
    # Older versions have no such broadcast; newer ones that have it elsewhere must not go unnoticed.
    is_there = "_broadcast_sigterm_tensor" in vars(_TrainingEpochLoop)
    assert is_there == ("torch.distributed" in getsource(_TrainingEpochLoop))
    assert is_there == ("_broadcast_sigterm_tensor" in getsource(_TrainingEpochLoop.advance))


@pytest.mark.skipif(not hasattr(_TrainingEpochLoop, "_broadcast_sigterm_tensor"), reason="since Lightning 2.5.2")
def test_the_broadcast_is_switched_off_for_one_trainer_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[int] = []
    monkeypatch.setattr("torch.distributed.broadcast", lambda tensor, src: calls.append(src))
    silent, other = (Trainer(accelerator="cpu", logger=False) for _ in range(2))
    silence_sigterm_broadcast(silent)
    silent.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert calls == []
    other.fit_loop.epoch_loop._broadcast_sigterm_tensor()
    assert calls == [0]


def test_signals_are_noted_where_lightning_would_wait_for_other_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    environment = {"SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NAME": "job", "SLURM_PROCID": "0"}
    for name, value in {**environment, "SLURM_LOCALID": "0", "SLURM_NODEID": "0"}.items():
        monkeypatch.setenv(name, value)
    trainer = Trainer(accelerator="cpu", logger=False, devices=1)
    noted: list[object] = []
    redirect_signals(trainer, lambda: noted.append("terminate"), noted.append)
    connector = trainer._signal_connector
    connector.register_signal_handlers()
    try:
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGUSR1)
    finally:
        connector.teardown()
    assert noted == ["terminate", signal.SIGUSR1]
    assert not trainer.received_sigterm
    set_terminated(trainer)
    assert trainer.received_sigterm


def test_a_callback_is_put_before_the_users_and_taken_away_again() -> None:
    timer, ours = Timer("00:01:00:00"), ModelCheckpoint()
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[timer], enable_checkpointing=False)
    before = user_callbacks(trainer)
    add_callback(trainer, ours, is_last=True)
    assert user_callbacks(trainer) == [*before, ours]
    remove_callback(trainer, ours)
    add_callback(trainer, ours)
    assert user_callbacks(trainer) == [ours, *before]
    remove_callback(trainer, ours)
    remove_callback(trainer, ours)
    assert user_callbacks(trainer) == before


class Noting(FitCallback):
    def __init__(self) -> None:
        self.seen: list[str] = []

    def on_train_batch_end(self, *_: Any) -> None:
        self.seen.append("on_train_batch_end")

    def on_after_backward(self, *_: Any) -> None:
        self.seen.append("on_after_backward")


class NotingHooks(StagedBatchModule):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(1, 1)
        self.hooks: list[str | None] = []

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        self.hooks.append(self._current_fx_name)
        return self.layer(batch).sum()

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def test_lightning_calls_only_the_hooks_that_a_callback_of_a_fit_has() -> None:
    noting, module = Noting(), NotingHooks()
    trainer = Trainer(accelerator="cpu", logger=False, callbacks=[noting], fast_dev_run=1)
    trainer.fit(module, DataLoader(torch.zeros(1, 1)))
    assert noting.seen == ["on_after_backward", "on_train_batch_end"]
    assert module.hooks == ["training_step"]


class Transferring(StagedBatchModule):
    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return ("seen", batch)


def test_a_staged_batch_is_passed_through_untouched() -> None:
    staged = StagedBatch()
    assert Transferring()._on_before_batch_transfer(staged) is staged
    assert Transferring()._on_before_batch_transfer(7) == ("seen", 7)


def test_the_training_loader_is_asked_for_where_lightning_asks() -> None:
    trainer, loader = Trainer(accelerator="cpu", logger=False), [torch.zeros(1)]
    trainer.fit_loop._data_source.instance = loader
    assert request_train_loader(trainer) is loader


def test_a_loader_that_was_set_up_meanwhile_is_forgotten() -> None:
    trainer = Trainer(accelerator="cpu", logger=False)
    before = trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher
    assert before[0] is None
    with without_train_loader(trainer):
        trainer.fit_loop._combined_loader = trainer.fit_loop._data_fetcher = object()
    assert (trainer.fit_loop._combined_loader, trainer.fit_loop._data_fetcher) == before


def test_nothing_is_logged_while_a_module_is_measured() -> None:
    module = StagedBatchModule()
    with module.not_logging():
        module.log("loss", 1.0)
        module.log_dict({"loss": 1.0})
    # Without a trainer Lightning only warns.
    with pytest.warns(UserWarning, match="the `self.trainer` reference is not registered on the model yet"):
        module.log("loss", 1.0)
