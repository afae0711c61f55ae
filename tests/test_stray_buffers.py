"""Buffers that belong to no block: the rank that changed one tells the others."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from lightning_pipebd.checkpoint import hand_over
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.stray_buffers import StrayBuffers
from tests.helpers.ranks import run_threads


class Centres(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.BatchNorm1d(1)
        for name in ("centre", "scale"):
            self.register_buffer(name, torch.zeros(2))


def assemble(changes: list[dict[str, float]], num_times: int = 2) -> list[tuple[list[list[float]], list[int]]]:
    """Let ranks change buffers, some times; give each rank's buffers, and how many were handed over each time."""
    world = LocalWorld(len(changes))

    def work(rank: int) -> tuple[list[list[float]], list[int]]:
        module, counts = Centres(), []
        strays = StrayBuffers(module, lambda: [(list(module.block.buffers()), 0)])
        for _ in range(num_times):
            for name, value in changes[rank].items():
                setattr(module, name, torch.full((2,), value))
            owned = strays.owned(world.transports[rank])
            hand_over(world.transports[rank], owned)
            strays.settle()
            counts.append(len(owned))
        return [module.centre.tolist(), module.scale.tolist()], counts

    return run_threads(len(changes), work)


def test_a_buffer_is_that_of_the_rank_that_changed_it() -> None:
    assert assemble([{"scale": 2.0}, {"centre": 1.0}]) == [([[1.0] * 2, [2.0] * 2], [2, 0])] * 2


def test_ranks_that_change_it_alike_agree() -> None:
    assert assemble([{}, {"centre": 1.0}, {"centre": 1.0}]) == [([[1.0] * 2, [0.0] * 2], [1, 0])] * 3


def test_ranks_that_change_it_differently_are_told() -> None:
    with pytest.warns(UserWarning, match="The buffer `centre` belongs to no block, and ranks 1, 2 changed it"):
        assert assemble([{}, {"centre": 1.0}, {"centre": 3.0}], num_times=1)[0][0][0] == [1.0, 1.0]


def test_buffers_of_blocks_are_not_looked_at() -> None:
    assert assemble([{}, {}]) == [([[0.0] * 2, [0.0] * 2], [0, 0])] * 2
