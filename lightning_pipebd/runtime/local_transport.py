"""The transport's twin without processes: threads of one process are the ranks."""

from __future__ import annotations

import pickle
import queue
import threading
from collections import defaultdict
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_pipebd.runtime.transport import Lane, Message, Pending, Transport, TransportError

__all__ = ["LocalTransport", "LocalWorld"]

_TICK_S = 0.05


class LocalWorld:
    """Ranks that are threads of this process.

    Args:
        num_ranks: How many.

    Example:
        >>> world = LocalWorld(2)
        >>> zero, one = world.transports
        >>> pending = zero.send(Message((1, 2, 3, 4), {"x": torch.ones(2)}), 1, Lane.RELAY)
        >>> one.recv(0, Lane.RELAY)
        Message(fields=(1, 2, 3, 4), tree={'x': tensor([1., 1.])})
        >>> pending.wait()
    """

    def __init__(self, num_ranks: int) -> None:
        self.num_ranks = num_ranks
        self.ended: set[int] = set()
        # Made beforehand: two threads that make the same queue at the same time would each keep their own.
        self.queues: dict[tuple[int, int, Lane], queue.Queue[tuple[Message, threading.Event]]] = {
            (sender, receiver, lane): queue.Queue()
            for sender in range(num_ranks)
            for receiver in range(num_ranks)
            for lane in Lane
        }
        self._lock = threading.Condition()
        self._rounds: dict[Any, tuple[list[Any], set[int]]] = {}
        self.transports = tuple(LocalTransport(self, rank) for rank in range(num_ranks))

    def end(self, rank: int) -> None:
        """Let a rank die: whoever waits for it raises :class:`TransportError`."""
        with self._lock:
            self.ended.add(rank)
            self._lock.notify_all()

    def contribute(self, key: Any, ranks: tuple[int, ...], rank: int, value: Any) -> None:
        """Put in this rank's part of a collective."""
        with self._lock:
            values, _ = self._rounds.setdefault(key, ([None] * len(ranks), set(ranks)))
            values[ranks.index(rank)] = (value,)
            self._lock.notify_all()

    def collect(self, key: Any, rank: int) -> list[Any]:
        """Wait for all parts of a collective; the last to collect clears it away."""
        with self._lock:
            values, absent = self._rounds[key]
            while any(entry is None for entry in values):
                dead = self.ended & absent
                if dead:
                    raise TransportError(f"rank {rank} lost rank {min(dead)} in a collective")
                self._lock.wait()
            absent.discard(rank)
            if not absent:
                del self._rounds[key]
            return [entry[0] for entry in values]


class LocalTransport(Transport):
    """One thread's view of a :class:`LocalWorld`; a send is done when it was received, as with gloo."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        self._world = world
        self.rank = rank
        self.num_ranks = world.num_ranks
        self._counts: dict[Any, int] = defaultdict(int)

    @override
    def connect(self, edges: Sequence[tuple[int, int]], groups: Sequence[tuple[int, ...]]) -> None:
        # Threads of one process reach each other as it is.
        pass

    @override
    def send(self, message: Message, peer: int, lane: Lane) -> Pending:
        received = threading.Event()
        copy = pytree.tree_map(lambda leaf: leaf.detach().clone() if isinstance(leaf, Tensor) else leaf, message.tree)
        self._world.queues[self.rank, peer, lane].put((Message(message.fields, copy), received))
        return _Delivery(lambda: self._await_delivery(received, peer))

    @override
    def recv(self, peer: int, lane: Lane) -> Message:
        while True:
            try:
                message, received = self._world.queues[peer, self.rank, lane].get(timeout=_TICK_S)
            except queue.Empty:
                if peer in self._world.ended or self.rank in self._world.ended:
                    raise TransportError(f"rank {self.rank} lost rank {peer}: it has ended") from None
                continue
            received.set()
            return message

    @override
    def all_reduce(self, tensors: Sequence[Tensor], ranks: tuple[int, ...]) -> Pending:
        key = self._key(("all_reduce", ranks))
        self._world.contribute(key, ranks, self.rank, [tensor.detach().clone() for tensor in tensors])

        def finish() -> None:
            for tensor, *parts in zip(tensors, *self._world.collect(key, self.rank), strict=True):
                tensor.detach().copy_(torch.stack(parts).sum(0))

        return _Delivery(finish)

    @override
    def broadcast(self, tensor: Tensor, source: int) -> None:
        values = self._gather("broadcast", tensor.detach().clone())
        if self.rank != source:
            tensor.detach().copy_(values[source])

    @override
    def all_gather_object(self, value: Any) -> list[Any]:
        # Pickled as between processes, so that every rank gets values of its own.
        return [pickle.loads(payload) for payload in self._gather("gather", pickle.dumps(value))]

    def _gather(self, kind: str, value: Any) -> list[Any]:
        key = self._key(kind)
        self._world.contribute(key, tuple(range(self.num_ranks)), self.rank, value)
        with self.meeting():
            return self._world.collect(key, self.rank)

    def _key(self, kind: Any) -> tuple[Any, int]:
        self._counts[kind] += 1
        return kind, self._counts[kind]

    def _await_delivery(self, received: threading.Event, peer: int) -> None:
        while not received.wait(_TICK_S):
            if peer in self._world.ended:
                raise TransportError(f"sending from rank {self.rank} to rank {peer} failed: it has ended")


class _Delivery:
    def __init__(self, finish: Callable[[], None]) -> None:
        self._finish = finish

    def wait(self) -> None:
        self._finish()
