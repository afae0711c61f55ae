"""The relay: boundaries travel from the rank that computed them to the ranks that need them.

One thread per sending peer waits for messages and puts them on a shelf, so that a boundary is there before the main
thread asks for it. The shelf is small: the first message of a step that lies too far ahead stays in the thread's hand,
what follows it stays with the sender, who then waits. Ranks thereby run ahead of each other, but only by a bounded
number of steps.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Iterable
from typing import Any

from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.row_trees import RowTree
from lightning_pipebd.runtime.transport import Lane, Message, Pending, Transport, TransportError

__all__ = ["Relay", "RelayError"]

_STOP = (-1, 0, 0, 0)


class RelayError(RuntimeError):
    """A boundary will never arrive."""


class Relay:
    """Exchange boundaries with the ranks that a plan names.

    Args:
        transport: Carries the messages.
        sources: Ranks that send boundaries to this one.
        destinations: Ranks that receive boundaries from this one.
        max_in_flight: Steps that a receiver may have on its shelf (the present one included), and steps that a sender
            may have under way to it, at least 1 each. While a receiver is at step ``k``, a sender of one message per
            step completes its sends up to step ``k + 2 * max_in_flight``, and then waits.
    """

    def __init__(
        self, transport: Transport, *, sources: Iterable[int], destinations: Iterable[int], max_in_flight: int = 2
    ) -> None:
        self._transport = transport
        self._sources = tuple(sources)
        self._destinations = tuple(destinations)
        self._max_in_flight = max_in_flight
        self._step = 0
        self._shelf: dict[tuple[int, int, int, Rows], RowTree] = {}
        self._changed = threading.Condition()
        self._failure: BaseException | None = None
        self._finished: set[int] = set()
        self._is_closed = False
        self._outbox: dict[int, deque[tuple[int, Pending]]] = {peer: deque() for peer in self._destinations}
        self._threads = [
            threading.Thread(target=self._receive, args=(peer,), name=f"relay-from-{peer}", daemon=True)
            for peer in self._sources
        ]
        for thread in self._threads:
            thread.start()

    def begin_step(self, step: int) -> None:
        """Tell the relay that this rank now works on ``step``, which lets senders go one step further."""
        with self._changed:
            self._step = step
            self._changed.notify_all()

    def send(self, step: int, boundary: int, piece: RowTree, peer: int) -> None:
        """Start to send a boundary; waits only while ``max_in_flight`` steps to that peer are under way."""
        outbox = self._outbox[peer]
        while outbox and outbox[0][0] <= step - self._max_in_flight:
            self._finish(outbox.popleft()[1])
        message = Message((step, boundary, piece.rows.start, piece.rows.stop), (piece.tree, piece.row_leaves))
        outbox.append((step, self._start(message, peer)))

    def recv(self, step: int, boundary: int, rows: Rows, peer: int, name: str = "") -> RowTree:
        """Wait for a boundary.

        Args:
            step: Step in which it was sent.
            boundary: Number that it was sent under.
            rows: Rows that were sent.
            peer: Rank that sent it.
            name: What a failure calls it, where the number is not simply a boundary's.

        Raises:
            RelayError: A peer has ended, or the connection to it; or the peer has said that nothing more will come.
        """
        key = (step, peer, boundary, rows)
        with self._changed:
            while key not in self._shelf:
                if self._failure is not None or peer in self._finished:
                    subject = f"{name or f'boundary {boundary}'}{_in_brackets(rows)} of step {step}"
                    reason = self._failure or "it has closed its relay after its last step"
                    raise RelayError(f"{subject} will not arrive from rank {peer}: {reason}") from self._failure
                self._changed.wait()
            return self._shelf.pop(key)

    def close(self) -> None:
        """Finish all sends and end the threads; every rank must call this after the same step.

        Raises:
            RelayError: A peer ended before it had received everything.
        """
        try:
            for peer, outbox in self._outbox.items():
                while outbox:
                    self._finish(outbox.popleft()[1])
                self._finish(self._start(Message(_STOP), peer))
        finally:
            self.abandon()
        for thread in self._threads:
            thread.join()

    def abandon(self) -> None:
        """Give up without waiting for anyone: this rank is about to end with an error."""
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()

    def _start(self, message: Message, peer: int) -> Pending:
        try:
            return self._transport.send(message, peer, Lane.RELAY)
        except TransportError as error:
            raise RelayError(str(error)) from error

    def _finish(self, pending: Pending) -> None:
        try:
            pending.wait()
        except TransportError as error:
            raise RelayError(str(error)) from error

    def _receive(self, peer: int) -> None:
        try:
            while (message := self._transport.recv(peer, Lane.RELAY)).fields != _STOP:
                self._put(peer, message)
            with self._changed:
                self._finished.add(peer)
                self._changed.notify_all()
        except BaseException as error:
            with self._changed:
                self._failure = self._failure or error
                self._changed.notify_all()

    def _put(self, peer: int, message: Message) -> None:
        step, boundary, start, stop = message.fields
        tree, row_leaves = _unpack(message.tree)
        rows = Rows(start, stop)
        with self._changed:
            while step >= self._step + self._max_in_flight and not self._is_closed:
                self._changed.wait()
            self._shelf[step, peer, boundary, rows] = RowTree(rows, tree, row_leaves)
            self._changed.notify_all()


def _in_brackets(rows: Rows) -> str:
    return "" if rows.is_empty else f" (rows {rows})"


def _unpack(tree: Any) -> tuple[Any, tuple[bool, ...] | None]:
    boundary, row_leaves = tree
    return boundary, None if row_leaves is None else tuple(row_leaves)
