"""The prediction of a whole student's training beside the truth, and what would do better."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_pipebd.planning.pipeline_drift import PipelineTimes, find_better_pipeline
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_program import WORK, PipelineKind
from lightning_pipebd.runtime.agreement import done_by_rank_zero
from lightning_pipebd.runtime.pipeline_executor import PipelineSpan
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.step_pace import StepPace, compare, has_drifted

__all__ = ["PipelineStepReport"]

Listener = Callable[[PipelineSpan], None]


class PipelineStepReport(StepPace[PipelineSpan]):
    """Log what a step took, beside what was predicted, and what would be faster where that is too far off.

    The paces are exchanged at the end of the first epoch with enough steps: the slowest rank's is everybody's. A plan
    that was given is not commented.

    Args:
        outlook: What was foreseen.
        transport: Reaches the other ranks.
        listen: Has every action told to somebody, and gives what ends that; `None` where actions cannot be timed.
    """

    def __init__(
        self,
        outlook: PipelineOutlook,
        transport: Transport,
        listen: Callable[[Listener], Callable[[], None]] | None = None,
    ) -> None:
        super().__init__(listen)
        self._outlook = outlook
        self._transport = transport
        self._durations: defaultdict[tuple[PipelineKind, int, int], list[float]] = defaultdict(list)

    @property
    @override
    def is_measuring(self) -> bool:
        return self.step_time_ms is None

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** over all ranks, until the pace is known: find and log it."""
        if self.step_time_ms is not None:
            return
        pace_ms, durations = self.take_pace(), self._durations
        self._durations = defaultdict(list)
        medians = {(kind.value, *key): statistics.median(times) for (kind, *key), times in durations.items()}
        # Every rank has seen as many batches, so all decide alike.
        everyone = self._transport.all_gather_object((pace_ms, medians if pace_ms is not None else {}))
        paces = [pace for pace, _ in everyone if pace is not None]
        if not paces:
            return
        self.step_time_ms = max(paces)
        self.close()
        times: defaultdict[tuple[PipelineKind, int, int], list[float]] = defaultdict(list)
        for _, own in everyone:
            for (kind, block, rows), ms in own.items():
                times[PipelineKind(kind), block, rows].append(ms)
        observed = {key: statistics.mean(found) for key, found in times.items()}
        done_by_rank_zero(self._transport, lambda: self._tell(observed))

    @override
    def _note(self, span: PipelineSpan) -> None:
        action = span.action
        if action.kind in WORK and action.rows.num_rows:
            key = (action.kind, action.index, action.rows.num_rows)
            self._durations[key].append((span.stop_s - span.start_s) * 1000)

    def _tell(self, observed: PipelineTimes) -> None:
        assert self.step_time_ms is not None
        rank_zero_info(compare(self._outlook.step_time_ms, self.step_time_ms))
        if self._outlook.choice is None or not has_drifted(self._outlook.step_time_ms, self.step_time_ms):
            return
        found = find_better_pipeline(self._outlook, observed)
        if found is None:
            return
        present, better = found
        way = better.candidate
        rank_zero_info(
            f"With the times of this epoch, another plan would take {better.step_time_ms:.4g} ms instead of "
            f"{present.step_time_ms:.4g} ms. To use it, stop and go on from a checkpoint with "
            f'`plan="{way.plan}"`, `num_micro_batches={way.num_micro_batches}`, `schedule="{way.schedule}"`.'
        )
