"""Links are measured through the transport, and all ranks get the same findings."""

from __future__ import annotations

import pytest
import torch

from lightning_pipebd.runtime.link_probe import Links, measure_links, probe_edges, probe_groups
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
