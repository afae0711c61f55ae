"""The bench: what a module is measured with, and its first batch on every rank."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision

from lightning_pipebd.checkpoint import share_from_zero
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.first_batch import FirstBatch, only_loader, peek
from lightning_pipebd.lightning_internals import request_train_loader
from lightning_pipebd.runtime.agreement import done_by_rank_zero
from lightning_pipebd.runtime.transport import Transport

__all__ = ["Bench", "TimedNews", "bring_batch", "share_first_batch"]

_SECONDS_BETWEEN_NEWS = 2.0
ModuleT = TypeVar("ModuleT", bound=DistillationModule)


@dataclass(frozen=True, kw_only=True)
class Bench(Generic[ModuleT]):
    """What a module is measured with.

    Args:
        trainer: Its trainer.
        module: The module, attached to the trainer.
        transport: Reaches the other ranks.
        plugin: The trainer's precision plugin.
        device: Where this rank computes.
        to_device: Brings a batch to the device, as the strategy does in training.
        is_synchronised: Whether shared blocks take their batch statistics over all rows.
        tell: Called with the progress in words, on rank 0.
    """

    trainer: Trainer
    module: ModuleT
    transport: Transport
    plugin: Precision
    device: torch.device
    to_device: Callable[[Any], Any]
    is_synchronised: bool
    tell: Callable[[str], None]


class TimedNews:
    """Passes progress on every few seconds."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._last = time.perf_counter()

    def __call__(self, text: str) -> None:
        """Pass it on, unless something was passed on just now."""
        now = time.perf_counter()
        if now - self._last >= _SECONDS_BETWEEN_NEWS:
            self._last = now
            self._tell(f"Measuring: {text}.")


def share_first_batch(bench: Bench[ModuleT], example: Callable[[], FirstBatch]) -> FirstBatch:
    """**Collective** over all ranks: give every rank the first batch that rank 0 loads.

    Args:
        bench: Reaches the loader and the ranks.
        example: Gives a batch where the loader may not be asked for its first one.
    """
    transport = bench.transport
    # On every rank: a hook of the user's may wait for the other ranks.
    loader = only_loader(request_train_loader(bench.trainer))

    def look() -> FirstBatch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = peek(loader)
        return first if first.is_known else example()

    batches: list[Any] = []

    def look_and_keep() -> FirstBatch:
        found = look()
        batches.append(found.batch)
        # The batch itself is too large for an exchange of objects.
        return found._replace(batch=None)

    found = done_by_rank_zero(transport, look_and_keep)
    return found._replace(batch=share_from_zero(transport, batches[0] if batches else None))


def bring_batch(bench: Bench[ModuleT], batch: Any) -> tuple[Any, Any]:
    """Give a batch's inputs and labels on the device."""
    converted = bench.to_device(bench.plugin.convert_input(batch))
    return bench.module.unpack_batch(converted)
