"""The measured timeline: what every rank did when, as a file for trace viewers and as a picture."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any, NamedTuple

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipebd.loss_history import LossHistory, merge_losses
from lightning_pipebd.pipeline_session import PipelineSession
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.program import Kind
from lightning_pipebd.plots import DrawnSpan, check_plots, draw_timelines, make_label, predicted_spans
from lightning_pipebd.runtime.executor import Span
from lightning_pipebd.runtime.pipeline_executor import PipelineSpan
from lightning_pipebd.session import TrainingSession
from lightning_pipebd.strategy import PipeBDStrategy
from lightning_pipebd.timeline_report import make_report

__all__ = ["Timeline"]


class _Event(NamedTuple):
    """One action, in seconds of the clock on the wall."""

    step: int
    kind: str
    name: str
    start_s: float
    stop_s: float
    num_bytes: int = 0


class Timeline(Callback):
    """Record what each rank does in some steps, and write it when the fit ends.

    The file is in the Trace Event Format, which ``chrome://tracing`` and https://ui.perfetto.dev open. Each rank notes
    its own actions; they are gathered once, at the end. On GPUs an action's time is that of the rank's thread, which
    runs ahead of the device. Clocks of several nodes agree as far as their wall clocks do.

    Args:
        path: JSON file to write.
        first_step: First step to record; the steps before fill the pipeline.
        num_steps: Steps to record, at least 1.
        plot: Picture to draw as well, the predicted timeline above the measured one; needs matplotlib.
        report: Page to write as well, HTML or Markdown by its ending: the plan, prediction and measurement side by
            side, the ranks' time, the relay, the losses of all blocks, or the terms of a whole student's; needs
            matplotlib.

    Raises:
        ValueError: A number is too small, or the report has another ending.
        ImportError: A picture or a report is wanted, but matplotlib is not installed.
    """

    def __init__(
        self,
        path: str | Path = "timeline.json",
        *,
        first_step: int = 8,
        num_steps: int = 8,
        plot: str | Path | None = None,
        report: str | Path | None = None,
    ) -> None:
        if first_step < 0 or num_steps < 1:
            raise ValueError(
                f"`first_step` must not be below 0 and `num_steps` not below 1, but they are {first_step} and "
                f"{num_steps}. Record at least one step."
            )
        if report is not None and Path(report).suffix not in (".html", ".md"):
            raise ValueError(f"`report` must end in .html or .md, but is {str(report)!r}. Choose one of both.")
        if plot is not None or report is not None:
            check_plots()
        self._path = Path(path)
        self._plot = None if plot is None else Path(plot)
        self._report = None if report is None else Path(report)
        self._losses = LossHistory()
        self._steps = range(first_step, first_step + num_steps)
        self._events: list[_Event] = []
        self._step = 0
        self._update_start = 0.0
        self._offset = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to this rank's actions."""
        self._end_listening = _session(trainer).observe(self._note)
        self._events, self._step, self._losses, self._offset = [], 0, LossHistory(), 0.0

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note when updates begin."""
        self._update_start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note when updates end."""
        self._end_update(time.perf_counter())
        if self._report is not None:
            self._losses.note(self._step, _session(trainer).losses)
        self._step += 1

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** over all ranks: bring all ranks' actions together, and write them."""
        self._end_listening()
        own = ([tuple(event) for event in self._events], self._losses.points)
        everyone = _session(trainer).gather(own)
        if not trainer.is_global_zero:
            return
        events = [[_Event(*event) for event in own] for own, _ in everyone]
        trace = _trace(events)
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(trace), encoding="utf-8")
        outlook = _strategy(trainer).outlook
        timelines = self._timelines(events, outlook) if self._plot or self._report else {}
        if self._plot is not None:
            draw_timelines(self._plot, timelines)
        if self._report is not None:
            losses = merge_losses([points for _, points in everyone])
            make_report(_session(trainer), outlook, trace, timelines, losses).write(self._report)
        rank_zero_info(f"The timeline of {len(self._steps)} steps is in {self._path}.")

    def _note(self, span: Span | PipelineSpan) -> None:
        # What an end-to-end program does after the optimizer step is an action again.
        self._end_update(span.start_s)
        if self._step in self._steps and span.action.kind.value != Kind.UPDATE.value:
            num_bytes = span.num_bytes if isinstance(span, PipelineSpan) else 0
            self._add(span.action.kind.value, str(span.action), span.start_s, span.stop_s, num_bytes)

    def _end_update(self, stop_s: float) -> None:
        if self._update_start and self._step in self._steps:
            self._add(Kind.UPDATE.value, Kind.UPDATE.value, self._update_start, stop_s)
        self._update_start = 0.0

    def _add(self, kind: str, name: str, start_s: float, stop_s: float, num_bytes: int = 0) -> None:
        # The clock that measures best begins anywhere; the one on the wall is the same for all ranks. Of some readings
        # the greatest was interrupted least.
        self._offset = self._offset or max(time.time() - time.perf_counter() for _ in range(5))
        self._events.append(_Event(self._step, kind, name, start_s + self._offset, stop_s + self._offset, num_bytes))

    def _timelines(
        self, ranks: list[list[_Event]], outlook: Outlook | PipelineOutlook | None
    ) -> dict[str, list[DrawnSpan]]:
        timelines = {}
        if outlook is not None:
            timelines["predicted"] = predicted_spans(outlook.simulate(max(2, len(self._steps))).timeline)
        timelines["measured"] = [
            DrawnSpan(rank, event.kind, make_label(event.name), event.start_s * 1000, event.stop_s * 1000)
            for rank, events in enumerate(ranks)
            for event in events
        ]
        return timelines


def _strategy(trainer: Trainer) -> PipeBDStrategy:
    strategy = trainer.strategy
    if not isinstance(strategy, PipeBDStrategy):
        raise TypeError(
            f"`Timeline` must run under `strategy='pipebd'`, but the strategy is {type(strategy).__name__}. Use "
            "Trainer(profiler=...) there."
        )
    return strategy


def _session(trainer: Trainer) -> TrainingSession | PipelineSession:
    session = _strategy(trainer).session
    assert session is not None
    return session


def _trace(ranks: list[list[_Event]]) -> dict[str, Any]:
    start_s = min((event.start_s for events in ranks for event in events), default=0.0)
    names = [
        {"ph": "M", "name": "process_name", "pid": rank, "args": {"name": f"rank {rank}"}} for rank in range(len(ranks))
    ]
    spans = [
        {
            "ph": "X",
            "name": event.name,
            "cat": event.kind,
            "pid": rank,
            "tid": 0,
            "ts": (event.start_s - start_s) * 1e6,
            "dur": (event.stop_s - event.start_s) * 1e6,
            "args": {"step": event.step, **({"bytes": event.num_bytes} if event.num_bytes else {})},
        }
        for rank, events in enumerate(ranks)
        for event in events
    ]
    return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}
