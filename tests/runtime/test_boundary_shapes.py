"""Shapes of teacher and student are compared before anything is trained, and nothing is left behind."""

from __future__ import annotations

import copy
import random
from collections.abc import Mapping
from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.runtime.partition import (
    Partition,
    PartitionError,
    boundary_shapes,
    check_shapes,
    cut_model,
    explicit_blocks,
)
from tests.helpers.containers import Container
from tests.helpers.decoder import Decoder, decoder_blocks

NAMES = (("0", "0"), ("2", "2"))


def chain(*widths: int) -> nn.Sequential:
    first, middle, last = widths
    return nn.Sequential(nn.Linear(first, middle), nn.ReLU(), nn.Linear(middle, last))


def cut(model: nn.Module, role: str = "student") -> Partition:
    return cut_model(model, ["0", "2"], role=role)


def check(
    teacher: Partition,
    student: Partition,
    *,
    names: Any = NAMES,
    adapters: Mapping[int, nn.Module] | None = None,
    input_adapters: Mapping[int, nn.Module] | None = None,
) -> None:
    example = torch.randn(5, 4)
    check_shapes(teacher, student, example, names=names, adapters=adapters or {}, input_adapters=input_adapters or {})


def test_boundary_shapes_are_meta_tensors_from_the_input_to_the_last_boundary() -> None:
    shapes = boundary_shapes(cut(chain(4, 3, 2)), torch.randn(5, 4, dtype=torch.float32))
    assert [(tuple(leaf.shape), leaf.dtype, leaf.device.type) for leaf in shapes] == [
        ((5, 4), torch.float32, "meta"),
        ((5, 3), torch.float32, "meta"),
        ((5, 2), torch.float32, "meta"),
    ]


def test_boundary_shapes_of_a_tree_are_a_tree() -> None:
    decoder = Decoder()
    shapes = boundary_shapes(explicit_blocks(decoder, decoder_blocks(decoder)), torch.zeros(4, 6, dtype=torch.long))
    hidden, mask, (cosine, sine) = shapes[1]
    assert [tuple(leaf.shape) for leaf in (hidden, mask, cosine, sine)] == [(4, 6, 16), (6, 6), (6, 8), (6, 8)]
    assert mask.dtype == torch.bool


class NeedsValues(nn.Module):
    """Counts its calls, draws numbers, and looks at values, which a meta tensor does not have."""

    calls: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(1))
        self.norm = nn.BatchNorm1d(4)
        self.layer = nn.Linear(4, 2)

    def forward(self, x: Tensor) -> Any:
        self.calls += 1
        self.calls = self.calls + torch.rand(1) + random.random()
        assert not self.training
        return self.layer(self.norm(x)) if x.sum().item() > -1e9 else x


@pytest.mark.parametrize("model", [pytest.param(chain(4, 4, 2), id="meta"), pytest.param(NeedsValues(), id="values")])
def test_finding_shapes_changes_nothing(model: nn.Module) -> None:
    model.train()
    partition = explicit_blocks(model, [model])
    state, buffers = copy.deepcopy(model.state_dict()), dict(model.named_buffers())
    random_states = torch.get_rng_state(), random.getstate()
    assert [tuple(shape.shape) for shape in boundary_shapes(partition, torch.ones(5, 4))] == [(5, 4), (5, 2)]
    assert torch.equal(torch.get_rng_state(), random_states[0])
    assert random.getstate() == random_states[1]
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(value is buffers[name] for name, value in model.named_buffers())
    assert all(module.training for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_lazy_parameters_stay_lazy() -> None:
    layer = nn.LazyLinear(3)
    shapes = boundary_shapes(cut_model(nn.Sequential(layer), ["0"]), torch.randn(5, 4))
    assert tuple(shapes[1].shape) == (5, 3)
    assert layer.has_uninitialized_params()


def test_matching_shapes_pass() -> None:
    check(cut(chain(4, 3, 2)), cut(chain(4, 3, 2)))


def test_a_student_block_reads_the_teachers_boundary() -> None:
    check(
        cut(chain(4, 3, 2)),
        explicit_blocks(student := nn.ModuleList([nn.Linear(4, 3), nn.Linear(3, 2)]), list(student)),
    )


def test_other_shapes_are_refused_with_both_and_the_way_out() -> None:
    with pytest.raises(
        PartitionError,
        match=r"`0` -> `0` must .* teacher's `0` gives \(5, 3\) and the student's `0` gives \(5, 7\)\. "
        r"Give the block an adapter by `adapters=\{\"0\": \.\.\.\}`, which maps",
    ):
        check(cut(chain(4, 3, 2)), cut(chain(4, 7, 2)))


def test_an_adapter_makes_shapes_match() -> None:
    check(
        cut(chain(4, 3, 2)),
        cut(chain(4, 7, 2)),
        adapters={0: nn.Linear(7, 3)},
        input_adapters={1: nn.Linear(3, 7)},
    )


def test_an_adapter_that_does_not_help_is_named() -> None:
    with pytest.raises(
        PartitionError, match=r"student's `0` with its adapter gives \(5, 5\)\. Change its adapter in `adapters=\{"
    ):
        check(cut(chain(4, 3, 2)), cut(chain(4, 7, 2)), adapters={0: nn.Linear(7, 5)})


def test_an_adapter_that_fails_is_named() -> None:
    with pytest.raises(PartitionError, match=r"the adapter of `0` must take .*\(5, 7\), but raises RuntimeError: "):
        check(cut(chain(4, 3, 2)), cut(chain(4, 7, 2)), adapters={0: nn.Linear(8, 3)})


def test_a_student_block_that_cannot_take_the_teachers_boundary_asks_for_an_input_adapter() -> None:
    with pytest.raises(
        PartitionError,
        match=r"student block `2` must take .*, \(5, 3\), but raises RuntimeError: .* "
        r"Give the block an adapter by `input_adapters=\{\"2\": \.\.\.\}`\.",
    ):
        check(cut(chain(4, 3, 2)), cut(chain(4, 7, 2)), adapters={0: nn.Linear(7, 3)})


def test_an_example_that_the_teacher_cannot_take_is_refused() -> None:
    with pytest.raises(PartitionError, match=r"teacher block `0` must take .*, \(5, 4\), but raises RuntimeError"):
        check(cut(chain(6, 3, 2)), cut(chain(4, 3, 2)))


def test_blocks_must_be_as_many_on_both_sides() -> None:
    with pytest.raises(PartitionError, match="teacher's 2 blocks, but there are 1 student blocks and 2 pairs of names"):
        check(cut(chain(4, 3, 2)), cut_model(chain(4, 3, 2), ["2"]))


@pytest.mark.parametrize("subject", ["adapters", "input_adapters"])
def test_adapters_must_be_of_blocks_that_exist(subject: str) -> None:
    with pytest.raises(PartitionError, match=rf"`{subject}` must name blocks below 2, but names \[-1, 2\]"):
        check(cut(chain(4, 3, 2)), cut(chain(4, 3, 2)), **{subject: {2: nn.Identity(), -1: nn.Identity()}})


@pytest.mark.parametrize(
    ("output", "finding"),
    [
        (None, "no tensor"),
        ("text", "no tensor"),
        ((), "no tensor"),
        ([torch.ones(1), 3j], "a tree with complex in it"),
    ],
)
def test_a_boundary_must_be_tensors(output: Any, finding: str) -> None:
    partition = cut_model(nn.Sequential(Container(lambda self, x: output)), ["0"])
    with pytest.raises(PartitionError, match=rf"block 0 must give a tensor or a tree of tensors .*{finding}"):
        boundary_shapes(partition, torch.randn(5, 4))


def test_a_boundary_may_hold_numbers_beside_tensors() -> None:
    partition = cut_model(nn.Sequential(Container(lambda self, x: (x, [x.shape[1], None])), nn.Identity()), ["0"])
    _, (hidden, size) = boundary_shapes(partition, torch.randn(5, 4))
    assert (hidden.shape, size) == ((5, 4), [4, None])


def test_trees_are_compared_leaf_by_leaf() -> None:
    teacher = explicit_blocks(nn.Identity(), [lambda x: (x, {"mask": x[0]})])
    student = explicit_blocks(nn.Identity(), [lambda x: (x, {"mask": x})])
    with pytest.raises(
        PartitionError, match=r"\(\(5, 4\), \{'mask': \(4,\)\}\) and .* \(\(5, 4\), \{'mask': \(5, 4\)\}\)"
    ):
        check(teacher, student, names=(("a", "b"),))


class Spy(nn.Linear):
    seen: ClassVar[list[tuple[str, bool]]] = []

    def forward(self, input: Tensor) -> Tensor:
        self.seen.append((self.weight.device.type, self.training))
        return super().forward(input)


def test_shapes_are_found_in_evaluation_without_computing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Spy, "seen", [])
    boundary_shapes(cut_model(nn.Sequential(Spy(4, 3)), ["0"]), torch.randn(5, 4))
    assert Spy.seen == [("meta", False)]
