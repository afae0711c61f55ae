"""What the ranks compute on: their devices, nodes, threads and memory."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from lightning_pipebd.planning.cluster import Cluster

__all__ = ["Machine", "find_cluster"]


class Machine(NamedTuple):
    """What a rank computes on.

    Args:
        device_class: Model of the device.
        node: Number of its node.
        num_threads: Threads with which it computes.
        memory_bytes: What the device has free; `None` where nobody counts.
    """

    device_class: str
    node: int
    num_threads: int
    memory_bytes: int | None

    @classmethod
    def here(cls, device: torch.device, node: int) -> Machine:
        """Describe this rank."""
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            held = torch.cuda.memory_reserved(device)
            return cls(torch.cuda.get_device_name(device), node, torch.get_num_threads(), free + held)
        return cls(_processor(), node, torch.get_num_threads(), None)


def find_cluster(machines: Sequence[Machine], memory_limit_bytes: int | None) -> Cluster:
    """Describe the ranks; a limit of `None` is what each device has free."""
    return Cluster(
        device_class=tuple(machine.device_class for machine in machines),
        node=tuple(machine.node for machine in machines),
        memory_limit_bytes=tuple(memory_limit_bytes or machine.memory_bytes for machine in machines),
    )


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine() or "cpu"
