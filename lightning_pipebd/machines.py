"""What the ranks compute on: their devices, nodes, threads and memory."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.runtime.transport import Transport

__all__ = ["Machine", "find_cluster", "find_memory", "usable_bytes"]

# Communicators, workspaces of the device's libraries, what allocators leave unused.
_LEAST_RESERVE_BYTES = 2**30
_RESERVE_SHARE = 20


class Machine(NamedTuple):
    """What a rank computes on.

    Args:
        device_class: Model of the device.
        node: Number of its node.
        num_threads: Threads with which it computes.
        num_sharing: Ranks that compute on the same GPU, this one included.
    """

    device_class: str
    node: int
    num_threads: int
    num_sharing: int = 1

    @classmethod
    def here(cls, device: torch.device, node: int, *, devices: Sequence[torch.device] = ()) -> Machine:
        """Describe this rank.

        Args:
            device: Where it computes.
            node: Number of its node.
            devices: Of all ranks of the node.
        """
        if device.type == "cuda":
            name = torch.cuda.get_device_name(device)
            return cls(name, node, torch.get_num_threads(), max(1, list(devices).count(device)))
        return cls(_processor(), node, torch.get_num_threads())


def find_memory(
    transport: Transport, device: torch.device, machines: Sequence[Machine], memory_limit_bytes: int | None
) -> list[int | None]:
    """**Collective** over all ranks: give what each may use: the limit, or what its GPU has left; `None` on CPU.

    To be called after measuring: communicators and workspaces are there by then.

    Args:
        transport: Reaches the other ranks.
        device: Where this rank computes.
        machines: Of every rank.
        memory_limit_bytes: What the user allows; `None` without.
    """
    if memory_limit_bytes is not None:
        return [memory_limit_bytes] * len(machines)
    mine = None
    if device.type == "cuda":
        free_bytes, _ = torch.cuda.mem_get_info(device)
        held_bytes = torch.cuda.memory_reserved(device)
        mine = usable_bytes(free_bytes, held_bytes, machines[transport.rank].num_sharing)
    found: list[int | None] = transport.all_gather_object(mine)
    return found


def usable_bytes(free_bytes: int, held_bytes: int, num_sharing: int) -> int:
    """Give what a rank may plan with: its part of what a GPU has free, and what it holds, less a reserve.

    The reserve is a twentieth, at least 1 GiB.

    Args:
        free_bytes: What nobody holds.
        held_bytes: What this rank's allocator holds.
        num_sharing: Ranks on this GPU.

    Example:
        >>> usable_bytes(78 * 2**30, 2 * 2**30, 1) // 2**30, usable_bytes(12 * 2**30, 0, 2) // 2**30
        (76, 5)
    """
    own_bytes = free_bytes // num_sharing + held_bytes
    return max(1, own_bytes - max(_LEAST_RESERVE_BYTES, own_bytes // _RESERVE_SHARE))


def find_cluster(machines: Sequence[Machine], memory_bytes: Sequence[int | None]) -> Cluster:
    """Describe the ranks, each with what memory it may use."""
    return Cluster(
        device_class=tuple(machine.device_class for machine in machines),
        node=tuple(machine.node for machine in machines),
        memory_limit_bytes=tuple(memory_bytes),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine() or "cpu"
