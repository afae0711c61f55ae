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

from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.program import Kind
from lightning_pipebd.planning.simulate import simulate
from lightning_pipebd.plots import DrawnSpan, check_plots, draw_timelines, predicted_spans
from lightning_pipebd.runtime.executor import Span
from lightning_pipebd.session import TrainingSession
from lightning_pipebd.strategy import PipeBDStrategy

__all__ = ["Timeline"]


class _Event(NamedTuple):
    """One action, in seconds of the clock on the wall."""

    step: int
    kind: str
    name: str
    start_s: float
    stop_s: float


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

    Raises:
        ValueError: A number is too small.
        ImportError: A picture is wanted, but matplotlib is not installed.
    """

    def __init__(
        self,
        path: str | Path = "timeline.json",
        *,
        first_step: int = 8,
        num_steps: int = 8,
        plot: str | Path | None = None,
    ) -> None:
        if first_step < 0 or num_steps < 1:
            raise ValueError(
                f"`first_step` must not be below 0 and `num_steps` not below 1, but they are {first_step} and "
                f"{num_steps}. Record at least one step."
            )
        if plot is not None:
            check_plots()
        self._path = Path(path)
        self._plot = None if plot is None else Path(plot)
        self._steps = range(first_step, first_step + num_steps)
        self._events: list[_Event] = []
        self._step = 0
        self._update_start = 0.0

    @override
    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Listen to this rank's actions."""
        self._end_listening = _session(trainer).observe(self._note)
        self._events, self._step = [], 0

    @override
    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        """Note when updates begin."""
        self._update_start = time.perf_counter()

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note when updates end."""
        if self._update_start and self._step in self._steps:
            self._add(Kind.UPDATE.value, "UPDATE", self._update_start, time.perf_counter())
        self._update_start = 0.0
        self._step += 1

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** over all ranks: bring all ranks' actions together, and write them."""
        self._end_listening()
        ranks = _session(trainer).gather([tuple(event) for event in self._events])
        if not trainer.is_global_zero:
            return
        events = [[_Event(*event) for event in own] for own in ranks]
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._path.write_text(json.dumps(_trace(events)), encoding="utf-8")
        if self._plot is not None:
            self._draw(self._plot, events, trainer.strategy.outlook)  # type: ignore[attr-defined]  # ours, as `_session` found
        rank_zero_info(f"The timeline of {len(self._steps)} steps is in {self._path}.")

    def _note(self, span: Span) -> None:
        if self._step in self._steps and span.action.kind is not Kind.UPDATE:
            self._add(span.action.kind.value, str(span.action), span.start_s, span.stop_s)

    def _add(self, kind: str, name: str, start_s: float, stop_s: float) -> None:
        # The clock that measures best begins anywhere; the one on the wall is the same for all ranks.
        offset = time.time() - time.perf_counter()
        self._events.append(_Event(self._step, kind, name, start_s + offset, stop_s + offset))

    def _draw(self, path: Path, ranks: list[list[_Event]], outlook: Outlook | None) -> None:
        timelines = {}
        if outlook is not None:
            simulation = simulate(
                outlook.plan,
                outlook.measurement.costs,
                outlook.cluster,
                num_rows=outlook.measurement.num_rows,
                num_steps=max(2, len(self._steps)),
                max_in_flight=outlook.max_in_flight,
                target_blocks=outlook.measurement.target_blocks,
            )
            timelines["predicted"] = predicted_spans(simulation)
        timelines["measured"] = [
            DrawnSpan(rank, Kind(event.kind), _short(event), event.start_s * 1000, event.stop_s * 1000)
            for rank, events in enumerate(ranks)
            for event in events
        ]
        draw_timelines(path, timelines)


def _session(trainer: Trainer) -> TrainingSession:
    strategy = trainer.strategy
    if not isinstance(strategy, PipeBDStrategy):
        raise TypeError(
            f"`Timeline` must run under `strategy='pipebd'`, but the strategy is {type(strategy).__name__}. Use "
            "Trainer(profiler=...) there."
        )
    if strategy.session is None:
        raise TypeError(
            "`Timeline` must watch a BlockwiseDistillationModule, but a whole student is trained. Leave it out."
        )
    return strategy.session


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
            "args": {"step": event.step},
        }
        for rank, events in enumerate(ranks)
        for event in events
    ]
    return {"traceEvents": [*names, *spans], "displayTimeUnit": "ms"}


def _short(event: _Event) -> str:
    number = event.name.partition("=")[2].split(" ")[0]
    return f"{event.kind[0]}{number if event.kind not in ('LOAD', 'UPDATE') else ''}"
