"""Shared memory: how tensors pass between ranks of one host, with one copy and no socket.

The sender keeps *slots*, pieces of anonymous memory that its readers map as well. It copies a message's tensors into
a free slot and tells the slot's number; the readers' tensors lie in the slot itself, and the slot is free again when
the last of them is gone. Nothing is ever to be unlinked: the memory has no name, and the system takes it back when
all processes have ended, however they end.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import secrets
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_pipebd.runtime.layouts import TensorLayout

__all__ = [
    "MOST_READERS",
    "Passport",
    "SlotReader",
    "SlotWriter",
    "issue_passport",
    "lay_out",
    "open_file",
    "slot_size",
]

# A slot begins with one byte for each reader, which tells whether that reader still uses it; tensors start at multiples
# of a cache line.
_LINE = 64
_SMALLEST_SLOT = 64 * 1024
MOST_READERS = _LINE
"""Readers that a slot has room for."""


class Passport(NamedTuple):
    """By what another process finds out whether it can map this process's memory."""

    boot: str
    pid: int
    file: int
    token: bytes

    def is_readable(self) -> bool:
        """Tell whether this process sees the memory of the passport's owner: same host, same namespace, allowed to."""
        if not self.boot or self.boot != _boot():
            return False
        try:
            with open(_path(self.pid, self.file), "rb") as file:
                return file.read() == self.token
        except OSError:
            return False

    def destroy(self) -> None:
        """Take the passport back, when everybody has looked at it; only its owner may."""
        if self.file >= 0:
            os.close(self.file)


def issue_passport() -> Passport:
    """Give this process's passport; no other process can read it where the system has no anonymous files."""
    token = secrets.token_bytes(16)
    try:
        file = os.memfd_create("pipebd-passport")
    except (AttributeError, OSError):
        # Not on Linux, or in a container that forbids it.
        return Passport("", os.getpid(), -1, token)
    os.write(file, token)
    return Passport(_boot(), os.getpid(), file, token)


def open_file(pid: int, file: int, flags: int) -> int:
    """Open a file that another process of this host has open; give its number here.

    Raises:
        OSError: The process has ended, or has closed the file.
    """
    return os.open(_path(pid, file), flags | os.O_CLOEXEC)


class SlotWriter:
    """The sender's slots for its readers.

    There are as many as the readers hold messages at once, which the relay bounds.

    Args:
        num_readers: How many read each message; at most :data:`MOST_READERS`.
    """

    def __init__(self, num_readers: int = 1) -> None:
        self._slots: dict[int, mmap.mmap] = {}
        self._nobody, self._everybody = bytes(num_readers), b"\1" * num_readers

    def write(self, flats: Sequence[Tensor]) -> tuple[int, int]:
        """Copy tensors into a free slot; give the slot's file number and size, by which the readers find it.

        Args:
            flats: Tensors of one dimension, in host memory or on a device.
        """
        offsets, end = lay_out([flat.numel() * flat.element_size() for flat in flats])
        number, memory = self._take_slot(end)
        for flat, offset in zip(flats, offsets, strict=True):
            torch.frombuffer(memory, dtype=flat.dtype, count=flat.numel(), offset=offset).copy_(flat)
        return number, len(memory)

    def write_joined(self, tensors: Sequence[Tensor]) -> tuple[int, int]:
        """Copy host tensors of one type into a free slot, as one tensor of one dimension; give the slot as `write`."""
        flats = [tensor.detach().resolve_conj().resolve_neg().reshape(-1) for tensor in tensors]
        count, dtype = sum(flat.numel() for flat in flats), flats[0].dtype
        number, memory = self._take_slot(_LINE + count * dtype.itemsize)
        torch.cat(flats, out=torch.frombuffer(memory, dtype=dtype, count=count, offset=_LINE))
        return number, len(memory)

    def _take_slot(self, num_bytes: int) -> tuple[int, mmap.mmap]:
        number, memory = self._free_slot(num_bytes)
        memory[: len(self._everybody)] = self._everybody
        return number, memory

    def _free_slot(self, num_bytes: int) -> tuple[int, mmap.mmap]:
        fitting = [
            (len(memory), number) for number, memory in self._slots.items() if self._fits(len(memory), num_bytes)
        ]
        for _, number in sorted(fitting):
            if self._is_free(number):
                return number, self._slots[number]
        size = slot_size(num_bytes)
        number = os.memfd_create("pipebd-slot")
        weakref.finalize(self, os.close, number).atexit = False
        os.ftruncate(number, size)
        self._slots[number] = mmap.mmap(number, size)
        return number, self._slots[number]

    def _is_free(self, number: int) -> bool:
        return self._slots[number][: len(self._nobody)] == self._nobody

    def _fits(self, size: int, num_bytes: int) -> bool:
        return size >= num_bytes


class SlotReader:
    """A reader's view of one sender's slots.

    Args:
        pid: Process of the sender; a sender may read its own slots.
        place: Which of the sender's readers this is.
    """

    def __init__(self, pid: int, place: int = 0) -> None:
        self._pid = pid
        self._place = place
        self._slots: dict[int, mmap.mmap] = {}

    def read(self, number: int, size: int, layouts: Sequence[TensorLayout]) -> list[Tensor]:
        """Give the tensors of a slot; they keep it in use as long as one of them, or a view of one, lives.

        Raises:
            OSError: The sender has ended.
        """
        memory = self._map(number, size)
        # An object of its own for each message: tensors refer to it, so that its end is the end of the last of them.
        lease = (ctypes.c_char * size).from_buffer(memory)
        weakref.finalize(lease, _release, memory, self._place, os.getpid()).atexit = False
        offsets, _ = lay_out([layout.num_elements * layout.dtype.itemsize for layout in layouts])
        return [
            layout.restore(torch.frombuffer(lease, dtype=layout.dtype, count=layout.num_elements, offset=offset))
            for layout, offset in zip(layouts, offsets, strict=True)
        ]

    def _map(self, number: int, size: int) -> mmap.mmap:
        if number not in self._slots:
            file = open_file(self._pid, number, os.O_RDWR)
            try:
                self._slots[number] = mmap.mmap(file, size)
            finally:
                os.close(file)
        return self._slots[number]


def slot_size(num_bytes: int) -> int:
    """Give the size of a new slot: a power of two, so that batches of changing size share slots.

    Pages that are never touched take no memory.

    Example:
        >>> slot_size(1), slot_size(100_000)
        (65536, 131072)
    """
    return max(_SMALLEST_SLOT, 1 << (num_bytes - 1).bit_length())


def lay_out(sizes: Sequence[int]) -> tuple[list[int], int]:
    """Give the places of tensors of these sizes in a slot, and the end of the last one.

    Example:
        >>> lay_out([4, 100])
        ([64, 128], 256)
    """
    offsets, end = [], _LINE
    for size in sizes:
        offsets.append(end)
        end += -(-size // _LINE) * _LINE
    return offsets, end


def _release(memory: mmap.mmap, place: int, owner: int) -> None:
    # A forked child (a loader's worker) has copies of the parent's objects; they do not count.
    if os.getpid() == owner:
        memory[place] = 0


def _path(pid: int, file: int) -> str:
    return f"/proc/{pid}/fd/{file}"


def _boot() -> str:
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    except OSError:
        return ""
