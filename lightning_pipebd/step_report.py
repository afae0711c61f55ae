"""The prediction beside the truth: how long steps took, measured without making anybody wait."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Callable, Collection
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.drift import ObservedTimes, find_better
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.program import Kind
from lightning_pipebd.planning.quantities import format_ms
from lightning_pipebd.runtime.agreement import done_by_rank_zero
from lightning_pipebd.runtime.executor import Span
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.step_pace import StepPace, compare, has_drifted

__all__ = ["StepReport"]

Listener = Callable[[Span], None]


class StepReport(StepPace[Span]):
    """Log what a step took, beside what was predicted, and look for a better plan where that is too far off.

    Each rank notes when its batches end; validation in between does not count. The paces are exchanged at the end of
    the epoch: the slowest rank's is everybody's. That is done in the first epoch with enough steps, or in all of them
    if the plan may change. Blocks that are trained no longer are a reason to look for a better plan in any epoch.

    Args:
        outlook: What was foreseen.
        transport: Reaches the other ranks.
        module: Knows its frozen blocks.
        listen: Has every action told to somebody, and gives what ends that; `None` where actions cannot be timed.
        replans: Whether the plan may change between epochs.

    Attributes:
        better: What is foreseen of a better plan, if the plan may change and there is one; the same on all ranks.
    """

    def __init__(
        self,
        outlook: Outlook,
        transport: Transport,
        module: BlockwiseDistillationModule,
        listen: Callable[[Listener], Callable[[], None]] | None = None,
        *,
        replans: bool = False,
    ) -> None:
        super().__init__(listen)
        self._outlook = outlook
        self._transport = transport
        self._module = module
        self._replans = replans
        self._durations: defaultdict[tuple[Kind, int, int], list[float]] = defaultdict(list)
        # Blocks that are trained no longer: those that were foreseen, those that are known, and those that were not
        # trained either when this epoch began, or when the times were observed.
        self._foreseen = self._frozen = self._frozen_early = self._frozen_when_observed = module.frozen_blocks
        self._observed: ObservedTimes = {}
        self._is_compared = False
        self.better: Outlook | None = None

    @override
    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Note the time."""
        if not self._stamps:
            self._frozen_early = self._module.frozen_blocks
        super().on_train_batch_end(trainer, pl_module, outputs, batch, batch_idx)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** over all ranks: find and log the pace, and a better plan."""
        everyone = [_Epoch(*epoch) for epoch in self._transport.all_gather_object(tuple(self._end_epoch()))]
        frozen = frozenset(block for epoch in everyone for block in epoch.frozen)
        newly, self._frozen = frozen - self._frozen, frozen
        # Every rank has seen as many batches, so all decide alike.
        paces = [epoch.pace_ms for epoch in everyone if epoch.pace_ms is not None]
        if paces:
            self.step_time_ms = max(paces)
            self._observed = {
                (rank, Kind(kind), block, rows): ms
                for rank, epoch in enumerate(everyone)
                for (kind, block, rows), ms in epoch.medians.items()
            }
            self._frozen_when_observed = frozenset(block for epoch in everyone for block in epoch.frozen_early)
            if not self._replans:
                self.close()
        if paces or newly:
            self.better = done_by_rank_zero(self._transport, lambda: self._look(bool(paces), newly))

    @property
    @override
    def is_measuring(self) -> bool:
        return self._replans or self.step_time_ms is None

    def _end_epoch(self) -> _Epoch:
        pace_ms = self.take_pace()
        durations, self._durations = self._durations, defaultdict(list)
        frozen = (self._module.frozen_blocks, self._frozen_early)
        if pace_ms is None:
            return _Epoch(None, {}, *frozen)
        # Of the half that the pace is of: in the first one, kernels are compiled and caches are filled.
        medians = {
            (key[0].value, *key[1:]): statistics.median(values[len(values) // 2 :]) for key, values in durations.items()
        }
        return _Epoch(pace_ms, medians, *frozen)

    @override
    def _note(self, span: Span) -> None:
        kind, block, rows = span.action.kind, span.action.index, span.action.rows.num_rows
        if kind in (Kind.TEACH, Kind.LEARN) and rows:
            self._durations[kind, block, rows].append((span.stop_s - span.start_s) * 1000)

    def _look(self, is_measured: bool, newly: frozenset[int]) -> Outlook | None:
        """Log what was measured; find and tell a better plan, and give it if it may be used."""
        has_changed = bool(newly)
        if is_measured and self.step_time_ms is not None and not newly:
            has_changed = has_drifted(self._outlook.step_time_ms, self.step_time_ms)
            if not self._is_compared:
                rank_zero_info(compare(self._outlook.step_time_ms, self.step_time_ms))
            self._is_compared = True
        # A plan that the user gave is changed if they asked for that, and not commented otherwise.
        if not has_changed or (self._outlook.choice is None and not self._replans):
            return None
        frozen = self._frozen - self._foreseen
        found = find_better(self._outlook, self._observed, frozen=frozen, frozen_before=self._frozen_when_observed)
        if found is None:
            return None
        present, better = found
        why = f"Since block {_list(newly)} is trained no longer" if newly else "With the blocks' times of this epoch"
        plan = f'"{format_plan(better.plan)}"' if has_text_form(better.plan) else str(better.plan.to_dict())
        way = "The next epoch goes on with" if self._replans else "To use it, stop and go on from a checkpoint with"
        rank_zero_info(
            f"{why}, another plan is predicted to take {format_ms(better.step_time_ms)} ms instead of "
            f"{format_ms(present.step_time_ms)} ms. "
            f"{way} `plan={plan}`."
        )
        return better if self._replans else None


class _Epoch(NamedTuple):
    """What a rank tells the others of an epoch; without a pace if it was too short, or if none is wanted."""

    pace_ms: float | None
    medians: dict[tuple[str, int, int], float]
    frozen: frozenset[int]
    frozen_early: frozenset[int]


def _list(blocks: Collection[int]) -> str:
    return ", ".join(map(str, sorted(blocks)))
