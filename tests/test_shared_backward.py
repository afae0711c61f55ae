from __future__ import annotations

import gc
import weakref
from collections.abc import Sequence

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.shared_backward import SharedBackward

ROWS = 64


class Learner:
    """Blocks of one layer and their shared backward passes, which are counted."""

    def __init__(self, widths: Sequence[int]) -> None:
        torch.manual_seed(0)
        self.blocks = [nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for width in widths]
        self.num_passes = 0
        self.shared = SharedBackward(self._run, lambda block: self.blocks[block].parameters())

    def _run(self, loss: Tensor) -> None:
        self.num_passes += 1
        torch.autograd.backward(loss)

    def learn(self, block: int, boundary: Tensor) -> Tensor:
        loss = self.shared.call(block, boundary, lambda: self.blocks[block](boundary).square().mean())
        self.shared.add(block, loss)
        return loss

    def gradients(self) -> list[Tensor]:
        found = [parameter.grad for block in self.blocks for parameter in block.parameters()]
        return [gradient for gradient in found if gradient is not None]


def test_small_blocks_have_one_backward_pass_and_the_gradients_of_their_own() -> None:
    learner, boundary = Learner([8, 8, 8]), torch.randn(ROWS, 8)
    for _ in range(2):  # weighing the blocks changes nothing, either
        for block in range(3):
            learner.learn(block, boundary)
            assert not learner.shared.is_full
        learner.shared.settle()
    assert learner.num_passes == 2
    alone = Learner([8, 8, 8])
    for _ in range(2):
        for block in alone.blocks:
            torch.autograd.backward(block(boundary).square().mean())
    assert all(map(torch.equal, learner.gradients(), alone.gradients()))


def test_nothing_waits_for_a_large_block() -> None:
    learner = Learner([8, 4096])
    for block, (width, is_full) in enumerate([(8, False), (4096, True)]):
        learner.learn(block, torch.randn(ROWS, width))
        assert learner.shared.is_full == is_full
    learner.shared.settle()
    assert (learner.num_passes, learner.shared.is_full) == (1, False)


def test_many_small_blocks_are_settled_before_they_keep_much_together() -> None:
    learner = Learner([512] * 64)
    boundary = torch.randn(256, 512)  # a block keeps what its last layer gave, half a MiB
    num_kept = 0
    while not learner.shared.is_full:
        learner.learn(num_kept, boundary)
        num_kept += 1
    assert num_kept == 9
    learner.shared.settle()


def test_a_larger_boundary_is_weighed_again() -> None:
    learner = Learner([8])
    for rows, is_full in ((ROWS, False), (2**17, True)):
        learner.learn(0, torch.randn(rows, 8))
        assert learner.shared.is_full == is_full
        learner.shared.settle()


def test_a_block_that_was_never_weighed_is_not_kept() -> None:
    learner = Learner([8])
    learner.shared.add(0, learner.blocks[0](torch.randn(ROWS, 8)).mean())
    assert learner.shared.is_full


def test_settling_nothing_does_nothing() -> None:
    learner = Learner([8])
    learner.shared.settle()
    assert learner.num_passes == 0


def test_weighing_notices_what_changed_in_place() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    learner.shared.add(0, learner.shared.call(0, boundary, lambda: learner.blocks[0](boundary).exp_().add_(1).mean()))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        learner.shared.settle()


def test_second_gradients_pass_through_a_weighed_block() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8, requires_grad=True)
    found = []
    for _ in range(2):  # weighed, and not
        loss = learner.shared.call(0, boundary, lambda: learner.blocks[0](boundary).square().mean())
        (slope,) = torch.autograd.grad(loss, boundary, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), boundary)[0])
    assert found[0].abs().sum() > 0
    assert torch.equal(*found)


def test_a_weighed_graph_that_nobody_runs_goes_with_its_loss() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    loss = learner.shared.call(0, boundary, lambda: learner.blocks[0](boundary).exp())
    seen = weakref.ref(loss)
    gc.disable()
    try:
        del loss
        assert seen() is None
    finally:
        gc.enable()
