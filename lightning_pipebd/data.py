"""Who loads which rows of the batch, and how the other ranks learn that there is a batch.

The batch is the user's: its rows, their order and their number are those of one process. Ranks with rows of the first
teacher block load them; every other rank gets a :class:`BatchHeader` from the first loading rank, sent when the batch
is loaded, not when it is computed. So loaders without a length, early ends and short batches need no agreement.
"""

from __future__ import annotations

import copy
import pickle
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, default_collate

from lightning_pipebd.lightning_internals import StagedBatch
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.random_streams import borrowed_random_states, random_states
from lightning_pipebd.runtime.row_trees import count_rows
from lightning_pipebd.runtime.transport import Message, Transport

__all__ = [
    "BatchHeader",
    "EvaluationLoader",
    "HeaderLoader",
    "Loaded",
    "RowLoader",
    "TrainLoader",
    "check_loader",
    "header_loader",
]

_EPOCH, _BATCH, _END = 0, 1, 2
Interval = tuple[Fraction, Fraction]


class BatchHeader(StagedBatch):
    """All that a rank knows of a batch of which it loads no row.

    Attributes:
        num_rows: Rows of the batch.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows


class Loaded(NamedTuple):
    """A batch, or this rank's rows of it."""

    batch: Any
    num_rows: int
    rows: Rows


def check_loader(loader: object) -> None:
    """Refuse loaders that already deal the data to ranks.

    Raises:
        ValueError: The loader, or its batch sampler, has a :class:`~torch.utils.data.DistributedSampler`.
    """
    samplers = (getattr(holder, "sampler", None) for holder in (loader, getattr(loader, "batch_sampler", None)))
    if any(isinstance(sampler, DistributedSampler) for sampler in samplers):
        msg = (
            "A dataloader must yield whole batches on every rank, but one has a DistributedSampler. Remove it: "
            "`batch_size` is the batch of one process, and each rank takes its rows of it."
        )
        raise ValueError(msg)


class RowLoader:
    """Load an interval of the rows of every batch, in the order in which one process would.

    A map-style dataset is asked for these rows only. Anything else (an iterable dataset, a list of batches, a loader
    with a collate function of the user's) is iterated whole, and the other rows are dropped.

    Args:
        loader: Any iterable of batches.
        interval: Exact share of the rows: a cut ``c`` lies at row ``ceil(c * num_rows)``.
        min_rows: A loader whose first batch has fewer rows is not divided at all; see :attr:`is_whole`.
        batch_rows: Counts the rows of a loaded batch.
    """

    def __init__(
        self,
        loader: Any,
        interval: Interval,
        *,
        min_rows: int = 1,
        batch_rows: Callable[[Any], int] = count_rows,
    ) -> None:
        self._loader = loader
        self._interval = interval
        self._min_rows = min_rows
        self._batch_rows = batch_rows
        self.is_whole = interval == (Fraction(0), Fraction(1))

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def load(self) -> Iterator[Loaded]:
        """Iterate over batches with their row counts; rows may be empty, then the batch is ``None``.

        The user's loader starts at once, not at the first batch: it draws its seeds when one process would.
        """
        if self.is_whole or not _has_batches_of_indices(self._loader):
            return self._load_whole(iter(self._loader))
        sampler = _RowSampler(self._loader.batch_sampler, self)
        clone = copy.copy(self._loader)
        # DataLoader forbids to set its sampler: a copy with the user's settings and another sampler is what we want.
        clone.__dict__["batch_sampler"] = sampler
        clone.__dict__["_iterator"] = None
        return self._load_rows(iter(clone), sampler)

    def rows(self, num_rows: int) -> Rows:
        """Give this loader's rows of a batch."""
        start, stop = (Fraction(0), Fraction(1)) if self.is_whole else self._interval
        return Rows(ceil(start * num_rows), ceil(stop * num_rows))

    def _load_whole(self, batches: Iterator[Any]) -> Iterator[Loaded]:
        for index, batch in enumerate(batches):
            num_rows = self._batch_rows(batch)
            self._decide(index, num_rows)
            rows = self.rows(num_rows)
            yield Loaded(_slice_batch(batch, num_rows, rows), num_rows, rows)

    @staticmethod
    def _load_rows(batches: Iterator[Any], sampler: _RowSampler) -> Iterator[Loaded]:
        for batch in batches:
            yield from sampler.take_empty()
            yield Loaded(batch, *sampler.dealt.popleft())
        yield from sampler.take_empty()

    def _decide(self, index: int, num_rows: int) -> None:
        if index == 0 and num_rows < self._min_rows:
            self.is_whole = True


class _RowSampler:
    """A batch sampler's batches, cut to some rows; remembers what it dealt, in order."""

    def __init__(self, batch_sampler: Iterable[list[int]], loader: RowLoader) -> None:
        self._batch_sampler = batch_sampler
        self._loader = loader
        self.dealt: deque[tuple[int, Rows]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        for index, indices in enumerate(self._batch_sampler):
            indices = list(indices)
            self._loader._decide(index, len(indices))
            rows = self._loader.rows(len(indices))
            self.dealt.append((len(indices), rows))
            if not rows.is_empty:
                yield indices[rows.start : rows.stop]

    def take_empty(self) -> Iterator[Loaded]:
        while self.dealt and self.dealt[0][1].is_empty:
            yield Loaded(None, *self.dealt.popleft())


class TrainLoader:
    """A loading rank's training loader: its rows of each batch, announced to the ranks that wait for headers.

    Args:
        row_loader: Loads this rank's rows.
        outbox: Where headers go; only on the first loading rank.
        mailbox: Where the first loading rank's headers come from; only on the other loading ranks, which take the
            random state from there, so that all shuffle alike.
        seeded_peers: The other loading ranks.
    """

    def __init__(
        self,
        row_loader: RowLoader,
        *,
        outbox: Outbox | None = None,
        mailbox: Mailbox | None = None,
        seeded_peers: tuple[int, ...] = (),
    ) -> None:
        self._row_loader = row_loader
        self._outbox = outbox
        self._mailbox = mailbox
        self._seeded_peers = seeded_peers
        self.loaded: deque[Loaded] = deque()
        self.observe: Callable[[Iterator[Any]], Iterator[Any]] = iter

    def __len__(self) -> int:
        return len(self._row_loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_row_loader":
            raise AttributeError(name)
        return getattr(self._row_loader, name)

    def __iter__(self) -> Iterator[Any]:
        self.loaded.clear()
        return self.observe(self._announce(self._begin_epoch()))

    def _announce(self, batches: Iterator[Loaded]) -> Iterator[Any]:
        for loaded in batches:
            self.loaded.append(loaded)
            if self._outbox is not None:
                self._outbox.post(Message((_BATCH, loaded.num_rows, 0, 0)))
            yield BatchHeader(loaded.num_rows) if loaded.rows.is_empty else loaded.batch
        if self._outbox is not None:
            self._outbox.post(Message((_END, 0, 0, 0)))

    def _begin_epoch(self) -> Iterator[Loaded]:
        if self._mailbox is not None:
            return self._begin_as_peer(self._mailbox)
        if self._outbox is not None:
            others = [peer for peer in self._outbox.peers if peer not in self._seeded_peers]
            self._outbox.post(Message((_EPOCH, 0, 0, 0)), others)
            state = torch.frombuffer(bytearray(pickle.dumps(random_states())), dtype=torch.uint8)
            self._outbox.post(Message((_EPOCH, 0, 0, 0), state), self._seeded_peers)
        return self._row_loader.load()

    def _begin_as_peer(self, mailbox: Mailbox) -> Iterator[Loaded]:
        message = _await_epoch(mailbox)
        state = pickle.loads(message.tree.numpy().tobytes())
        with borrowed_random_states(state):
            loading = self._row_loader.load()
            state = random_states()
        return _with_random_states(state, loading)


class HeaderLoader:
    """A training loader without data: yields a :class:`BatchHeader` for every batch that is loaded elsewhere.

    Args:
        loader: The user's loader, asked for its length and attributes only.
        mailbox: Where the headers come from.
    """

    def __init__(self, loader: object, mailbox: Mailbox) -> None:
        self._loader = loader
        self._mailbox = mailbox
        self._length = _sized_length(loader)
        self.loaded: deque[Loaded] = deque()
        self.observe: Callable[[Iterator[Any]], Iterator[Any]] = iter

    def __len__(self) -> int:
        if self._length is None:
            raise TypeError("the loader on the loading rank has no length")
        return self._length

    def __getattr__(self, name: str) -> Any:
        # What a user reads from `trainer.train_dataloader`. Its state belongs to the loading rank.
        if name.startswith("__") or name in ("_loader", "state_dict", "load_state_dict"):
            raise AttributeError(name)
        return getattr(self._loader, name)

    def __iter__(self) -> Iterator[BatchHeader]:
        return self.observe(self._take_headers())

    def _take_headers(self) -> Iterator[BatchHeader]:
        self.loaded.clear()
        _await_epoch(self._mailbox)
        while (fields := self._mailbox.get().fields)[0] != _END:
            # An epoch that was begun twice before its first batch is one epoch.
            if fields[0] == _BATCH:
                self.loaded.append(Loaded(None, fields[1], Rows(0, 0)))
                yield BatchHeader(fields[1])


class StatefulHeaderLoader(HeaderLoader):
    """For loaders that keep their state in checkpoints: the state is the loading rank's, and this rank has none."""

    def state_dict(self) -> dict[str, Any]:
        """Give nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""


class EvaluationLoader:
    """A rank's rows of every evaluation batch, dealt in the order that rank 0 draws.

    **Collective** over all ranks: beginning to iterate exchanges the random state.

    Args:
        row_loader: Loads this rank's rows.
        transport: Reaches the other ranks.
    """

    def __init__(self, row_loader: RowLoader, transport: Transport) -> None:
        self.row_loader = row_loader
        self._transport = transport

    def __len__(self) -> int:
        return len(self.row_loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "row_loader":
            raise AttributeError(name)
        return getattr(self.row_loader, name)

    def __iter__(self) -> Iterator[Any]:
        state = self._transport.all_gather_object(random_states() if self._transport.rank == 0 else None)[0]
        if self._transport.rank == 0:
            return _batches(self.row_loader.load())
        with borrowed_random_states(state):
            loading = self.row_loader.load()
            state = random_states()
        return _batches(_with_random_states(state, loading))


def header_loader(loader: object, mailbox: Mailbox) -> HeaderLoader:
    """Make the loader of a rank that loads no data."""
    is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return (StatefulHeaderLoader if is_stateful else HeaderLoader)(loader, mailbox)


def _batches(loading: Iterator[Loaded]) -> Iterator[Any]:
    for loaded in loading:
        yield BatchHeader(loaded.num_rows) if loaded.rows.is_empty else loaded.batch


def _await_epoch(mailbox: Mailbox) -> Message:
    # What was announced but not trained in the last epoch (it may have ended early) is skipped here.
    while (message := mailbox.get()).fields[0] != _EPOCH:
        pass
    return message


def _has_batches_of_indices(loader: object) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
        # Another collate function may look at the whole batch (padding to its longest row): it gets whole batches.
        and loader.collate_fn is default_collate
    )


def _sized_length(loader: object) -> int | None:
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def _slice_batch(batch: Any, num_rows: int, rows: Rows) -> Any:
    if rows == Rows(0, num_rows):
        return batch
    if rows.is_empty:
        return None

    def cut(leaf: Any) -> Any:
        is_per_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == num_rows
        return leaf[rows.start : rows.stop] if is_per_row else leaf

    return pytree.tree_map(cut, batch)


def _with_random_states(states: dict[str, Any], iterator: Iterator[Loaded]) -> Iterator[Loaded]:
    # Samplers draw at their first batch, and some at every batch: they always see their own stream.
    while True:
        with borrowed_random_states(states):
            loaded = next(iterator, None)
            states = random_states()
        if loaded is None:
            return
        yield loaded
