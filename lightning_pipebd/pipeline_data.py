"""Batches of an end-to-end training, and the one after each: the teacher works one batch ahead.

One rank loads; the others hear of each batch, and how many rows the next one has, when it is loaded.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import chain, islice
from typing import Any, NamedTuple

from lightning.pytorch import LightningModule

from lightning_pipebd.data import BatchHeader
from lightning_pipebd.data_position import DataPosition, RandomMoment
from lightning_pipebd.lightning_internals.module import LogCall, StagedBatch, before_transfer
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.random_streams import borrowed_random_states, random_states
from lightning_pipebd.runtime.row_trees import RowTree, count_rows
from lightning_pipebd.runtime.transport import Message

__all__ = ["AheadBatch", "AheadHeaderLoader", "AheadLoader", "Announced"]

_EPOCH, _BATCH, _END = 0, 1, 2
_WHOLE = (Fraction(0), Fraction(1))


class AheadBatch(StagedBatch):
    """A batch as it was loaded, which is brought to the device once, perhaps a step before it is trained on.

    Attributes:
        num_rows: Rows of the batch.
        boundaries: What a program of blocks starts from, once the batch was unpacked for it.
        seen: The batch as it was then.
        put_off: What was logged meanwhile, to be logged when the batch is trained on.
    """

    def __init__(self, batch: Any) -> None:
        self.num_rows = count_rows(batch)
        self.boundaries: dict[int, RowTree] = {}
        self.seen: Any = None
        self.put_off: list[LogCall] = []
        self._batch = batch
        self._is_moved = False

    def moved(self, module: LightningModule, move: Callable[[Any], Any]) -> Any:
        """Give the batch on the device; the first call moves it, so that hooks that draw random numbers run once."""
        if not self._is_moved:
            self._batch, self._is_moved = move(before_transfer(module, self._batch)), True
        return self._batch


class Announced(NamedTuple):
    """A batch that will be trained on.

    Args:
        epoch: Stands for the epoch: one object for all its batches.
        batch_index: Its number in the epoch.
        num_rows: Rows of the batch.
        num_next_rows: Rows of the batch after it; 0 if there is none, or none that may be looked at yet.
        following: The batch after it, on the rank that loads.
    """

    epoch: object
    batch_index: int
    num_rows: int
    num_next_rows: int
    following: AheadBatch | None = None


class AheadLoader:
    """The loading rank's loader: whole batches, each announced with the number of rows of the next.

    Args:
        loader: The user's loader.
        outbox: Where announcements go; ``None`` without other ranks.
        num_batches: Gives how many batches of an epoch are trained on; none is looked at beyond.
        looks_ahead: Whether to load a batch before the one ahead of it is trained on.

    Attributes:
        observe: Put around the batches of each epoch.
        resumed: Where the next epoch goes on; ``None`` to begin it.
    """

    def __init__(
        self, loader: Any, outbox: Outbox | None, *, num_batches: Callable[[], float], looks_ahead: bool
    ) -> None:
        self._loader = loader
        self._outbox = outbox
        self._num_batches = num_batches
        self._looks_ahead = looks_ahead
        self._row_loader = RowLoader(loader, _WHOLE)
        self._at_start: RandomMoment | None = None
        self._moments: dict[int, RandomMoment] = {}
        self.resumed: DataPosition | None = None
        self.announced: deque[Announced] = deque()
        self.observe: Callable[[Iterator[Any]], Iterator[Any]] = iter

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[AheadBatch]:
        self.announced.clear()
        self._post(_EPOCH)
        resumed, self.resumed = self.resumed, None
        generators = self._row_loader.generators
        if resumed is not None:
            resumed.at_start.restore(generators)
        num_skipped = resumed.num_batches if resumed is not None else 0
        self._at_start = RandomMoment.now(generators)
        # The user's loader starts at once, not at the first batch: it draws its seeds when one process would.
        loading = self._row_loader.load(num_skipped)
        self._moments = {}
        if resumed is not None and resumed.now is not None:
            resumed.now.restore(generators)
            if resumed.loading is not None:
                loading = chain(self._first_again(loading, resumed.loading), loading)
        return self.observe(self._announce(loading, num_skipped))

    def _first_again(self, loading: Iterator[Loaded], moment: RandomMoment) -> list[Loaded]:
        """Load the batch that was there when the checkpoint was written, with what it was loaded with then."""
        generators = self._row_loader.generators
        with borrowed_random_states(random_states()):
            moment.restore(generators)
            return list(islice(loading, 1))

    def position(self, num_batches: int | None, now: RandomMoment | None) -> DataPosition | None:
        """Say where the run stands after some batches of the epoch, ``None`` for all; nothing before its first one.

        Args:
            num_batches: Batches that were trained.
            now: The random states before anything was drawn for the next batch; ``None`` for those at present.
        """
        generators = self._row_loader.generators
        if self._row_loader.keeps_its_own_position:
            return None
        if num_batches is None:
            return DataPosition(0, RandomMoment.now(generators), None)
        if self._at_start is None:
            return None
        return DataPosition(
            num_batches, self._at_start, now or RandomMoment.now(generators), self._moments.get(num_batches)
        )

    def _announce(self, batches: Iterator[Loaded], index: int) -> Iterator[AheadBatch]:
        epoch = object()
        batch = self._next(batches, index)
        while batch is not None:
            may_look = self._looks_ahead and index + 1 < self._num_batches()
            following = self._next(batches, index + 1) if may_look else None
            num_next_rows = following.num_rows if following is not None else 0
            self.announced.append(Announced(epoch, index, batch.num_rows, num_next_rows, following))
            self._post(_BATCH, batch.num_rows, num_next_rows)
            yield batch
            batch = following if may_look else self._next(batches, index + 1)
            index += 1
        self._post(_END)

    def _next(self, loading: Iterator[Loaded], index: int) -> AheadBatch | None:
        # A checkpoint may be asked for before this batch is trained.
        self._moments = {index: RandomMoment.now(self._row_loader.generators)}
        loaded = next(loading, None)
        return None if loaded is None else AheadBatch(loaded.batch)

    def _post(self, kind: int, num_rows: int = 0, num_next_rows: int = 0) -> None:
        if self._outbox is not None:
            self._outbox.post(Message((kind, num_rows, num_next_rows, 0)))


class AheadHeaderLoader:
    """The loader of a rank that loads no data: a :class:`BatchHeader` for every batch that is loaded elsewhere.

    Args:
        loader: The user's loader, asked for its length and attributes only.
        mailbox: Where the announcements come from.

    Attributes:
        observe: Put around the headers of each epoch.
    """

    def __init__(self, loader: Any, mailbox: Mailbox) -> None:
        self._loader = loader
        self._mailbox = mailbox
        self.announced: deque[Announced] = deque()
        self.observe: Callable[[Iterator[Any]], Iterator[Any]] = iter

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        # What a user reads from `trainer.train_dataloader`. Its state belongs to the loading rank.
        if name.startswith("__") or name in ("_loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[BatchHeader]:
        self.announced.clear()
        return self.observe(self._take_headers())

    def _take_headers(self) -> Iterator[BatchHeader]:
        # What was announced but not trained in the last epoch (it may have ended early) is skipped here.
        while self._mailbox.get().fields[0] != _EPOCH:
            pass
        epoch, index = object(), 0
        while (fields := self._mailbox.get().fields)[0] != _END:
            # An epoch that was begun twice before its first batch is one epoch.
            if fields[0] == _BATCH:
                self.announced.append(Announced(epoch, index, fields[1], fields[2]))
                yield BatchHeader(fields[1])
                index += 1
