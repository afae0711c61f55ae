"""Edges between ranks that compute on one device: which they are, and how a message is told when it has been copied.

What a rank asks of a device is done later than it is asked. A thread of the sender's waits until a message has been
copied, and only then tells the receiver, who therefore needs no event of another process: one that dies leaves nobody
waiting for what its device would have done.
"""

from __future__ import annotations

import queue
import secrets
import threading
import warnings
import weakref
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.runtime.device_slots import DeviceMemory, DeviceSlotWriter
from lightning_pipebd.runtime.links import LinkSender
from lightning_pipebd.runtime.pipes import PipeReader, PipeWriter

__all__ = ["DeviceLinkSender", "edges_on_device"]

_Edge = tuple[int, int]
_Records = queue.SimpleQueue[tuple[Callable[[], None], bytes] | None]
_NUM_PROBED = 16


class DeviceLinkSender(LinkSender):
    """The sending end of an edge on one device; its thread ends with it.

    Args:
        records: Pipe to the receiver.
        acknowledgements: Pipe from the receiver.
        memory: Where tensors pass.
    """

    def __init__(self, records: PipeWriter, acknowledgements: PipeReader, memory: DeviceMemory) -> None:
        super().__init__(records, acknowledgements, DeviceSlotWriter(memory))
        self._memory = memory
        # Ends with None.
        self._asked: _Records = queue.SimpleQueue()
        self._told = _Told()
        threading.Thread(
            target=_tell_when_done, args=(self._asked, records, self._told), name="device-records", daemon=True
        ).start()
        weakref.finalize(self, self._asked.put, None).atexit = False

    @override
    def wait(self, number: int) -> None:
        """Wait until a message was received.

        Raises:
            ConnectionError: The receiver has ended.
            RuntimeError: The device has failed.
        """
        # What was never told is never acknowledged.
        self._told.wait(number)
        super().wait(number)

    @override
    def _tell(self, record: bytes) -> None:
        self._asked.put((self._memory.mark(), record))


class _Told:
    """How many records have been written to the pipe, or why no more will be."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._number = 0
        self._failure: BaseException | None = None

    def advance(self) -> None:
        with self._changed:
            self._number += 1
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        with self._changed:
            self._failure = error
            self._changed.notify_all()

    def wait(self, number: int) -> None:
        with self._changed:
            while self._number < number:
                if self._failure is not None:
                    raise self._failure
                self._changed.wait()


def _tell_when_done(asked: _Records, pipe: PipeWriter, told: _Told) -> None:
    while (next_one := asked.get()) is not None:
        wait_until_copied, record = next_one
        try:
            wait_until_copied()
            pipe.write(record)
        except BaseException as error:
            # What follows is not told either: the receiver counts messages.
            told.fail(error)
            return
        told.advance()


class _Offer(NamedTuple):
    """What a sender would have a receiver open, and what the receiver should find there; or why it cannot."""

    export: bytes
    content: bytes
    problem: str = ""


def edges_on_device(
    rank: int, edges: Iterable[_Edge], memory: DeviceMemory | None, gather: Callable[[Any], list[Any]]
) -> list[_Edge]:
    """**Collective** over all ranks: give those of the edges whose receiver has opened the sender's device memory.

    Args:
        rank: This rank.
        edges: Edges between neighbours, the same on every rank.
        memory: Memory of the device that this rank computes on; `None` if that is none.
        gather: **Collective** over all ranks: gives every rank's value.
    """
    names = gather("" if memory is None else memory.name)
    shared = [edge for edge in edges if names[edge[0]] and names[edge[0]] == names[edge[1]]]
    if not shared:
        return []
    offers: dict[_Edge, _Offer] = {}
    found: dict[_Edge, str] = {}
    # They must live until the receivers have looked.
    buffers: list[Tensor] = []
    if memory is not None:
        offers = {edge: _offer(memory, buffers) for edge in shared if edge[0] == rank}
    offered: list[Mapping[_Edge, _Offer]] = gather(offers)
    if memory is not None:
        found = {edge: _look(memory, offered[edge[0]][edge]) for edge in shared if edge[1] == rank}
    problems = {edge: problem for of_rank in gather(found) for edge, problem in of_rank.items()}
    buffers.clear()
    refused = [edge for edge in shared if problems[edge]]
    if refused and rank == min(map(min, refused)):
        pairs = ", ".join(f"{sender} to {receiver}" for sender, receiver in refused)
        warnings.warn(
            f"Boundaries from rank {pairs} pass through host memory, although both compute on one GPU: one cannot open "
            f"the other's memory there ({problems[refused[0]]}).",
            stacklevel=2,
        )
    return [edge for edge in shared if not problems[edge]]


def _offer(memory: DeviceMemory, buffers: list[Tensor]) -> _Offer:
    content = secrets.token_bytes(_NUM_PROBED)
    try:
        buffer = memory.allocate(_NUM_PROBED)
        buffers.append(buffer.copy_(torch.frombuffer(bytearray(content), dtype=torch.uint8)))
        export = memory.export(buffer)
        memory.mark()()
    except Exception as error:
        # Whatever it is, host memory remains.
        return _Offer(b"", content, _in_words(error))
    return _Offer(export, content)


def _look(memory: DeviceMemory, offer: _Offer) -> str:
    if offer.problem:
        return offer.problem
    try:
        (found,) = memory.take([memory.open(offer.export)])
    except Exception as error:
        return _in_words(error)
    return "" if bytes(found.tolist()) == offer.content else "what is there is not what was written"


def _in_words(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[0].rstrip(".") if lines else type(error).__name__
