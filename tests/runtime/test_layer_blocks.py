"""Blocks of models that call a list of layers, which no recording can follow."""

from __future__ import annotations

import copy
import importlib
import importlib.util
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils import _pytree as pytree

from lightning_pipebd import PartitionError, layer_blocks
from lightning_pipebd.runtime.partition import call_block, cut_model
from tests.helpers.keyword_decoder import Decoder, DistilledDecoder

TOKENS = torch.randint(11, (4, 5), generator=torch.Generator().manual_seed(1))
MASK = torch.tensor([[1.0] * 5, [0, 1, 1, 1, 1], [0, 0, 1, 1, 1], [1.0] * 5])
INPUTS = {"tokens": TOKENS, "attention_mask": MASK}
TAIL = ["body.norm", "head"]


def run(blocks: list[nn.Module], inputs: Any) -> list[Any]:
    boundaries = [inputs]
    for block in blocks:
        boundaries.append(call_block(block, boundaries[-1]))
    return boundaries


@pytest.mark.parametrize("inputs", [TOKENS, (TOKENS, MASK), INPUTS], ids=["tensor", "tuple", "dict"])
def test_the_blocks_do_what_the_model_does_for_other_shapes_than_the_example(inputs: Any) -> None:
    model = Decoder().eval()
    small = pytree.tree_map(lambda leaf: leaf[:2, :3], inputs)
    blocks = layer_blocks(model, "body.layers", small, tail=TAIL)
    assert len(blocks) == 4
    boundaries = run(blocks, inputs)
    whole = model(**inputs) if isinstance(inputs, dict) else model(*pytree.tree_leaves(inputs))
    assert torch.equal(boundaries[-1], whole)
    names = {"hidden", "scale", *(f"position_embeddings_{each}" for each in ("0", "1", "0__1", "1__1"))}
    assert set(boundaries[1]) == names | (set() if inputs is TOKENS else {"attention_mask", "attention_mask__1"})
    assert boundaries[1].keys() == boundaries[2].keys()
    assert isinstance(boundaries[3], torch.Tensor)


def test_every_tensor_of_the_model_is_in_one_block() -> None:
    model = Decoder()
    blocks = layer_blocks(model, "body.layers", INPUTS, tail=TAIL)
    owned = [id(value) for block in blocks for value in (*block.parameters(), *block.buffers())]
    assert len(owned) == len(set(owned))
    assert set(owned) == {id(value) for value in (*model.parameters(), *model.buffers())}
    first = {id(value) for value in (*blocks[0].parameters(), *blocks[0].buffers())}
    body = model.body
    beginning = (*body.embed.parameters(), body.begin, body.offset, *body.layers[0].parameters())
    assert first == {id(value) for value in beginning}


def test_looking_leaves_the_model_as_it_was() -> None:
    model = Decoder()
    model.body.dropout.eval()
    state, modes = copy.deepcopy(model.state_dict()), [module.training for module in model.modules()]
    random = torch.get_rng_state()
    blocks = layer_blocks(model, "body.layers", INPUTS)
    run(blocks, INPUTS)
    assert [module.training for module in model.modules()] == modes
    assert torch.equal(torch.get_rng_state(), random)
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert not any("forward" in vars(layer) for layer in model.body.layers)
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())


def test_blocks_follow_their_model_to_other_types_modes_and_into_a_copy() -> None:
    model = Decoder()
    blocks = nn.ModuleList(layer_blocks(model, "body.layers", INPUTS, tail=TAIL))
    blocks.double()
    assert {value.dtype for value in (*model.parameters(), *model.buffers())} == {torch.float64}
    assert model.body.offset is blocks[0].get_buffer("body__offset")
    blocks.eval()
    assert not any(module.training for module in (model.body, *model.body.layers, model.body.dropout))
    inputs = {**INPUTS, "attention_mask": MASK.double()}
    model.eval()
    copied, copied_blocks = copy.deepcopy((model, blocks))
    with torch.no_grad():
        model.body.begin.add_(1)
    before, after = (run(list(each), inputs)[-1] for each in (copied_blocks, blocks))
    assert torch.equal(before, copied(**inputs))
    assert torch.equal(after, model(**inputs))
    assert not torch.equal(before, after)


def test_gradients_reach_the_block_that_ran() -> None:
    model = Decoder()
    blocks = layer_blocks(model, "body.layers", INPUTS)
    with torch.no_grad():
        boundary = call_block(blocks[0], INPUTS)
    call_block(blocks[1], boundary)["hidden"].sum().backward()
    reached = {id(own) for own in model.parameters() if own.grad is not None}
    assert reached == {id(own) for own in blocks[1].parameters()}
    call_block(blocks[0], INPUTS)["hidden"].sum().backward()
    assert model.body.begin.grad is not None


class Changed(Decoder):
    """Hands on something else than its layers give."""

    def forward(self, tokens: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        hidden = self.body.embed(tokens)
        angles = torch.zeros(1)
        for layer in self.body.layers:
            hidden = layer(hidden * 2, position_embeddings=(angles, angles))[0]
        return hidden


@pytest.mark.parametrize(
    ("model", "path", "message"),
    [
        (
            Decoder(),
            "layers",
            r"`layers` must be the path of a module of `Decoder`.*Its lists of modules are `body.layers`",
        ),
        (Decoder(1), "body.layers", "`body.layers` must be a list of at least two layers, but has 1"),
        (Decoder(), "head", "`head` must be a list of at least two layers, but has 0"),
        (
            Changed(),
            "body.layers",
            "`body.layers.0` must give one tensor that the next layer gets as it is, but gives 0",
        ),
    ],
)
def test_layers_that_are_no_blocks_are_refused(model: nn.Module, path: str, message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        layer_blocks(model, path, TOKENS)


def test_layers_in_another_order_are_refused() -> None:
    model = Decoder()
    model.body.is_reversed = True
    with pytest.raises(PartitionError, match=r"`body.layers` must be layers that the model calls one after another.*2"):
        layer_blocks(model, "body.layers", TOKENS)


def test_objects_that_layers_get_are_refused_with_the_way_out() -> None:
    model = Decoder()
    model.body.cache = object()
    with pytest.raises(PartitionError, match=r"its `past_key_values` is object.*use_cache = False"):
        layer_blocks(model, "body.layers", TOKENS)


def test_batches_of_another_form_than_the_example_are_refused() -> None:
    blocks = layer_blocks(Decoder(), "body.layers", TOKENS)
    with pytest.raises(
        PartitionError, match=r"`body.layers.1` must be called as it was for the example.*attn_implementation"
    ):
        call_block(blocks[0], INPUTS)


def test_a_student_that_needs_what_the_teacher_does_not_hand_over_is_told_so() -> None:
    teacher = layer_blocks(Decoder(), "body.layers", TOKENS)
    student = layer_blocks(Decoder(), "body.layers", INPUTS)
    with pytest.raises(PartitionError, match=r"`body.layers.1` must get `attention_mask` from its boundary"):
        call_block(student[1], call_block(teacher[0], TOKENS))


def test_a_model_that_cannot_be_cut_is_told_of_layer_blocks() -> None:
    with pytest.raises(PartitionError, match="`layer_blocks` makes them of a model with a list of layers"):
        cut_model(Decoder(), ["body.layers.0", "head"], role="teacher")


def test_the_loss_compares_the_hidden_states_alone() -> None:
    module = DistilledDecoder()
    boundary = call_block(module.block_pairs.teacher.blocks[0], INPUTS)
    student = call_block(module.block_pairs.student.blocks[1], boundary)
    teacher = call_block(module.block_pairs.teacher.blocks[1], boundary)
    expected = (student["hidden"] - teacher["hidden"]).square().mean()
    torch.testing.assert_close(module.block_loss(1, student, teacher), expected)


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["gpt2", "llama", "gemma3", "bert"])
def test_models_of_hugging_face_are_cut(kind: str) -> None:
    transformers: Any = importlib.import_module("transformers")
    shape = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11, "intermediate_size": 16}
    ends: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
    inputs = {"input_ids": TOKENS, "attention_mask": MASK.long()}
    path, tail = "model.layers", ["model.norm", "lm_head"]
    if kind == "gpt2":
        config = transformers.GPT2Config(n_layer=3, n_embd=16, n_head=2, vocab_size=11, use_cache=False, **ends)
        model: Any = transformers.GPT2LMHeadModel(config)
        path, tail = "transformer.h", ["transformer.ln_f", "lm_head"]
    elif kind == "llama":
        model = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(num_hidden_layers=3, use_cache=False, **shape, **ends)
        )
    elif kind == "gemma3":
        config = transformers.Gemma3TextConfig(
            num_hidden_layers=7, num_key_value_heads=1, head_dim=8, sliding_window=3, use_cache=False, **shape, **ends
        )
        model = transformers.Gemma3ForCausalLM(config)
    else:
        model = transformers.BertModel(transformers.BertConfig(num_hidden_layers=3, **shape), add_pooling_layer=False)
        path, tail = "encoder.layer", []
    model.eval()
    output = run(layer_blocks(model, path, inputs, tail=tail), inputs)[-1]
    assert torch.equal(output, model(**inputs)[0])
