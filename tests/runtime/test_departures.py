"""Messages leave when the device has computed them: threads, and a device whose marks the test passes."""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.departures import Departures
from lightning_pipebd.runtime.local_transport import LocalTransport, LocalWorld
from lightning_pipebd.runtime.relay import Relay, RelayError
from lightning_pipebd.runtime.row_trees import RowTree
from lightning_pipebd.runtime.transport import Lane, Message, Pending, TransportError
from tests.helpers.ranks import run_threads

JOIN_S = 20.0
PROBE_S = 0.1
LINGER_S = 0.05
WAY = (0, 1)


class Mark:
    """Is passed when the test says so."""

    def __init__(self) -> None:
        self.is_passed = threading.Event()

    def synchronize(self) -> None:
        assert self.is_passed.wait(JOIN_S)


class Device:
    """Remembers its marks; one that runs passes them at once."""

    def __init__(self, *, runs: bool = True) -> None:
        self.marks: list[Mark] = []
        self._runs = runs

    def mark(self) -> Mark:
        self.marks.append(Mark())
        if self._runs:
            self.marks[-1].is_passed.set()
        return self.marks[-1]

    @contextmanager
    def way(self, ranks: tuple[int, int]) -> Iterator[None]:
        assert ranks == WAY
        yield

    def hand_over(self, tensor: Tensor) -> None:
        raise AssertionError("nothing is received here")


class Work:
    """Is done when the test says so."""

    def __init__(self, is_taken: threading.Event) -> None:
        self._is_taken = is_taken

    def wait(self) -> None:
        assert self._is_taken.wait(JOIN_S)


class Peer:
    """Takes parts of messages when the test says so, and remembers which were begun."""

    def __init__(self) -> None:
        self.begun: list[str] = []
        self._taken: dict[str, threading.Event] = {}
        self._changed = threading.Condition()

    def part(self, name: str) -> Callable[[], Any]:
        self._taken[name] = threading.Event()

        def begin() -> Work:
            with self._changed:
                self.begun.append(name)
                self._changed.notify_all()
            return Work(self._taken[name])

        return begin

    def take(self, *names: str) -> None:
        for name in names:
            self._taken[name].set()

    def has(self, *names: str) -> bool:
        """Tell whether exactly these parts have been begun, in this order, and no other one follows."""
        with self._changed:
            reached = self._changed.wait_for(lambda: len(self.begun) >= len(names), JOIN_S)
            stays = not self._changed.wait_for(lambda: len(self.begun) > len(names), PROBE_S)
            return reached and stays and self.begun == list(names)


def departures(device: Device) -> Departures:
    return Departures(device, WAY, linger_s=LINGER_S)


def is_waited_for(pending: Pending) -> Callable[[], bool]:
    """Wait in a thread; give what tells whether it still waits."""
    waiter = threading.Thread(target=pending.wait, daemon=True)
    waiter.start()

    def is_alive() -> bool:
        waiter.join(PROBE_S)
        return waiter.is_alive()

    return is_alive


def test_nothing_leaves_before_the_device_has_computed_it() -> None:
    device, peer = Device(runs=False), Peer()
    departure = departures(device).post([peer.part("header"), peer.part("tensor")])
    peer.take("header", "tensor")
    assert peer.has()
    device.marks[0].is_passed.set()
    departure.wait()
    assert peer.begun == ["header", "tensor"]


def test_tensors_follow_when_the_peer_has_taken_the_header() -> None:
    peer = Peer()
    departure = departures(Device()).post([peer.part("header"), peer.part("first"), peer.part("second")])
    assert peer.has("header")
    peer.take("header")
    assert peer.has("header", "first", "second")
    is_waiting = is_waited_for(departure)
    peer.take("second")
    assert is_waiting()
    peer.take("first")
    departure.wait()
    assert not is_waiting()


def test_messages_leave_in_the_order_of_posting() -> None:
    device, peer = Device(runs=False), Peer()
    posted = departures(device)
    all_of_them = [posted.post([peer.part(name)]) for name in ("boundary", "another", "stop")]
    for mark in reversed(device.marks):
        assert peer.has()
        mark.is_passed.set()
    for name in ("boundary", "another", "stop"):
        peer.take(name)
    for departure in reversed(all_of_them):
        departure.wait()
    assert peer.begun == ["boundary", "another", "stop"]


def test_after_a_message_that_failed_all_fail_and_nobody_waits() -> None:
    peer = Peer()

    def fail() -> Any:
        raise RuntimeError("connection closed by peer")

    posted = departures(Device())
    before = [posted.post([fail]), posted.post([peer.part("header")])]
    for departure in [*before, posted.post([peer.part("tensor")])]:
        with pytest.raises(RuntimeError, match="connection closed by peer"):
            departure.wait()
    assert peer.begun == []


def test_device_that_fails_is_told_to_whoever_waits() -> None:
    class Broken(Mark):
        def synchronize(self) -> None:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    device = Device()
    device.mark = Broken
    with pytest.raises(RuntimeError, match="illegal memory access"):
        departures(device).post([Peer().part("header")]).wait()


def test_tensors_are_kept_until_they_have_arrived_and_no_longer() -> None:
    peer = Peer()
    tensor = torch.zeros(4)
    kept = weakref.ref(tensor)
    begin = peer.part("tensor")

    def parts(own: Tensor) -> list[Callable[[], Any]]:
        return [peer.part("header"), lambda: (own, begin())[1]]

    departure = departures(Device()).post(parts(tensor))
    del tensor
    peer.take("header")
    assert peer.has("header", "tensor")
    gc.collect()
    assert kept() is not None
    peer.take("tensor")
    departure.wait()
    gc.collect()
    assert kept() is None


def test_thread_ends_when_there_are_no_messages_and_another_one_sends_the_next() -> None:
    before = set(threading.enumerate())
    posted, peer = departures(Device()), Peer()
    for name in ("first", "second"):
        header = peer.part(name)
        peer.take(name)
        posted.post([header]).wait()
        (own,) = set(threading.enumerate()) - before
        assert (own.name, own.daemon) == ("departures-to-1", True)
        own.join(JOIN_S)
        assert not own.is_alive()
    assert peer.begun == ["first", "second"]


class DepartingTransport(LocalTransport):
    """Boundaries leave by departures."""

    def __init__(self, world: LocalWorld, rank: int) -> None:
        super().__init__(world, rank)
        self.device = Device()
        self._departures = departures(self.device)

    @override
    def send(self, message: Message, peer: int, lane: Lane) -> Pending:
        return self._departures.post([lambda: super(DepartingTransport, self).send(message, peer, lane)])


def piece(step: int) -> RowTree:
    return RowTree(Rows(0, 2), torch.full((2, 1), float(step)), (True,))


class TestRelay:
    @pytest.mark.parametrize("max_in_flight", [1, 2])
    def test_sender_runs_ahead_as_far_as_without_departures(self, max_in_flight: int) -> None:
        world = LocalWorld(2)
        sender = Relay(DepartingTransport(world, 0), sources=[], destinations=[1], max_in_flight=max_in_flight)
        receiver = Relay(world.transports[1], sources=[0], destinations=[], max_in_flight=max_in_flight)
        num_sent, changed = [0], threading.Condition()

        def send() -> None:
            for step in range(2 * max_in_flight + 3):
                sender.send(step, 1, piece(step), 1)
                with changed:
                    num_sent[0] += 1
                    changed.notify_all()

        sending = threading.Thread(target=send, daemon=True)
        sending.start()
        with changed:
            assert changed.wait_for(lambda: num_sent[0] == 2 * max_in_flight + 1, JOIN_S)
            assert not changed.wait_for(lambda: num_sent[0] > 2 * max_in_flight + 1, PROBE_S)
        receiver.begin_step(2 * max_in_flight + 3)
        sending.join(JOIN_S)
        run_threads(2, lambda rank: (sender, receiver)[rank].close())
        values = [receiver.recv(step, 1, Rows(0, 2), 0).tree[0, 0].item() for step in range(2 * max_in_flight + 3)]
        assert values == list(range(2 * max_in_flight + 3))

    def test_receiver_that_ends_is_an_error_at_the_sender(self) -> None:
        world = LocalWorld(2)
        sender = Relay(DepartingTransport(world, 0), sources=[], destinations=[1])
        sender.send(0, 1, piece(0), 1)
        world.end(1)
        with pytest.raises(RelayError, match="rank 1"):
            sender.close()

    def test_relay_that_is_abandoned_waits_for_nobody(self) -> None:
        transport = DepartingTransport(LocalWorld(2), 0)
        transport.device._runs = False
        sender = Relay(transport, sources=[], destinations=[1])
        sender.send(0, 1, piece(0), 1)
        sender.abandon()
        transport._world.end(1)
        transport.device.marks[0].is_passed.set()
        with pytest.raises(TransportError, match="rank 1"):
            sender._outbox[1][0][1].wait()
