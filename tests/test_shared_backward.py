from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lightning_pipebd.shared_backward import SharedBackward

ROWS = 64


class Learner:
    """Blocks of one layer and their shared backward passes, which are counted."""

    def __init__(self, widths: Sequence[int]) -> None:
        torch.manual_seed(0)
        self.blocks = [nn.Sequential(nn.Linear(width, width), nn.Sigmoid()) for width in widths]
        self.num_passes = 0
        self.shared = SharedBackward(self._run)

    def _run(self, loss: Tensor) -> None:
        self.num_passes += 1
        torch.autograd.backward(loss)

    def learn(self, block: int, boundary: Tensor) -> Tensor:
        loss: Tensor = self.blocks[block](boundary).square().mean()
        self.shared.add(block, boundary, loss)
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
    boundary = torch.randn(64, 512)  # of which a block makes three times as much, 384 KiB, of the 4 MiB for all
    num_kept = 0
    while not learner.shared.is_full:
        learner.learn(num_kept, boundary)
        num_kept += 1
    assert num_kept == 11
    learner.shared.settle()


def test_a_larger_boundary_is_weighed_again() -> None:
    learner = Learner([8])
    for rows, is_full in ((ROWS, False), (2**17, True)):
        learner.learn(0, torch.randn(rows, 8))
        assert learner.shared.is_full == is_full
        learner.shared.settle()


def test_compiled_code_is_not_weighed_and_nothing_waits_for_it() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    compiled = torch.compile(learner.blocks[0], backend="aot_eager")
    learner.shared.add(0, boundary, compiled(boundary).mean())
    assert learner.shared.is_full


def test_weighing_runs_nothing_of_a_checkpointed_block() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    num_calls = 0

    def count(layer: nn.Module, given: object) -> None:
        nonlocal num_calls
        num_calls += 1

    learner.blocks[0].register_forward_pre_hook(count)
    learner.shared.add(0, boundary, checkpoint(learner.blocks[0], boundary, use_reentrant=False).mean())
    assert num_calls == 1
    learner.shared.settle()
    assert num_calls == 2


def test_settling_nothing_does_nothing() -> None:
    learner = Learner([8])
    learner.shared.settle()
    assert learner.num_passes == 0
