"""Batches for plans whose teacher blocks work one batch ahead: the next batch is loaded, and unpacked, a step early.

What draws random numbers (loading, the batch transfer hooks, unpacking) draws in the order of one process, batch after
batch: a batch is brought to the device and unpacked before the next one is loaded. And none is loaded early where one
process would draw something else before it: where validation may follow the step, or the training may end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from typing_extensions import override

from lightning_pipebd.data import BATCH, END, TrainLoader
from lightning_pipebd.data_position import DataPosition, RandomMoment
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.mailbox import Outbox

__all__ = ["AheadTrainLoader"]


class AheadTrainLoader(TrainLoader):
    """The loading rank's training loader: whole batches, each announced with the number of rows of the next.

    Args:
        row_loader: Loads whole batches.
        outbox: Where headers go; ``None`` without other ranks.
        prepare: Unpacks a batch that the next one is loaded before.
        may_look: Tells of a batch, by its number in the epoch, whether the next may be loaded before it is trained on.
    """

    def __init__(
        self,
        row_loader: RowLoader,
        *,
        outbox: Outbox | None,
        prepare: Callable[[AheadBatch], None],
        may_look: Callable[[int], bool],
    ) -> None:
        super().__init__(row_loader, outbox=outbox)
        self._prepare = prepare
        self._may_look = may_look
        self._num_skipped = 0
        self._moments: dict[int, RandomMoment] = {}

    @override
    def _take_resumed(self) -> DataPosition | None:
        resumed = super()._take_resumed()
        self._num_skipped = resumed.num_batches if resumed is not None else 0
        self._moments = {}
        return resumed

    @override
    def _announce(self, batches: Iterator[Loaded]) -> Iterator[Any]:
        index, is_first = self._num_skipped, True
        loaded, is_ready = next(batches, None), False
        while loaded is not None:
            following = None
            looks = self._may_look(index)
            if looks:
                if not is_ready:
                    loaded = self._readied(loaded)
                self._moments = {index + 1: RandomMoment.now(self._row_loader.generators)}
                following = next(batches, None)
                following = following and self._readied(following)
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
            index, is_first = index + 1, False
        self._post(END)

    def _readied(self, loaded: Loaded) -> Loaded:
        batch = AheadBatch(loaded.batch)
        self._prepare(batch)
        return loaded._replace(batch=batch)

    @override
    def position(self, num_batches: int | None) -> DataPosition | None:
        """Say where the run stands after some batches of the epoch, ``None`` for all; nothing before its first one."""
        found = super().position(num_batches)
        # What was drawn for a batch that is not trained on yet will be drawn again.
        early = None if num_batches is None else self._moments.get(num_batches)
        return found if found is None or early is None else found._replace(now=early)
