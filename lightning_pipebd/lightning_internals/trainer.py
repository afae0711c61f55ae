"""Every private name of Lightning that we use; ``tests/test_lightning_internals.py`` pins each of them."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import timedelta
from subprocess import Popen
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch import LightningModule
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.runtime.rendezvous import agent_address, store_of_start

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "COMPLETE",
    "LAUNCHER",
    "ProcessGroupStrategy",
    "StagedBatch",
    "StagedBatchModule",
    "before_transfer",
    "begin_next_epoch",
    "follow_requeue_signal",
    "is_logging_step",
    "launched_processes",
    "log_again",
    "logging_step",
    "redirect_signals",
    "request_train_loader",
    "seed_workers",
    "set_device",
    "set_terminated",
    "silence_resume_warning",
    "silence_sigterm_broadcast",
    "stops_between_batches",
    "validates_by_time",
    "without_train_loader",
]

LAUNCHER = "LIGHTNING_PIPEBD_LAUNCHER"
"""Environment variable: the process that launched this one, where that is a rank itself."""

_SIGTERM_BROADCAST = "_broadcast_sigterm_tensor"
_POSITION_OF_SYNC_DIST = 6

COMPLETE = object()
"""In place of a process group: the value is that of all rows already."""


class StagedBatch:
    """Stands for a batch of which this rank holds no row; Lightning passes it through untouched."""


class StagedBatchModule(LightningModule):
    """A module whose batch hooks see the user's batches only, and whose logged values are those of all rows.

    Attributes:
        shares_logs: Set by the strategy while ranks hold different rows of one batch: what is logged then is exchanged
            (``sync_dist``), whether the user thought of it or not, because the user wrote it for one process.
        sees_whole_batch: Set by the strategy in a step for which every rank has all rows: what is logged is complete.
    """

    shares_logs: bool = False
    sees_whole_batch: bool = False
    _is_measured: bool = False

    @contextmanager
    def not_logging(self) -> Iterator[None]:
        """Log nothing inside the context: no batch is trained there."""
        self._is_measured = True
        try:
            yield
        finally:
            del self._is_measured

    @override
    def __setattr__(self, name: str, value: Any) -> None:
        # Lightning names the present hook some forty times a step; torch looks each time whether that is a parameter.
        if name == "_current_fx_name":
            self.__dict__[name] = value
        else:
            super().__setattr__(name, value)

    @override
    def log(self, name: str, value: Any, *args: Any, **kwargs: Any) -> None:
        if self._is_measured:
            return
        if self.shares_logs and len(args) <= _POSITION_OF_SYNC_DIST:
            kwargs["sync_dist"] = True
            if self.sees_whole_batch:
                kwargs["sync_dist_group"] = COMPLETE
        super().log(name, value, *args, **kwargs)

    @override
    def _on_before_batch_transfer(self, batch: Any, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, StagedBatch):
            return batch
        return super()._on_before_batch_transfer(batch, dataloader_idx)


class _PreflightLauncher(_SubprocessScriptLauncher):
    """Starts the other processes only after the preflight has passed in this one."""

    def __init__(self, strategy: ProcessGroupStrategy) -> None:
        assert strategy.cluster_environment is not None
        super().__init__(strategy.cluster_environment, strategy.num_processes, strategy.num_nodes)
        self._strategy = strategy

    @override
    def _call_children_scripts(self) -> None:
        # They cannot tell otherwise whether their parent is the process of rank 0 or a tool that started all ranks.
        os.environ[LAUNCHER] = str(os.getpid())
        try:
            super()._call_children_scripts()
        finally:
            del os.environ[LAUNCHER]

    @override
    def launch(
        self,
        function: Callable[..., Any],
        *args: Any,
        trainer: Trainer | None = None,
        **kwargs: Any,
    ) -> Any:
        self._strategy.resumes_last = any(isinstance(value, str) and value == "last" for value in args)
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

    Attributes:
        resumes_last: Whether the trainer was called with ``ckpt_path="last"``.
    """

    def __init__(
        self,
        *,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.num_nodes = 1
        self.resumes_last = False
        self._process_group_backend = process_group_backend
        self._timeout = timeout

    def preflight(self, trainer: Trainer) -> None:
        """Raise for everything that can be known to be wrong before a second process exists."""

    @property
    @override
    def root_device(self) -> torch.device:
        assert self.parallel_devices is not None
        return self.parallel_devices[self.local_rank]

    @property
    def num_processes(self) -> int:
        """Processes on this node."""
        return len(self.parallel_devices) if self.parallel_devices is not None else 0

    @override
    def _configure_launcher(self) -> None:
        self._launcher = _PreflightLauncher(self)

    def set_world_ranks(self) -> None:
        """Tell the cluster environment which process this is."""
        if self.cluster_environment is not None:
            self.cluster_environment.set_global_rank(self.node_rank * self.num_processes + self.local_rank)
            self.cluster_environment.set_world_size(self.num_nodes * self.num_processes)
        rank_zero_only.rank = self.global_rank  # type: ignore[attr-defined]  # how Lightning tells it the rank

    @override
    def setup_environment(self) -> None:
        super().setup_environment()
        self.set_world_ranks()
        assert self.cluster_environment is not None
        backend = self._process_group_backend or _get_default_process_group_backend_for_device(self.root_device)
        options: dict[str, Any] = {"timeout": self._timeout}
        options["device_id"] = None if self.root_device.type == "cpu" or backend == "gloo" else self.root_device
        if (address := agent_address()) is not None:
            store: Any = dist.TCPStore(*address, is_master=False, timeout=self._timeout)  # type: ignore[attr-defined]
            options["store"] = store_of_start(store, self.global_rank, self.world_size, self._timeout)
        _init_dist_connection(self.cluster_environment, backend, **options)

    @override
    def model_to_device(self) -> None:
        assert self.model is not None
        self.model.to(self.root_device)

    @override
    def barrier(self, name: str | None = None) -> None:
        if not dist.is_initialized():
            return
        if dist.get_backend() == "nccl":
            dist.barrier(device_ids=[self.root_device.index])
        else:
            dist.barrier()

    @override
    def broadcast(self, obj: Any, src: int = 0) -> Any:
        if not dist.is_initialized():
            return obj
        values = [obj]
        dist.broadcast_object_list(values, src)
        return values[0]

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        return _sync_ddp_if_available(tensor, group, reduce_op=reduce_op) if isinstance(tensor, Tensor) else tensor

    @property
    def layer_sync(self) -> bool:
        """Whether the user asked for ``Trainer(sync_batchnorm=True)``."""
        return self._layer_sync is not None


def launched_processes(strategy: ProcessGroupStrategy) -> list[Popen[bytes]]:
    """Give the processes that this one has launched."""
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []


def silence_sigterm_broadcast(trainer: Trainer) -> None:
    """Switch off the broadcast over all ranks with which Lightning starts every batch (since 2.5.2).

    It would make the ranks step in lock-step: a rank could not run ahead, and the pipeline would be filled anew for
    every batch. What SIGTERM does is in :mod:`~lightning_pipebd.signals`.
    """
    loop = trainer.fit_loop.epoch_loop
    if hasattr(loop, _SIGTERM_BROADCAST):
        setattr(loop, _SIGTERM_BROADCAST, lambda: None)


def redirect_signals(trainer: Trainer, terminate: Callable[[], None], requeue: Callable[[int], None]) -> None:
    """Have SIGTERM and SLURM's requeue signal call these, in the signal handler, instead of what Lightning does there.

    To be called before Lightning registers its handlers, hence in set-up. SIGTERM still goes on to launched processes.
    """
    connector = trainer._signal_connector

    def on_terminate(signum: int, frame: object) -> None:
        launcher = trainer.strategy.launcher
        if isinstance(launcher, _SubprocessScriptLauncher) and not connector.received_sigterm:
            launcher.kill(signum)
        terminate()

    connector._sigterm_notifier_fn = on_terminate  # type: ignore[assignment, method-assign]
    connector._slurm_sigusr_handler_fn = lambda signum, _: requeue(signum)  # type: ignore[method-assign]


def follow_requeue_signal(trainer: Trainer, signum: int) -> None:
    """**Collective** over all ranks: save a checkpoint and requeue the job, as Lightning does for the signal."""
    connector = trainer._signal_connector
    type(connector)._slurm_sigusr_handler_fn(connector, signum, None)  # type: ignore[arg-type]  # the frame is not used


def set_terminated(trainer: Trainer) -> None:
    """Have Lightning's loops raise ``SIGTERMException`` at the next place where they ask."""
    trainer._signal_connector.received_sigterm = True


def stops_between_batches(trainer: Trainer) -> bool:
    """Tell whether nothing is under way after the present batch: its gradients have been used."""
    return not trainer.fit_loop._should_accumulate()


def before_transfer(module: LightningModule, batch: Any) -> Any:
    """Do to a batch what Lightning's training loop does before it asks the strategy to move it."""
    batch = module.trainer.precision_plugin.convert_input(batch)
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


def silence_resume_warning() -> None:
    """Have Lightning not warn of loaders that cannot go on in the middle of an epoch: under the strategy, they can."""
    warnings.filterwarnings("ignore", message="You're resuming from a checkpoint that ended before the epoch ended")


def begin_next_epoch(trainer: Trainer) -> None:
    """Have an epoch that follows a resume begin as every other one.

    Lightning (2.5 to 2.6 at least) completes the epoch of a checkpoint that was written after its last batch, and then
    takes the next one for the rest of it: counts are one short from there on, and a second resume repeats the epoch.
    """
    loop = trainer.fit_loop
    if loop.restarted_mid_epoch and loop.epoch_progress.current.completed == loop.epoch_progress.current.ready:
        loop.reset_restart_stage()


def seed_workers(loader: object, position: int) -> None:
    """Let a loader's workers draw what one process would have them draw (``seed_everything(workers=True)``).

    Lightning does this for the loaders that it gets back from a strategy, and with the number of the process; ours hide
    the user's, and the plan says which process loads.

    Args:
        loader: The user's loader.
        position: 0 for the rank that loads the first rows, 1 for the next.
    """
    _auto_add_worker_init_fn(loader, position)


def logging_step(trainer: Trainer) -> int:
    """Give the step that Lightning's loggers write now: optimizer steps so far, counted as the loggers count."""
    return int(trainer.fit_loop.epoch_loop._batches_that_stepped)


def is_logging_step(trainer: Trainer) -> bool:
    """Tell whether Lightning writes training metrics after the present batch."""
    if trainer.fit_loop._should_accumulate():
        return False
    interval = int(getattr(trainer, "log_every_n_steps", 0))
    is_due = interval > 0 and (logging_step(trainer) + 1) % interval == 0
    return is_due or trainer.should_stop or bool(getattr(trainer, "fast_dev_run", False))


def log_again(module: StagedBatchModule, values: Mapping[str, Tensor], batch_size: int) -> bool:
    """Log values that the present hook has logged before, with the same settings; tell whether that was done.

    Lightning's own way checks name, value and settings of each value at each step, which costs more than a small block.
    It is needed the first time, at the first batch of an epoch, and where the user has another way to log.
    """
    ways = (getattr(module.log, "__func__", None), getattr(module.log_dict, "__func__", None))
    if ways != (StagedBatchModule.log, LightningModule.log_dict) or module._is_measured or module.shares_logs:
        return False
    hook, results, connector = module._current_fx_name, module.trainer._results, module.trainer._logger_connector
    if hook is None or results is None or connector.should_reset_tensors(hook):
        return False
    if not all(f"{hook}.{name}" in results and value.dim() == 0 for name, value in values.items()):
        return False
    for name, value in values.items():
        results.update_metrics(f"{hook}.{name}", value, batch_size)
    connector._current_fx = hook
    return True


def set_device(module: LightningModule, device: torch.device) -> None:
    """Let ``module.device`` tell where the blocks compute; some of its parameters may be elsewhere."""
    module._device = device


def request_train_loader(trainer: Trainer) -> Any:
    """Give what the user trains on; calls their ``train_dataloader`` hook, if that is where it comes from."""
    return trainer.fit_loop._data_source.dataloader()


@contextmanager
def without_train_loader(trainer: Trainer) -> Iterator[None]:
    """Forget afterwards which loader was set up inside the context, so that training sets up its own."""
    loop = trainer.fit_loop
    before = loop._combined_loader, loop._data_fetcher
    try:
        yield
    finally:
        loop._combined_loader, loop._data_fetcher = before


def validates_by_time(trainer: Trainer) -> bool:
    """Tell whether ``val_check_interval`` is a time (since Lightning 2.6)."""
    return getattr(trainer, "_val_check_time_interval", None) is not None
