"""Neighbours: ranks of one host, who pass boundaries and sum gradients through shared memory.

::

    sender -- record: fields, layout, slot --> receiver      a pipe; the tensors lie in the sender's slot
    sender <------ one byte per message ------ receiver      a pipe; what was received, counted

    every rank of a group -- slot --> every other            a pipe per pair; each adds all parts by itself, in the
                                                             order of the ranks, so that all have the same sums
"""

from __future__ import annotations

import struct
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_pipebd.runtime.layouts import TensorLayout
from lightning_pipebd.runtime.pipes import PipeReader, PipeWriter
from lightning_pipebd.runtime.shared_memory import Passport, SlotReader, SlotWriter, issue_passport

__all__ = ["NUM_HEADER", "LinkReceiver", "LinkSender", "Neighbours", "Summation"]

NUM_HEADER = 8
"""Integers in front of a message."""

_HEADER = struct.Struct(f"={NUM_HEADER}q")
_SLOT = struct.Struct("=2q")
# Each rank reads the parts of all: beyond this, passing on sums from rank to rank moves fewer bytes.
_MOST_SUMMANDS = 8
_MOST_ACKNOWLEDGEMENTS = 256


class _Pipe(NamedTuple):
    """Which pipe: what for, from whom, to whom."""

    purpose: Any
    writer: int
    reader: int


class LinkSender:
    """The sending end of an edge between neighbours.

    Args:
        records: Pipe to the receiver.
        acknowledgements: Pipe from the receiver.
    """

    def __init__(self, records: PipeWriter, acknowledgements: PipeReader) -> None:
        self._slots = SlotWriter()
        self._records = records
        self._acknowledgements = acknowledgements
        self._num_sent = self._num_received = 0
        self._lock = threading.Lock()

    def place(self, flats: Sequence[Tensor]) -> tuple[int, int]:
        """Copy tensors of one dimension into a slot; give its number and size."""
        return self._slots.write(flats)

    def send(self, header: Sequence[int], blob: bytes) -> int:
        """Tell the receiver; give the message's number."""
        self._records.write(_HEADER.pack(*header) + blob)
        self._num_sent += 1
        return self._num_sent

    def wait(self, number: int) -> None:
        """Wait until a message was received.

        Raises:
            ConnectionError: The receiver has ended.
        """
        with self._lock:
            while self._num_received < number:
                self._num_received += len(self._acknowledgements.read_some(_MOST_ACKNOWLEDGEMENTS))


class LinkReceiver:
    """The receiving end of an edge between neighbours.

    Args:
        pid: Process of the sender.
        records: Pipe from the sender.
        acknowledgements: Pipe to the sender.
    """

    def __init__(self, pid: int, records: PipeReader, acknowledgements: PipeWriter) -> None:
        self._slots = SlotReader(pid)
        self._records = records
        self._acknowledgements = acknowledgements

    def receive(self, blob_bytes: Callable[[Sequence[int]], int]) -> tuple[Sequence[int], bytes]:
        """Wait for the next message; give its header and the bytes that follow it. To be acknowledged.

        Args:
            blob_bytes: Tells from the header how many these are.

        Raises:
            ConnectionError: The sender has ended.
        """
        header = _HEADER.unpack(self._records.read(_HEADER.size))
        return header, self._records.read(blob_bytes(header))

    def tensors(self, slot: int, size: int, layouts: Sequence[TensorLayout]) -> list[Tensor]:
        """Give the tensors of a slot."""
        return self._slots.read(slot, size, layouts)

    def acknowledge(self) -> None:
        """Tell the sender that its message was received: from then on it may end.

        Raises:
            ConnectionError: The sender has ended.
        """
        self._acknowledgements.write(b"\0")


class Summation:
    """Sums over a group of neighbours.

    Args:
        rank: This rank.
        pids: Process of every rank of the group.
        tellers: Pipe to each other rank.
        listeners: Pipe from each other rank.
        timeout: How long the others may stay behind.
    """

    def __init__(
        self,
        rank: int,
        pids: dict[int, int],
        tellers: dict[int, PipeWriter],
        listeners: dict[int, PipeReader],
        timeout: timedelta,
    ) -> None:
        self._rank = rank
        place = sorted(pids).index(rank)
        self._slots = SlotWriter(len(pids))
        self._readers = {peer: SlotReader(pid, place) for peer, pid in sorted(pids.items())}
        self._tellers = tellers
        self._listeners = listeners
        self._timeout_s = timeout.total_seconds()
        # What each rank has told, from the oldest sum that is still to be finished here.
        self._told: dict[int, dict[int, tuple[int, int]]] = {peer: {} for peer in self._readers}
        self._num_heard: dict[int, int] = defaultdict(int)
        self._num_begun = 0

    def begin(self, tensors: Sequence[Tensor]) -> int:
        """**Collective** over the group: put in this rank's part of the next sum; give the sum's number.

        Args:
            tensors: Of one type, with at least one element; they may change afterwards.
        """
        number = self._num_begun
        self._num_begun += 1
        slot = self._slots.write_joined(tensors)
        self._told[self._rank][number] = slot
        for teller in self._tellers.values():
            teller.write(_SLOT.pack(*slot))
        return number

    def finish(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Wait for the other parts of a sum and write it into the tensors.

        Raises:
            ConnectionError: A rank of the group has ended.
            TimeoutError: A rank of the group stays behind.
        """
        sizes = [tensor.numel() for tensor in tensors]
        layout = TensorLayout((sum(sizes),), (1,), tensors[0].dtype, is_cuda=False)
        parts = [
            torch.split(reader.read(*self._hear(peer, number), [layout])[0], sizes)
            for peer, reader in self._readers.items()
        ]
        for tensor, *own in zip(tensors, *parts, strict=True):
            first, second, *others = (part.view(tensor.shape) for part in own)
            torch.add(first, second, out=tensor.detach())
            for other in others:
                tensor.detach().add_(other)

    def _hear(self, peer: int, number: int) -> tuple[int, int]:
        while number not in self._told[peer]:
            slot = _SLOT.unpack(self._listeners[peer].read(_SLOT.size, self._timeout_s))
            self._told[peer][self._num_heard[peer]] = slot
            self._num_heard[peer] += 1
        return self._told[peer].pop(number)


class Neighbours:
    """What one rank shares with others of its host.

    Args:
        rank: This rank.
        gather: **Collective** over all ranks: gives every rank's value.
        timeout: How long the ranks of a sum may wait for each other.

    Attributes:
        senders: Per receiving neighbour, this rank's end of the edge.
        receivers: Per sending neighbour, this rank's end of the edge.
        summations: Per group that consists of neighbours and has this rank in it.
    """

    def __init__(self, rank: int, gather: Callable[[Any], list[Any]], timeout: timedelta) -> None:
        self._rank = rank
        self._gather = gather
        self._timeout = timeout
        self.senders: dict[int, LinkSender] = {}
        self.receivers: dict[int, LinkReceiver] = {}
        self.summations: dict[tuple[int, ...], Summation] = {}

    def connect(self, edges: Iterable[tuple[int, int]], groups: Iterable[tuple[int, ...]]) -> None:
        """**Collective** over all ranks: share memory along these edges and in these groups, where that can be."""
        edges, groups = list(edges), [group for group in groups if len(group) <= _MOST_SUMMANDS]
        pairs = {*edges, *(pair for group in groups for pair in permutations(group, 2))}
        passport = issue_passport()
        passports: list[Passport] = self._gather(passport)
        peers = {writer for writer, reader in pairs if reader == self._rank}
        readable = self._gather({peer for peer in peers | self._readers_of(pairs) if passports[peer].is_readable()})
        passport.destroy()

        def are_neighbours(ranks: tuple[int, ...]) -> bool:
            return all(one in readable[other] for one, other in permutations(ranks, 2))

        edges, groups = list(filter(are_neighbours, edges)), list(filter(are_neighbours, groups))
        pipes = [_Pipe("records", *edge) for edge in edges] + [_Pipe("received", *reversed(edge)) for edge in edges]
        pipes += [_Pipe(group, *pair) for group in groups for pair in permutations(group, 2)]
        pids = [passport.pid for passport in passports]
        writers, readers = self._open(pipes, pids)
        self._take(edges, groups, pids, writers, readers)

    def _readers_of(self, pairs: Iterable[tuple[int, int]]) -> set[int]:
        return {reader for writer, reader in pairs if writer == self._rank}

    def _open(
        self, pipes: Sequence[_Pipe], pids: Sequence[int]
    ) -> tuple[dict[_Pipe, PipeWriter], dict[_Pipe, PipeReader]]:
        writers = {pipe: PipeWriter() for pipe in pipes if pipe.writer == self._rank}
        ends = self._gather({pipe: writer.reading_end for pipe, writer in writers.items()})
        readers = {
            pipe: PipeReader(pids[pipe.writer], ends[pipe.writer][pipe]) for pipe in pipes if pipe.reader == self._rank
        }
        self._gather(None)
        for writer in writers.values():
            writer.let_go()
        return writers, readers

    def _take(
        self,
        edges: Iterable[tuple[int, int]],
        groups: Iterable[tuple[int, ...]],
        pids: Sequence[int],
        writers: dict[_Pipe, PipeWriter],
        readers: dict[_Pipe, PipeReader],
    ) -> None:
        for edge in edges:
            records, received = _Pipe("records", *edge), _Pipe("received", *reversed(edge))
            if records in writers:
                self.senders[edge[1]] = LinkSender(writers[records], readers[received])
            if records in readers:
                self.receivers[edge[0]] = LinkReceiver(pids[edge[0]], readers[records], writers[received])
        for group in groups:
            if self._rank in group:
                others = [rank for rank in group if rank != self._rank]
                self.summations[group] = Summation(
                    self._rank,
                    {rank: pids[rank] for rank in group},
                    {rank: writers[_Pipe(group, self._rank, rank)] for rank in others},
                    {rank: readers[_Pipe(group, rank, self._rank)] for rank in others},
                    self._timeout,
                )
