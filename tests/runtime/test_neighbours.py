"""Neighbours in one process: threads as ranks, whose passports all name this process."""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pipebd.runtime import neighbours
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.neighbours import Neighbours, Summation
from tests.helpers.ranks import RankError, run_threads

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="the system has no anonymous files")


def among_neighbours(num_ranks: int, work: Callable[[Neighbours, int], Any], timeout_s: float = 30.0) -> list[Any]:
    """Connect all ranks as one group and along (0, 1), and give what each made of it."""
    world = LocalWorld(num_ranks)
    everyone = []  # as in a process, what a rank made lives on when the rank is done

    def connect(rank: int) -> Any:
        own = Neighbours(rank, world.transports[rank].all_gather_object, timedelta(seconds=timeout_s))
        everyone.append(own)
        own.connect([(0, 1)], [tuple(range(num_ranks))])
        return work(own, rank)

    return run_threads(num_ranks, connect)


def summation(own: Neighbours) -> Summation:
    (found,) = own.summations.values()
    return found


class TestSummation:
    def test_parts_are_added_in_the_order_of_the_ranks_on_every_rank(self) -> None:
        # Large and small numbers: another order gives another sum.
        parts = [torch.tensor([1e8, 1.0, 3.0]), torch.tensor([1.0, 1e8, 5.0]), torch.tensor([-1e8, -1e8, 7.0])]

        def work(own: Neighbours, rank: int) -> Tensor:
            tensor = parts[rank].clone()
            summation(own).finish(summation(own).begin([tensor]), [tensor])
            return tensor

        expected = parts[0] + parts[1] + parts[2]
        assert [seen.tolist() for seen in among_neighbours(3, work)] == [expected.tolist()] * 3
        assert not torch.equal(expected, parts[2] + parts[1] + parts[0])

    def test_tensors_that_are_summed_together_get_the_bits_of_sums_of_their_own(self) -> None:
        def work(own: Neighbours, rank: int) -> list[Tensor]:
            generator = torch.Generator().manual_seed(rank)
            sizes = [(7,), (3, 5), (1,), (64, 9)]
            alone = [torch.randn(size, generator=generator) * 10.0 ** (4 * rank) for size in sizes]
            together = [tensor.clone() for tensor in alone]
            for tensor in alone:
                summation(own).finish(summation(own).begin([tensor]), [tensor])
            summation(own).finish(summation(own).begin(together), together)
            assert all(map(torch.equal, alone, together))
            return together

        first, *others = among_neighbours(4, work)
        assert all(torch.equal(mine, theirs) for other in others for mine, theirs in zip(first, other, strict=True))

    def test_several_tensors_of_any_order_in_memory_keep_their_places(self) -> None:
        image = torch.arange(24.0).reshape(1, 2, 3, 4)

        def work(own: Neighbours, rank: int) -> list[Any]:
            tensors = [image.to(memory_format=torch.channels_last) if rank else image.clone(), torch.ones(5)[::2]]
            summation(own).finish(summation(own).begin(tensors), tensors)
            return [tensors[0].stride(), torch.equal(tensors[0], 2 * image), tensors[1].tolist()]

        first, second = among_neighbours(2, work)
        assert first == [image.stride(), True, [2.0] * 3]
        assert second == [image.to(memory_format=torch.channels_last).stride(), True, [2.0] * 3]

    def test_sums_under_way_are_finished_in_any_order_and_slots_are_used_again(self) -> None:
        def work(own: Neighbours, rank: int) -> list[float]:
            seen = []
            for turn in range(4):
                tensors = [torch.full((2,), 10.0 * turn + index + rank) for index in range(3)]
                numbers = [summation(own).begin([tensor]) for tensor in tensors]
                for number, tensor in reversed(list(zip(numbers, tensors, strict=True))):
                    summation(own).finish(number, [tensor])
                seen += [tensor[1].item() for tensor in tensors]
            assert len(summation(own)._slots._slots) <= 6
            return seen

        expected = [2 * (10.0 * turn + index) + 1 for turn in range(4) for index in range(3)]
        assert among_neighbours(2, work) == [expected] * 2

    def test_tensor_may_change_when_its_part_was_put_in(self) -> None:
        def work(own: Neighbours, rank: int) -> list[float]:
            tensor = torch.full((2,), rank + 1.0)
            number = summation(own).begin([tensor])
            tensor.zero_()
            summation(own).finish(number, [tensor])
            return tensor.tolist()

        assert among_neighbours(2, work) == [[3.0, 3.0]] * 2

    def test_rank_that_stays_behind_is_an_error_after_the_time_limit(self) -> None:
        def work(own: Neighbours, rank: int) -> None:
            tensor = torch.ones(1)
            if rank == 0:
                summation(own).finish(summation(own).begin([tensor]), [tensor])

        with pytest.raises(RankError, match=r"TimeoutError: nothing came for 0\.05 s"):
            among_neighbours(2, work, timeout_s=0.05)


class TestConnecting:
    def test_ranks_that_cannot_see_each_others_memory_are_no_neighbours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(neighbours.Passport, "is_readable", lambda passport: False)
        assert among_neighbours(2, lambda own, rank: (own.senders, own.receivers, own.summations)) == [({}, {}, {})] * 2

    def test_where_anonymous_files_are_forbidden_are_no_neighbours(self, monkeypatch: pytest.MonkeyPatch) -> None:
        def refuse(name: str) -> int:
            raise PermissionError

        monkeypatch.setattr(os, "memfd_create", refuse)
        assert among_neighbours(2, lambda own, rank: (own.senders, own.receivers, own.summations)) == [({}, {}, {})] * 2

    def test_edge_has_one_sender_and_one_receiver(self) -> None:
        seen = among_neighbours(3, lambda own, rank: (list(own.senders), list(own.receivers)))
        assert seen == [([1], []), ([], [0]), ([], [])]

    def test_large_groups_are_left_to_the_network(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(neighbours, "_MOST_SUMMANDS", 2)
        assert among_neighbours(3, lambda own, rank: len(own.summations)) == [0, 0, 0]
