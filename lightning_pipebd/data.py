"""Who loads which rows of the batch, and how the other ranks learn that there is a batch.

The batch is the user's: its rows, their order and their number are those of one process. Ranks with rows of the first
teacher block load them; every other rank gets a :class:`BatchHeader` from the first loading rank, sent when the batch
is loaded, not when it is computed. So loaders without a length, early ends and short batches need no agreement.
"""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable, Iterator, Sized
from typing import Any

import torch
from torch.utils.data import DistributedSampler

from lightning_pipebd.data_position import DataPosition, RandomMoment
from lightning_pipebd.lightning_internals.module import StagedBatch
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.random_streams import borrowed_random_states, random_states
from lightning_pipebd.runtime.transport import Message, Transport

__all__ = [
    "BATCH",
    "END",
    "EPOCH",
    "POSITION",
    "BatchHeader",
    "EvaluationLoader",
    "HeaderLoader",
    "TrainLoader",
    "check_loader",
    "header_loader",
    "num_trained",
    "save_position",
    "sized_length",
]

EPOCH, BATCH, END = 0, 1, 2
"""What the first loading rank's announcements are of."""
POSITION = "data_position"
"""Key of the position in checkpoints."""


class BatchHeader(StagedBatch):
    """All that a rank knows of a batch of which it loads no row.

    Attributes:
        num_rows: Rows of the batch.
    """

    def __init__(self, num_rows: int) -> None:
        self.num_rows = num_rows


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


class TrainLoader:
    """A loading rank's training loader: its rows of each batch, announced to the ranks that wait for headers.

    Args:
        row_loader: Loads this rank's rows.
        outbox: Where headers go; only on the first loading rank.
        mailbox: Where the first loading rank's headers come from; only on the other loading ranks, which take the
            random state from there, so that all shuffle alike.
        seeded_peers: The other loading ranks.

    Attributes:
        resumed: Where the next epoch goes on; ``None`` to begin it.
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
        self.resumed: DataPosition | None = None
        self._at_start: RandomMoment | None = None

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
            self._post(BATCH, loaded.num_rows)
            yield BatchHeader(loaded.num_rows) if loaded.rows.is_empty else loaded.batch
        self._post(END)

    def _post(self, kind: int, num_rows: int = 0, num_next_rows: int = 0) -> None:
        if self._outbox is not None:
            self._outbox.post(Message((kind, num_rows, num_next_rows, 0)))

    def _begin_epoch(self) -> Iterator[Loaded]:
        if self._mailbox is not None:
            return self._begin_as_peer(self._mailbox)
        resumed, generators = self._take_resumed(), self._row_loader.generators
        if resumed is not None:
            resumed.at_start.restore(generators)
        num_skipped = resumed.num_batches if resumed is not None else 0
        self._at_start = RandomMoment.now(generators)
        if self._outbox is not None:
            others = [peer for peer in self._outbox.peers if peer not in self._seeded_peers]
            self._outbox.post(Message((EPOCH, num_skipped, 0, 0)), others)
            state = torch.frombuffer(bytearray(pickle.dumps((random_states(), self._at_start.own))), dtype=torch.uint8)
            self._outbox.post(Message((EPOCH, num_skipped, 0, 0), state), self._seeded_peers)
        loading = self._row_loader.load(num_skipped)
        if resumed is not None and resumed.now is not None:
            resumed.now.restore(generators)
        return loading

    def _take_resumed(self) -> DataPosition | None:
        resumed, self.resumed = self.resumed, None
        return None if self._row_loader.keeps_its_own_position else resumed

    def position(self, num_batches: int | None) -> DataPosition | None:
        """Say where the run stands after some batches of the epoch, ``None`` for all; nothing before its first one."""
        now = RandomMoment.now(self._row_loader.generators)
        if num_batches is None:
            return DataPosition(0, now, None)
        return None if self._at_start is None else DataPosition(num_batches, self._at_start, now)

    def _begin_as_peer(self, mailbox: Mailbox) -> Iterator[Loaded]:
        message = _await_epoch(mailbox)
        state, own = pickle.loads(message.tree.numpy().tobytes())
        for generator, own_state in zip(self._row_loader.generators, own, strict=True):
            generator.set_state(own_state)
        with borrowed_random_states(state):
            loading = self._row_loader.load(message.fields[1])
            state = random_states()
        return self._agreeing(_with_random_states(state, loading), mailbox)

    @staticmethod
    def _agreeing(loading: Iterator[Loaded], mailbox: Mailbox) -> Iterator[Loaded]:
        # Ranks whose datasets differ would wait for each other in the middle of an epoch.
        while True:
            loaded = next(loading, None)
            while (fields := mailbox.get().fields)[0] == EPOCH:
                pass
            theirs, mine = (fields[1] if fields[0] == BATCH else 0), (loaded.num_rows if loaded else 0)
            if theirs != mine:
                msg = (
                    f"`train_dataloader` must give the same batches on every rank, but gives {mine} rows here where "
                    f"the first loading rank has {theirs} (0 is the end). Build the same dataset on every rank."
                )
                raise ValueError(msg)
            if loaded is None:
                return
            yield loaded


class HeaderLoader:
    """A training loader without data: yields a :class:`BatchHeader` for every batch that is loaded elsewhere.

    Args:
        loader: The user's loader, asked for its length and attributes only.
        mailbox: Where the headers come from.
    """

    def __init__(self, loader: object, mailbox: Mailbox) -> None:
        self._loader = loader
        self._mailbox = mailbox
        self._length = sized_length(loader)
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
        is_first = True
        while (fields := self._mailbox.get().fields)[0] != END:
            # An epoch that was begun twice before its first batch is one epoch.
            if fields[0] == BATCH:
                self.loaded.append(Loaded(None, fields[1], Rows(0, 0), is_first, fields[2]))
                is_first = False
                yield BatchHeader(fields[1])


class StatefulHeaderLoader(HeaderLoader):
    """For loaders that keep their state in checkpoints: the state is the loading rank's, and this rank has none."""

    def state_dict(self) -> dict[str, Any]:
        """Give nothing."""
        return {}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take nothing."""


class EvaluationLoader:
    """A rank's rows of every evaluation batch, dealt in the order that the rank which loads for training draws.

    That rank's random states are those of one process, also for the epochs that follow.

    **Collective** over all ranks: beginning to iterate exchanges the random state.

    Args:
        row_loader: Loads this rank's rows.
        transport: Reaches the other ranks.
        source: Gives the rank whose random states are used.
    """

    def __init__(self, row_loader: RowLoader, transport: Transport, source: Callable[[], int] = lambda: 0) -> None:
        self.row_loader = row_loader
        self._transport = transport
        self._source = source

    def __len__(self) -> int:
        return len(self.row_loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name in ("row_loader", "_source"):
            raise AttributeError(name)
        return getattr(self.row_loader, name)

    def __iter__(self) -> Iterator[Any]:
        source, rank = self._source(), self._transport.rank
        state = self._transport.all_gather_object(random_states() if rank == source else None)[source]
        if rank == source:
            return _batches(self.row_loader.load())
        with borrowed_random_states(state):
            loading = self.row_loader.load()
            state = random_states()
        return _batches(_with_random_states(state, loading))


def header_loader(loader: object, mailbox: Mailbox) -> HeaderLoader:
    """Make the loader of a rank that loads no data."""
    is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
    return (StatefulHeaderLoader if is_stateful else HeaderLoader)(loader, mailbox)


def num_trained(progress: Any) -> int | None:
    """Give how many batches of the epoch were trained, from Lightning's count; ``None`` for all."""
    return None if progress.is_last_batch else int(progress.current.ready)


def save_position(checkpoint: dict[str, Any], mine: DataPosition | None, transport: Transport, first_rank: int) -> None:
    """**Collective** over all ranks: add to a checkpoint where the run stands in its data.

    Args:
        checkpoint: Gets an entry.
        mine: What this rank knows of it.
        transport: Reaches the other ranks.
        first_rank: The rank that loads first; what it knows counts.
    """
    position = transport.all_gather_object(mine.to_plain() if mine else None)[first_rank]
    if position is not None:
        checkpoint[POSITION] = position


def _batches(loading: Iterator[Loaded]) -> Iterator[Any]:
    for loaded in loading:
        yield BatchHeader(loaded.num_rows) if loaded.rows.is_empty else loaded.batch


def _await_epoch(mailbox: Mailbox) -> Message:
    # What was announced but not trained in the last epoch (it may have ended early) is skipped here.
    while (message := mailbox.get()).fields[0] != EPOCH:
        pass
    return message


def sized_length(loader: object) -> int | None:
    """Give how many batches a loader has in an epoch; ``None`` if that is not known."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except (TypeError, NotImplementedError):
        return None


def _with_random_states(states: dict[str, Any], iterator: Iterator[Loaded]) -> Iterator[Loaded]:
    # Samplers draw at their first batch, and some at every batch: they always see their own stream.
    while True:
        with borrowed_random_states(states):
            loaded = next(iterator, None)
            states = random_states()
        if loaded is None:
            return
        yield loaded
