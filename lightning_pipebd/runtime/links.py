"""Links: the two ends of an edge between neighbours.

::

    sender -- record: fields, layout, slot --> receiver      a pipe; the tensors lie in the sender's slot
    sender <------ one byte per message ------ receiver      a pipe; what was received, counted
"""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Sequence

from torch import Tensor

from lightning_pipebd.runtime.layouts import TensorLayout
from lightning_pipebd.runtime.pipes import PipeReader, PipeWriter
from lightning_pipebd.runtime.shared_memory import SlotReader, SlotWriter

__all__ = ["NUM_HEADER", "LinkReceiver", "LinkSender"]

NUM_HEADER = 8
"""Integers in front of a message."""

_HEADER = struct.Struct(f"={NUM_HEADER}q")
_MOST_ACKNOWLEDGEMENTS = 256


class LinkSender:
    """The sending end of an edge between neighbours.

    Args:
        records: Pipe to the receiver.
        acknowledgements: Pipe from the receiver.
        slots: Where the tensors of messages lie.
    """

    def __init__(self, records: PipeWriter, acknowledgements: PipeReader, slots: SlotWriter) -> None:
        self._slots = slots
        self._records = records
        self._acknowledgements = acknowledgements
        self._num_sent = self._num_received = 0
        self._lock = threading.Lock()

    def place(self, flats: Sequence[Tensor]) -> tuple[int, int]:
        """Copy tensors of one dimension into a slot; give its number and size."""
        return self._slots.write(flats)

    def send(self, header: Sequence[int], blob: bytes) -> int:
        """Tell the receiver; give the message's number."""
        self._tell(_HEADER.pack(*header) + blob)
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

    def _tell(self, record: bytes) -> None:
        self._records.write(record)


class LinkReceiver:
    """The receiving end of an edge between neighbours.

    Args:
        records: Pipe from the sender.
        acknowledgements: Pipe to the sender.
        slots: Where the tensors of messages lie.
    """

    def __init__(self, records: PipeReader, acknowledgements: PipeWriter, slots: SlotReader) -> None:
        self._slots = slots
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
