"""Links are measured through the transport, and all ranks get the same findings."""

from __future__ import annotations

import pytest
import torch

from lightning_pipebd.runtime.link_probe import (
    Links,
    Passage,
    link_cost,
    measure_links,
    probe_edges,
    probe_groups,
)
from lightning_pipebd.runtime.local_transport import LocalWorld
from tests.helpers.ranks import run_threads


@pytest.mark.parametrize("nodes", [(0, 0), (0, 0, 0), (0, 1), (0, 0, 1, 1)])
def test_every_rank_gets_the_same_links(nodes: tuple[int, ...]) -> None:
    world = LocalWorld(len(nodes))

    def run(rank: int) -> Links:
        return measure_links(world.transports[rank], nodes, torch.device("cpu"), num_threads=1)

    near, *others = run_threads(len(nodes), run)
    assert all(other == near for other in others)
    for link in near[:2]:
        assert link.latency_ms > 0
        assert 0 < link.bytes_per_ms < float("inf")
        assert 0 <= link.reduce_occupation <= 1
    assert near.overheads.send_ms == near.overheads.recv_ms >= 0
    assert near.overheads.reduce_ms >= 0
    assert [reduce.num_ranks for reduce in near[0].reduces] == [
        len(group) for group in probe_groups(len(nodes)) if len({nodes[rank] for rank in group}) == 1
    ]


def test_one_rank_has_no_links() -> None:
    (transport,) = LocalWorld(1).transports
    assert measure_links(transport, (0,), torch.device("cpu"), num_threads=1) == Links()
    assert probe_edges((0,)) == []


def test_bandwidth_is_what_a_message_takes_beside_telling_of_it() -> None:
    for is_cuda in (False, True):
        link, _ = link_cost(Passage(0.5, 0.1), Passage(2.5, 0.1), 4096 + 2000, is_cuda=is_cuda)
        assert (link.latency_ms, link.bytes_per_ms) == (0.5, 1000.0)


def test_gpu_that_sends_by_itself_is_not_occupied_and_begins_in_the_time_of_the_call() -> None:
    link, own_ms = link_cost(Passage(0.5, 0.25), Passage(2.5, 0.25), 2**28, is_cuda=True)
    assert (link.send_occupation, link.receive_occupation, own_ms) == (0.0, 0.0, 0.25)


def test_rank_that_copies_from_its_gpu_is_occupied_by_sending_and_not_by_receiving() -> None:
    link, own_ms = link_cost(Passage(1.0, 0.75), Passage(3.0, 1.75), 2**28, is_cuda=True)
    assert (link.send_occupation, link.receive_occupation, own_ms) == (0.5, 0.0, 0.25)


def test_rank_without_a_gpu_is_occupied_by_both() -> None:
    link, own_ms = link_cost(Passage(1.0, 0.75), Passage(4.0, 1.0), 2**22, is_cuda=False)
    assert (link.send_occupation, link.receive_occupation, own_ms) == (0.25, 0.25, 0.5)
