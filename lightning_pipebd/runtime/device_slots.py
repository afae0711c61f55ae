"""Device slots: how tensors pass between ranks that compute on one device, without leaving it.

By a slot of shared memory the reader finds a message, and frees it; but the tensors lie in a *buffer* on the device,
which the reader's process has opened as well. The sender copies a message in, the reader copies it out and hands on
what is its own: the life of no tensor reaches into another process.

::

    slot, in host memory      a byte per reader, as ever | size of the export | export: by which the buffer is opened
    buffer, on the device     the tensors, at the places that they would have in the slot

A slot may come to name another buffer, or none; the reader then closes what it has open. Nothing here tells a reader
that a copy is done: it must hear of a message only then.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.runtime.layouts import TensorLayout
from lightning_pipebd.runtime.shared_memory import MOST_READERS, SlotReader, SlotWriter, lay_out, slot_size

__all__ = ["DeviceMemory", "DeviceSlotReader", "DeviceSlotWriter"]

_SIZE = struct.Struct("=q")
_EXPORT = MOST_READERS + _SIZE.size
# A buffer that so many messages did not use was for a plan of before, or for measuring.
_NUM_IDLE = 1000


class DeviceMemory(Protocol):
    """The memory of one device, as one process sees it.

    Attributes:
        name: Says which device it is; the same in every process on it.
    """

    name: str

    def allocate(self, num_bytes: int) -> Tensor:
        """Give a buffer of this many bytes, at least one, which no other process has a part in yet."""

    def export(self, buffer: Tensor) -> bytes:
        """Give that by which one other process opens an allocated buffer; another one needs another export."""

    def open(self, export: bytes) -> Tensor:
        """Give the buffer that another process on this device has allocated and exported."""

    def mark(self) -> Callable[[], None]:
        """Give what returns, on any thread, when all is done that this thread has asked of the device so far."""

    def take(self, parts: Sequence[Tensor]) -> list[Tensor]:
        """Give copies of parts of opened buffers; when this returns they are made, and the buffers may change."""


class DeviceSlotWriter(SlotWriter):
    """The sender's slots for a reader on the same device.

    Args:
        memory: Where the buffers are.
    """

    def __init__(self, memory: DeviceMemory) -> None:
        super().__init__()
        self._memory = memory
        self._buffers: dict[int, Tensor] = {}
        self._last_use: dict[int, int] = {}
        self._num_written = 0

    @override
    def write(self, flats: Sequence[Tensor]) -> tuple[int, int]:
        offsets, end = lay_out([flat.numel() * flat.element_size() for flat in flats])
        self._drop_idle()
        number, slot = self._take_slot(end)
        self._num_written += 1
        self._last_use[number] = self._num_written
        buffer = self._buffers.get(number)
        if buffer is None or len(buffer) < end:
            buffer = self._buffers[number] = self._memory.allocate(end)
            _write_export(slot, self._memory.export(buffer))
        for flat, offset in zip(flats, offsets, strict=True):
            _part(buffer, offset, flat.dtype, flat.numel()).copy_(flat)
        return number, len(slot)

    def _drop_idle(self) -> None:
        for number, last in self._last_use.copy().items():
            if last <= self._num_written - _NUM_IDLE and self._is_free(number):
                _write_export(self._slots[number], b"")
                del self._buffers[number], self._last_use[number]

    @override
    def _fits(self, size: int, num_bytes: int) -> bool:
        # Unlike pages, a buffer takes memory whether it is touched or not: small messages shall not hold large ones.
        return size == slot_size(num_bytes)


class DeviceSlotReader(SlotReader):
    """A reader's view of the slots of one sender on the same device.

    Args:
        pid: Process of the sender.
        memory: Where the buffers are.
    """

    def __init__(self, pid: int, memory: DeviceMemory) -> None:
        super().__init__(pid)
        self._memory = memory
        self._buffers: dict[int, Tensor] = {}
        self._exports: dict[int, bytes] = {}

    @override
    def read(self, number: int, size: int, layouts: Sequence[TensorLayout]) -> list[Tensor]:
        """Give copies of the tensors of a slot, which is free again; each lies where the sender's did.

        Raises:
            OSError: The sender has ended.
            RuntimeError: The device has failed.
        """
        slot = self._map(number, size)
        buffer = self._open(number)
        offsets, _ = lay_out([layout.num_elements * layout.dtype.itemsize for layout in layouts])
        parts = [
            _part(buffer, offset, layout.dtype, layout.num_elements)
            for layout, offset in zip(layouts, offsets, strict=True)
        ]
        flats = self._memory.take(parts)
        slot[self._place] = 0
        return [
            layout.restore(flat if layout.is_cuda else flat.cpu()) for layout, flat in zip(layouts, flats, strict=True)
        ]

    def _open(self, number: int) -> Tensor:
        # First, because the sender's device has the memory back only when it is open nowhere.
        for known in [known for known in self._buffers if _read_export(self._slots[known]) != self._exports[known]]:
            del self._buffers[known], self._exports[known]
        if number not in self._buffers:
            export = _read_export(self._slots[number])
            self._buffers[number] = self._memory.open(export)
            self._exports[number] = export
        return self._buffers[number]


def _part(buffer: Tensor, offset: int, dtype: torch.dtype, count: int) -> Tensor:
    return buffer[offset : offset + count * dtype.itemsize].view(dtype)


def _write_export(slot: mmap.mmap, export: bytes) -> None:
    end = _EXPORT + len(export)
    if end > len(slot):
        raise OSError(f"a slot of {len(slot)} bytes has no room for an export of {len(export)}")
    slot[MOST_READERS:end] = _SIZE.pack(len(export)) + export


def _read_export(slot: mmap.mmap) -> bytes:
    (size,) = _SIZE.unpack(slot[MOST_READERS:_EXPORT])
    return slot[_EXPORT : _EXPORT + size]
