"""What a rank may plan with of a GPU's memory."""

from __future__ import annotations

import pytest
import torch

from lightning_pipebd.machines import Machine, find_cluster, find_memory, usable_bytes
from lightning_pipebd.runtime.local_transport import LocalWorld

GIB = 2**30


@pytest.mark.parametrize(
    ("free", "held", "num_sharing", "usable"),
    [
        (100 * GIB, 0, 1, 95 * GIB),
        (60 * GIB, 40 * GIB, 1, 95 * GIB),
        (10 * GIB, 0, 1, 9 * GIB),
        (10 * GIB, 2 * GIB, 2, 6 * GIB),
        (GIB // 2, 0, 1, 1),
    ],
)
def test_a_reserve_and_the_parts_of_others_stay_free(free: int, held: int, num_sharing: int, usable: int) -> None:
    assert usable_bytes(free, held, num_sharing) == usable


def test_limit_of_the_user_holds_for_every_rank() -> None:
    machines = [Machine("cpu", 0, 1), Machine("gpu", 0, 1, num_sharing=2)]
    memory = find_memory(LocalWorld(2).transports[0], torch.device("cpu"), machines, 7 * GIB)
    assert find_cluster(machines, memory).memory_limit_bytes == (7 * GIB, 7 * GIB)


def test_nobody_counts_the_memory_of_hosts() -> None:
    machines = [Machine.here(torch.device("cpu"), 0, devices=[torch.device("cpu")] * 2)]
    assert machines[0].num_sharing == 1
    assert find_memory(LocalWorld(1).transports[0], torch.device("cpu"), machines, None) == [None]
