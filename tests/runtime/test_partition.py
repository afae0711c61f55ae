"""Unchanged models of torchvision, cut at named modules: the blocks in a row are the model, bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.fx
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pipebd.runtime.partition import check_ties, cut_model, has_batch_statistics, is_stochastic
from tests.helpers.containers import Container, run_in_a_row

models = pytest.importorskip("torchvision.models", reason="the models that are cut here are torchvision's")


def small_vit() -> nn.Module:
    vit: nn.Module = models.VisionTransformer(
        image_size=32, patch_size=16, num_layers=4, num_heads=2, hidden_dim=32, mlp_dim=64, dropout=0.1, num_classes=10
    )
    return vit


def small_vgg() -> nn.Module:
    """Give vgg16_bn without the hundred million parameters of its classifier."""
    with torch.device("meta"):
        vgg: nn.Module = models.VGG(nn.Identity(), init_weights=False)
    vgg.features = models.vgg.make_layers(models.vgg.cfgs["D"], batch_norm=True)
    vgg.classifier = nn.Sequential(nn.Linear(512 * 7 * 7, 16), nn.ReLU(inplace=True), nn.Dropout(), nn.Linear(16, 10))
    return vgg


CASES = [
    pytest.param(models.resnet18, ["layer1", "layer2", "layer3", "layer4"], id="resnet18"),
    pytest.param(models.resnet18, ["conv1", "layer2.0", "layer4.1", "fc"], id="resnet18-inside-layers"),
    pytest.param(small_vgg, ["features.6", "features.13", "features.23", "features.33", "features"], id="vgg16_bn"),
    pytest.param(small_vgg, ["features.1", "avgpool", "classifier.2", ""], id="vgg16_bn-before-in-place"),
    pytest.param(models.mobilenet_v2, ["features.3", "features.6", "features.13", "features.18"], id="mobilenet_v2"),
    pytest.param(models.efficientnet_b0, ["features.2", "features.4", "features.6", "features"], id="efficientnet_b0"),
    pytest.param(
        small_vit,
        ["encoder.dropout", "encoder.layers.encoder_layer_0", "encoder.layers.encoder_layer_2", "encoder", "heads"],
        id="vit",
    ),
    pytest.param(models.shufflenet_v2_x0_5, ["stage2", "stage3", "stage4"], id="shufflenet_v2"),
]

each_model = pytest.mark.parametrize(("build", "boundaries"), CASES)


@pytest.fixture
def images() -> Tensor:
    return torch.randn(4, 3, 32, 32)


def train_once(model: nn.Module, run: Callable[[Tensor], Tensor], images: Tensor) -> dict[str, Tensor]:
    """Give everything a training step leaves behind, drawing the same random numbers every time."""
    torch.manual_seed(5)
    output = run(images)
    output.square().mean().backward()  # type: ignore[no-untyped-call] # torch leaves it untyped
    gradients = {f"gradient of {name}": value.grad for name, value in model.named_parameters()}
    return {"output": output, **gradients, **dict(model.named_buffers())}  # type: ignore[dict-item] # all have one


def assert_equal(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []


@each_model
def test_blocks_in_a_row_are_the_model_in_evaluation(
    build: Callable[[], nn.Module], boundaries: list[str], images: Tensor
) -> None:
    model = build().eval()
    partition = cut_model(model, boundaries)
    with torch.no_grad():
        assert torch.equal(run_in_a_row(partition, images), model(images))


@each_model
def test_blocks_in_a_row_are_the_model_in_training(
    build: Callable[[], nn.Module], boundaries: list[str], images: Tensor
) -> None:
    model = build().train()
    reference = copy.deepcopy(model)
    partition = cut_model(model, boundaries)
    ours = train_once(model, lambda images: run_in_a_row(partition, images), images)
    assert_equal(ours, train_once(reference, reference, images))


@each_model
def test_every_parameter_and_buffer_is_in_one_block_under_its_own_name(
    build: Callable[[], nn.Module], boundaries: list[str]
) -> None:
    model = build()
    parameters, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    partition = cut_model(model, boundaries)
    tail: Any = partition.tail or nn.Identity()
    named = [*(dict(block.named_parameters()) for block in partition.blocks), dict(tail.named_parameters())]
    assert [names.keys() for names in named[:-1]] == [set(names) for names in partition.parameter_names]
    assert sorted(name for names in named for name in names) == sorted(parameters)
    assert all(parameters[name] is value for names in named for name, value in names.items())
    kept = [*partition.buffer_names, tuple(dict(tail.named_buffers()))]
    assert sorted(name for names in kept for name in names) == sorted(buffers)
    check_ties(model, partition, "student")


@each_model
def test_cutting_leaves_the_model_as_it_was(build: Callable[[], nn.Module], boundaries: list[str]) -> None:
    model = build().train()
    model.get_submodule(boundaries[0]).eval()
    attributes = {name: dict(vars(module)) for name, module in model.named_modules()}
    state, random_state = copy.deepcopy(model.state_dict()), torch.get_rng_state()
    cut_model(model, boundaries)
    assert {name: vars(module) for name, module in model.named_modules()} == attributes
    assert_equal(dict(model.state_dict()), state)
    assert torch.equal(torch.get_rng_state(), random_state)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("build", "boundaries"),
    [
        pytest.param(models.resnet50, ["layer1", "layer2.1", "layer4"], id="resnet50"),
        pytest.param(models.swin_t, ["features.1", "features.5", "avgpool"], id="swin_t"),
    ],
)
def test_models_of_full_size_can_be_cut(build: Callable[[], nn.Module], boundaries: list[str]) -> None:
    model, images = build().eval(), torch.randn(1, 3, 224, 224)
    partition = cut_model(model, boundaries)
    with torch.no_grad():
        assert torch.equal(run_in_a_row(partition, images), model(images))


def test_a_model_that_ends_at_its_last_boundary_has_no_tail() -> None:
    assert cut_model(models.resnet18(), ["layer1", "fc"]).tail is None
    assert cut_model(models.resnet18(), ["layer1", ""]).tail is None


def test_the_model_as_only_boundary_is_the_only_block() -> None:
    model = nn.Linear(3, 3)
    partition = cut_model(model, [""])
    assert partition.blocks == (model,)
    assert partition.parameter_names == (("weight", "bias"),)


def test_another_batch_size_runs_through_the_same_blocks(images: Tensor) -> None:
    model = small_vit().eval()
    partition = cut_model(model, ["encoder.layers.encoder_layer_0"])
    assert torch.equal(run_in_a_row(partition, images[:1]), model(images[:1]))


def test_a_block_ends_at_the_last_call_of_its_module() -> None:
    model = Container(lambda self, x: self.b(self.a(self.a(x))), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    x = torch.randn(2, 3)
    first, second = cut_model(model, ["a", "b"]).blocks
    assert torch.equal(first(x), model.a(model.a(x)))  # type: ignore[operator] # a submodule
    assert torch.equal(second(first(x)), model(x))


def test_functional_code_runs_once_in_the_block_after_the_boundary() -> None:
    model = Container(lambda self, x: self.b(F.relu(self.a(x)) * 2), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    x = torch.randn(8, 3)
    first, second = cut_model(model, ["a", "b"]).blocks
    assert torch.equal(first(x), model.a(x))  # type: ignore[operator] # a submodule
    assert torch.equal(second(first(x)), model(x))


def test_functional_dropout_between_modules_follows_the_mode_of_the_model() -> None:
    model = Container(
        lambda self, x: self.b(F.dropout(self.a(x), 0.5, self.training)), a=nn.Linear(9, 9), b=nn.Linear(9, 9)
    )
    x, reference = torch.randn(4, 9), copy.deepcopy(model)
    partition = cut_model(model, ["a", "b"])
    assert [is_stochastic(block) for block in partition.blocks] == [False, True]
    assert_equal(train_once(model, lambda x: run_in_a_row(partition, x), x), train_once(reference, reference, x))
    assert torch.equal(run_in_a_row(cut_model(model.eval(), ["a", "b"]), x), run_in_a_row(partition, x))
    assert torch.equal(run_in_a_row(partition, x), model(x))


def add_items(pair: Any) -> Any:
    return pair[0] + pair[1]


def test_a_module_that_gives_several_tensors_may_end_a_block() -> None:
    pair = Container(lambda self, x: (self.a(x), x * 2), a=nn.Linear(3, 3))
    model = Container(lambda self, x: add_items(self.pair(self.first(x))), first=nn.ReLU(), pair=pair)
    x = torch.randn(2, 3)
    partition = cut_model(model, ["first", "pair"])
    assert [item.shape for item in partition.blocks[1](x)] == [(2, 3), (2, 3)]
    assert torch.equal(run_in_a_row(partition, x), model(x))


def test_a_container_that_holds_a_boundary_may_return_a_tuple_or_a_dict() -> None:
    x = torch.randn(2, 3)
    a, b = nn.Linear(3, 3), nn.Linear(3, 3)
    pair = Container(lambda self, x: (self.b(self.a(x)), self.b.weight), a=a, b=b)
    of_pair = Container(lambda self, x: self.m(x)[0] + 1, m=pair)
    named = Container(lambda self, x: {"hidden": self.b(self.a(x))}, a=a, b=b)
    of_named = Container(lambda self, x: self.m(x)["hidden"] * 2, m=named)
    assert torch.equal(run_in_a_row(cut_model(of_pair, ["m.a", "m"]), x), of_pair(x))
    assert torch.equal(run_in_a_row(cut_model(of_named, ["m.a", "m"]), x), of_named(x))


class OneTuple(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return (super().forward(input),)


class Named(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return torch.max(super().forward(input), dim=1)


class Keyed(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return {"hidden": super().forward(input)}


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(Container(lambda self, x: self.a(x)[0] * 2, a=OneTuple(3, 3)), id="tuple-of-one"),
        pytest.param(Container(lambda self, x: self.a(x).values * 2, a=Named(3, 3)), id="named-tuple"),
        pytest.param(Container(lambda self, x: self.a(x)["hidden"] * 2, a=Keyed(3, 3)), id="dict"),
    ],
)
def test_a_boundary_has_whatever_type_its_module_returns(model: nn.Module) -> None:
    x = torch.randn(2, 3)
    partition = cut_model(model, ["a"])
    assert torch.equal(run_in_a_row(partition, x), model(x))


def test_a_model_with_several_inputs_takes_a_tuple_or_a_dict() -> None:
    model = TwoInputs()
    x, y = torch.randn(2, 3), torch.randn(2, 3)
    partition = cut_model(model, ["a", "b"])
    assert torch.equal(run_in_a_row(partition, (x, y)), model(x, y=y))
    assert torch.equal(run_in_a_row(partition, {"y": y, "x": x}), model(x, y=y))


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(3, 3)
        self.b = nn.Linear(3, 3)

    def forward(self, x: Tensor, *, y: Tensor, scale: float = 2.0) -> Tensor:
        output: Tensor = self.b(self.a(x + y) * scale)
        return output


class Turned(nn.Module):
    """Layers that all read one table, as rotary positions are read; ``grow`` changes it."""

    table: Tensor

    def __init__(self, *, grow: bool = False) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(3, 3) for _ in range(3))
        self.grow = grow
        self.register_buffer("table", torch.randn(3), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x * (self.table.add_(1) if self.grow else self.table))
        return x


def test_a_buffer_that_several_blocks_read_belongs_to_the_first_of_them() -> None:
    model, x = Turned(), torch.randn(2, 3)
    partition = cut_model(model, ["layers.0", "layers.1", "layers.2"])
    assert partition.buffer_names == (("table",), (), ())
    assert torch.equal(run_in_a_row(partition, x), model(x))
    check_ties(model, partition, "student")
    copied, x = copy.deepcopy(partition.blocks[1]).double(), x.double()
    assert torch.equal(copied(x), copied.get_submodule("layers.1")(x * model.table.double()))


def test_a_buffer_that_several_blocks_read_must_not_be_changed_by_one() -> None:
    partition = cut_model(Turned(grow=True), ["layers.0", "layers.1", "layers.2"])
    with pytest.raises(RuntimeError, match=r"block 0 of the student must leave the buffer `table` as it is.*Merge"):
        partition.blocks[0](torch.randn(2, 3))


def test_has_batch_statistics_and_is_stochastic_tell_blocks_apart() -> None:
    partition = cut_model(small_vgg(), ["features", "classifier.1", "classifier.3"])
    assert [has_batch_statistics(block) for block in partition.blocks] == [True, False, False]
    assert [is_stochastic(block) for block in partition.blocks] == [False, False, True]


def test_slices_of_a_sequential_are_looked_into() -> None:
    layers = nn.Sequential(nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 3), nn.ReLU(), nn.Linear(3, 2))
    model = Container(lambda self, x: self.layers[3:](self.layers[:3](x) * 2), layers=layers)
    x = torch.randn(2, 3)
    partition = cut_model(model, ["layers.1", "layers.2", "layers.4"])
    assert [len(names) for names in partition.parameter_names] == [2, 2, 2]
    assert torch.equal(run_in_a_row(partition, x), model(x))


@torch.fx.wrap
def apply_module(module: nn.Module, x: Tensor) -> Any:
    return module(x)


def test_a_module_that_is_handed_to_a_function_belongs_to_the_block() -> None:
    model = Container(lambda self, x: apply_module(self.b, self.a(x)), a=nn.Linear(3, 3), b=nn.Linear(3, 2))
    x = torch.randn(2, 3)
    partition = cut_model(model, ["a", ""])
    assert partition.parameter_names == (("a.weight", "a.bias"), ("b.weight", "b.bias"))
    assert torch.equal(run_in_a_row(partition, x), model(x))


def test_tensors_made_between_modules_may_differ_with_the_mode() -> None:
    model = Container(lambda self, x: self.a(x) + torch.full((3,), 1.0 if self.training else 2.0), a=nn.Linear(3, 3))
    x = torch.randn(2, 3)
    partition = cut_model(model, ["a"])
    assert torch.equal(run_in_a_row(partition, x), model(x))
    model.eval()
    assert torch.equal(run_in_a_row(partition, x), model(x))
