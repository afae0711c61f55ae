"""What the strategy adds to the trainer: the losses of all ranks' blocks, under the same keys for every plan."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.fit_callbacks import FitCallback
from lightning_pipebd.lightning_internals.trainer import is_logging_step, logging_step
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.transport import Lane, Message, Transport

__all__ = ["BlockMetrics"]

LossName = int | str
"""A block's index, or the name of a term of a loss of the whole student."""


class _Report(NamedTuple):
    """What a rank tells the others at the end of an epoch; losses are this rank's part of each block's."""

    sums: dict[LossName, float]
    latest: dict[LossName, float]
    num_posted: int


class BlockMetrics(FitCallback):
    """Bring every block's loss to the logger of rank 0, their sum to its progress bar, and epoch means to every rank.

    Between epochs nothing waits: a rank posts its losses when a logging step is due, and rank 0 writes the row of a
    step when all its parts have arrived. The means are exchanged once an epoch.

    Args:
        transport: Carries the losses.
        contributors: Ranks that learn a block.
        sharing_logs: Context in which logged values count as those of all ranks.
        assemble_student: **Collective** over all ranks: gives every rank the present weights of all blocks.
    """

    def __init__(
        self,
        transport: Transport,
        contributors: frozenset[int],
        sharing_logs: Callable[[], AbstractContextManager[None]],
        assemble_student: Callable[[], None],
    ) -> None:
        self._sharing_logs = sharing_logs
        self._assemble_student = assemble_student
        self._transport = transport
        self._contributors = contributors
        is_zero = transport.rank == 0
        others = sorted(contributors - {0})
        self._mailboxes = {peer: Mailbox(transport, peer, Lane.METRICS) for peer in others} if is_zero else {}
        self._outbox = Outbox(transport, [0], Lane.METRICS) if transport.rank in others else None
        self._rows: dict[int, dict[int, dict[LossName, float]]] = defaultdict(dict)  # step -> rank -> block -> loss
        self._epochs: dict[int, int] = {}
        self._sums: dict[tuple[LossName, ...], Tensor] = {}  # of the steps that had these losses
        self._num_rows = 0
        self._num_posted = 0
        self._num_received: dict[int, int] = defaultdict(int)
        self._latest: dict[LossName, Tensor] = {}

    def record(self, losses: Mapping[Any, Tensor], num_rows: int) -> None:
        """Take in this rank's parts of the block losses of a batch; reads no value from the device."""
        self._latest = dict(losses)
        self._num_rows += num_rows
        if not losses:
            return
        names = tuple(losses)
        weighted = _stacked(losses) * num_rows
        self._sums[names] = self._sums[names] + weighted if names in self._sums else weighted

    @property
    def latest(self) -> dict[Any, Tensor]:
        """This rank's parts of the losses of the last step."""
        return self._latest

    def close(self) -> None:
        """End the exchange; every rank must call it after the same step."""
        if self._outbox is not None:
            self._outbox.close()
        for mailbox in self._mailboxes.values():
            mailbox.close()

    def abandon(self) -> None:
        """This rank ends with an error: wait for nobody any more."""
        if self._outbox is not None:
            self._outbox.abandon()

    @override
    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Post or write the block losses if Lightning logs at this step."""
        if isinstance(outputs, dict) and self._latest:
            # The closure's own loss is a stand-in: the real ones exist only after the program has run.
            total = _metrics_of(pl_module, self._latest)["train/loss"]
            num_batches = trainer.accumulate_grad_batches
            outputs["loss"] = total if num_batches == 1 else total / num_batches
        if is_logging_step(trainer):
            step = logging_step(trainer)
            if self._transport.rank == 0:
                self._note(0, step, _read(self._latest), trainer)
            elif self._outbox is not None:
                self._post(step)
        for peer, mailbox in self._mailboxes.items():
            for message in mailbox.drain():
                self._take(peer, message, trainer)
        self._write(trainer, pl_module)

    @override
    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** over all ranks: log every block's last loss and its mean over the epoch, on every rank.

        The user's hooks that follow, up to ``on_train_end``, find the whole student on every rank.
        """
        self._assemble_student()
        mine = _Report(self._read_sums(), _read(self._latest), self._num_posted)
        everyone = [_Report(*report) for report in self._transport.all_gather_object(tuple(mine))]
        for peer, mailbox in self._mailboxes.items():
            while self._num_received[peer] < everyone[peer].num_posted:
                self._take(peer, mailbox.get(), trainer)
        self._write(trainer, None)
        self._rows.clear()
        if self._num_rows:
            latest = self._merge(pl_module, [report.latest for report in everyone])
            sums = self._merge(pl_module, [report.sums for report in everyone])
            with self._sharing_logs():
                # What plain Lightning knows after the last step; the logger has it already, if it was due.
                _show(pl_module, latest)
                # Behind an epoch that a hook cut short Lightning would look for the rows of its last batch.
                means = {f"{key}_epoch": total / self._num_rows for key, total in sums.items()}
                pl_module.log_dict(means, batch_size=1)
        self._sums, self._num_rows = {}, 0

    def _read_sums(self) -> dict[LossName, float]:
        sums: dict[LossName, float] = defaultdict(float)
        for names, values in self._sums.items():
            for name, value in zip(names, values.tolist(), strict=True):
                sums[name] += value
        return dict(sums)

    def _post(self, step: int) -> None:
        assert self._outbox is not None
        losses = torch.tensor(_numbers(self._latest), dtype=torch.float64)
        self._outbox.post(Message((step, 0, 0, 0), (tuple(self._latest), losses)))
        self._num_posted += 1

    def _take(self, peer: int, message: Message, trainer: Trainer) -> None:
        self._num_received[peer] += 1
        names, losses = message.tree
        self._note(peer, message.fields[0], dict(zip(names, losses.tolist(), strict=True)), trainer)

    def _note(self, rank: int, step: int, losses: dict[LossName, float], trainer: Trainer) -> None:
        self._rows[step][rank] = losses
        self._epochs.setdefault(step, trainer.current_epoch)

    def _write(self, trainer: Trainer, pl_module: LightningModule | None) -> None:
        complete = [step for step, parts in self._rows.items() if self._contributors <= parts.keys()]
        values: dict[str, float] = {}
        for step in sorted(complete):
            values = self._merge(trainer.lightning_module, self._rows.pop(step).values())
            epoch = self._epochs.pop(step)
            for logger in trainer.loggers:
                logger.log_metrics({**values, "epoch": epoch}, step=step)
        if values and pl_module is not None:
            _show(pl_module, values, on_step=True, on_epoch=False, rank_zero_only=True)

    @staticmethod
    def _merge(module: Any, parts: Iterable[dict[LossName, float]]) -> dict[str, float]:
        losses: dict[LossName, float] = defaultdict(float)
        for part in parts:
            for name, loss in part.items():
                losses[name] += loss
        return _metrics_of(module, losses)


def _metrics_of(module: Any, losses: Mapping[LossName, Any]) -> dict[str, Any]:
    """Name a step's losses as the module logs them."""
    found: dict[str, Any] = module.metrics(losses)
    return found


def _show(pl_module: LightningModule, values: Mapping[str, float], **options: Any) -> None:
    """Hand values to the progress bar and the callbacks; a bar has no room for a number per block."""
    for key, value in values.items():
        is_block = key.startswith("train/block/")
        pl_module.log(key, value, prog_bar=not is_block, logger=False, batch_size=1, **options)


def _read(losses: dict[LossName, Tensor]) -> dict[LossName, float]:
    return dict(zip(losses, _numbers(losses), strict=True))


def _numbers(losses: Mapping[LossName, Tensor]) -> list[float]:
    """Give the values of losses; waits for the device once, not once per loss."""
    numbers: list[float] = _stacked(losses).tolist() if losses else []
    return numbers


def _stacked(losses: Mapping[Any, Tensor]) -> Tensor:
    """Give at least one loss in float64, in one tensor on the device of the first; reads none."""
    device = next(iter(losses.values())).device
    return torch.stack([loss.reshape(()).to(device) for loss in losses.values()]).double()
