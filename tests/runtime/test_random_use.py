from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

from lightning_pipebd.runtime.block_traits import graph_draws_random_numbers
from lightning_pipebd.runtime.partition import cut_model
from lightning_pipebd.runtime.random_use import Draws, KnownDraws, block_stream, draws_of


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


class Adding(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self[0](x)
        output: Tensor = self[1](hidden * 2 + hidden)
        return output


class Noisy(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        hidden = self[0](x)
        output: Tensor = self[1](hidden * hidden.detach().clone().uniform_())
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
    ("block", "draws"),
    [
        (nn.Sequential(nn.Conv2d(1, 1, 1), nn.BatchNorm2d(1), nn.ReLU(), nn.MaxPool2d(2)), Draws.NOTHING),
        (cut_model(linears(Adding), ["0", "1"]).blocks[1], Draws.NOTHING),
        (nn.Sequential(nn.Linear(2, 2), nn.Dropout(0.0)), Draws.TORCH),
        (nn.RReLU(), Draws.TORCH),
        (nn.MultiheadAttention(2, 1), Draws.TORCH),
        (nn.FractionalMaxPool2d(2, output_size=1), Draws.TORCH),
        (nn.LazyLinear(2), Draws.PYTHON),
        (nn.LSTM(2, 2), Draws.TORCH),
        (cut_model(linears(Doubling), ["0", "1"]).blocks[1], Draws.TORCH),
        (cut_model(linears(Noisy), ["0", "1"]).blocks[1], Draws.TORCH),
        (cut_model(linears(Shaking), ["0", "1"]).blocks[1], Draws.PYTHON),
        (nn.Sequential(nn.Linear(2, 2), Branching()), Draws.PYTHON),
        (nn.TransformerEncoderLayer(2, 1, activation=lambda x: x), Draws.PYTHON),
        (hooked(), Draws.PYTHON),
        (replaced(), Draws.PYTHON),
    ],
    ids=[
        *("layers", "arithmetic", "a dropout that drops nothing", "a random slope", "attention", "a random pool"),
        *("a layer without parameters yet", "a recurrent layer", "a function of torch", "a method of torch"),
        *("a function of the user", "a module", "an activation", "a hook", "a forward"),
    ],
)
def test_what_a_block_may_draw_from_follows_from_the_code_that_it_runs(block: nn.Module, draws: Draws) -> None:
    assert draws_of(block) is draws


@pytest.mark.parametrize(
    ("name", "draws"),
    [
        *(("resnet18", Draws.NOTHING), ("mobilenet_v2", Draws.TORCH), ("efficientnet_b0", Draws.TORCH)),
        *(("densenet121", Draws.TORCH), ("vit_b_16", Draws.TORCH)),
    ],
)
def test_torchvision_draws_from_torch_alone_where_something_may_be_dropped(name: str, draws: Draws) -> None:
    models = pytest.importorskip("torchvision.models")
    with torch.device("meta"):
        assert draws_of(models.get_model(name)) is draws


def test_every_method_of_torch_that_draws_is_known() -> None:
    operations = [getattr(torch.ops.aten, name) for name in dir(torch.ops.aten) if hasattr(Tensor, name)]
    seeded = torch.Tag.nondeterministic_seeded
    drawing = [
        packet.__name__
        for packet in operations
        if isinstance(packet, torch._ops.OpOverloadPacket)
        and any(seeded in getattr(packet, overload).tags for overload in packet.overloads())  # type: ignore[no-untyped-call]  # as torch has it
    ]
    assert {"uniform_", "bernoulli"} <= set(drawing)
    for name in drawing:
        graph = fx.Graph()
        graph.call_method(name, (graph.placeholder("x"),))
        assert graph_draws_random_numbers(graph), name


def test_layers_that_are_said_to_draw_nothing_draw_nothing() -> None:
    block = nn.Sequential(
        *(
            nn.Conv2d(2, 4, 3),
            nn.BatchNorm2d(4),
            nn.SiLU(),
            nn.InstanceNorm2d(4),
            nn.AdaptiveAvgPool2d(2),
            nn.GroupNorm(2, 4),
        ),
        *(nn.Upsample(scale_factor=2), nn.PixelShuffle(2), nn.Flatten(), nn.Linear(64, 8), nn.LayerNorm(8), nn.GELU()),
    )
    assert draws_of(block) is Draws.NOTHING
    before = torch.get_rng_state()
    block(torch.ones(2, 2, 6, 6)).sum().backward()
    assert torch.equal(torch.get_rng_state(), before)


def drawn(draws: Draws) -> tuple[float, float]:
    with block_stream(draws, (7, 0, 1), torch.device("cpu")):
        return torch.rand(()).item(), random.random()


def test_a_block_draws_from_its_own_stream_what_it_may_draw() -> None:
    first, second = drawn(Draws.PYTHON), drawn(Draws.PYTHON)
    assert first == second
    assert drawn(Draws.TORCH)[0] == first[0]
    random.seed(0)
    others = {drawn(Draws.TORCH)[1] for _ in range(2)}
    assert len(others | {first[1]}) == 3


def test_a_hook_for_all_modules_may_draw() -> None:
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert draws_of(nn.Linear(2, 2)) is Draws.PYTHON
    finally:
        handle.remove()


def test_blocks_are_looked_at_anew_in_every_epoch() -> None:
    known, block = KnownDraws(), nn.Linear(2, 2)

    def find(_: int) -> Any:
        return [block]

    assert known.of(0, 0, find) is Draws.NOTHING
    block.register_forward_hook(lambda *_: None)
    assert known.of(0, 0, find) is Draws.NOTHING
    assert known.of(0, 1, find) is Draws.PYTHON


def test_a_block_draws_what_any_of_its_modules_may_draw() -> None:
    assert KnownDraws().of(0, 0, lambda _: [nn.Linear(2, 2), nn.Dropout()]) is Draws.TORCH


def test_functions_of_the_users_may_draw() -> None:
    assert KnownDraws().of(0, 0, lambda _: None) is Draws.PYTHON
