"""Links measured with the transport that training uses: messages to and fro, and reductions of several sizes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from lightning_pipebd.planning.costs import LinkCost, Overheads, ReduceTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.runtime.sampling import median_ms
from lightning_pipebd.runtime.transport import Lane, Message, Transport

__all__ = ["Links", "Passage", "link_cost", "measure_links", "probe_edges", "probe_groups"]

_SMALL_BYTES, _LARGE_BYTES = 4096, 4 << 20
# Between GPUs a few MiB take less time than telling of them.
_LARGE_CUDA_BYTES = 256 << 20
_NUM_SMALL, _NUM_LARGE, _NUM_REDUCES = 20, 6, 5


class Links(NamedTuple):
    """What was found.

    Args:
        same_node: Link between ranks of one node.
        other_node: Link between ranks of different nodes.
        overheads: What a message, and a reduction, takes of a rank's time however small it is.
    """

    same_node: LinkCost = LinkCost()
    other_node: LinkCost = LinkCost()
    overheads: Overheads = Overheads()


class Passage(NamedTuple):
    """One direction of a message measured to and fro, or a reduction; and what it takes of the rank's own time.

    With a GPU the rank's own time is that of beginning it: the rest is done by other threads, or by the GPU, and the
    main thread does not wait for it in training.

    Args:
        ms: How long it takes.
        busy_ms: How much of the rank's own time.
    """

    ms: float
    busy_ms: float


class _Reduction(NamedTuple):
    """Reductions of one group, and what they take of the rank's own time."""

    times: ReduceTimes
    occupation: float
    own_ms: float


def probe_edges(nodes: Sequence[int]) -> list[tuple[int, int]]:
    """Give the pairs of ranks whose link is measured: rank 0 with a rank of its node, and with one of another.

    Example:
        >>> probe_edges([0, 0, 1, 1]), probe_edges([0])
        ([(0, 1), (1, 0), (0, 2), (2, 0)], [])
    """
    peers = [next((rank for rank in range(1, len(nodes)) if (nodes[rank] == nodes[0]) == near), 0) for near in (1, 0)]
    return [edge for peer in peers if peer for edge in ((0, peer), (peer, 0))]


def probe_groups(num_ranks: int) -> list[tuple[int, ...]]:
    """Give the groups of ranks whose reductions are measured: the first 2, 4, 8, ... ranks, and all.

    Example:
        >>> probe_groups(3), probe_groups(1)
        ([(0, 1), (0, 1, 2)], [])
    """
    sizes = {2**power for power in range(1, num_ranks.bit_length())} | {num_ranks}
    return [tuple(range(size)) for size in sorted(sizes) if 2 <= size <= num_ranks]


def measure_links(transport: Transport, nodes: Sequence[int], device: torch.device, *, num_threads: int) -> Links:
    """**Collective** over all ranks: measure the links of a node and those between nodes, alone on the wire.

    Args:
        transport: Connected along `probe_edges` and in `probe_groups`.
        nodes: Node of every rank.
        device: Where messages lie.
        num_threads: Threads with which each rank computes.

    Returns:
        Rank 0's findings, the same on every rank. One of both is taken for the other where there is no such link.
    """
    if transport.num_ranks == 1:
        return Links()
    # Where no core is left over, what a thread in the background does is taken from the computation.
    num_here = sum(node == nodes[transport.rank] for node in nodes)
    is_crowded = device.type == "cpu" and num_here * num_threads >= len(os.sched_getaffinity(0))
    links: dict[bool, LinkCost] = {}
    message_ms = 0.0
    for sender, receiver in probe_edges(nodes)[::2]:
        link, own_ms = _measure_pair(transport, (sender, receiver), device, is_crowded=is_crowded)
        links[nodes[sender] == nodes[receiver]] = link
        message_ms = max(message_ms, own_ms)
    reduces: dict[bool, list[_Reduction]] = {True: [], False: []}
    for group in probe_groups(transport.num_ranks):
        is_near = len({nodes[rank] for rank in group}) == 1
        reduces[is_near].append(_measure_reduce(transport, group, device, is_crowded=is_crowded))
    near, far = (_with_reduces(links.get(is_near) or links[not is_near], reduces[is_near]) for is_near in (True, False))
    reduce_ms = max(found.own_ms for found in (*reduces[True], *reduces[False]))
    overheads = Overheads(send_ms=message_ms, recv_ms=message_ms, reduce_ms=reduce_ms)
    gathered: list[tuple[LinkCost, LinkCost, Overheads]] = transport.all_gather_object((near, far, overheads))
    return Links(*gathered[0])


def _with_reduces(link: LinkCost, found: Sequence[_Reduction]) -> LinkCost:
    occupation = max((reduction.occupation for reduction in found), default=link.receive_occupation)
    return replace(link, reduce_occupation=occupation, reduces=tuple(reduction.times for reduction in found))


def _occupation(small: Passage, large: Passage, *, is_cuda: bool) -> tuple[float, float]:
    """Give the fraction of a transfer that occupies the rank, and what a small one takes of its time besides.

    On a GPU to begin a transfer takes as long for any size, unless the rank copies for it.
    """
    begun = small if is_cuda else Passage(0.0, 0.0)
    occupation = (large.busy_ms - begun.busy_ms) / max(large.ms - begun.ms, 1e-6)
    occupation = min(1.0, max(0.0, occupation))
    return occupation, max(0.0, small.busy_ms - occupation * small.ms)


def link_cost(small: Passage, large: Passage, large_bytes: int, *, is_cuda: bool) -> tuple[LinkCost, float]:
    """Give the cost of a link, and what a message takes of a rank's time however small it is.

    Args:
        small: A message of 4 KiB.
        large: A message of ``large_bytes``.
        large_bytes: Its size.
        is_cuda: Whether both ranks have a GPU.
    """
    occupation, own_ms = _occupation(small, large, is_cuda=is_cuda)
    link = LinkCost(
        latency_ms=small.ms,
        bytes_per_ms=(large_bytes - _SMALL_BYTES) / max(large.ms - small.ms, 1e-6),
        send_occupation=occupation,
        # On a GPU's side a thread receives.
        receive_occupation=0.0 if is_cuda else occupation,
    )
    return link, own_ms


def _measure_pair(
    transport: Transport, ranks: tuple[int, int], device: torch.device, *, is_crowded: bool
) -> tuple[LinkCost, float]:
    transport.all_gather_object(None)  # nobody else uses the machine meanwhile
    if transport.rank not in ranks:
        return LinkCost(), 0.0
    small = _pass(transport, ranks, device, _SMALL_BYTES, _NUM_SMALL, is_crowded=is_crowded)
    large_bytes = _large_bytes(device)
    large = _pass(transport, ranks, device, large_bytes, _NUM_LARGE, is_crowded=is_crowded)
    return link_cost(small, large, large_bytes, is_cuda=device.type == "cuda")


def _large_bytes(device: torch.device) -> int:
    return _LARGE_CUDA_BYTES if device.type == "cuda" else _LARGE_BYTES


def _pass(
    transport: Transport, ranks: tuple[int, int], device: torch.device, num_bytes: int, count: int, *, is_crowded: bool
) -> Passage:
    payload = torch.zeros(num_bytes, dtype=torch.uint8, device=device)
    peer = ranks[1] if transport.rank == ranks[0] else ranks[0]
    busy_clock = _busy_clock(is_crowded=is_crowded)
    times, busy = [], []

    def send() -> float:
        start = time.perf_counter()
        pending = transport.send(Message((0, 0, 0, 0), payload), peer, Lane.RELAY)
        begun_ms = (time.perf_counter() - start) * 1000
        pending.wait()
        return begun_ms

    for _ in range(count + 1):
        start, busy_start = time.perf_counter(), busy_clock()
        if transport.rank == ranks[0]:
            begun_ms = send()
            transport.recv(peer, Lane.RELAY)
        else:
            transport.recv(peer, Lane.RELAY)
            begun_ms = send()
        # There and back.
        times.append((time.perf_counter() - start) * 500)
        busy.append(begun_ms if device.type == "cuda" else (busy_clock() - busy_start) * 500)
    # The first message also tells the receiver its layout.
    return Passage(median_ms(times[1:]), median_ms(busy[1:]))


def _measure_reduce(
    transport: Transport, group: tuple[int, ...], device: torch.device, *, is_crowded: bool
) -> _Reduction:
    busy_clock = _busy_clock(is_crowded=is_crowded)
    found = []
    large_bytes, is_cuda = _large_bytes(device), device.type == "cuda"
    for num_bytes in (_SMALL_BYTES, large_bytes):
        tensor = torch.zeros(num_bytes // 4, device=device)
        transport.all_gather_object(None)
        times, busy = [], []
        for _ in range(_NUM_REDUCES + 2 if transport.rank in group else 0):
            start, busy_start = time.perf_counter(), busy_clock()
            pending = transport.all_reduce([tensor], group)
            begun_ms = (time.perf_counter() - start) * 1000
            pending.wait()
            if is_cuda:
                torch.cuda.synchronize(device)
            times.append((time.perf_counter() - start) * 1000)
            busy.append(begun_ms if is_cuda else (busy_clock() - busy_start) * 1000)
        # The first one makes room.
        found.append(Passage(median_ms(times[2:]), median_ms(busy[2:])) if times else Passage(0.0, 0.0))
    curve = Curve(zip((_SMALL_BYTES, large_bytes), (passage.ms for passage in found), strict=True))
    return _Reduction(ReduceTimes(num_ranks=len(group), ms=curve), *_occupation(*found, is_cuda=is_cuda))


def _busy_clock(*, is_crowded: bool) -> Callable[[], float]:
    return time.process_time if is_crowded else time.thread_time
