"""Messages and collectives between ranks: the interface, and its form over torch's process groups.

No other file calls torch.distributed's communication functions. A *message* is four integers and a tree of tensors,
sent from one rank to another over a *lane*. Messages of one lane between two ranks arrive in the order of sending.
"""

from __future__ import annotations

import pickle
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from enum import IntEnum
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.runtime.cuda_memory import CudaMemory
from lightning_pipebd.runtime.departures import CudaSide, Departures, Side
from lightning_pipebd.runtime.layouts import LayoutBook, TensorLayout, describe, flatten, flatten_tree, restore_tree
from lightning_pipebd.runtime.links import NUM_HEADER
from lightning_pipebd.runtime.neighbours import Neighbours
from lightning_pipebd.runtime.pending import Later, Pending, Reported, TransportError, Works

__all__ = ["Lane", "Message", "Pending", "ProcessGroupTransport", "Transport", "TransportError"]

# A receiver waits as long as its senders compute: hours, if one of them validates. Dead peers close their sockets.
_PATIENCE = timedelta(days=30)
_NUM_FIELDS = 4
_NO_SLOT = -1


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


class ProcessGroupTransport(Transport):
    """Messages over gloo; boundaries and sums by shared memory between ranks of one host, by NCCL between GPUs.

    It is NCCL if that is the default group's backend for GPUs. Where ranks share a GPU, which NCCL refuses, boundaries
    between those pass through its memory where that can be, and all else through host memory; so does everything where
    gloo was asked for.

    **Collective** over all ranks: the constructor creates process groups, and every rank must name the same ones. More
    can be added with :meth:`connect`.

    Args:
        device: Where this rank computes; tensors arrive there.
        edges: Pairs (sender, receiver) that exchange boundaries; each gets an NCCL group of its own, so that a receive
            never queues behind a send.
        groups: Sets of ranks that will reduce together.
        timeout: Time after which a collective fails. A message may be waited for as long as its sender lives.
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
        shares_memory: bool = True,
    ) -> None:
        self.rank, self.num_ranks = dist.get_rank(), dist.get_world_size()
        self._world: Any = dist.group.WORLD
        self.has_failed = False
        self._device = device
        self._timeout = timeout
        self._use_nccl = device.type == "cuda" and "nccl" in dist.get_backend()
        everyone = list(range(self.num_ranks))
        self._control: Any = dist.new_group(everyone, timeout=timeout, backend="gloo")
        # Each group has a thread that wakes a hundred times a second; a rank alone has nobody to send to.
        self._messages: Any = self._control
        if self.num_ranks > 1:
            self._messages = dist.new_group(everyone, timeout=_PATIENCE, backend="gloo")
        self._edges: dict[tuple[int, int], Any] = {}
        self._groups: dict[tuple[int, ...], Any] = {}
        self._layer_groups: dict[tuple[int, ...], Any] = {}
        self._sent: dict[tuple[int, Lane], LayoutBook] = {}
        self._received: dict[tuple[int, Lane], LayoutBook] = {}
        self._side: Side = CudaSide(device)
        self._departures: dict[int, Departures] = {}
        memory = CudaMemory(device) if device.type == "cuda" and not self._use_nccl else None
        self._neighbours = Neighbours(self.rank, self.all_gather_object, timeout, memory)
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
            self._edges |= {edge: dist.new_group(sorted(edge), timeout=_PATIENCE, backend="nccl") for edge in new}
        unique = {tuple(sorted(group)) for group in groups if len(group) > 1}
        new_groups = sorted(unique - self._groups.keys())
        if self._shares_memory and (new or new_groups):
            self._neighbours.connect(new, new_groups if self._device.type == "cpu" else [])
        by_neighbours = self._summed_by_neighbours(new_groups)
        for group in new_groups:
            self._groups[group] = None if group in by_neighbours else self._new_group(group)

    def _summed_by_neighbours(self, groups: Sequence[tuple[int, ...]]) -> set[tuple[int, ...]]:
        """**Collective** over all ranks: find the groups that need none of torch's, which would have a thread each."""
        if not (self._shares_memory and groups):
            return set()
        own = [group for group in groups if group in self._neighbours.summations]
        return {group for theirs in self.all_gather_object(own) for group in theirs}

    def keep_only(self, edges: Iterable[tuple[int, int]], groups: Iterable[tuple[int, ...]]) -> None:
        """**Collective** over all ranks: end the NCCL groups that are not named, each of which holds a GPU's memory.

        Nothing may be under way in them. What :meth:`connect` names later is made anew.
        """
        wanted = {tuple(sorted(group)) for group in groups}
        old_edges, old_groups = sorted(self._edges.keys() - set(edges)), sorted(self._groups.keys() - wanted)
        if not self._use_nccl or not (old_edges or old_groups):
            return
        torch.cuda.synchronize(self._device)
        self.all_gather_object(None)
        # In one order on all ranks: to end a group may be to wait for its other ranks.
        ending = [self._edges.pop(edge) for edge in old_edges] + [self._groups.pop(group) for group in old_groups]
        self._connected.difference_update(old_edges)
        for group in ending:
            dist.destroy_process_group(group)

    def layer_groups(self, groups: Iterable[tuple[int, ...]]) -> dict[tuple[int, ...], Any]:
        """**Collective** over all ranks: give torch's groups for layers that exchange statistics by themselves.

        Sums of gradients begin between the exchanges of layers, on each rank at another place: one group for both
        would have ranks that wait for each other, or take the one for the other.
        """
        for group in sorted(set(groups) - self._layer_groups.keys()):
            self._layer_groups[group] = self._new_group(group)
        return self._layer_groups

    def _new_group(self, ranks: tuple[int, ...]) -> Any:
        return dist.new_group(list(ranks), timeout=self._timeout, backend="nccl" if self._use_nccl else "gloo")

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
            with Reported(subject):
                return Later(partial(link.wait, link.send(header, layout)), subject)
        blob = [torch.frombuffer(bytearray(layout), dtype=torch.uint8)] if layout else []
        # Its place is said, because a user may have set another one for new tensors.
        tensors = [torch.tensor(header, dtype=torch.int64, device="cpu"), *blob, *flats]
        edge = self._edges.get((self.rank, peer)) if lane is Lane.RELAY else None
        return self._send_tensors(tensors, peer, lane) if edge is None else self._depart(tensors, peer, edge)

    def _send_tensors(self, tensors: list[Tensor], peer: int, lane: Lane) -> Pending:
        subject = f"sending from rank {self.rank} to rank {peer}"
        works = []
        with Reported(subject):
            for index, tensor in enumerate(tensors):
                tensors[index] = tensor = tensor.cpu()
                works.append(dist.isend(tensor, peer, group=self._messages, tag=int(lane)))
        return Works(works, tensors, subject)

    def _depart(self, tensors: list[Tensor], peer: int, edge: Any) -> Pending:
        if peer not in self._departures:
            self._departures[peer] = Departures(self._side, (self.rank, peer))
        # As bytes: NCCL knows few element types.
        parts = [
            partial(dist.isend, tensor.view(torch.uint8), peer, group=edge)
            if tensor.is_cuda
            else partial(dist.isend, tensor, peer, group=self._messages, tag=int(Lane.RELAY))
            for tensor in tensors
        ]
        departure = self._departures[peer].post(parts)
        return Later(departure.wait, f"sending from rank {self.rank} to rank {peer}")

    @override
    def recv(self, peer: int, lane: Lane) -> Message:
        with Reported(f"receiving on rank {self.rank} from rank {peer}"):
            return self._recv(peer, lane)

    def _recv(self, peer: int, lane: Lane) -> Message:
        link = self._neighbours.receivers.get(peer) if lane is Lane.RELAY else None
        if link is not None:
            header, blob = link.receive(_blob_bytes)
        else:
            header = self._recv_host(torch.empty(NUM_HEADER, dtype=torch.int64, device="cpu"), peer, lane).tolist()
            room = torch.empty(_blob_bytes(header), dtype=torch.uint8, device="cpu")
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
        # Beside the computation of the main thread, which needs no order of streams: the tensor is there on leaving.
        with self._side.way((peer, self.rank)):
            tensor = leaf.new_flat(self._device)
            work = dist.irecv(tensor.view(torch.uint8), peer, group=edge)
            assert work is not None
            work.wait()
        self._side.hand_over(tensor)
        return tensor

    @override
    def all_reduce(self, tensors: Sequence[Tensor], ranks: tuple[int, ...]) -> Pending:
        subject = f"reducing over ranks {ranks}"
        tensors = [tensor.detach() for tensor in tensors if tensor.numel()]
        summation = self._neighbours.summations.get(ranks)
        with Reported(subject):
            if not tensors:
                return Later(_done, subject)
            if summation is not None:
                return Later(partial(summation.finish, summation.begin(tensors), tensors), subject)
            flat = torch.cat([tensor.reshape(-1) for tensor in tensors]) if len(tensors) > 1 else tensors[0]
            work = dist.all_reduce(flat, group=self._groups[ranks], async_op=True)
        return Later(partial(_finish_sum, work, flat, tensors), subject)

    @override
    def broadcast(self, tensor: Tensor, source: int) -> None:
        host = tensor.detach().resolve_conj().resolve_neg().contiguous().cpu()
        with self.meeting(), Reported(f"broadcasting from rank {source}"):
            # As bytes: gloo has collectives for few element types.
            dist.broadcast(host.reshape(-1).view(torch.uint8), source, group=self._control)
        if self.rank != source and host.data_ptr() != tensor.data_ptr():
            tensor.detach().copy_(host)

    @override
    def all_gather_object(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.num_ranks
        with self.meeting(), Reported(f"gathering on rank {self.rank}"):
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
