"""Every private name of Lightning that we use, in one place; ``tests/test_lightning_internals.py`` pins each of them."""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from lightning.pytorch.utilities.rank_zero import rank_zero_only
from torch import Tensor

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "ProcessGroupStrategy",
    "StagedBatch",
    "StagedBatchModule",
    "is_logging_step",
    "logging_step",
    "set_device",
    "silence_sigterm_broadcast",
]

_SIGTERM_BROADCAST = "_broadcast_sigterm_tensor"


class StagedBatch:
    """Stands for a batch of which this rank holds no row; Lightning passes it through untouched."""


class StagedBatchModule(LightningModule):
    """A module whose batch hooks see the user's batches only, never a :class:`StagedBatch`."""

    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:  # noqa: ANN401
        if isinstance(batch, StagedBatch):
            return batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)


class _PreflightLauncher(_SubprocessScriptLauncher):
    """Starts the other processes only after the preflight has passed in this one."""

    def __init__(self, strategy: ProcessGroupStrategy) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,  # noqa: ANN401
        trainer: Trainer | None = None,
        **kwargs: Any,  # noqa: ANN401
    ) -> Any:  # noqa: ANN401
        if trainer is not None:
            self._strategy.preflight(trainer)
        return super().launch(function, *args, trainer=trainer, **kwargs)


class ProcessGroupStrategy(ParallelStrategy):
    """One process per device over torch.distributed, with nothing wrapped around the module.

    What :class:`~lightning.pytorch.strategies.DDPStrategy` does for processes, less what it does to models.

    Args:
        process_group_backend: Backend of the default group; ``None`` takes NCCL on GPUs and gloo elsewhere.
        timeout: Time after which a collective operation fails.
        kwargs: See :class:`~lightning.pytorch.strategies.ParallelStrategy`.
    """

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        **kwargs: Any,  # noqa: ANN401 - accelerator, plugins, as Lightning passes them
    ) -> None:
        super().__init__(**kwargs)
        self.num_nodes = 1
        self._process_group_backend = process_group_backend
        self._timeout = timeout

    def preflight(self, trainer: Trainer) -> None:
        """Raise for everything that can be known to be wrong before a second process exists."""

    @property
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    def _configure_launcher(self) -> None:
        self._launcher = _PreflightLauncher(self)

    def set_world_ranks(self) -> None:
        """Tell the cluster environment which process this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank

    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        backend = self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)
        device_id = None if self.root_device.type == "cpu" or backend == "gloo" else self.root_device
        _init_dist_connection(self.cluster_environment, backend, timeout=self._timeout, device_id=device_id)

    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    def barrier(self, name: str | None = None) -> None:
        if not dist.is_initialized():
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    def broadcast(self, obj: Any, src: int = 0) -> Any:  # type: ignore[override]  # noqa: ANN401 - typed by a TypeVar there
        if not dist.is_initialized():
            return obj
        values = [obj]
        dist.broadcast_object_list(values, src)
        return values[0]

    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:  # noqa: ANN401
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    @property
    def layer_sync(self) -> bool:
        """Whether the user asked for ``Trainer(sync_batchnorm=True)``."""
        return self._layer_sync is not None


def silence_sigterm_broadcast(trainer: Trainer) -> None:
    """Switch off the broadcast over all ranks with which Lightning starts every batch (since 2.5.2).

    It would make the ranks step in lock-step: a rank could not run ahead, and the pipeline would be filled anew for
    every batch. A SIGTERM still ends each process that receives it.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, _SIGTERM_BROADCAST):
        setattr(loop, _SIGTERM_BROADCAST, lambda: None)


def logging_step(trainer: Trainer) -> int:
    """Give the step that Lightning's loggers write now: optimizer steps so far, counted as the loggers count."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_logging_step(trainer: Trainer) -> bool:
    """Tell whether Lightning writes training metrics after the present batch."""
    if trainer.fit_loop._should_accumulate():
        return False
    due = (logging_step(trainer) + 1) % trainer.log_every_n_steps == 0 if trainer.log_every_n_steps else False
    return due or trainer.should_stop or bool(trainer.fast_dev_run)


def set_device(module: LightningModule, device: torch.device) -> None:
    """Let ``module.device`` tell where the blocks compute; some of its parameters may be elsewhere."""
    module._device = device
