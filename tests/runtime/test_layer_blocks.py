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
from lightning_pipebd.runtime.layer_masks import with_padded_rows
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
        PartitionError, match=r"`body.layers.1` must be called as it was for the example.*in every batch or in none"
    ):
        call_block(blocks[0], INPUTS)


def test_a_student_that_needs_what_the_teacher_does_not_hand_over_is_told_so() -> None:
    teacher = layer_blocks(Decoder(), "body.layers", TOKENS)
    student = layer_blocks(Decoder(), "body.layers", INPUTS)
    with pytest.raises(PartitionError, match=r"`body.layers.1` must get `attention_mask` from its boundary"):
        call_block(student[1], call_block(teacher[0], TOKENS))


def leaving_out() -> Decoder:
    """Give a decoder that hands no masks to its layers where nothing is padded."""
    torch.manual_seed(7)
    model = Decoder().double()
    model.body.leave_out_masks()
    return model


@pytest.mark.parametrize("example", [torch.ones(4, 5), MASK], ids=["full", "padded"])
@pytest.mark.parametrize("as_dict", [True, False], ids=["dict", "tuple"])
def test_masks_that_a_model_leaves_out_are_in_every_boundary(example: torch.Tensor, as_dict: bool) -> None:
    model = leaving_out().eval()

    def inputs(mask: torch.Tensor) -> Any:
        return {"tokens": TOKENS, "attention_mask": mask} if as_dict else (TOKENS, mask)

    blocks = layer_blocks(model, "body.layers", inputs(example), tail=TAIL)
    forms = set()
    for mask in (torch.ones(4, 5), MASK, torch.ones(4, 5)):
        boundaries = run(blocks, inputs(mask))
        torch.testing.assert_close(boundaries[-1], model(TOKENS, mask), rtol=1e-12, atol=1e-12)
        forms.add(tuple((name, tuple(value.shape)) for name, value in boundaries[1].items()))
    assert len(forms) == 1
    assert {name for name, _ in forms.pop()} > {"attention_mask", "attention_mask__1"}


def test_a_row_has_the_same_masks_whatever_rows_are_beside_it() -> None:
    blocks = layer_blocks(leaving_out().eval(), "body.layers", {**INPUTS, "attention_mask": torch.ones(4, 5)})
    whole = call_block(blocks[0], INPUTS)
    part = call_block(blocks[0], {name: value[3:] for name, value in INPUTS.items()})
    assert list(part) == list(whole)
    assert torch.equal(part["attention_mask"], whole["attention_mask"][3:])
    assert torch.equal(part["attention_mask__1"], whole["attention_mask__1"][3:])
    torch.testing.assert_close(part["hidden"], whole["hidden"][3:], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("num_rows", [1, 3, 4, 5, 6])
def test_masks_have_as_many_rows_as_the_batch_also_where_rows_are_as_many_as_places(num_rows: int) -> None:
    blocks = layer_blocks(leaving_out(), "body.layers", INPUTS)
    mask = torch.ones(num_rows, 5)
    boundary = call_block(blocks[0], {"tokens": TOKENS[:1].expand(num_rows, 5), "attention_mask": mask})
    assert boundary["attention_mask"].shape == (num_rows, 5, 5)
    assert boundary["position_embeddings_0"].shape == (1, 5, 1)


def test_a_table_of_places_is_not_taken_for_rows() -> None:
    mask = torch.ones(4, 5)
    padded = with_padded_rows((TOKENS,), {"mask": mask}, [mask], 0)
    assert len(padded.args[0]) == len(padded.kwargs["mask"]) == padded.num_all == 6
    assert padded.kwargs["mask"][4:].tolist() == [[1, 1, 0, 0, 0]] * 2
    assert padded.of_batch(torch.ones(5, 5)).shape == (5, 5)
    assert padded.of_batch(torch.ones(6, 5, 5)).shape == (4, 5, 5)


def test_finding_masks_leaves_no_trace() -> None:
    model = leaving_out()
    model.body.norm.eval()
    blocks = layer_blocks(model, "body.layers", INPUTS)
    full = {**INPUTS, "attention_mask": torch.ones(4, 5)}
    modes = [module.training for module in model.modules()]
    torch.manual_seed(3)
    padded = call_block(blocks[0], INPUTS)
    random = torch.get_rng_state()
    torch.manual_seed(3)
    found = call_block(blocks[0], full)
    assert torch.equal(torch.get_rng_state(), random)
    assert [module.training for module in model.modules()] == modes
    assert found["hidden"].requires_grad
    assert not found["attention_mask"].requires_grad
    assert found.keys() == padded.keys()
    assert not any("forward" in vars(layer) for layer in model.body.layers)


class Inverted(Decoder):
    """Takes a mask that is true where a place is padded."""

    def forward(self, tokens: Any = None, key_padding_mask: Any = None, labels: Any = None) -> Any:
        seen = None if key_padding_mask is None else (~key_padding_mask).float()
        return self.head(self.body(tokens, attention_mask=seen))


def test_masks_may_say_what_is_padded_as_well_as_what_is_not() -> None:
    model = Inverted().eval()
    model.body.leave_out_masks()
    nothing = torch.zeros(4, 5, dtype=torch.bool)
    blocks = layer_blocks(model, "body.layers", {"tokens": TOKENS, "key_padding_mask": nothing}, tail=TAIL)
    for mask in (nothing, MASK == 0):
        inputs = {"tokens": TOKENS, "key_padding_mask": mask}
        boundaries = run(blocks, inputs)
        assert "attention_mask__1" in boundaries[1]
        torch.testing.assert_close(boundaries[-1], model(**inputs))


class Counting(Decoder):
    """Takes as many pictures as rows, in a tensor of its own form."""

    def forward(self, tokens: Any = None, attention_mask: Any = None, pictures: Any = None) -> Any:
        assert pictures is not None
        if pictures.numel() != len(tokens):
            raise ValueError("rows and pictures do not match")
        return self.head(self.body(tokens, attention_mask=attention_mask))


def test_a_model_that_takes_no_further_row_is_cut_and_told_what_to_do_where_nothing_is_padded() -> None:
    model = Counting().double()
    model.body.leave_out_masks()
    full = {"tokens": TOKENS, "attention_mask": torch.ones(4, 5), "pictures": torch.ones(2, 2)}
    layer_blocks(model, "body.layers", full)
    blocks = layer_blocks(model, "body.layers", {**full, "attention_mask": MASK})
    assert "attention_mask" in call_block(blocks[0], {**full, "attention_mask": MASK})
    with pytest.raises(PartitionError, match=r"`body.layers` must get the masks.*do not match.*attn_implementation"):
        call_block(blocks[0], full)


def test_boundaries_have_one_shape_with_and_without_padding() -> None:
    pairs = DistilledDecoder(leaves_out=True).block_pairs
    full = {**INPUTS, "attention_mask": torch.ones(4, 5)}
    pairs.check_shapes(full, {})
    assert pairs.boundary_bytes_per_row(full) == pairs.boundary_bytes_per_row(INPUTS)


class Long(Decoder):
    """Hands masks to its layers for long rows alone."""

    def forward(self, tokens: Any = None, attention_mask: Any = None, labels: Any = None) -> Any:
        return self.head(
            self.body(tokens, attention_mask=tokens.new_ones(tokens.shape) if len(tokens[0]) > 4 else None)
        )


def test_what_a_model_leaves_out_for_another_reason_is_refused() -> None:
    blocks = layer_blocks(Long(), "body.layers", TOKENS)
    with pytest.raises(PartitionError, match=r"`body.layers` must get `attention_mask.*in every batch.*Hand the model"):
        call_block(blocks[0], TOKENS[:, :3])


def test_a_student_that_adds_masks_does_not_take_truth_values() -> None:
    student = layer_blocks(Decoder(), "body.layers", INPUTS)
    boundary = call_block(layer_blocks(Decoder(), "body.layers", INPUTS)[0], INPUTS)
    boundary["attention_mask"] = boundary["attention_mask"] > 0
    with pytest.raises(PartitionError, match=r"`attention_mask` of type torch.float32.*truth values.*the same impl"):
        run(student[1:], boundary)


class Sharing(nn.Module):
    """Its first layer makes a table that all others get; its dropout runs at both ends, its head sees one place."""

    def __init__(self, num_new: int = 1) -> None:
        super().__init__()
        self.embed = nn.Embedding(11, 4)
        self.dropout = nn.Dropout(0.1)
        self.layers = nn.ModuleList(SharingLayer(index == 0 or index <= num_new - 1) for index in range(3))
        self.head = nn.Linear(4, 2)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        hidden, table = self.dropout(self.embed(tokens)), None
        for layer in self.layers:
            hidden, _, table = layer(hidden, table)
        given: torch.Tensor = self.head(torch.relu(self.dropout(hidden)[:, 0]))
        return given


class SharingLayer(nn.Module):
    """Gives the hidden state, nothing, and the table."""

    def __init__(self, makes_table: bool) -> None:
        super().__init__()
        self.mix = nn.Linear(4, 4)
        self.table = nn.Parameter(torch.randn(4)) if makes_table else None

    def forward(self, hidden: torch.Tensor, table: Any) -> tuple[torch.Tensor, None, Any]:
        table = table if self.table is None else self.table * 2
        return hidden + self.mix(hidden * table), None, table


def first_place(hidden: torch.Tensor) -> torch.Tensor:
    return torch.relu(hidden[:, 0])


def test_a_table_that_the_first_layer_makes_reaches_all_others_and_functions_are_part_of_the_tail() -> None:
    model = Sharing().eval()
    blocks = layer_blocks(model, "layers", TOKENS[:2], tail=["dropout", first_place, "head"])
    boundaries = run(copy.deepcopy(blocks), TOKENS)
    assert list(boundaries[1]) == list(boundaries[2]) == ["hidden", "table"]
    assert torch.equal(boundaries[-1], model(TOKENS))


def test_a_layer_that_changes_the_table_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"`layers.1` must give one tensor that the next layer gets.*gives 2"):
        layer_blocks(Sharing(num_new=2), "layers", TOKENS)


@pytest.mark.parametrize(
    ("tail", "message"),
    [
        (["head"], r"`head` of `tail` must get what the last layer gives, \(4, 5, 4\), and.*gives it \(4, 4\)"),
        (["dropout", "head"], r"`head` of `tail` must get what `dropout` gives.*Put a function"),
        ([torch.neg, "head"], r"`head` of `tail` must get what the function before it gives"),
        (["layers.0", "head"], r"`layers.0` of `tail` must be a module that the model calls once.*calls it 0 times"),
        (["norm"], "`norm` must be the path of a module of `Sharing`"),
    ],
)
def test_a_tail_that_is_not_what_the_model_does_is_refused(tail: list[Any], message: str) -> None:
    with pytest.raises(PartitionError, match=message):
        layer_blocks(Sharing(), "layers", TOKENS, tail=tail)


def test_a_step_of_a_tail_is_a_path_or_a_function_without_parameters() -> None:
    model = Sharing()
    with pytest.raises(TypeError, match=r"`tail\[0\]` must be a module or callable, but is int"):
        layer_blocks(model, "layers", TOKENS, tail=[3])  # type: ignore[list-item]
    with pytest.raises(
        PartitionError, match=r"`tail\[0\]` must use no parameters as a plain function, but uses `model`"
    ):
        layer_blocks(model, "layers", TOKENS, tail=[lambda hidden: model.head(hidden)])


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


HUGGING_SHAPE = {"hidden_size": 16, "num_attention_heads": 2, "vocab_size": 11, "intermediate_size": 16}
HUGGING_ENDS: dict[str, Any] = {"bos_token_id": None, "eos_token_id": None, "pad_token_id": None}
# Per kind the model, its configuration, the path of its layers and the tail.
HUGGING: dict[str, tuple[str, str, dict[str, Any], str, list[Any]]] = {
    "gpt2": (
        "GPT2LMHeadModel",
        "GPT2Config",
        {"n_layer": 3, "n_embd": 16, "n_head": 2, "vocab_size": 11, "use_cache": False, **HUGGING_ENDS},
        "transformer.h",
        ["transformer.ln_f", "lm_head"],
    ),
    "llama": (
        "LlamaForCausalLM",
        "LlamaConfig",
        {"num_hidden_layers": 3, "use_cache": False, **HUGGING_SHAPE, **HUGGING_ENDS},
        "model.layers",
        ["model.norm", "lm_head"],
    ),
    "gemma3": (
        "Gemma3ForCausalLM",
        "Gemma3TextConfig",
        {"num_hidden_layers": 7, "num_key_value_heads": 1, "head_dim": 8, "sliding_window": 8, "use_cache": False}
        | HUGGING_SHAPE
        | HUGGING_ENDS,
        "model.layers",
        ["model.norm", "lm_head"],
    ),
    "bert": (
        "BertForSequenceClassification",
        "BertConfig",
        {"num_hidden_layers": 3, **HUGGING_SHAPE},
        "bert.encoder.layer",
        ["bert.pooler", "classifier"],
    ),
    "distilbert": (
        "DistilBertForSequenceClassification",
        "DistilBertConfig",
        {"dim": 16, "n_heads": 2, "vocab_size": 11, "hidden_dim": 16, "n_layers": 3},
        "distilbert.transformer.layer",
        [lambda hidden: hidden[:, 0], "pre_classifier", torch.relu, "classifier"],
    ),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 3, "num_heads": 2, "vocab_size": 11, "use_cache": False}
        | {"tie_word_embeddings": False, "pad_token_id": 0, "decoder_start_token_id": 0},
        "decoder.block",
        ["decoder.final_layer_norm", "decoder.dropout", "lm_head"],
    ),
}


@pytest.mark.skipif(importlib.util.find_spec("transformers") is None, reason="transformers is not installed")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", HUGGING)
def test_models_of_hugging_face_are_cut(kind: str) -> None:
    transformers: Any = importlib.import_module("transformers")
    model_name, config_name, config, path, tail = HUGGING[kind]
    model = getattr(transformers, model_name)(getattr(transformers, config_name)(**config)).eval()

    def inputs(mask: torch.Tensor) -> dict[str, torch.Tensor]:
        decoder = {"decoder_input_ids": TOKENS.flip(0), "decoder_attention_mask": mask.flip(0)} if kind == "t5" else {}
        return {"input_ids": TOKENS, "attention_mask": mask, **decoder}

    full = torch.ones(4, 5, dtype=torch.long)
    blocks = layer_blocks(model, path, inputs(full), tail=tail)
    forms = set()
    with torch.no_grad():
        for mask in (full, MASK.long(), full):
            boundaries = run(blocks, inputs(mask))
            torch.testing.assert_close(boundaries[-1], model(**inputs(mask))[0])
            forms.add(tuple((name, tuple(value.shape)) for name, value in boundaries[1].items()))
    assert len(forms) == 1
