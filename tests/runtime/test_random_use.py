from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_pipebd.runtime.partition import cut_model
from lightning_pipebd.runtime.random_use import PythonDrawing, may_draw_from_python


class Branching(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x if random.random() < 0.5 else -x


@fx.wrap  # type: ignore[untyped-decorator]  # torch leaves it untyped
def shaken(x: Tensor) -> Tensor:
    return x * random.random()


class Shaking(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self[1](shaken(self[0](x)))
        return output


class Doubling(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self[1](torch.relu(self[0](x)) * 2)
        return output


def linears(kind: type[nn.Sequential]) -> nn.Sequential:
    return kind(nn.Linear(2, 2), nn.Linear(2, 2))


def hooked() -> nn.Module:
    block = nn.Linear(2, 2)
    block.register_forward_hook(lambda *_: None)
    return block


def replaced() -> nn.Module:
    block = nn.Linear(2, 2)
    block.forward = lambda input: input * random.random()  # type: ignore[method-assign]
    return block


@pytest.mark.parametrize(
    ("block", "may_draw"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.Dropout()), False),
        (cut_model(linears(Doubling), ["0", "1"]).blocks[1], False),
        (cut_model(linears(Shaking), ["0", "1"]).blocks[1], True),
        (nn.Sequential(nn.Linear(2, 2), Branching()), True),
        (nn.TransformerEncoderLayer(2, 1, activation=lambda x: x), True),
        (hooked(), True),
        (replaced(), True),
    ],
    ids=["layers", "operations of torch", "a function of the user", "a module", "an activation", "a hook", "a forward"],
)
def test_only_code_of_the_users_may_draw(block: nn.Module, may_draw: bool) -> None:
    assert may_draw_from_python(block) == may_draw


def test_torchvision_draws_from_torch_alone() -> None:
    models = pytest.importorskip("torchvision.models")
    assert not may_draw_from_python(models.efficientnet_b0())


def test_a_hook_for_all_modules_may_draw() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert may_draw_from_python(nn.Linear(2, 2))
    finally:
        handle.remove()


def test_blocks_are_looked_at_anew_in_every_epoch() -> None:
    drawing, block = PythonDrawing(), nn.Linear(2, 2)

    def find(_: int) -> Any:
        return [block]

    assert not drawing.may_draw(0, 0, find)
    block.register_forward_hook(lambda *_: None)
    assert not drawing.may_draw(0, 0, find)
    assert drawing.may_draw(0, 1, find)


def test_functions_of_the_users_may_draw() -> None:
    assert PythonDrawing().may_draw(0, 0, lambda _: None)
