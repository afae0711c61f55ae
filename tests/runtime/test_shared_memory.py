from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch
from torch import Tensor

from lightning_pipebd.runtime import shared_memory
from lightning_pipebd.runtime.layouts import LayoutBook, TensorLayout, describe, flatten
from lightning_pipebd.runtime.shared_memory import Passport, SlotReader, SlotWriter, issue_passport

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no anonymous files")


def deliver(writer: SlotWriter, reader: SlotReader, *tensors: Tensor) -> tuple[int, list[Tensor]]:
    described = [describe(tensor) for tensor in tensors]
    number, size = writer.write([flatten(dense) for dense, _ in described])
    return number, reader.read(number, size, [layout for _, layout in described])


@pytest.fixture
def writer() -> SlotWriter:
    return SlotWriter()


@pytest.fixture
def reader() -> SlotReader:
    return SlotReader(os.getpid())


class TestSlots:
    def test_tensors_of_all_types_and_orders_in_memory_arrive(self, writer: SlotWriter, reader: SlotReader) -> None:
        image = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
        sent = [
            image,
            torch.ones(3, dtype=torch.bool),
            torch.randn(7).bfloat16(),
            torch.tensor(1j),
            torch.arange(5)[1:],
        ]
        _, received = deliver(writer, reader, *sent)
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(received, sent, strict=True))
        assert received[0].is_contiguous(memory_format=torch.channels_last)

    def test_slot_is_used_again_when_its_tensors_and_all_their_views_are_gone(
        self, writer: SlotWriter, reader: SlotReader
    ) -> None:
        first, received = deliver(writer, reader, torch.ones(4), torch.zeros(4))
        view = received[1][1:].reshape(-1)
        del received
        gc.collect()
        second, others = deliver(writer, reader, torch.full((4,), 2.0))
        assert second != first
        assert view.tolist() == [0.0] * 3
        del view, others
        assert deliver(writer, reader, torch.ones(4))[0] in (first, second)

    def test_tensor_that_autograd_keeps_for_the_backward_pass_keeps_its_slot(
        self, writer: SlotWriter, reader: SlotReader
    ) -> None:
        weight = torch.ones(4, requires_grad=True)
        first, received = deliver(writer, reader, torch.arange(4.0))
        loss = (weight * received[0]).sum()
        del received
        assert deliver(writer, reader, torch.full((4,), 9.0))[0] != first
        torch.autograd.backward(loss)
        assert weight.grad is not None
        assert weight.grad.tolist() == [0.0, 1.0, 2.0, 3.0]

    def test_larger_message_gets_a_larger_slot_and_smaller_ones_share(
        self, writer: SlotWriter, reader: SlotReader
    ) -> None:
        large = deliver(writer, reader, torch.ones(100_000))[0]
        small = deliver(writer, reader, torch.ones(10))[0]
        assert small == large
        assert deliver(writer, reader, torch.ones(200_000))[0] != large

    @pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
    def test_forked_child_does_not_free_its_parents_slot(self, writer: SlotWriter, reader: SlotReader) -> None:
        first, received = deliver(writer, reader, torch.ones(4))
        child = os.fork()
        if not child:
            del received
            gc.collect()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        assert deliver(writer, reader, torch.zeros(4))[0] != first
        assert received[0].tolist() == [1.0] * 4

    def test_slots_end_with_their_writer(self, reader: SlotReader) -> None:
        writer = SlotWriter()
        number, size = writer.write([torch.ones(4)])
        del writer
        gc.collect()
        with pytest.raises(OSError, match="No such file"):
            reader.read(number, size, [TensorLayout((4,), (1,), torch.float32, False)])


class TestPassport:
    def test_own_passport_is_readable_until_it_is_destroyed(self) -> None:
        passport = issue_passport()
        assert passport.is_readable()
        passport.destroy()
        assert not passport.is_readable()

    def test_another_host_or_another_process_under_the_same_number_is_not_readable(self) -> None:
        passport = issue_passport()
        assert not passport._replace(boot="another").is_readable()
        assert not passport._replace(token=b"another").is_readable()
        assert not passport._replace(pid=2**22 + 1).is_readable()
        passport.destroy()

    def test_system_that_tells_no_boot_shares_nothing(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(shared_memory, "_boot", lambda: "")
        passport = issue_passport()
        assert isinstance(passport, Passport)
        assert not passport.is_readable()
        passport.destroy()

    def test_passport_leaves_no_file_open(self) -> None:
        before = len(list(Path("/proc/self/fd").iterdir()))
        issue_passport().destroy()
        assert len(list(Path("/proc/self/fd").iterdir())) == before


class TestLayouts:
    def test_dense_tensors_are_not_copied_and_others_are(self) -> None:
        permuted = torch.randn(2, 3).t()
        expanded = torch.randn(1, 3).expand(4, 3)
        assert describe(permuted)[0].data_ptr() == permuted.data_ptr()
        assert describe(expanded)[0].is_contiguous()
        assert torch.equal(describe(expanded)[0], expanded)

    def test_restored_tensor_has_the_values_in_the_same_order_in_memory(self) -> None:
        tensor = torch.arange(6.0).reshape(2, 3).t()
        dense, layout = describe(tensor)
        assert flatten(dense).tolist() == [0.0, 1.0, 2.0, 3.0, 4.0, 5.0]
        assert torch.equal(layout.restore(flatten(dense).clone()), tensor)

    def test_book_sends_a_layout_once(self) -> None:
        book = LayoutBook()
        assert book.number(b"one") == (0, True)
        assert book.number(b"two") == (1, True)
        assert book.number(b"one") == (0, False)
