"""Cut blocks are views: whatever happens to the model happens to them."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.runtime.compiling import compiled_block
from lightning_pipebd.runtime.partition import Partition, call_block, cut_model
from tests.helpers.containers import Container, run_in_a_row
from tests.helpers.ranks import run_threads


class Positions(nn.Module):
    """Uses a parameter, two buffers and a constant directly, in a container that a cut opens."""

    table: Tensor
    offset: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(4, 3))
        self.register_buffer("table", torch.randn(8, 3))
        self.register_buffer("offset", torch.randn(3), persistent=False)
        self.layers = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])

    def forward(self, x: Tensor) -> Any:
        x = self.layers[0](x + self.position + self.table[: x.shape[1]])
        return self.layers[1](x * self.offset + torch.arange(3) + torch.ones(3))


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(3))
        self.encoder = Positions()
        self.norm = nn.BatchNorm1d(4)
        self.head = nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.norm(self.encoder(x + self.token)))


BOUNDARIES = ["encoder.layers.0", "norm", "head"]


@pytest.fixture
def model() -> Model:
    return Model().eval()


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 4, 3)


def test_parameters_used_between_modules_keep_their_names_and_are_trained(model: Model, x: Tensor) -> None:
    partition = cut_model(model, BOUNDARIES)
    assert partition.parameter_names == (
        ("token", "encoder.position", "encoder.layers.0.weight", "encoder.layers.0.bias"),
        ("encoder.layers.1.weight", "encoder.layers.1.bias", "norm.weight", "norm.bias"),
        ("head.weight", "head.bias"),
    )
    assert partition.buffer_names == (
        ("encoder.table",),
        ("encoder.offset", "norm.running_mean", "norm.running_var", "norm.num_batches_tracked"),
        (),
    )
    run_in_a_row(partition, x).sum().backward()
    assert model.token.grad is not None
    assert model.encoder.position.grad is not None
    assert dict(partition.blocks[0].named_parameters())["encoder.position"] is model.encoder.position


def test_blocks_follow_the_model_to_another_dtype(model: Model, x: Tensor) -> None:
    partition = cut_model(model, BOUNDARIES)
    model.double()
    assert torch.equal(run_in_a_row(partition, x.double()), model(x.double()))
    assert dict(partition.blocks[0].named_buffers())["encoder.table"] is model.encoder.table


def test_blocks_see_what_is_loaded_into_the_model(model: Model, x: Tensor) -> None:
    partition, other = cut_model(model, BOUNDARIES), Model().eval()
    model.load_state_dict(other.state_dict(), assign=True)
    model.encoder.offset = other.encoder.offset
    assert torch.equal(run_in_a_row(partition, x), other(x))
    assert dict(partition.blocks[0].named_parameters())["token"] is model.token


def test_blocks_see_modules_that_were_exchanged(model: Model, x: Tensor) -> None:
    partition = cut_model(model, BOUNDARIES)
    model.head = nn.Linear(3, 5)
    assert torch.equal(run_in_a_row(partition, x), model(x))
    assert list(partition.blocks[2].children()) == [model.head]


def test_moving_a_block_moves_that_part_of_the_model(model: Model) -> None:
    first = cut_model(model, BOUNDARIES).blocks[0]
    first.double()
    assert {name for name, value in model.state_dict().items() if value.dtype == torch.float64} == {
        "token",
        "encoder.position",
        "encoder.table",
        "encoder.layers.0.weight",
        "encoder.layers.0.bias",
    }


def test_state_of_a_block_is_its_part_of_the_models(model: Model) -> None:
    partition, state = cut_model(model, BOUNDARIES), model.state_dict()
    states = [block.state_dict() for block in partition.blocks]
    assert sorted(name for part in states for name in part) == sorted(state)
    assert all(torch.equal(value, state[name]) for part in states for name, value in part.items())


def test_loading_a_block_loads_that_part_of_the_model(model: Model) -> None:
    other, name = Model(), "encoder.layers.0.bias"
    cut_model(model, BOUNDARIES).blocks[0].load_state_dict(
        cut_model(other, BOUNDARIES).blocks[0].state_dict(), assign=True
    )
    assert torch.equal(model.encoder.table, other.encoder.table)
    assert torch.equal(model.token, other.token)
    assert torch.equal(model.get_parameter(name), other.get_parameter(name))
    assert not torch.equal(model.head.bias, other.head.bias)


def test_the_mode_of_a_block_is_that_of_its_modules_and_containers(model: Model) -> None:
    partition = cut_model(model, BOUNDARIES)
    partition.blocks[1].train()
    assert model.norm.training
    assert model.encoder.training
    assert not model.head.training
    partition.blocks[1].eval()
    assert not any(module.training for module in model.modules())


def test_a_block_does_not_register_the_model(model: Model) -> None:
    first = cut_model(model, BOUNDARIES).blocks[0]
    assert not {id(module) for module in first.modules()} & {id(model), id(model.encoder), id(model.head)}


def copied(both: tuple[Model, Partition]) -> tuple[Model, Partition]:
    return copy.deepcopy(both)


def pickled(both: tuple[Model, Partition]) -> tuple[Model, Partition]:
    again: tuple[Model, Partition] = pickle.loads(pickle.dumps(both))
    return again


@pytest.mark.parametrize("duplicate", [copied, pickled])
def test_a_partition_copied_with_its_model_belongs_to_the_copy(model: Model, x: Tensor, duplicate: Any) -> None:
    expected = model(x)
    other, partition = duplicate((model, cut_model(model, BOUNDARIES)))
    assert torch.equal(run_in_a_row(partition, x), expected)
    assert {id(value) for block in partition.blocks for value in block.parameters()} == {*map(id, other.parameters())}
    nn.init.zeros_(other.head.weight)
    nn.init.zeros_(other.head.bias)
    assert torch.equal(run_in_a_row(partition, x), torch.zeros(2, 4, 2))
    assert torch.equal(model(x), expected)


def test_blocks_run_on_part_of_the_batch(model: Model, x: Tensor) -> None:
    partition = cut_model(model, BOUNDARIES)
    rows = [run_in_a_row(partition, x[:1]), run_in_a_row(partition, x[1:])]
    assert torch.allclose(torch.cat(rows), model(x))


def test_other_threads_run_modules_while_a_model_is_recorded(x: Tensor) -> None:
    layer, outputs = nn.Linear(3, 3), []

    def forward(self: Any, x: Tensor) -> Any:
        thread = threading.Thread(target=lambda: outputs.append(layer(example)))
        thread.start()
        thread.join()
        return self.layer(x)

    example = x.clone()
    cut_model(Container(forward, layer=layer), ["layer"])
    assert [torch.equal(output, layer(example)) for output in outputs] == [True, True]


def test_threads_may_cut_and_run_models_at_the_same_time() -> None:
    def cut_and_run(rank: int) -> list[bool]:
        model, x = Model().eval(), torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(rank))
        expected = model(x)
        barrier.wait()
        return [torch.equal(run_in_a_row(cut_model(model, BOUNDARIES), x), expected) for _ in range(5)]

    barrier = threading.Barrier(4)
    assert run_threads(4, cut_and_run) == [[True] * 5] * 4


def test_a_cut_block_can_be_called_without_call_block(model: Model, x: Tensor) -> None:
    first = cut_model(model, BOUNDARIES).blocks[0]
    assert torch.equal(first(x), call_block(first, x))


class Scaled(nn.Module):
    """Makes a tensor where its parameters are, between two modules."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(3, 3), nn.Linear(3, 3)

    def forward(self, x: Tensor) -> Any:
        scale = torch.arange(3, device=next(self.parameters()).device)
        return self.second(self.first(x) * scale)


def test_constants_are_where_the_boundary_is(x: Tensor) -> None:
    model = Scaled()
    expected = model(x)
    partition = cut_model(model, ["first", "second"])
    elsewhere = copy.deepcopy((model, partition))
    elsewhere[0].to("meta")
    output = run_in_a_row(elsewhere[1], x.to("meta"))
    assert (output.device.type, output.shape) == ("meta", expected.shape)
    # And back, with the numbers that they had; copies and files hold them as well.
    for own_model, own in (elsewhere, copied(elsewhere), pickled(elsewhere)):  # type: ignore[arg-type]
        own_model.to_empty(device="cpu").load_state_dict(model.state_dict())
        assert torch.equal(run_in_a_row(own, x), expected)


def test_constants_that_inference_brought_can_be_trained_with(x: Tensor) -> None:
    model = Scaled()
    partition = cut_model(model, ["first", "second"])
    model.to("meta")
    x = x.to("meta")
    with torch.inference_mode():
        run_in_a_row(partition, x)
    run_in_a_row(partition, x).sum().backward()
    assert model.first.weight.grad is not None


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")
def test_a_compiled_block_finds_its_constants_where_the_boundary_is(x: Tensor) -> None:
    model = Scaled()
    partition = cut_model(model, ["first", "second"])
    graphs: list[str] = []

    def backend(graph: torch.fx.GraphModule, inputs: list[Tensor]) -> Any:
        graphs.append(graph.code)
        return graph.forward

    compiled = compiled_block(partition.blocks[1], "block_1", {"backend": backend, "fullgraph": True})
    boundary = model.first(x).detach()
    for _ in range(2):
        assert torch.equal(compiled(boundary), call_block(partition.blocks[1], boundary))
    model.to("meta")
    assert compiled(boundary.to("meta")).device.type == "meta"
    # They are not moved in every call.
    assert len(graphs) == 2
    assert not any(".to(" in code for code in graphs)
