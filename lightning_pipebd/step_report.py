"""The prediction beside the truth: how long steps took, measured without making anybody wait."""

from __future__ import annotations

import time
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.runtime.transport import Transport

__all__ = ["StepReport"]

_MIN_STEPS = 8
_DRIFT = 1.25


class StepReport(Callback):
    """Log after the first epoch what a step took, beside what was predicted.

    Each rank notes when its batches end; validation in between does not count. The paces are exchanged once, at the
    end of the epoch: the slowest rank's is everybody's.

    Args:
        outlook: What was foreseen.
        transport: Reaches the other ranks.
    """

    def __init__(self, outlook: Outlook, transport: Transport) -> None:
        self._outlook = outlook
        self._transport = transport
        self._stamps: list[float] = []
        self._pause_s = 0.0
        self._pause_start = 0.0
        self.step_time_ms: float | None = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        if self.step_time_ms is None:
            self._stamps.append(time.perf_counter() - self._pause_s)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause_start = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it run on."""
        self._pause_s += time.perf_counter() - self._pause_start

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** over all ranks, in the first epoch with enough steps: find and log the pace."""
        if self.step_time_ms is not None:
            return
        # Every rank has seen as many batches, so all decide alike.
        stamps, self._stamps = self._stamps, []
        if len(stamps) < _MIN_STEPS:
            return
        half = len(stamps) // 2
        pace = (stamps[-1] - stamps[half - 1]) / (len(stamps) - half) * 1000
        self.step_time_ms = max(self._transport.all_gather_object(pace))
        rank_zero_info(compare(self._outlook.step_time_ms, self.step_time_ms))


def compare(predicted_ms: float, measured_ms: float) -> str:
    """Say how a measured step time differs from the predicted one.

    Example:
        >>> compare(40.0, 41.0)
        'measured: 41 ms per step, predicted: 40 ms (+2 %)'
        >>> print(compare(10.0, 20.0))
        measured: 20 ms per step, predicted: 10 ms (+100 %)
        That is more than 25 % beside the prediction. Something else may use the devices, or did so while the costs were
        measured; to have them measured anew, empty the folder that PIPEBD_CACHE names.
    """
    ratio = measured_ms / predicted_ms if predicted_ms else 1.0
    line = f"measured: {measured_ms:.4g} ms per step, predicted: {predicted_ms:.4g} ms ({ratio - 1:+.0%})"
    line = line.replace("%)", " %)")
    if 1 / _DRIFT <= ratio <= _DRIFT:
        return line
    return (
        f"{line}\nThat is more than {_DRIFT - 1:.0%} beside the prediction. Something else may use the devices, or did "
        "so while the costs were\nmeasured; to have them measured anew, empty the folder that PIPEBD_CACHE names."
    ).replace("25% beside", "25 % beside")
