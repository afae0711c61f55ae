"""Slots whose tensors lie on a device, which here is host memory."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Sequence

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from lightning_pipebd.runtime import device_slots
from lightning_pipebd.runtime.device_slots import DeviceSlotReader, DeviceSlotWriter
from lightning_pipebd.runtime.layouts import TensorLayout, describe, flatten
from lightning_pipebd.runtime.shared_memory import slot_size
from tests.helpers.device_memory import HostMemory

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no anonymous files")

Told = tuple[int, int, list[TensorLayout]]


class Pair:
    """A sender and a receiver on one device."""

    def __init__(self) -> None:
        self.mine, self.theirs = HostMemory(), HostMemory()
        self.writer = DeviceSlotWriter(self.mine)
        self.reader = DeviceSlotReader(os.getpid(), self.theirs)

    def write(self, *tensors: Tensor) -> Told:
        described = [describe(tensor) for tensor in tensors]
        number, size = self.writer.write([flatten(dense) for dense, _ in described])
        return number, size, [layout for _, layout in described]

    def read(self, told: Told) -> list[Tensor]:
        return self.reader.read(*told)

    def pass_on(self, *tensors: Tensor) -> tuple[int, list[Tensor]]:
        told = self.write(*tensors)
        return told[0], self.read(told)


@pytest.fixture
def pair() -> Pair:
    return Pair()


def test_tensors_of_all_types_and_orders_in_memory_arrive(pair: Pair) -> None:
    sent = [
        torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last),
        torch.ones(3, dtype=torch.bool),
        torch.randn(7).bfloat16(),
        torch.tensor(1j),
        torch.arange(5)[1:],
        torch.randn(3, dtype=torch.float64),
        torch.tensor([-1, 2], dtype=torch.int8),
    ]
    _, received = pair.pass_on(*sent)
    assert all(torch.equal(mine, theirs) for mine, theirs in zip(received, sent, strict=True))
    assert [tensor.dtype for tensor in received] == [tensor.dtype for tensor in sent]
    assert received[0].is_contiguous(memory_format=torch.channels_last)


def test_slot_is_free_when_it_was_read_although_its_tensors_live_on(pair: Pair) -> None:
    first, received = pair.pass_on(torch.ones(4))
    second, others = pair.pass_on(torch.zeros(4))
    assert second == first
    assert (received[0].tolist(), others[0].tolist()) == ([1.0] * 4, [0.0] * 4)


def test_slot_is_not_used_again_before_it_was_read(pair: Pair) -> None:
    told = [pair.write(torch.full((4,), float(value))) for value in range(3)]
    assert len({number for number, _, _ in told}) == 3
    assert [pair.read(one)[0][0].item() for one in told] == [0.0, 1.0, 2.0]


def test_buffer_is_exported_and_opened_once(pair: Pair) -> None:
    for value in range(5):
        assert pair.pass_on(torch.full((4,), float(value)))[1][0].tolist() == [value] * 4
    assert (pair.mine.num_exports, len(pair.theirs._opened)) == (1, 1)


def test_larger_message_gets_a_larger_buffer_and_the_old_one_is_closed(pair: Pair) -> None:
    small, _ = pair.pass_on(torch.ones(4))
    large, (received,) = pair.pass_on(torch.arange(9_000.0))
    assert large == small
    assert torch.equal(received, torch.arange(9_000.0))
    assert pair.mine.allocated_bytes == [64 + 36_032]
    assert pair.theirs.num_open == 1


def test_small_messages_do_not_hold_large_buffers(pair: Pair) -> None:
    large, _ = pair.pass_on(torch.ones(100_000))
    small, _ = pair.pass_on(torch.ones(4))
    assert small != large
    assert pair.mine.allocated_bytes == [64 + 400_000, 128]


def test_buffer_that_is_not_used_any_more_is_given_back_on_both_sides(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(device_slots, "_NUM_IDLE", 3)
    large, _ = pair.pass_on(torch.ones(100_000))
    for _ in range(4):
        pair.pass_on(torch.ones(4))
    assert pair.mine.allocated_bytes == [128]
    assert pair.theirs.num_open == 1
    again, (received,) = pair.pass_on(torch.full((100_000,), 2.0))
    assert again == large
    assert received.unique().tolist() == [2.0]


def test_buffer_with_a_message_in_it_is_never_given_back(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device_slots, "_NUM_IDLE", 1)
    told = [pair.write(torch.full((size,), 1.0 + size)) for size in (100_000, 4, 4, 4)]
    assert [pair.read(one)[0][0].item() for one in told] == [100_001.0, 5.0, 5.0, 5.0]


def test_message_that_could_not_be_copied_out_keeps_its_slot(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(parts: Sequence[Tensor]) -> list[Tensor]:
        raise RuntimeError("the device is lost")

    told = pair.write(torch.ones(4))
    monkeypatch.setattr(pair.theirs, "take", fail)
    with pytest.raises(RuntimeError, match="the device is lost"):
        pair.read(told)
    assert pair.write(torch.zeros(4))[0] != told[0]


def test_export_that_no_slot_has_room_for_is_an_error(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pair.mine, "export", lambda buffer: bytes(70_000))
    with pytest.raises(OSError, match=r"a slot of 65536 bytes has no room for an export of 70000"):
        pair.write(torch.ones(4))


@given(st.lists(st.tuples(st.sampled_from((1, 50, 15_000, 17_000, 60_000)), st.integers(0, 3)), max_size=30))
def test_whatever_is_under_way_arrives_in_buffers_no_more_than_were_needed_at_once(
    messages: list[tuple[int, int]],
) -> None:
    pair = Pair()
    under_way: deque[tuple[Told, Tensor]] = deque()
    most: dict[int, int] = {}
    for index, (size, num_read) in enumerate(messages):
        sent = torch.arange(size) * 31 + index
        under_way.append((pair.write(sent), sent))
        sizes = [slot_size(64 + 8 * len(each)) for _, each in under_way]
        most |= {each: max(most.get(each, 0), sizes.count(each)) for each in sizes}
        for told, expected in [under_way.popleft() for _ in range(min(num_read, len(under_way)))]:
            (received,) = pair.read(told)
            assert torch.equal(received, expected)
    assert len(pair.mine.allocated_bytes) == sum(most.values())
