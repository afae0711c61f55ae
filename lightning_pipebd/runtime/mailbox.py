"""Small messages outside the relay: batch headers ahead of the data, metrics behind it."""

from __future__ import annotations

import queue
import threading
from collections import deque
from collections.abc import Sequence

from lightning_pipebd.runtime.transport import Lane, Message, Pending, Transport, TransportError

__all__ = ["Mailbox", "Outbox"]

_STOP = (-(2**62), 0, 0, 0)
_MAX_PENDING = 32


class Mailbox:
    """Collect a peer's messages on a lane without making anyone wait.

    Args:
        transport: Carries the messages.
        peer: Rank that sends them.
        lane: Lane they come on.
    """

    def __init__(self, transport: Transport, peer: int, lane: Lane) -> None:
        self._transport = transport
        self._peer = peer
        self._lane = lane
        # Ends with what was raised, or with None when the peer has closed its outbox.
        self._messages: queue.SimpleQueue[Message | BaseException | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._collect, name=f"{lane.name.lower()}-from-{peer}", daemon=True)
        self._thread.start()

    def get(self) -> Message:
        """Wait for the next message.

        Raises:
            TransportError: The peer has ended, or has closed its outbox.
        """
        message = self._messages.get()
        if isinstance(message, Message):
            return message
        self._messages.put(message)  # whoever asks again shall hear it again
        if message is None:
            lane = self._lane.name.lower()
            raise TransportError(f"rank {self._peer} has closed its outbox, so no more {lane} will come")
        raise message

    def drain(self) -> list[Message]:
        """Take what has arrived, without waiting.

        Raises:
            TransportError: The peer has ended, and all that arrived before has been taken.
        """
        messages: list[Message] = []
        while not self._messages.empty():
            message = self._messages.get()
            if isinstance(message, Message):
                messages.append(message)
                continue
            self._messages.put(message)
            if message is not None and not messages:
                raise message
            break
        return messages

    def close(self) -> None:
        """Wait until the peer has closed its outbox."""
        self._thread.join()

    def _collect(self) -> None:
        try:
            while (message := self._transport.recv(self._peer, self._lane)).fields != _STOP:
                self._messages.put(message)
            self._messages.put(None)
        except BaseException as error:
            self._messages.put(error)


class Outbox:
    """Send messages to mailboxes from a thread of its own, so that posting costs the training thread next to nothing.

    Args:
        transport: Carries the messages.
        peers: Ranks that have a mailbox for this rank.
        lane: Lane they listen on.

    Attributes:
        peers: Those ranks.
    """

    def __init__(self, transport: Transport, peers: Sequence[int], lane: Lane) -> None:
        self._transport = transport
        self.peers = tuple(peers)
        self._lane = lane
        self._pending: deque[Pending] = deque()
        self._posted: queue.SimpleQueue[tuple[Message, tuple[int, ...]] | None] = queue.SimpleQueue()  # ends with None
        self._failure: BaseException | None = None
        name = f"{lane.name.lower()}-to-{len(self.peers)}-ranks"
        self._thread = threading.Thread(target=self._send, name=name, daemon=True)
        self._thread.start()

    def post(self, message: Message, peers: Sequence[int] | None = None) -> None:
        """Have a message sent to all peers, or to some of them; its tensors must stay unchanged.

        Raises:
            TransportError: A peer has ended; said when the thread has noticed, which is some messages later.
        """
        if self._failure is not None:
            raise self._failure
        self._posted.put((message, self.peers if peers is None else tuple(peers)))

    def close(self) -> None:
        """Send everything and tell the mailboxes that nothing more will come.

        Raises:
            TransportError: A peer has ended before it had received everything.
        """
        if self._failure is None:
            self._posted.put((Message(_STOP), self.peers))
        self._posted.put(None)
        self._thread.join()
        if self._failure is not None:
            raise self._failure

    def abandon(self) -> None:
        """Send nothing more and wait for nobody: this rank is about to end with an error."""
        self._failure = self._failure or TransportError(f"rank {self._transport.rank} has given up its outbox")
        self._posted.put(None)

    def _send(self) -> None:
        while (posted := self._posted.get()) is not None:
            if self._failure is None:
                try:
                    self._begin(*posted)
                except BaseException as error:
                    self._failure = error
        self._finish()

    def _begin(self, message: Message, peers: Sequence[int]) -> None:
        for peer in peers:
            self._pending.append(self._transport.send(message, peer, self._lane))
        while len(self._pending) > _MAX_PENDING * max(1, len(self.peers)):
            self._pending.popleft().wait()

    def _finish(self) -> None:
        try:
            while self._pending and self._failure is None:
                self._pending.popleft().wait()
        except BaseException as error:
            self._failure = error
