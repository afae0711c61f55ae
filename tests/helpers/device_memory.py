"""A device that threads and processes share, without one: its memory is host memory without a name."""

from __future__ import annotations

import mmap
import os
import pickle
import weakref
from collections.abc import Callable, Sequence
from itertools import count

import torch
from torch import Tensor

from lightning_pipebd.runtime.shared_memory import open_file

__all__ = ["HostMemory"]


class HostMemory:
    """Stands for the memory of a device; what is asked of this device is done at once.

    Args:
        name: Which device.

    Attributes:
        num_exports: How often a buffer was exported.
    """

    def __init__(self, name: str = "the only device") -> None:
        self.name = name
        self.num_exports = 0
        self._files: dict[int, int] = {}
        self._numbers = count()
        self._allocated: list[weakref.ref[Tensor]] = []
        self._opened: list[weakref.ref[Tensor]] = []

    @property
    def allocated_bytes(self) -> list[int]:
        """Sizes of the buffers that live."""
        return [len(buffer) for reference in self._allocated if (buffer := reference()) is not None]

    @property
    def num_open(self) -> int:
        """Buffers of others that are open here."""
        return sum(reference() is not None for reference in self._opened)

    def allocate(self, num_bytes: int) -> Tensor:
        file = os.memfd_create("tests-device")
        os.ftruncate(file, num_bytes)
        buffer = torch.frombuffer(mmap.mmap(file, num_bytes), dtype=torch.uint8)
        weakref.finalize(buffer, os.close, file)
        self._files[buffer.data_ptr()] = file
        self._allocated.append(weakref.ref(buffer))
        return buffer

    def export(self, buffer: Tensor) -> bytes:
        self.num_exports += 1
        return pickle.dumps((os.getpid(), self._files[buffer.data_ptr()], len(buffer), next(self._numbers)))

    def open(self, export: bytes) -> Tensor:
        pid, number, size, _ = pickle.loads(export)
        file = open_file(pid, number, os.O_RDWR)
        try:
            buffer = torch.frombuffer(mmap.mmap(file, size), dtype=torch.uint8)
        finally:
            os.close(file)
        self._opened.append(weakref.ref(buffer))
        return buffer

    def mark(self) -> Callable[[], None]:
        return lambda: None

    def take(self, parts: Sequence[Tensor]) -> list[Tensor]:
        return [part.clone() for part in parts]
