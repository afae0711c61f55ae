"""Private names of Lightning's module: its batch hooks, what it logs, its device."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.device_dtype_mixin import _DeviceDtypeModuleMixin
from lightning.pytorch import LightningModule
from torch import Tensor
from typing_extensions import override

__all__ = [
    "COMPLETE",
    "LogCall",
    "StagedBatch",
    "StagedBatchModule",
    "before_transfer",
    "log_again",
    "set_device",
]

_POSITION_OF_SYNC_DIST = 6

LogCall = tuple[str, Any, tuple[Any, ...], dict[str, Any]]
"""What :meth:`~lightning.pytorch.LightningModule.log` was called with."""
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
    _put_off: list[LogCall] | None = None

    @contextmanager
    def not_logging(self) -> Iterator[None]:
        """Log nothing inside the context: no batch is trained there."""
        self._is_measured = True
        try:
            yield
        finally:
            del self._is_measured

    @contextmanager
    def putting_off_logs(self) -> Iterator[list[LogCall]]:
        """Only note what is logged inside the context: the step that it belongs to comes later."""
        self._put_off = []
        try:
            yield self._put_off
        finally:
            del self._put_off

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
        if self._put_off is not None:
            # A value of now: what it was taken from may be another one then.
            self._put_off.append((name, value.clone() if isinstance(value, Tensor) else value, args, kwargs))
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


def before_transfer(module: LightningModule, batch: Any) -> Any:
    """Do to a batch what Lightning's training loop does before it asks the strategy to move it."""
    batch = module.trainer.precision_plugin.convert_input(batch)
    return module._on_before_batch_transfer(batch, dataloader_idx=0)


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
    """Let ``module.device``, and that of modules of Lightning inside it, tell where the blocks compute.

    Some of its parameters may be elsewhere.
    """
    for inner in module.modules():
        if isinstance(inner, _DeviceDtypeModuleMixin):
            inner._device = device
