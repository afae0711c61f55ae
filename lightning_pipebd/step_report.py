"""The prediction beside the truth: how long steps took, measured without making anybody wait."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_pipebd.planning.drift import ObservedTimes, find_better
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.program import Kind
from lightning_pipebd.runtime.executor import Span
from lightning_pipebd.runtime.transport import Transport

__all__ = ["StepReport"]

Listener = Callable[[Span], None]

_MIN_STEPS = 8
_DRIFT = 1.25


class StepReport(Callback):
    """Log after the first epoch what a step took, beside what was predicted.

    Each rank notes when its batches end; validation in between does not count. The paces are exchanged once, at the
    end of the epoch: the slowest rank's is everybody's.

    Args:
        outlook: What was foreseen.
        transport: Reaches the other ranks.
        listen: Has every action told to somebody, and gives what ends that; `None` where actions cannot be timed.
    """

    def __init__(
        self, outlook: Outlook, transport: Transport, listen: Callable[[Listener], Callable[[], None]] | None = None
    ) -> None:
        self._outlook = outlook
        self._transport = transport
        self._end_listening = listen(self._note) if listen is not None else None
        self._durations: defaultdict[tuple[Kind, int, int], list[float]] = defaultdict(list)
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
        durations, self._durations = self._durations, defaultdict(list)
        if len(stamps) < _MIN_STEPS:
            return
        if self._end_listening is not None:
            self._end_listening()
        half = len(stamps) // 2
        pace = (stamps[-1] - stamps[half - 1]) / (len(stamps) - half) * 1000
        medians = {(key[0].value, *key[1:]): statistics.median(values) for key, values in durations.items()}
        everyone = self._transport.all_gather_object((pace, medians))
        self.step_time_ms = max(pace for pace, _ in everyone)
        if self._transport.rank == 0:
            observed = {
                (rank, Kind(kind), block, rows): ms
                for rank, (_, times) in enumerate(everyone)
                for (kind, block, rows), ms in times.items()
            }
            self._report(self.step_time_ms, observed)

    def _note(self, span: Span) -> None:
        kind, block, rows = span.action.kind, span.action.index, span.action.rows.num_rows
        if kind in (Kind.TEACH, Kind.LEARN) and rows:
            self._durations[kind, block, rows].append((span.stop_s - span.start_s) * 1000)

    def _report(self, step_time_ms: float, observed: ObservedTimes) -> None:
        rank_zero_info(compare(self._outlook.step_time_ms, step_time_ms))
        if self._outlook.choice is None or not has_drifted(self._outlook.step_time_ms, step_time_ms):
            return
        found = find_better(self._outlook, observed)
        if found is not None:
            present, better = found
            plan = f'"{format_plan(better.plan)}"' if has_text_form(better.plan) else str(better.plan.to_dict())
            rank_zero_info(
                f"With the times of this epoch another plan would take {better.step_time_ms:.4g} ms instead of "
                f"{present.step_time_ms:.4g} ms. To use it, stop and go on from a checkpoint with `plan={plan}`."
            )


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
    line = f"measured: {measured_ms:.4g} ms per step, predicted: {predicted_ms:.4g} ms ({change:+.0f} %)"
    if not has_drifted(predicted_ms, measured_ms):
        return line
    return (
        f"{line}\nThat is more than {(_DRIFT - 1) * 100:.0f} % off. Something else may use the devices, or did so "
        "while the costs were measured; to\nhave them measured anew, set PIPEBD_CACHE to an empty folder."
    )
