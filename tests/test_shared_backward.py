from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
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

    def learn(self, block: int, boundary: Tensor, path: Callable[[Any], Any] | None = None) -> None:
        self.shared.begin()
        output = self.blocks[block](boundary)
        self.shared.add(block, boundary, (output if path is None else path(output)).square().mean())

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
    boundary = torch.randn(256, 512)  # of which a block makes three times as much, 1.5 MiB, of the 16 MiB for all
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


def test_another_path_through_a_block_is_weighed_by_itself() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)

    def wide(output: Tensor) -> Tensor:
        return output.repeat(1, 512).sin()

    for path, is_full in ((None, False), (wide, True), (None, False), (wide, True)):
        learner.learn(0, boundary, path)
        assert learner.shared.is_full == is_full
        learner.shared.settle()


def test_a_wider_path_of_as_many_operations_is_noticed_in_time_and_remembered() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    found = []
    for width in [1, *[512] * 32, 1]:
        learner.learn(0, boundary, lambda output, width=width: output.repeat(1, width).sin())
        found.append(learner.shared.is_full)
        learner.shared.settle()
    assert (found.index(True), found[-1]) == (32, True)


class Doubled(torch.autograd.Function):
    """Keeps what nobody sees."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        ctx.kept = torch.zeros(2**20)
        return given * 2

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient * 2


def nested(layout: torch.layout) -> Callable[[Tensor], Tensor]:
    def path(output: Tensor) -> Tensor:
        pieces: Tensor = torch.nested.as_nested_tensor([output[:3], output[3:]], layout=layout)
        padded: Tensor = torch.nested.to_padded_tensor(pieces * 2, 0.0)
        return padded

    return path


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors:UserWarning")
@pytest.mark.parametrize(
    "path",
    [Doubled.apply, nested(torch.strided), nested(torch.jagged), lambda output: nn.LSTM(8, 8)(output)[0]],
    ids=["function", "strided", "jagged", "recurrent"],
)
def test_nothing_waits_for_a_graph_that_holds_what_cannot_be_seen(path: Callable[[Tensor], Tensor]) -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    learner.learn(0, boundary, path)
    assert learner.shared.is_full
    learner.shared.settle()
    assert len(learner.gradients()) == 2


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_torchscript_is_weighed_until_it_is_one_operation() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    scripted: Any = torch.jit.script(nn.Sequential(nn.Linear(8, 8), nn.Sigmoid()))
    found = []
    for _ in range(4):  # it looks at what it gets before it becomes one
        learner.learn(0, boundary, scripted)
        found.append(learner.shared.is_full)
        learner.shared.settle()
    assert (found[0], found[-1]) == (False, True)


class Sizeless(Tensor):
    def numel(self) -> int:
        raise NotImplementedError


def test_what_cannot_be_weighed_is_large_and_no_error() -> None:
    learner, boundary = Learner([8]), torch.randn(ROWS, 8)
    for _ in range(2):
        learner.learn(0, boundary.as_subclass(Sizeless), lambda output: output.as_subclass(Tensor))
        assert learner.shared.is_full
        learner.shared.settle()
    assert (len(learner.gradients()), learner.num_passes) == (2, 2)


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
