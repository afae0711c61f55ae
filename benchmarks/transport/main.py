"""What boundaries and sums of gradients cost between two ranks of one host: shared memory against gloo.

    python benchmarks/transport/main.py

Two processes, one thread each. *Bandwidth*: messages are sent one after another, two under way as in training; the
time ends when the last one has arrived. *Latency*: half of a round trip of one message. In both, the receiver reads
one number of every message; it does not copy them. *Copy*: one process copies a tensor of this size to another. *Sum*:
both ranks add a tensor of this size over both, one sum after another.
Rounds of all ways are interleaved, and medians are compared.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections import defaultdict, deque
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from lightning_pipebd.runtime.transport import Lane, Message, Pending, ProcessGroupTransport

SIZES = (4 * 1024, 64 * 1024, 256 * 1024, 1024**2, 4 * 1024**2, 16 * 1024**2, 64 * 1024**2)
NUM_UNDER_WAY = 2
Figures = dict[str, dict[int, list[float]]]


def stream(transport: ProcessGroupTransport, tensor: Tensor, num_messages: int) -> float:
    """Give the seconds that a message takes when others follow it."""
    transport.all_gather_object(None)
    start = time.perf_counter()
    if transport.rank == 0:
        pending: deque[Pending] = deque()
        for index in range(num_messages):
            pending.append(transport.send(Message((index, 0, 0, 0), tensor), 1, Lane.RELAY))
            if len(pending) > NUM_UNDER_WAY:
                pending.popleft().wait()
        for each in pending:
            each.wait()
        transport.recv(1, Lane.RELAY)
    else:
        for _ in range(num_messages):
            transport.recv(0, Lane.RELAY).tree[-1].item()
        transport.send(Message((0, 0, 0, 0)), 0, Lane.RELAY).wait()
    return (time.perf_counter() - start) / num_messages


def bounce(transport: ProcessGroupTransport, tensor: Tensor, num_messages: int) -> float:
    """Give the seconds of a message that goes alone, half of a round trip."""
    transport.all_gather_object(None)
    peer = 1 - transport.rank
    start = time.perf_counter()
    for _ in range(num_messages):
        if transport.rank == 0:
            transport.send(Message((0, 0, 0, 0), tensor), peer, Lane.RELAY).wait()
        transport.recv(peer, Lane.RELAY).tree[-1].item()
        if transport.rank == 1:
            transport.send(Message((0, 0, 0, 0), tensor), peer, Lane.RELAY).wait()
    return (time.perf_counter() - start) / num_messages / 2


def add(transport: ProcessGroupTransport, tensor: Tensor, num_sums: int) -> float:
    """Give the seconds of a sum over both ranks."""
    values = torch.zeros(len(tensor) // 4)
    transport.all_gather_object(None)
    start = time.perf_counter()
    for _ in range(num_sums):
        transport.all_reduce([values], (0, 1)).wait()
    return (time.perf_counter() - start) / num_sums


def copy(tensor: Tensor, num_messages: int) -> float:
    """Give the seconds of a copy into memory that is there already."""
    target = torch.empty_like(tensor)
    start = time.perf_counter()
    for _ in range(num_messages):
        target.copy_(tensor)
    return (time.perf_counter() - start) / num_messages


def measure(rank: int, folder: str, repeats: int) -> None:
    """Measure on one of the two ranks; rank 0 writes the figures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    device, edges = torch.device("cpu"), [(0, 1), (1, 0)]
    ways = {
        "shared memory": ProcessGroupTransport(device, edges=edges, groups=[(0, 1)]),
        "gloo": ProcessGroupTransport(device, edges=edges, groups=[(0, 1)], shares_memory=False),
    }
    figures: dict[str, Figures] = {
        "stream": defaultdict(lambda: defaultdict(list)),
        "bounce": defaultdict(lambda: defaultdict(list)),
        "sum": defaultdict(lambda: defaultdict(list)),
    }
    for size in SIZES:
        tensor = torch.ones(size, dtype=torch.uint8)
        num_messages = max(6, min(100, 128 * 1024**2 // size))
        for _ in range(repeats + 1):
            for name, transport in ways.items():
                figures["stream"][name][size].append(stream(transport, tensor, num_messages))
                figures["bounce"][name][size].append(bounce(transport, tensor, max(6, num_messages // 4)))
                figures["sum"][name][size].append(add(transport, tensor, max(6, num_messages // 4)))
            if rank == 0:
                figures["stream"]["copy"][size].append(copy(tensor, num_messages))
    if rank == 0:
        Path(folder, "figures.json").write_text(json.dumps(figures))
    dist.destroy_process_group()


def main() -> None:
    """Start the two processes and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(measure, args=(folder, arguments.repeats), nprocs=2)
        figures = json.loads(Path(folder, "figures.json").read_text())
    sys.stdout.write(
        "size KiB | GB/s: shared  gloo  copy | gloo / shared | us alone: shared  gloo | us sum: shared  gloo\n"
    )
    for size in SIZES:
        # The first round of each size makes slots and connections.
        seconds, alone, sums = (
            {name: statistics.median(found[str(size)][1:]) for name, found in figures[kind].items()}
            for kind in ("stream", "bounce", "sum")
        )
        speed = {name: size / value / 1e9 for name, value in seconds.items()}
        ratio = seconds["gloo"] / seconds["shared memory"]
        sys.stdout.write(
            f"{size // 1024:8} | {speed['shared memory']:12.2f} {speed['gloo']:5.2f} {speed['copy']:5.2f} | "
            f"{ratio:13.2f} | {alone['shared memory'] * 1e6:16.0f} {alone['gloo'] * 1e6:5.0f} | "
            f"{sums['shared memory'] * 1e6:14.0f} {sums['gloo'] * 1e6:5.0f}\n"
        )


if __name__ == "__main__":
    main()
