"""Departures: messages to one peer that leave in order, each when the device has computed it.

The main thread runs ahead of a GPU. If a message left at once, the peer's GPU would begin to receive what is not there
yet, and both GPUs would be held by a kernel that waits; whatever waits for a whole GPU meanwhile (memory that is given
back, a graph that is recorded) would wait for another rank::

    main thread   compute, mark, post ---------> the next block
    departures    wait for the mark, then the header; when the peer has taken it, the tensors; wait until they are there
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor

from lightning_pipebd.runtime.cuda_memory import mark_stream

__all__ = ["CudaSide", "Departure", "Departures", "Mark", "Side"]

_LINGER_S = 5.0


class Mark(Protocol):
    """A point in what a device was given to do, such as a CUDA event."""

    def synchronize(self) -> None:
        """Wait until the device has come to it."""


class Side(Protocol):
    """What a device does beside computing."""

    def mark(self) -> Mark:
        """Mark what the calling thread has given the device to do so far."""

    def way(self, ranks: tuple[int, int]) -> AbstractContextManager[None]:
        """Give a context whose work goes beside the computation; it ends when that work is done.

        Args:
            ranks: Sender and receiver; each pair has a queue of its own.
        """

    def hand_over(self, tensor: Tensor) -> None:
        """Have the computation use a tensor that was made beside it."""


class CudaSide:
    """Streams of a GPU beside the one that computes.

    Args:
        device: The GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._streams: dict[tuple[int, int], torch.cuda.Stream] = {}

    def mark(self) -> Mark:
        """Mark what the current stream was given to do so far."""
        return mark_stream(torch.cuda.current_stream(self._device))

    @contextmanager
    def way(self, ranks: tuple[int, int]) -> Iterator[None]:
        """Give a context whose work goes to a stream of these ranks' own; it ends when that work is done."""
        if ranks not in self._streams:
            self._streams[ranks] = torch.cuda.Stream(self._device)  # type: ignore[no-untyped-call]
        stream = self._streams[ranks]
        with torch.cuda.device(self._device), torch.cuda.stream(stream):
            yield
            mark_stream(stream).synchronize()

    def hand_over(self, tensor: Tensor) -> None:
        """Keep a tensor's memory from being used again before the computation has done with it."""
        tensor.record_stream(torch.cuda.default_stream(self._device))


class Departure:
    """One message on its way.

    Args:
        mark: Where the device has computed it.
        parts: Begin to send its header, and then its tensors; each gives what is to be waited for.
    """

    def __init__(self, mark: Mark, parts: Sequence[Callable[[], Any]]) -> None:
        self._mark = mark
        self._parts = tuple(parts)
        self._is_over = threading.Event()
        self._failure: BaseException | None = None

    def wait(self) -> None:
        """Return when the message has arrived, or raise what kept it from that."""
        self._is_over.wait()
        if self._failure is not None:
            raise self._failure

    def go(self, way: AbstractContextManager[None]) -> None:
        """Send it when the device has computed it, and wait until it has arrived."""
        self._mark.synchronize()
        header, *tensors = self._parts
        with way:
            # The peer takes the header when it will receive the tensors: no kernel waits for the other rank for long.
            header().wait()
            for work in [begin() for begin in tensors]:
                work.wait()

    def end(self, failure: BaseException | None) -> None:
        """Let go of the tensors, and of whoever waits."""
        self._failure = failure
        self._parts = ()
        self._is_over.set()


class Departures:
    """Send the messages to one peer from a thread, which ends by itself when there have been none for a while.

    After one that failed, all fail alike: the peer could no longer tell what it gets.

    Args:
        side: What the device does beside computing.
        ranks: Sender and receiver.
        linger_s: How long the thread waits for a message before it ends.
    """

    def __init__(self, side: Side, ranks: tuple[int, int], *, linger_s: float = _LINGER_S) -> None:
        self._side = side
        self._ranks = ranks
        self._linger_s = linger_s
        self._posted: deque[Departure] = deque()
        self._changed = threading.Condition()
        self._is_running = False
        self._failure: BaseException | None = None

    def post(self, parts: Sequence[Callable[[], Any]]) -> Departure:
        """Have a message sent when the device has done what it was given to do so far.

        Args:
            parts: Begin to send its header, and then its tensors, which must stay unchanged until it has arrived.
        """
        departure = Departure(self._side.mark(), parts)
        with self._changed:
            self._posted.append(departure)
            if self._is_running:
                self._changed.notify()
            else:
                self._is_running = True
                name = f"departures-to-{self._ranks[1]}"
                threading.Thread(target=self._run, name=name, daemon=True).start()
        return departure

    def _run(self) -> None:
        while (departure := self._next()) is not None:
            if self._failure is None:
                try:
                    departure.go(self._side.way(self._ranks))
                except BaseException as error:
                    self._failure = error
            departure.end(self._failure)

    def _next(self) -> Departure | None:
        with self._changed:
            if self._changed.wait_for(lambda: self._posted, self._linger_s):
                return self._posted.popleft()
            self._is_running = False
            return None
