from __future__ import annotations

import threading
from collections.abc import Iterable
from itertools import count

import pytest
import torch

from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.transport import Lane, Message, TransportError
from tests.helpers.ranks import run_threads

NUM_MESSAGES = 200  # more than an outbox keeps under way


def message(number: int) -> Message:
    return Message((number, 0, 0, 0), torch.full((2,), float(number)))


def numbers(messages: list[Message]) -> list[int]:
    return [each.fields[0] for each in messages]


def wait_for_arrival(mailbox: Mailbox) -> None:
    """A closed outbox has handed everything over, so the mailbox's thread ends."""
    mailbox.close()


class TestMailbox:
    def test_messages_are_collected_in_order_without_anyone_asking(self) -> None:
        world = LocalWorld(2)
        outbox, mailbox = Outbox(world.transports[0], [1], Lane.HEADERS), Mailbox(world.transports[1], 0, Lane.HEADERS)
        for number in range(NUM_MESSAGES):
            outbox.post(message(number))
        outbox.close()
        wait_for_arrival(mailbox)
        assert mailbox.get().tree.tolist() == [0.0, 0.0]
        assert numbers(mailbox.drain()) == list(range(1, NUM_MESSAGES))

    def test_get_waits_for_a_message_sent_later(self) -> None:
        world = LocalWorld(2)
        outbox, mailbox = Outbox(world.transports[0], [1], Lane.METRICS), Mailbox(world.transports[1], 0, Lane.METRICS)

        def work(rank: int) -> int | None:
            if rank == 0:
                outbox.post(message(7))
                outbox.close()
                return None
            return mailbox.get().fields[0]

        assert run_threads(2, work) == [None, 7]
        mailbox.close()

    def test_drain_does_not_wait(self) -> None:
        world = LocalWorld(2)
        mailbox = Mailbox(world.transports[1], 0, Lane.METRICS)
        assert mailbox.drain() == []
        Outbox(world.transports[0], [1], Lane.METRICS).close()
        mailbox.close()

    def test_closed_outbox_ends_get_with_an_error_and_drain_with_nothing(self) -> None:
        world = LocalWorld(2)
        outbox, mailbox = Outbox(world.transports[0], [1], Lane.HEADERS), Mailbox(world.transports[1], 0, Lane.HEADERS)
        outbox.post(message(1))
        outbox.close()
        mailbox.close()
        assert numbers(mailbox.drain()) == [1]
        assert mailbox.drain() == []
        for _ in range(2):
            with pytest.raises(TransportError, match="rank 0 has closed its outbox, so no more headers will come"):
                mailbox.get()

    def test_dead_peer_is_reported_ever_again(self) -> None:
        world = LocalWorld(2)
        outbox, mailbox = Outbox(world.transports[0], [1], Lane.METRICS), Mailbox(world.transports[1], 0, Lane.METRICS)
        outbox.post(message(1))
        received = mailbox.get()
        world.end(0)
        mailbox.close()
        assert numbers([received]) == [1]
        for take in (mailbox.drain, mailbox.get, mailbox.drain):
            with pytest.raises(TransportError, match="rank 1 lost rank 0"):
                take()
        outbox.abandon()

    def test_message_with_the_smallest_numbers_is_not_taken_for_the_end(self) -> None:
        world = LocalWorld(2)
        outbox, mailbox = Outbox(world.transports[0], [1], Lane.METRICS), Mailbox(world.transports[1], 0, Lane.METRICS)
        outbox.post(message(-1))
        outbox.post(message(-(2**31)))
        outbox.close()
        mailbox.close()
        assert numbers(mailbox.drain()) == [-1, -(2**31)]


class TestOutbox:
    def test_peers_may_be_addressed_apart(self) -> None:
        world = LocalWorld(3)
        outbox = Outbox(world.transports[0], [1, 2], Lane.HEADERS)
        mailboxes = [Mailbox(world.transports[rank], 0, Lane.HEADERS) for rank in (1, 2)]
        outbox.post(message(1))
        outbox.post(message(2), [2])
        outbox.post(message(3), [])
        outbox.close()
        for mailbox in mailboxes:
            mailbox.close()
        assert [numbers(mailbox.drain()) for mailbox in mailboxes] == [[1], [1, 2]]

    def test_without_peers_nothing_is_sent_or_kept(self) -> None:
        outbox = Outbox(LocalWorld(1).transports[0], [], Lane.HEADERS)
        for number in range(NUM_MESSAGES):
            outbox.post(message(number))
        outbox.close()

    def test_dead_peer_ends_posting_and_closing(self) -> None:
        world = LocalWorld(2)
        outbox = Outbox(world.transports[0], [1], Lane.HEADERS)
        world.end(1)

        def post(numbers: Iterable[int]) -> None:
            for number in numbers:
                outbox.post(message(number))

        with pytest.raises(TransportError, match="sending from rank 0 to rank 1 failed"):
            post(count())
        with pytest.raises(TransportError, match="sending from rank 0 to rank 1 failed"):
            outbox.close()

    def test_posting_to_an_abandoned_outbox_is_an_error_and_nobody_is_waited_for(self) -> None:
        outbox = Outbox(LocalWorld(2).transports[0], [1], Lane.HEADERS)
        outbox.post(message(1))
        outbox.abandon()
        with pytest.raises(TransportError, match="rank 0 has given up its outbox"):
            outbox.post(message(2))

    def test_close_waits_until_the_mailbox_has_everything(self) -> None:
        world = LocalWorld(2)
        outbox = Outbox(world.transports[0], [1], Lane.METRICS)
        outbox.post(message(1))
        closing = threading.Thread(target=outbox.close, daemon=True)
        closing.start()
        assert numbers([world.transports[1].recv(0, Lane.METRICS)]) == [1]
        assert closing.is_alive()
        world.transports[1].recv(0, Lane.METRICS)
        closing.join(20.0)
        assert not closing.is_alive()
