"""Batches for plans whose teacher blocks work one batch ahead: the next batch is loaded, and unpacked, a step early.

What draws random numbers (loading, the batch transfer hooks, unpacking) draws in the order of one process, batch after
batch: a batch is brought to the device and unpacked before the next one is loaded. And none is loaded early where one
process would draw something else before it: where validation may follow the step, or the training may end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

from typing_extensions import override

from lightning_pipebd.data import BATCH, END, TrainLoader
from lightning_pipebd.data_position import DataPosition, RandomMoment
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.mailbox import Outbox

__all__ = ["AheadTrainLoader"]


class Prepare(Protocol):
    """Brings a batch to the device, and unpacks it."""

    def __call__(self, batch: AheadBatch, *, is_early: bool) -> None:
        """Prepare a batch; early if the one before it is not trained on yet."""


class AheadTrainLoader(TrainLoader):
    """The loading rank's training loader: whole batches, each announced with the number of rows of the next.

    Args:
        row_loader: Loads whole batches.
        outbox: Where headers go; ``None`` without other ranks.
        prepare: Unpacks a batch that the next one is loaded before; told whether the one before it is not trained yet.
        number: Gives the number in the epoch of the batch that is asked for. Whoever trains counts: a run that goes on
            may begin with the first batch of the loader in the middle of an epoch.
        may_look: Tells of a batch, by its number, whether the next may be loaded before it is trained on.
    """

    def __init__(
        self,
        row_loader: RowLoader,
        *,
        outbox: Outbox | None,
        prepare: Prepare,
        number: Callable[[], int],
        may_look: Callable[[int], bool],
    ) -> None:
        super().__init__(row_loader, outbox=outbox)
        self._prepare = prepare
        self._number = number
        self._may_look = may_look
        self._moments: dict[int, RandomMoment] = {}

    @override
    def _take_resumed(self) -> DataPosition | None:
        self._moments = {}
        return super()._take_resumed()

    @override
    def _announce(self, batches: Iterator[Loaded]) -> Iterator[Any]:
        is_first = True
        loaded, is_ready = next(batches, None), False
        while loaded is not None:
            number, following = self._number(), None
            if (looks := self._may_look(number)) and not is_ready:
                loaded = self._readied(loaded, is_early=False)
                # Unpacking may have shown that nobody may.
                looks = self._may_look(number)
            if looks:
                self._moments = {number + 1: RandomMoment.now(self._row_loader.generators)}
                following = next(batches, None)
                following = following and self._readied(following, is_early=True)
            self._post(BATCH, loaded.num_rows, following.num_rows if following is not None else 0)
            self.loaded.append(
                loaded._replace(
                    is_first=is_first,
                    num_next_rows=following.num_rows if following is not None else 0,
                    following=following.batch if following is not None else None,
                )
            )
            yield loaded.batch
            loaded, is_ready = (following, True) if looks else (next(batches, None), False)
            is_first = False
        self._post(END)

    def _readied(self, loaded: Loaded, *, is_early: bool) -> Loaded:
        batch = AheadBatch(loaded.batch)
        self._prepare(batch, is_early=is_early)
        return loaded._replace(batch=batch)

    @override
    def position(self, num_batches: int | None) -> DataPosition | None:
        """Say where the run stands after some batches of the epoch, ``None`` for all; nothing before its first one."""
        found = super().position(num_batches)
        # What was drawn for a batch that is not trained on yet will be drawn again.
        early = None if num_batches is None else self._moments.get(num_batches)
        return found if found is None or early is None else found._replace(now=early)
