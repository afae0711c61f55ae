"""The pace of a rank's steps, noted without making anybody wait, and the word on how far off the prediction it is."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from lightning.pytorch import LightningModule, Trainer
from typing_extensions import override

from lightning_pipebd.fit_callbacks import FitCallback
from lightning_pipebd.planning.quantities import format_ms

__all__ = ["StepPace", "compare", "has_drifted"]

_MIN_STEPS = 8
_DRIFT = 1.25
SpanT = TypeVar("SpanT")


class StepPace(FitCallback, Generic[SpanT]):
    """Note when this rank's batches end, and what its actions take; validation in between does not count.

    Args:
        listen: Has every action told to somebody, and gives what ends that; ``None`` where actions cannot be timed.

    Attributes:
        step_time_ms: Measured time of a step; ``None`` before it was measured.
    """

    def __init__(self, listen: Callable[[Callable[[SpanT], None]], Callable[[], None]] | None) -> None:
        self.step_time_ms: float | None = None
        self._end_listening = listen(self._note) if listen is not None else None
        self._stamps: list[float] = []
        self._pause_s = 0.0
        self._pause_start = 0.0

    @property
    def is_measuring(self) -> bool:
        """Whether the pace of this epoch is wanted."""
        return True

    def close(self) -> None:
        """Listen to actions no more."""
        if self._end_listening is not None:
            self._end_listening()
            self._end_listening = None

    def _note(self, span: SpanT) -> None:
        """Keep what an action took."""
        raise NotImplementedError

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        if self.is_measuring or not self._stamps:
            self._stamps.append(time.perf_counter() - self._pause_s)

    @override
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Stop the clock."""
        self._pause_start = time.perf_counter()

    @override
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Let it run on."""
        self._pause_s += time.perf_counter() - self._pause_start

    def take_pace(self) -> float | None:
        """End the epoch; give the time of a step in its second half in ms, ``None`` if it was too short to tell."""
        stamps, self._stamps = self._stamps, []
        if len(stamps) < _MIN_STEPS:
            return None
        half = len(stamps) // 2
        return (stamps[-1] - stamps[half - 1]) / (len(stamps) - half) * 1000


def has_drifted(predicted_ms: float, measured_ms: float) -> bool:
    """Tell whether a measured step time is too far from the predicted one.

    Example:
        >>> has_drifted(40.0, 41.0), has_drifted(40.0, 60.0), has_drifted(40.0, 20.0)
        (False, True, True)
    """
    return not predicted_ms / _DRIFT <= measured_ms <= predicted_ms * _DRIFT


def compare(predicted_ms: float, measured_ms: float) -> str:
    """Say how a measured step time differs from the predicted one.

    Example:
        >>> compare(40.0, 41.0)
        'measured: 41 ms per step, predicted: 40 ms (+2 %)'
        >>> print(compare(10.0, 20.0))
        measured: 20 ms per step, predicted: 10 ms (+100 %)
        That is more than 25 % off. Something else may use the devices, or did so while the costs were measured; to
        have them measured anew, set PIPEBD_CACHE to an empty folder.
    """
    change = (measured_ms / predicted_ms - 1) * 100 if predicted_ms else 0.0
    line = f"measured: {format_ms(measured_ms)} ms per step, predicted: {format_ms(predicted_ms)} ms ({change:+.0f} %)"
    if not has_drifted(predicted_ms, measured_ms):
        return line
    return (
        f"{line}\nThat is more than {(_DRIFT - 1) * 100:.0f} % off. Something else may use the devices, or did so "
        "while the costs were measured; to\nhave them measured anew, set PIPEBD_CACHE to an empty folder."
    )
