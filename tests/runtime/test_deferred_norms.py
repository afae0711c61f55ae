"""Running statistics of micro-batches move once per batch, by the statistics of the batch."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from lightning_pipebd.runtime.deferred_norms import DeferredNorms
from lightning_pipebd.runtime.local_transport import LocalWorld
from tests.helpers.ranks import run_threads


def run_in_parts(norm: nn.Module, views: list[torch.Tensor], sizes: list[int]) -> None:
    norms = DeferredNorms({0: [norm]})
    with norms.batch():
        for parts in zip(*(view.split(sizes) for view in views), strict=True):
            norms.begin(0)
            for part in parts:
                norm(part)


@pytest.mark.parametrize("momentum", [0.1, None])
def test_statistics_are_those_of_the_whole_batch(momentum: float | None) -> None:
    torch.manual_seed(1)
    whole = nn.BatchNorm2d(3, momentum=momentum)
    parts = copy.deepcopy(whole)
    for _ in range(3):
        batch = torch.randn(7, 3, 4, 4) * 3 + 1
        whole(batch)
        run_in_parts(parts, [batch], [3, 3, 1])
    torch.testing.assert_close(dict(parts.named_buffers()), dict(whole.named_buffers()), rtol=1e-5, atol=1e-6)


def test_views_are_kept_apart() -> None:
    torch.manual_seed(1)
    views = [torch.randn(6, 2), torch.randn(6, 2) + 5]
    whole = nn.BatchNorm1d(2)
    parts = copy.deepcopy(whole)
    for view in views:
        whole(view)
    run_in_parts(parts, views, [2, 4])
    torch.testing.assert_close(dict(parts.named_buffers()), dict(whole.named_buffers()), rtol=1e-5, atol=1e-6)
    assert parts.num_batches_tracked == 2


def test_outputs_are_normalised_by_their_micro_batch_and_eval_is_left_alone() -> None:
    norm, norms = nn.BatchNorm1d(2), DeferredNorms({})
    assert not norms
    norms = DeferredNorms({0: [norm], 1: [nn.BatchNorm1d(2, track_running_stats=False)]})
    part = torch.randn(4, 2)
    expected = copy.deepcopy(norm)(part)
    with norms.batch():
        norms.begin(0)
        torch.testing.assert_close(norm(part), expected)
        norm.eval()
        before = norm.running_mean.clone()
        norm(part)
        norm.train()
    assert not torch.equal(norm.running_mean, before)
    assert norm.num_batches_tracked == 1
    norm(part)
    assert norm.num_batches_tracked == 2


def test_a_batch_that_fails_moves_nothing() -> None:
    norm = nn.BatchNorm1d(2)
    norms = DeferredNorms({0: [norm]})

    def run() -> None:
        with norms.batch():
            norm(torch.randn(4, 2))
            norm(torch.randn(1, 2))

    with pytest.raises(ValueError, match="Expected more than 1 value"):
        run()
    assert norm.num_batches_tracked == 0
    assert norm.momentum == 0.1
    assert norm.running_mean.tolist() == [0, 0]


def test_replicas_move_alike_by_the_rows_of_all_also_one_without_rows() -> None:
    torch.manual_seed(1)
    views = [torch.randn(7, 3, 2, 2) * 3 + 1, torch.randn(7, 3, 2, 2)]
    whole = nn.BatchNorm2d(3)
    for view in views:
        whole(view)
    world = LocalWorld(3)

    def run(rank: int) -> dict[str, torch.Tensor]:
        own = [view[[slice(0, 4), slice(4, 7), slice(7, 7)][rank]] for view in views]
        parts = nn.BatchNorm2d(3)
        # A layer in eval() has no statistics to share.
        idle = nn.BatchNorm2d(2).eval()
        norms = DeferredNorms(
            {0: [parts, idle]}, lambda tensors: world.transports[rank].all_reduce(tensors, (0, 1, 2)).wait()
        )
        with norms.batch():
            if len(own[0]):
                norms.begin(0)
                for view in own:
                    parts(view)
        return dict(parts.named_buffers())

    first, second, third = run_threads(3, run)
    torch.testing.assert_close(first, dict(whole.named_buffers()), rtol=1e-5, atol=1e-6)
    torch.testing.assert_close([second, third], [first, first], rtol=0, atol=0)
