"""Edges on one device: a message is told when it was copied, and only where the receiver can open the memory."""

from __future__ import annotations

import gc
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta

import pytest
import torch
import torch.distributed
from torch import Tensor

from lightning_pipebd.runtime.device_links import DeviceLinkSender
from lightning_pipebd.runtime.device_slots import DeviceSlotReader
from lightning_pipebd.runtime.layouts import TensorLayout
from lightning_pipebd.runtime.links import LinkReceiver
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.neighbours import Neighbours
from lightning_pipebd.runtime.pipes import PipeReader, PipeWriter
from lightning_pipebd.runtime.transport import Lane, Message, ProcessGroupTransport, TransportError
from tests.helpers.device_memory import HostMemory
from tests.helpers.ranks import run_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no anonymous files")

PAIR = TensorLayout((2,), (1,), torch.float32, is_cuda=False)


class SlowMemory(HostMemory):
    """A device that has done nothing before it is let."""

    def __init__(self) -> None:
        super().__init__()
        self.log: list[str] = []
        self.let = threading.Semaphore(0)
        self.failure: Exception | None = None

    def mark(self) -> Callable[[], None]:
        def wait() -> None:
            self.let.acquire()
            if self.failure is not None:
                raise self.failure
            self.log.append("copied")

        return wait


class LoggedPipe(PipeWriter):
    """Notes when something is told."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def write(self, data: bytes) -> None:
        self._log.append("told")
        super().write(data)


class Link:
    """Both ends of an edge, in one process."""

    def __init__(self) -> None:
        self.memory = SlowMemory()
        records, received = LoggedPipe(self.memory.log), PipeWriter()
        readers = [PipeReader(os.getpid(), pipe.reading_end) for pipe in (records, received)]
        for pipe in (records, received):
            pipe.let_go()
        self.sender = DeviceLinkSender(records, readers[1], self.memory)
        self.receiver = LinkReceiver(readers[0], received, DeviceSlotReader(os.getpid(), HostMemory()))

    def send(self, value: float) -> int:
        slot = self.sender.place([torch.full((2,), value)])
        return self.sender.send([0] * 6 + list(slot), b"")

    def recv(self) -> list[float]:
        header, _ = self.receiver.receive(lambda header: 0)
        (tensor,) = self.receiver.tensors(header[6], header[7], [PAIR])
        self.receiver.acknowledge()
        return tensor.tolist()


class TestTelling:
    def test_message_is_told_when_it_was_copied_and_not_before(self) -> None:
        link = Link()
        numbers = [link.send(value) for value in (1.0, 2.0)]
        assert link.memory.log == []
        link.memory.let.release(2)
        assert [link.recv() for _ in numbers] == [[1.0] * 2, [2.0] * 2]
        link.sender.wait(numbers[1])
        assert link.memory.log == ["copied", "told"] * 2

    def test_message_without_tensors_keeps_its_place_among_the_others(self) -> None:
        link = Link()
        link.send(1.0)
        last = link.sender.send([7] * 8, b"")
        link.memory.let.release(2)
        assert link.recv() == [1.0, 1.0]
        assert link.receiver.receive(lambda header: 0)[0] == (7,) * 8
        link.receiver.acknowledge()
        link.sender.wait(last)

    def test_device_that_fails_is_an_error_for_every_message_that_was_not_told(self) -> None:
        link = Link()
        first = link.send(1.0)
        link.memory.let.release()
        link.recv()
        later = [link.send(2.0), link.send(3.0)]
        link.memory.failure = RuntimeError("the device is lost")
        link.memory.let.release()
        for number in reversed(later):
            with pytest.raises(RuntimeError, match="the device is lost"):
                link.sender.wait(number)
        link.sender.wait(first)
        assert link.memory.log == ["copied", "told"]

    def test_receiver_that_has_ended_is_an_error(self) -> None:
        link = Link()
        number = link.send(1.0)
        del link.receiver
        link.memory.let.release()
        with pytest.raises(ConnectionError):
            link.sender.wait(number)

    def test_thread_ends_with_its_sender(self) -> None:
        before = set(threading.enumerate())
        link = Link()
        (thread,) = set(threading.enumerate()) - before
        del link
        gc.collect()
        thread.join(10.0)
        assert not thread.is_alive()


class Refusing(HostMemory):
    """A device whose memory is not to be had by others, in one of the ways in which that is found out."""

    def __init__(self, way: str) -> None:
        super().__init__()
        self.way = way

    def allocate(self, num_bytes: int) -> Tensor:
        self._refuse("allocate")
        return super().allocate(num_bytes)

    def export(self, buffer: Tensor) -> bytes:
        self._refuse("export")
        return super().export(buffer)

    def open(self, export: bytes) -> Tensor:
        self._refuse("open")
        return super().open(export)

    def take(self, parts: Sequence[Tensor]) -> list[Tensor]:
        self._refuse("take")
        return [part.clone().zero_() for part in parts] if self.way == "show" else super().take(parts)

    def _refuse(self, way: str) -> None:
        if self.way == way:
            raise RuntimeError(f"\ncannot {way} that.\nmore about it")


def kinds_of_edges(memories: Sequence[HostMemory | None], edges: list[tuple[int, int]]) -> list[dict[int, str]]:
    """Connect threads as ranks along edges, and give how each sends and to whom; all of them pass on a tensor."""
    world = LocalWorld(len(memories))
    everyone = []  # as in a process, what a rank made lives on when the rank is done

    def connect(rank: int) -> dict[int, str]:
        own = Neighbours(rank, world.transports[rank].all_gather_object, timedelta(seconds=30), memories[rank])
        everyone.append(own)
        own.connect(edges, [])
        for peer, sender in own.senders.items():
            slot = sender.place([torch.tensor([rank, peer])])
            sender.send([0] * 6 + list(slot), b"")
        for peer, receiver in own.receivers.items():
            header, _ = receiver.receive(lambda header: 0)
            layout = TensorLayout((2,), (1,), torch.int64, is_cuda=False)
            assert receiver.tensors(header[6], header[7], [layout])[0].tolist() == [peer, rank]
            receiver.acknowledge()
        for sender in own.senders.values():
            sender.wait(1)
        return {
            peer: "device" if isinstance(sender, DeviceLinkSender) else "host" for peer, sender in own.senders.items()
        }

    kinds: list[dict[int, str]] = run_threads(len(memories), connect)
    everyone.clear()
    gc.collect()
    return kinds


class TestEdges:
    def test_ranks_on_one_device_have_edges_there_and_others_do_not(self) -> None:
        memories = [HostMemory("one"), HostMemory("two"), HostMemory("one"), None]
        edges = [(0, 1), (0, 2), (2, 0), (2, 3), (1, 2)]
        assert kinds_of_edges(memories, edges) == [{1: "host", 2: "device"}, {2: "host"}, {0: "device", 3: "host"}, {}]

    def test_ranks_without_a_device_ask_no_device(self) -> None:
        assert kinds_of_edges([None, None], [(0, 1)]) == [{1: "host"}, {}]

    def test_nothing_that_was_probed_stays(self) -> None:
        memories = [HostMemory(), HostMemory()]
        kinds_of_edges(memories, [(0, 1), (1, 0)])
        assert [(memory.allocated_bytes, memory.num_open) for memory in memories] == [([], 0)] * 2

    @pytest.mark.parametrize("way", ["allocate", "export"])
    def test_sender_that_cannot_share_sends_through_host_memory(self, way: str) -> None:
        with pytest.warns(UserWarning, match=rf"rank 0 to 1 pass through host memory.*\(cannot {way} that\)"):
            assert kinds_of_edges([Refusing(way), HostMemory()], [(0, 1), (1, 0)]) == [{1: "host"}, {0: "device"}]

    @pytest.mark.parametrize(
        ("way", "reason"),
        [("open", "cannot open that"), ("take", "cannot take that"), ("show", "what is there is not")],
    )
    def test_receiver_that_cannot_look_receives_through_host_memory(self, way: str, reason: str) -> None:
        with pytest.warns(UserWarning, match=rf"rank 0 to 1 pass through host memory.*\({reason}"):
            assert kinds_of_edges([HostMemory(), Refusing(way)], [(0, 1), (1, 0)]) == [{1: "host"}, {0: "device"}]


class Breaking(HostMemory):
    """A device that fails some time."""

    is_lost = False

    def mark(self) -> Callable[[], None]:
        is_lost = self.is_lost

        def wait() -> None:
            if is_lost:
                raise RuntimeError("the device is lost")

        return wait

    def take(self, parts: Sequence[Tensor]) -> list[Tensor]:
        if self.is_lost:
            raise RuntimeError("the device is lost")
        return super().take(parts)


@pytest.fixture
def memory() -> Breaking:
    return Breaking()


@pytest.fixture
def transport(memory: Breaking) -> Iterator[ProcessGroupTransport]:
    """A rank that has an edge on a device with itself."""
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    transport = ProcessGroupTransport(torch.device("cpu"))
    transport._neighbours._memory = memory
    transport.connect([(0, 0)], [])
    yield transport
    transport._neighbours.senders.clear()
    gc.collect()
    torch.distributed.destroy_process_group()


class TestTransport:
    def test_device_that_fails_at_the_sender_is_an_error_of_the_transport(
        self, transport: ProcessGroupTransport, memory: Breaking
    ) -> None:
        memory.is_lost = True
        sending = transport.send(Message((0, 0, 0, 0), torch.ones(2)), 0, Lane.RELAY)
        with pytest.raises(TransportError, match="sending from rank 0 to rank 0 failed: the device is lost"):
            sending.wait()

    def test_device_that_fails_at_the_receiver_is_an_error_of_the_transport(
        self, transport: ProcessGroupTransport, memory: Breaking
    ) -> None:
        transport.send(Message((0, 0, 0, 0), torch.ones(2)), 0, Lane.RELAY)
        memory.is_lost = True
        with pytest.raises(TransportError, match="receiving on rank 0 from rank 0 failed: the device is lost"):
            transport.recv(0, Lane.RELAY)

    def test_tensors_may_change_when_they_were_sent(self, transport: ProcessGroupTransport) -> None:
        tensor = torch.ones(2)
        sending = transport.send(Message((1, 2, 3, 4), {"x": tensor, "empty": torch.empty(0)}), 0, Lane.RELAY)
        tensor.zero_()
        fields, tree = transport.recv(0, Lane.RELAY)
        sending.wait()
        assert fields == (1, 2, 3, 4)
        assert tree["x"].tolist() == [1.0, 1.0]
        assert tree["empty"].shape == (0,)
