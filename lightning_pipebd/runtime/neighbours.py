"""Neighbours: ranks of one host, who pass boundaries and sum gradients through memory that they share.

Boundaries pass along links: through host memory, or between ranks on one GPU through its memory. For sums::

    every rank of a group -- slot --> every other            a pipe per pair; each adds all parts by itself, in the
                                                             order of the ranks, so that all have the same sums
"""

from __future__ import annotations

import struct
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from itertools import permutations
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_pipebd.runtime.device_links import DeviceLinkSender, edges_on_device
from lightning_pipebd.runtime.device_slots import DeviceMemory, DeviceSlotReader
from lightning_pipebd.runtime.layouts import TensorLayout
from lightning_pipebd.runtime.links import LinkReceiver, LinkSender
from lightning_pipebd.runtime.pipes import PipeReader, PipeWriter
from lightning_pipebd.runtime.shared_memory import Passport, SlotReader, SlotWriter, issue_passport

__all__ = ["Neighbours", "Summation"]

_SLOT = struct.Struct("=2q")
# Each rank reads the parts of all: beyond this, passing on sums from rank to rank moves fewer bytes.
_MOST_SUMMANDS = 8


class _Pipe(NamedTuple):
    """Which pipe: what for, from whom, to whom."""

    purpose: Any
    writer: int
    reader: int


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
        memory: Memory of the device that this rank computes on, for edges to ranks on the same one; `None` for edges
            through host memory alone.

    Attributes:
        senders: Per receiving neighbour, this rank's end of the edge.
        receivers: Per sending neighbour, this rank's end of the edge.
        summations: Per group that consists of neighbours and has this rank in it.
    """

    def __init__(
        self,
        rank: int,
        gather: Callable[[Any], list[Any]],
        timeout: timedelta,
        memory: DeviceMemory | None = None,
    ) -> None:
        self._rank = rank
        self._gather = gather
        self._timeout = timeout
        self._memory = memory
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
        on_device = edges_on_device(self._rank, edges, self._memory, self._gather)
        writers, readers = self._open(pipes, pids)
        for edge in edges:
            self._take_edge(edge, pids, writers, readers, self._memory if edge in on_device else None)
        self._take_groups(groups, pids, writers, readers)

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

    def _take_edge(
        self,
        edge: tuple[int, int],
        pids: Sequence[int],
        writers: dict[_Pipe, PipeWriter],
        readers: dict[_Pipe, PipeReader],
        memory: DeviceMemory | None,
    ) -> None:
        records, received = _Pipe("records", *edge), _Pipe("received", *reversed(edge))
        if records in writers:
            ends = writers[records], readers[received]
            self.senders[edge[1]] = (
                LinkSender(*ends, SlotWriter()) if memory is None else DeviceLinkSender(*ends, memory)
            )
        if records in readers:
            pid = pids[edge[0]]
            slots = SlotReader(pid) if memory is None else DeviceSlotReader(pid, memory)
            self.receivers[edge[0]] = LinkReceiver(readers[records], writers[received], slots)

    def _take_groups(
        self,
        groups: Iterable[tuple[int, ...]],
        pids: Sequence[int],
        writers: dict[_Pipe, PipeWriter],
        readers: dict[_Pipe, PipeReader],
    ) -> None:
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
