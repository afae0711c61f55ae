"""Private names with which Lightning starts processes and joins them in a group."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from datetime import timedelta
from subprocess import Popen
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from lightning.fabric.utilities.distributed import (
    _get_default_process_group_backend_for_device,
    _init_dist_connection,
    _sync_ddp_if_available,
)
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.strategies import ParallelStrategy
from lightning.pytorch.strategies.launchers.subprocess_script import _SubprocessScriptLauncher
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.runtime.rendezvous import agent_address, store_of_start

if TYPE_CHECKING:
    from lightning.pytorch import Trainer

__all__ = [
    "LAUNCHER",
    "ProcessGroupStrategy",
    "choose_backend",
    "launched_processes",
]

LAUNCHER = "LIGHTNING_PIPEBD_LAUNCHER"
"""Environment variable: the process that launched this one, where that is a rank itself."""


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
        process_group_backend: Backend of the default group; ``None`` takes NCCL if each process has a GPU of its own.
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
        backend = choose_backend(self._process_group_backend, self.parallel_devices or [self.root_device])
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


def choose_backend(given: str | None, devices: Sequence[torch.device]) -> str:
    """Give the backend of the default process group.

    Args:
        given: What the user asked for.
        devices: Of the processes of this node.

    Raises:
        ValueError: NCCL was asked for, but processes share a GPU.

    Example:
        >>> choose_backend(None, [torch.device("cuda", 0), torch.device("cuda", 1)])
        'nccl'
        >>> choose_backend(None, [torch.device("cuda", 0), torch.device("cuda", 0)])
        'gloo'
    """
    shares_gpu = devices[0].type == "cuda" and len(set(devices)) < len(devices)
    if given is None:
        return "gloo" if shares_gpu else _get_default_process_group_backend_for_device(devices[0])
    if shares_gpu and "nccl" in given:
        raise ValueError(
            f"`process_group_backend` must be 'gloo' where processes share a GPU, which NCCL refuses, but is {given!r} "
            f"for the devices {', '.join(map(str, devices))}. Leave it out, or give each process a GPU of its own."
        )
    return given


def launched_processes(strategy: ProcessGroupStrategy) -> list[Popen[bytes]]:
    """Give the processes that this one has launched."""
    launcher = strategy.launcher
    return launcher.procs if isinstance(launcher, _SubprocessScriptLauncher) else []
