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
    """Send messages to mailboxes; never waits in practice, because a mailbox takes everything at once.

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

    def post(self, message: Message, peers: Sequence[int] | None = None) -> None:
        """Start to send a message to all peers, or to some of them."""
        for peer in self.peers if peers is None else peers:
            self._pending.append(self._transport.send(message, peer, self._lane))
        while len(self._pending) > _MAX_PENDING * max(1, len(self.peers)):
            self._pending.popleft().wait()

    def close(self) -> None:
        """Send everything and tell the mailboxes that nothing more will come."""
        self.post(Message(_STOP))
        while self._pending:
            self._pending.popleft().wait()
