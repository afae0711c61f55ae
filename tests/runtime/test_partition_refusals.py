"""What cannot be cut, and that the message names the place and the way out."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pipebd.runtime.partition import (
    PartitionError,
    call_block,
    cut_model,
)
from tests.helpers.containers import Container, run_in_a_row


def linear() -> nn.Linear:
    return nn.Linear(3, 3)


def chain() -> nn.Sequential:
    return nn.Sequential(linear(), linear(), linear())


def container(function: Callable[[Any, Any], Any], **options: Any) -> Container:
    return Container(function, a=linear(), b=linear(), **options)


def nested(function: Callable[[Any, Any], Any], **options: Any) -> Container:
    return Container(lambda self, x: self.last(self.inner(x)), inner=container(function, **options), last=linear())


def test_an_unknown_path_is_named_with_the_nearest_existing_ones() -> None:
    model = Container(lambda self, x: self.layer2(self.layer1(x)), layer1=linear(), layer2=linear())
    with pytest.raises(PartitionError, match=r"`layer_1` must be .* of the student.*nearest are `layer1`, `layer2`\."):
        cut_model(model, ["layer_1"])


def test_an_unknown_path_that_resembles_nothing_is_named_with_the_outermost_modules() -> None:
    with pytest.raises(PartitionError, match=r"`stage9` .* of the teacher.*nearest are `0`, `1`, `2`\."):
        cut_model(chain(), ["stage9"], role="teacher")


def test_a_path_may_be_there_once() -> None:
    with pytest.raises(PartitionError, match=r"`1` of the student must end one block only.*Leave one"):
        cut_model(chain(), ["1", "1"])


def test_a_module_with_two_names_ends_one_block() -> None:
    shared = linear()
    model = Container(lambda self, x: self.b(self.a(x)), a=shared, b=shared)
    with pytest.raises(PartitionError, match=r"`b` of the student must end one block only"):
        cut_model(model, ["a", "b"])


def test_there_must_be_a_boundary() -> None:
    with pytest.raises(PartitionError, match="student must have at least one boundary"):
        cut_model(chain(), [])


def test_a_boundary_must_be_called() -> None:
    with pytest.raises(PartitionError, match=r"`b` of the student must be called in the model's `forward`.*never is"):
        cut_model(container(lambda self, x: self.a(x)), ["a", "b"])


@pytest.mark.parametrize("boundaries", [["1", "0"], ["", "0"]])
def test_boundaries_must_be_in_the_models_order(boundaries: list[str]) -> None:
    with pytest.raises(PartitionError, match=r"`0` of the student must run after .*Order the boundaries"):
        cut_model(chain(), boundaries)


def test_two_boundaries_must_not_be_one_activation() -> None:
    model = Container(lambda self, x: self.end(self.body(x)), body=chain(), end=linear())
    with pytest.raises(PartitionError, match=r"block 1 of the student must do something, but nothing .*`body` of the"):
        cut_model(model, ["body.2", "body"])


def test_a_boundary_inside_a_residual_block_is_refused() -> None:
    inner = container(lambda self, x: self.b(self.a(x)) + x)
    model = Container(lambda self, x: self.last(self.inner(self.stem(x))), stem=linear(), inner=inner, last=linear())
    with pytest.raises(
        PartitionError,
        match=r"block 2 .* boundary `inner.a`, but also needs the output of `stem`, used by `add` of the output of "
        r"`inner.b`\. Leave out `inner.a`, or choose a boundary outside the residual block or skip connection",
    ):
        cut_model(model, ["stem", "inner.a", "last"])


def test_boundaries_that_a_value_passes_aside_are_named_to_be_left_out() -> None:
    model = Container(
        lambda self, x: self.last(self.inner(self.stem(x))),
        stem=linear(),
        inner=nested(lambda self, x: self.b(self.a(x)) + x),
        last=linear(),
    )
    with pytest.raises(PartitionError, match=r"needs the output of `stem`.* Leave out `inner.inner.a`, or choose"):
        cut_model(model, ["stem", "inner.inner.a", "inner", "last"])
    assert len(cut_model(model, ["stem", "inner", "last"]).blocks) == 3


def test_boundaries_are_named_up_to_the_last_use_of_what_passes_them() -> None:
    def forward(self: Any, x: Tensor) -> Any:
        x = self.a(x)
        return self.d(self.c(self.b(x)) + x)

    model = Container(forward, a=linear(), b=linear(), c=linear(), d=linear())
    with pytest.raises(PartitionError, match=r"block 2 .* output of `a`.* Leave out `b`, or choose"):
        cut_model(model, ["a", "b", "d"])
    with pytest.raises(PartitionError, match=r"Leave out `b`, `c`, or choose"):
        cut_model(model, ["a", "b", "c", "d"])
    assert len(cut_model(model, ["a", "d"]).blocks) == 2


def resized(self: Any, x: Tensor) -> Tensor:
    return F.interpolate(self.b(self.a(x)), size=x.shape[-1])


def test_an_end_that_needs_the_input_but_trains_nothing_names_the_module_to_end_with() -> None:
    model = container(resized)
    with pytest.raises(PartitionError, match=r"the model's input `x`.*trained from there on: end .* at `b`\."):
        cut_model(model, ["a", ""])
    assert len(cut_model(model, ["a", "b"]).blocks) == 2


def test_a_module_whose_parts_are_called_one_by_one_names_the_last_of_them() -> None:
    model = Container(lambda self, x: self.head[1](self.head[0](self.a(x))), a=linear(), head=chain())
    with pytest.raises(PartitionError, match=r"`head` of the student must be called .*is called, `head\.1`\."):
        cut_model(model, ["a", "head"])
    assert len(cut_model(model, ["a", "head.1"]).blocks) == 2


def test_a_model_input_that_is_used_later_is_refused() -> None:
    model = Container(lambda self, x: self.last(self.a(x) + x), a=linear(), last=linear())
    with pytest.raises(PartitionError, match=r"block 1 .* `a`, but also needs the model's input `x`, used by `add`"):
        cut_model(model, ["a", "last"])


def test_what_follows_the_last_boundary_is_refused_only_when_it_is_called() -> None:
    model, x = container(lambda self, x: self.b(self.a(x)) + x), torch.randn(2, 3)
    partition = cut_model(model, ["a", "b"])
    assert torch.equal(call_block(partition.blocks[1], call_block(partition.blocks[0], x)) + x, model(x))
    with pytest.raises(PartitionError, match=r"the end of the student .* `b`, but also needs the model's input `x`"):
        run_in_a_row(partition, x)


def remember_shape(self: Any, x: Tensor) -> Tensor:
    num_rows = x.shape[0] * 1
    output: Tensor = self.b(self.a(x).expand(num_rows, 3))
    return output


def test_a_shape_of_an_earlier_activation_is_named_where_it_is_used() -> None:
    with pytest.raises(
        PartitionError, match=r"needs `mul` of `0` of `shape` of the model's input `x`, used by `expand`"
    ):
        cut_model(container(remember_shape), ["a", "b"])


def test_a_boundary_value_that_is_older_than_the_boundary_before_it_is_refused() -> None:
    inner = container(lambda self, x: (self.b(self.a(x)), x)[1])
    model = Container(lambda self, x: self.last(self.inner(x * 2)), inner=inner, last=linear())
    with pytest.raises(
        PartitionError, match=r"block 1 .* needs `mul` of the model's input `x`, which is what the bound"
    ):
        cut_model(model, ["inner.a", "inner"])


def test_values_that_decide_are_refused_with_the_container_that_asks_for_them() -> None:
    model = nested(lambda self, x: self.b(self.a(x)) if x.sum() > 0 else x)
    with pytest.raises(
        PartitionError,
        match=r"`inner` of the student must do the same operations on every batch to be cut at `inner.a`.*"
        r"Choose boundaries outside `inner`\. Or pass the blocks yourself \(`student_blocks`\)",
    ):
        cut_model(model, ["inner.a"])


def test_values_that_decide_in_the_model_itself_leave_listing_the_blocks() -> None:
    model = container(lambda self, x: self.b(self.a(x)) if x.sum() > 0 else x)
    with pytest.raises(PartitionError, match=r"`teacher` must do the same .*\. Pass the blocks yourself \(`teacher_bl"):
        cut_model(model, ["a"], role="teacher")


def test_values_may_decide_in_modules_without_a_boundary_inside() -> None:
    model = nested(lambda self, x: self.b(self.a(x)) if x.sum() > 0 else x)
    x = torch.randn(2, 3)
    assert torch.equal(run_in_a_row(cut_model(model, ["inner"]), x), model(x))


def test_operations_that_cannot_be_recorded_are_refused_with_the_reason() -> None:
    model = nested(lambda self, x: self.b(self.a(x)) + float(x.shape[0]))
    with pytest.raises(PartitionError, match=r"`inner` .* operations that can be recorded .*\(TypeError: "):
        cut_model(model, ["inner.a"])


@pytest.mark.parametrize(
    "register", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"]
)
def test_hooks_of_a_container_that_would_be_opened_are_refused(register: str) -> None:
    model = nested(lambda self, x: self.b(self.a(x)))
    getattr(model.inner, register)(lambda *_: None)
    with pytest.raises(PartitionError, match=r"`inner` of the student must have no hooks .*Remove them"):
        cut_model(model, ["inner.a"])
    assert len(cut_model(model, ["inner"]).blocks) == 1


def count_calls(self: Any, x: Tensor) -> Tensor:
    self.num_calls += 1
    output: Tensor = self.b(self.a(x))
    return output


def test_a_container_that_sets_attributes_is_refused_and_left_as_it_was() -> None:
    model = nested(count_calls)
    inner: Any = model.inner
    inner.num_calls = 7
    with pytest.raises(PartitionError, match=r"only compute, but `inner` of the student sets `num_calls`"):
        cut_model(model, ["inner.a"])
    assert inner.num_calls == 7


@pytest.mark.parametrize(
    "draw",
    [
        pytest.param(lambda self, x: self.b(self.a(x) + torch.rand(3)), id="torch"),
        pytest.param(lambda self, x: self.b(self.a(x) + random.random()), id="python"),
        pytest.param(lambda self, x: self.b(self.a(x) + float(np.random.rand())), id="numpy"),
    ],
)
def test_random_numbers_that_a_recording_would_freeze_are_refused(draw: Callable[[Any, Any], Any]) -> None:
    model = container(draw)
    states = torch.get_rng_state(), random.getstate()
    with pytest.raises(PartitionError, match="draws random numbers, which would be the same on every batch"):
        cut_model(model, ["a"])
    assert torch.equal(states[0], torch.get_rng_state())
    assert states[1] == random.getstate()


def frozen_stem(self: Any, x: Tensor) -> Tensor:
    with torch.no_grad():
        x = self.a(x) * 2
    output: Tensor = self.b(x)
    return output


def single_precision(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", enabled=False):
        output: Tensor = self.b(self.a(x))
    return output


def half_precision(self: Any, x: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        output: Tensor = self.b(self.a(x))
    return output


@pytest.mark.parametrize("function", [frozen_stem, single_precision, half_precision])
def test_gradient_and_autocast_modes_inside_an_opened_container_are_refused(
    function: Callable[[Any, Any], Any],
) -> None:
    with pytest.raises(PartitionError, match=r"`inner` .* must leave gradient and autocast mode alone to be cut at"):
        cut_model(nested(function), ["inner.a"])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_models_may_be_cut_wherever_no_gradients_are_wanted(mode: Callable[[], Any]) -> None:
    with mode():
        assert len(cut_model(chain(), ["0", "1"]).blocks) == 2
        with pytest.raises(PartitionError, match=r"`inner` .* must leave gradient and autocast mode alone"):
            cut_model(nested(frozen_stem), ["inner.a"])


def test_a_teacher_may_switch_gradients_off() -> None:
    teacher, x = nested(frozen_stem).eval(), torch.randn(2, 3)
    assert torch.equal(run_in_a_row(cut_model(teacher, ["inner.a"], role="teacher"), x), teacher(x))


@pytest.mark.parametrize(
    ("function", "finding"),
    [
        (lambda self, x: [self.b(self.a(x))], "a list"),
        (lambda self, x: (self.b(self.a(x)), 3), "a tuple of 2 with something else in it"),
        (lambda self, x: {"not a name": self.b(self.a(x))}, "a dict with the keys 'not a name'"),
    ],
)
def test_an_opened_container_at_a_boundary_must_return_tensors(
    function: Callable[[Any, Any], Any], finding: str
) -> None:
    inner = container(function)
    model = Container(lambda self, x: self.last(use_any(self.inner(x))), inner=inner, last=linear())
    with pytest.raises(PartitionError, match=rf"`inner` of the student must return .*{finding}"):
        cut_model(model, ["inner.a", "inner", "last"])


def use_any(value: Any) -> Any:
    return next(iter(value.values())) if isinstance(value, dict) else value[0]


class NoInput(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, *inputs: Tensor, scale: float = 1.0) -> Any:
        return self.a(inputs[0]) * scale


def test_a_model_must_name_an_input() -> None:
    with pytest.raises(PartitionError, match=r"`student` must have an input without a default .*\(\*inputs"):
        cut_model(NoInput(), ["a"])


def ends_early_in_evaluation(self: Any, x: Tensor) -> Tensor:
    output: Tensor = self.b(self.a(x)) if self.training else self.a(x)
    return output


def skips_in_training(self: Any, x: Tensor) -> Tensor:
    output: Tensor = self.b(self.a(x) + x if self.training else self.a(x))
    return output


def test_an_end_of_one_mode_only_is_refused_when_it_is_called() -> None:
    partition = cut_model(container(ends_early_in_evaluation), ["a"])
    with pytest.raises(PartitionError, match=r"end of the student must be the same in `train\(\)` and in `eval\(\)`"):
        run_in_a_row(partition, torch.randn(2, 3))


def test_a_student_must_be_cut_in_both_modes() -> None:
    with pytest.raises(PartitionError, match="also needs the model's input `x`"):
        cut_model(container(skips_in_training), ["a", "b"])


def test_a_teacher_that_can_only_be_cut_for_evaluation_refuses_to_run_in_training() -> None:
    teacher, x = container(skips_in_training).eval(), torch.randn(2, 3)
    partition = cut_model(teacher, ["a"], role="teacher")
    assert torch.equal(call_block(partition.blocks[0], x), teacher.get_submodule("a")(x))
    partition = cut_model(teacher, ["a", "b"], role="teacher")
    assert torch.equal(run_in_a_row(partition, x), teacher(x))
    teacher.train()
    with pytest.raises(
        RuntimeError, match=r"block 0 of the teacher could be cut for .* the model must be in `eval\(\)`, but"
    ):
        call_block(partition.blocks[0], x)


def test_containers_in_different_modes_are_refused_where_the_mode_matters() -> None:
    model = nested(lambda self, x: self.b(F.dropout(self.a(x), 0.5, self.training)))
    partition, x = cut_model(model, ["inner.a", "last"]), torch.randn(2, 3)
    model.get_submodule("inner").eval()
    hidden = call_block(partition.blocks[0], x)
    with pytest.raises(RuntimeError, match=r"block 1 of .* the model, `inner` must be all in one of them"):
        call_block(partition.blocks[1], hidden)


class OptionalMask(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.a = linear()

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Any:
        return self.a(x) if mask is None else self.a(x * mask)


@pytest.mark.parametrize("boundary", [(torch.ones(2, 3), torch.ones(3)), {"x": torch.ones(2, 3), "mask": None}, ()])
def test_a_block_gets_exactly_the_inputs_without_a_default(boundary: Any) -> None:
    block = cut_model(OptionalMask(), ["a"]).blocks[0]
    with pytest.raises(TypeError, match="block 0 of the student must get exactly `x`, but got"):
        call_block(block, boundary)


class OneTuple(nn.Linear):
    def forward(self, input: Tensor) -> Any:
        return (super().forward(input),)


def test_a_tuple_of_one_tensor_must_not_be_taken_for_the_tensor() -> None:
    model = Container(lambda self, x: self.b(self.a(x)[0]), a=OneTuple(3, 3), b=linear())
    first, second = cut_model(model, ["a", "b"]).blocks
    with pytest.raises(TypeError, match=r"block 1 of the student must know .*call_block"):
        second(*first(torch.randn(2, 3)))
