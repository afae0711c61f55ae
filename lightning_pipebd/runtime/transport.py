"""Messages and collectives between ranks: the interface, and its form over torch's process groups.

No other file calls torch.distributed's communication functions. A *message* is four integers and a tree of tensors,
sent from one rank to another over a *lane*. Messages of one lane between two ranks arrive in the order of sending.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.runtime.layouts import LayoutBook, TensorLayout, describe, flatten, flatten_tree, restore_tree
from lightning_pipebd.runtime.neighbours import NUM_HEADER, Neighbours

__all__ = ["Lane", "Message", "Pending", "ProcessGroupTransport", "Transport", "TransportError"]

# A receiver waits as long as its senders compute: hours, if one of them validates. Dead peers close their sockets.
_PATIENCE = timedelta(days=30)
_NUM_FIELDS = 4
_NO_SLOT = -1


class TransportError(RuntimeError):
    """A message could not be delivered: a peer has ended, or the network has failed."""


class Lane(IntEnum):
    """Independent streams of messages between the same two ranks."""

    RELAY = 1
    HEADERS = 2
    METRICS = 3
    STATE = 4


class Message(NamedTuple):
    """What one rank tells another: four integers, whose meaning is the caller's, and a tree of tensors."""

    fields: tuple[int, int, int, int]
    tree: Any = None


class Pending(Protocol):
    """Something under way."""

    def wait(self) -> None:
        """Return when it is done; raise :class:`TransportError` when it cannot be done any more."""


class Transport(ABC):
    """What a rank can do with other ranks.

    Whatever waits for a rank that has ended raises :class:`TransportError`; so may whatever is begun with it.

    Attributes:
        rank: This rank.
        num_ranks: All ranks.
        meeting: Gives a context around every collective over all ranks.
    """

    rank: int
    num_ranks: int
    meeting: Callable[[], AbstractContextManager[None]] = nullcontext

    @abstractmethod
    def connect(self, edges: Sequence[tuple[int, int]], groups: Sequence[tuple[int, ...]]) -> None:
        """**Collective** over all ranks: prepare what takes preparation; every rank must name the same.

        Args:
            edges: Pairs (sender, receiver) that will exchange boundaries.
            groups: Sets of ranks that will reduce together.
        """

    @abstractmethod
    def send(self, message: Message, peer: int, lane: Lane) -> Pending:
        """Start to send; the tensors must stay unchanged until the returned object's ``wait`` returns."""

    @abstractmethod
    def recv(self, peer: int, lane: Lane) -> Message:
        """Wait for the next message of a peer on a lane; one thread at a time per peer and lane."""

    @abstractmethod
    def all_reduce(self, tensors: Sequence[Tensor], ranks: tuple[int, ...]) -> Pending:
        """**Collective** over ``ranks``: start to sum tensors of one type, in place when ``wait`` returns."""

    @abstractmethod
    def broadcast(self, tensor: Tensor, source: int) -> None:
        """**Collective** over all ranks: overwrite the tensor with that of rank ``source``."""

    @abstractmethod
    def all_gather_object(self, value: Any) -> list[Any]:
        """**Collective** over all ranks: get every rank's value, in rank order. For small values."""


class _Works:
    """Works of one message; holds the tensors, which the sender must not free before they have left."""

    def __init__(self, works: list[Any], tensors: list[Tensor], subject: str) -> None:
        self._works = works
        self._tensors = tensors
        self._subject = subject

    def wait(self) -> None:
        try:
            with _Reported(self._subject):
                for work in self._works:
                    work.wait()
        finally:
            self._works, self._tensors = [], []


class _Later:
    """Something whose second half is done by whoever waits for it."""

    def __init__(self, finish: Callable[[], None], subject: str) -> None:
        self._finish: Callable[[], None] | None = finish
        self._subject = subject

    def wait(self) -> None:
        finish, self._finish = self._finish, None
        if finish is not None:
            with _Reported(self._subject):
                finish()


class _Reported:
    """Turns torch's plain errors, when an operation begins as well as while it is waited for, into ours."""

    __slots__ = ("_subject",)

    def __init__(self, subject: str) -> None:
        self._subject = subject

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        if isinstance(error, (RuntimeError, OSError)):
            raise TransportError(f"{self._subject} failed: {error}") from error


class ProcessGroupTransport(Transport):
    """Messages over gloo; boundaries and sums by shared memory between ranks of one host, by NCCL between GPUs.

    **Collective** over all ranks: the constructor creates process groups, and every rank must name the same ones. More
    can be added with :meth:`connect`.

    Args:
        device: Where this rank computes; tensors arrive there.
        edges: Pairs (sender, receiver) that exchange boundaries; each gets an NCCL group of its own, so that a receive
            never queues behind a send.
        groups: Sets of ranks that will reduce together.
        timeout: Time after which a collective fails. A message may be waited for as long as its sender lives.
        share_device: Whether some ranks compute on one GPU; NCCL refuses that, and messages go through host memory.
        shares_memory: Whether boundaries, and sums of host memory, pass through memory that ranks of one host share,
            where that can be; by gloo otherwise.

    Attributes:
        has_failed: Set when a rank has ended with an error: messages of then may still be on their way.
    """

    def __init__(
        self,
        device: torch.device,
        *,
        edges: Sequence[tuple[int, int]] = (),
        groups: Sequence[tuple[int, ...]] = (),
        timeout: timedelta = timedelta(minutes=30),
        share_device: bool = False,
        shares_memory: bool = True,
    ) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._world: Any = dist.group.WORLD
        self.has_failed = False
        self._device = device
        self._timeout = timeout
        self._use_nccl = device.type == "cuda" and not share_device
        everyone = list(range(self.num_ranks))
        self._control: Any = dist.new_group(everyone, timeout=timeout, backend="gloo")
        # Each group has a thread that wakes a hundred times a second; a rank alone has nobody to send to.
        self._messages: Any = self._control
        if self.num_ranks > 1:
            self._messages = dist.new_group(everyone, timeout=_PATIENCE, backend="gloo")
        self._edges: dict[tuple[int, int], Any] = {}
        self._groups: dict[tuple[int, ...], Any] = {}
        self._sent: dict[tuple[int, Lane], LayoutBook] = {}
        self._received: dict[tuple[int, Lane], LayoutBook] = {}
        self._streams: dict[int, torch.cuda.Stream] = {}
        self._neighbours = Neighbours(self.rank, self.all_gather_object, timeout)
        self._shares_memory = shares_memory and not self._use_nccl
        self._connected: set[tuple[int, int]] = set()
        self.connect(edges, groups)

    @property
    def is_usable(self) -> bool:
        """Whether another fit or evaluation may use it: each costs connections, which stay until the process ends."""
        return not self.has_failed and dist.is_initialized() and dist.group.WORLD is self._world

    @override
    def connect(self, edges: Sequence[tuple[int, int]], groups: Sequence[tuple[int, ...]]) -> None:
        new = sorted(set(edges) - self._connected)
        self._connected.update(new)
        if self._use_nccl:
            self._edges |= {edge: dist.new_group(sorted(edge), backend="nccl") for edge in new}
        unique = {tuple(sorted(group)) for group in groups if len(group) > 1}
        new_groups = sorted(unique - self._groups.keys())
        if self._shares_memory and (new or new_groups):
            self._neighbours.connect(new, new_groups if self._device.type == "cpu" else [])
        backend = "nccl" if self._use_nccl else "gloo"
        for group in new_groups:
            self._groups[group] = dist.new_group(list(group), timeout=self._timeout, backend=backend)

    @override
    def send(self, message: Message, peer: int, lane: Lane) -> Pending:
        leaves, structure, is_plain = flatten_tree(message.tree)
        described = [describe(leaf) if isinstance(leaf, Tensor) else (None, leaf) for leaf in leaves]
        flats = [flatten(dense) for dense, _ in described if dense is not None and dense.numel()]
        layouts = [layout for _, layout in described]
        # Most messages are like one before. True is equal to 1, but is not it.
        key = (structure, *layouts, *map(type, layouts)) if is_plain else pickle.dumps((structure, layouts))
        number, is_new = self._sent.setdefault((peer, lane), LayoutBook()).number(key)
        layout = pickle.dumps((structure, layouts)) if is_new else b""
        slot, slot_bytes = _NO_SLOT, 0
        link = self._neighbours.senders.get(peer) if lane is Lane.RELAY else None
        if link is not None and flats:
            slot, slot_bytes = link.place(flats)
        header = [*message.fields, number, len(layout), slot, slot_bytes]
        if link is not None:
            subject = f"sending from rank {self.rank} to rank {peer}"
            with _Reported(subject):
                return _Later(partial(link.wait, link.send(header, layout)), subject)
        blob = [torch.frombuffer(bytearray(layout), dtype=torch.uint8)] if layout else []
        return self._send_tensors([torch.tensor(header, dtype=torch.int64), *blob, *flats], peer, lane)

    def _send_tensors(self, tensors: list[Tensor], peer: int, lane: Lane) -> Pending:
        subject = f"sending from rank {self.rank} to rank {peer}"
        works = []
        with _Reported(subject):
            for index, tensor in enumerate(tensors):
                edge = self._edges.get((self.rank, peer)) if tensor.is_cuda and lane is Lane.RELAY else None
                if edge is None:
                    tensors[index] = tensor = tensor.cpu()
                    works.append(dist.isend(tensor, peer, group=self._messages, tag=int(lane)))
                else:
                    works.append(dist.isend(tensor, peer, group=edge))
        return _Works(works, tensors, subject)

    @override
    def recv(self, peer: int, lane: Lane) -> Message:
        with _Reported(f"receiving on rank {self.rank} from rank {peer}"):
            return self._recv(peer, lane)

    def _recv(self, peer: int, lane: Lane) -> Message:
        link = self._neighbours.receivers.get(peer) if lane is Lane.RELAY else None
        if link is not None:
            header, blob = link.receive(_blob_bytes)
        else:
            header = self._recv_host(torch.empty(NUM_HEADER, dtype=torch.int64), peer, lane).tolist()
            room = torch.empty(_blob_bytes(header), dtype=torch.uint8)
            blob = self._recv_host(room, peer, lane).numpy().tobytes() if len(room) else b""
        step, index, start, stop, number, _, slot, slot_bytes = header
        book = self._received.setdefault((peer, lane), LayoutBook())
        if blob:
            book.add(number, pickle.loads(blob))
        structure, leaves = book.layout(number)
        if link is None or slot == _NO_SLOT:
            received = [self._recv_leaf(leaf, peer, lane) for leaf in leaves]
        else:
            received = self._read_slot(leaves, partial(link.tensors, slot, slot_bytes))
        if link is not None:
            link.acknowledge()
        return Message((step, index, start, stop), restore_tree(structure, received))

    def _read_slot(self, leaves: list[Any], read: Callable[[list[TensorLayout]], list[Tensor]]) -> list[Any]:
        def has_values(leaf: Any) -> bool:
            return isinstance(leaf, TensorLayout) and leaf.num_elements > 0

        tensors = iter(read([leaf for leaf in leaves if has_values(leaf)]))
        return [
            self._place(next(tensors), leaf) if has_values(leaf) else self._recv_leaf(leaf, -1, Lane.RELAY)
            for leaf in leaves
        ]

    def _recv_leaf(self, leaf: Any, peer: int, lane: Lane) -> Any:
        if not isinstance(leaf, TensorLayout):
            return leaf
        edge = self._edges.get((peer, self.rank)) if leaf.is_cuda and lane is Lane.RELAY else None
        if edge is None or not leaf.num_elements:
            flat = leaf.new_flat()
            if leaf.num_elements:
                self._recv_host(flat, peer, lane)
            return self._place(leaf.restore(flat), leaf)
        return leaf.restore(self._recv_cuda(leaf, peer, edge))

    def _place(self, tensor: Tensor, layout: TensorLayout) -> Tensor:
        return tensor.to(self._device) if layout.is_cuda else tensor

    def _recv_host(self, tensor: Tensor, peer: int, lane: Lane) -> Tensor:
        work = dist.irecv(tensor, peer, group=self._messages, tag=int(lane))
        assert work is not None
        work.wait()
        return tensor

    def _recv_cuda(self, leaf: TensorLayout, peer: int, edge: Any) -> Tensor:
        # A stream of the receiving thread: the copy overlaps with the computation of the main thread, which is
        # protected by the synchronisation below, not by stream order.
        stream = self._streams.setdefault(peer, torch.cuda.Stream(self._device))  # type: ignore[no-untyped-call]
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            tensor = leaf.new_flat(self._device)
            work = dist.irecv(tensor, peer, group=edge)
            assert work is not None
            work.wait()
            stream.synchronize()
        tensor.record_stream(torch.cuda.default_stream(self._device))
        return tensor

    @override
    def all_reduce(self, tensors: Sequence[Tensor], ranks: tuple[int, ...]) -> Pending:
        subject = f"reducing over ranks {ranks}"
        tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
        summation = self._neighbours.summations.get(ranks)
        with _Reported(subject):
            if not tensors:
                return _Later(_done, subject)
            if summation is not None:
                return _Later(partial(summation.finish, summation.begin(tensors), tensors), subject)
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0]
            work = dist.all_reduce(flat, group=self._groups[ranks], async_op=True)
        return _Later(partial(_finish_sum, work, flat, tensors), subject)

    def process_group(self, ranks: tuple[int, ...]) -> Any:
        """Give torch's group of some ranks that reduce together, for layers that exchange statistics by themselves."""
        return self._groups[ranks]

    @override
    def broadcast(self, tensor: Tensor, source: int) -> None:
        host = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
        with self.meeting(), _Reported(f"broadcasting from rank {source}"):
            # As bytes: gloo has collectives for few element types.
            dist.broadcast(host.reshape(-1).view(torch.uint8), source, group=self._control)
        if self.rank != source and host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host)

    @override
    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.num_ranks
        with self.meeting(), _Reported(f"gathering on rank {self.rank}"):
            dist.all_gather_object(values, value, group=self._control)
        return values


def _blob_bytes(header: Sequence[int]) -> int:
    return header[_NUM_FIELDS + 1]


def _finish_sum(work: Any, flat: Tensor, tensors: Sequence[Tensor]) -> None:
    work.wait()
    if len(tensors) > 1:
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view(tensor.shape))


def _done() -> None:
    pass
