"""Models that cannot be cut at module paths: their blocks are listed."""

from __future__ import annotations

import copy
import functools
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.runtime.partition import (
    CallableBlock,
    PartitionError,
    call_block,
    check_ties,
    cut_model,
    explicit_blocks,
    is_stochastic,
)
from tests.helpers.containers import Container, run_in_a_row
from tests.helpers.decoder import Decoder, decoder_blocks


@pytest.fixture
def decoder() -> Decoder:
    return Decoder(dropout=0.1)


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(11, (4, 6))


def test_the_decoder_cannot_be_cut(decoder: Decoder) -> None:
    with pytest.raises(PartitionError, match=r"Pass the blocks yourself \(`student_blocks`\)"):
        cut_model(decoder, ["layers.0"])


def test_blocks_of_a_decoder_hand_on_mask_and_rotary_tables(decoder: Decoder, tokens: Tensor) -> None:
    partition = explicit_blocks(decoder, decoder_blocks(decoder))
    hidden, mask, rotary = call_block(partition.blocks[0], tokens)
    assert (hidden.shape, mask.shape, [table.shape for table in rotary]) == ((4, 6, 16), (6, 6), [(6, 8), (6, 8)])
    decoder.eval()
    assert torch.equal(run_in_a_row(partition, tokens), decoder(tokens))


def test_listed_blocks_train_what_the_model_trains(decoder: Decoder, tokens: Tensor) -> None:
    other = copy.deepcopy(decoder)
    partition = explicit_blocks(decoder, decoder_blocks(decoder))
    torch.manual_seed(3)
    run_in_a_row(partition, tokens).square().mean().backward()
    torch.manual_seed(3)
    other(tokens).square().mean().backward()
    gradients = {name: value.grad for name, value in other.named_parameters()}
    assert all(torch.equal(value.grad, gradients[name]) for name, value in decoder.named_parameters())  # type: ignore[arg-type]


def test_every_parameter_of_the_decoder_is_in_one_block(decoder: Decoder) -> None:
    partition = explicit_blocks(decoder, decoder_blocks(decoder))
    names = [name for names in partition.parameter_names for name in names]
    assert sorted(names) == sorted(name for name, _ in decoder.named_parameters())
    assert partition.parameter_names[0][0] == "embedding.weight"
    assert partition.tail is None
    assert [is_stochastic(block) for block in partition.blocks] == [True] * 3
    check_ties(decoder, partition, "student")


def test_listed_blocks_copied_with_their_model_belong_to_the_copy(decoder: Decoder, tokens: Tensor) -> None:
    expected = decoder.eval()(tokens)
    partition = explicit_blocks(decoder, decoder_blocks(decoder))
    other, copied = copy.deepcopy((decoder, partition))
    assert torch.equal(run_in_a_row(copied, tokens), expected)
    used = {id(value) for block in copied.blocks for value in block.parameters()}
    assert used == {id(value) for value in other.parameters()}
    for parameter in decoder.parameters():
        nn.init.zeros_(parameter)
    assert torch.equal(run_in_a_row(copied, tokens), expected)
    assert torch.equal(run_in_a_row(partition, tokens), torch.zeros(4, 6, 11))


def test_functions_that_capture_each_other_are_copied() -> None:
    layer = nn.Linear(2, 2)

    def twice(x: Tensor, depth: int = 2) -> Any:
        return x if not depth else layer(twice(x, depth - 1))

    captured = {"inner": [functools.partial(twice, depth=1)]}
    block = CallableBlock(lambda x: captured["inner"][0](x), [layer])
    other = copy.deepcopy(block)
    nn.init.zeros_(layer.weight)
    nn.init.zeros_(layer.bias)
    assert torch.equal(block(torch.ones(2)), torch.zeros(2))
    assert not torch.equal(other(torch.ones(2)), torch.zeros(2))


def test_bound_methods_may_be_blocks_and_are_pickled_with_the_model(decoder: Decoder, tokens: Tensor) -> None:
    partition = explicit_blocks(decoder, [CallableBlock(decoder.embed, [decoder.embedding])])
    assert partition.parameter_names == (("embedding.weight",),)
    other, again = pickle.loads(pickle.dumps((decoder, partition)))
    nn.init.zeros_(other.embedding.weight)
    assert torch.equal(call_block(again.blocks[0], tokens)[0], torch.zeros(4, 6, 16))
    assert not torch.equal(call_block(partition.blocks[0], tokens)[0], torch.zeros(4, 6, 16))


def test_functions_without_parameters_and_modules_may_be_listed_as_they_are() -> None:
    model = nn.Sequential(nn.Linear(4, 3), nn.Flatten())
    partition = explicit_blocks(model, [model[0], torch.relu, model[1]])
    x = torch.randn(2, 4)
    assert torch.equal(run_in_a_row(partition, x), model(x).relu())
    assert partition.parameter_names == (("0.weight", "0.bias"), (), ())


def test_a_boundary_that_is_a_dict_is_handed_on_by_name() -> None:
    def swap(first: Tensor, second: Tensor) -> dict[str, Tensor]:
        return {"second": first, "first": second}

    partition = explicit_blocks(nn.Identity(), [swap, swap, swap])
    outputs = run_in_a_row(partition, {"first": torch.zeros(1), "second": torch.ones(1)})
    assert (outputs["first"].item(), outputs["second"].item()) == (1, 0)


def test_there_must_be_a_block() -> None:
    with pytest.raises(PartitionError, match="`teacher_blocks` must list at least one block"):
        explicit_blocks(nn.Identity(), [], role="teacher")


def test_a_block_must_be_callable() -> None:
    with pytest.raises(TypeError, match=r"`student_blocks\[1\]` must be a module or callable, but is str\."):
        explicit_blocks(nn.Identity(), [nn.Identity(), "layer1"])  # type: ignore[list-item] # the point


@pytest.mark.parametrize(
    ("stranger", "name"), [(nn.Linear(3, 3), "weight"), (nn.BatchNorm1d(3, affine=False), "running_mean")]
)
def test_a_block_must_be_made_of_the_model(stranger: nn.Module, name: str) -> None:
    with pytest.raises(
        PartitionError, match=rf"`student_blocks\[0\]` .* its `{name}` is no .*Register the module in the"
    ):
        explicit_blocks(nn.Sequential(nn.Linear(3, 3)), [stranger])


LAYER = nn.Linear(3, 3)


def through_a_global(x: Tensor) -> Any:
    return LAYER(x)


class CallableObject:
    def __init__(self, layer: nn.Module) -> None:
        self.layers = [layer]

    def __call__(self, x: Tensor) -> Any:
        return self.layers[0](x)


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(lambda layer: lambda x: layer(x), "layer", id="closure"),
        pytest.param(lambda layer: lambda x, used=layer: used(x), "used", id="default"),
        pytest.param(lambda layer: layer.forward, "self", id="bound-method"),
        pytest.param(
            lambda layer: functools.partial(nn.functional.linear, weight=layer.weight), "weight", id="partial"
        ),
        pytest.param(lambda _: through_a_global, "LAYER", id="global"),
        pytest.param(CallableObject, "layers", id="object"),
    ],
)
def test_a_plain_function_must_use_no_parameters(make: Any, name: str) -> None:
    model = nn.Sequential(nn.Linear(3, 3))
    with pytest.raises(
        PartitionError, match=rf"`student_blocks\[0\]` must use no .* uses `{name}`.*CallableBlock\(func"
    ):
        explicit_blocks(model, [make(model[0])])


def test_a_function_that_uses_a_parameter_of_no_named_module_is_refused_when_it_trains() -> None:
    model: Any = Container(lambda self, x: x, a=nn.Linear(3, 3), b=nn.Linear(3, 4))
    block = explicit_blocks(model, [CallableBlock(lambda x: model.b(model.a(x)), [model.a])]).blocks[0]
    with torch.no_grad():
        block(torch.randn(2, 3))
    with pytest.raises(PartitionError, match=r"no trainable parameters but those .* one of shape \(4(, 3)?,?\)\. Name"):
        block(torch.randn(2, 3))


def test_what_comes_before_a_function_is_not_its_own() -> None:
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    blocks = explicit_blocks(model, [model[0], CallableBlock(lambda x: model[1](x).relu_(), [model[1]])]).blocks
    assert blocks[1](blocks[0](torch.randn(2, 3))).requires_grad


def test_a_parameter_that_the_model_holds_itself_may_be_named() -> None:
    model = nn.Linear(3, 3)
    block = CallableBlock(lambda x: x * model.weight, [nn.ParameterList([model.weight])])
    assert explicit_blocks(model, [block]).parameter_names == (("weight",),)
    assert block(torch.randn(3, 3)).requires_grad
