from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lightning_pipebd.runtime.block_pairs import pair_blocks
from lightning_pipebd.runtime.partition import PartitionError
from lightning_pipebd.runtime.suggestions import SuggestedPair, suggest_block_map


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    layers = (nn.Conv2d(inputs, outputs, 3, stride, 1), nn.BatchNorm2d(outputs), nn.ReLU())
    return nn.Sequential(*layers)


class Classifier(nn.Module):
    """Two stages of some depth and width, functional code between them and at the end."""

    def __init__(self, widths: tuple[int, int], depth: int = 1, num_classes: int = 5) -> None:
        super().__init__()
        first, second = widths
        self.low = nn.Sequential(convolution(3, first), *(convolution(first, first) for _ in range(depth - 1)))
        self.high = nn.Sequential(
            convolution(first, second, 2), *(convolution(second, second) for _ in range(depth - 1))
        )
        self.head = nn.Linear(second, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = self.high(self.low(x))
        output: Tensor = self.head(x.mean(dim=(2, 3)))
        return output


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(4, 4)
        self.outer = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = x + self.outer(self.inner(x))
        return output


IMAGE = torch.zeros(2, 3, 8, 8)


def paths(pairs: list[SuggestedPair]) -> list[tuple[str, str]]:
    return [(pair.teacher, pair.student) for pair in pairs]


def test_layers_of_equal_shape_are_paired_by_how_far_through_the_models_they_lie() -> None:
    pairs = suggest_block_map(Classifier((4, 8), depth=4), Classifier((4, 8), depth=2), IMAGE)
    assert paths(pairs) == [
        ("low.1", "low.0"),
        ("low", "low"),
        ("high.1", "high.0"),
        ("high", "high"),
        ("head", "head"),
    ]
    assert not any(pair.needs_adapter for pair in pairs)


def test_models_of_other_widths_are_paired_where_the_resolution_changes() -> None:
    pairs = suggest_block_map(Classifier((8, 16), depth=3), Classifier((4, 8), depth=2), IMAGE)
    assert paths(pairs) == [("low", "low"), ("high", "high"), ("head", "head")]
    assert [pair.needs_adapter for pair in pairs] == [True, True, False]
    assert (pairs[0].teacher_shape, pairs[0].student_shape) == ((2, 8, 8, 8), (2, 4, 8, 8))


def test_a_place_that_a_residual_passes_by_is_not_suggested() -> None:
    teacher, student = (nn.Sequential(Residual(), Residual(), nn.Linear(4, 2)) for _ in range(2))
    assert paths(suggest_block_map(teacher, student, torch.zeros(3, 4))) == [("0", "0"), ("1", "1"), ("2", "2")]


def test_blocks_without_anything_to_train_are_left_out() -> None:
    layers = (nn.Conv2d(3, 4, 3, padding=1), nn.MaxPool2d(2), nn.Conv2d(4, 4, 3, padding=1), nn.Flatten())
    pairs = suggest_block_map(nn.Sequential(*layers), nn.Sequential(*layers), IMAGE)
    assert paths(pairs) == [("0", "0"), ("3", "3")]


def test_suggestion_cuts_both_models_and_neither_has_changed() -> None:
    teacher, student = Classifier((4, 8), depth=3), Classifier((4, 8))
    teacher.train()
    student.head.eval()
    pairs = suggest_block_map(teacher, student, IMAGE)
    found = pair_blocks(teacher, student, dict(paths(pairs)), None, None)
    found.check_shapes(IMAGE, {})
    assert (teacher.training, teacher.low.training, student.training, student.head.training) == (
        True,
        True,
        True,
        False,
    )
    assert not any(module._forward_hooks for module in teacher.modules())
    assert teacher.low[0][1].num_batches_tracked == 0


def test_output_of_no_module_is_the_models_own() -> None:
    class Sum(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Linear(4, 4), nn.Linear(4, 2)

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.second(self.first(x)) * 2
            return output

    assert paths(suggest_block_map(Sum(), Sum(), torch.zeros(1, 4))) == [("first", "first"), ("", "")]


def test_outputs_of_different_shapes_are_refused() -> None:
    with pytest.raises(
        PartitionError, match=r"`student` must give an output of the teacher's shape, but gives \(2, 3\)"
    ):
        suggest_block_map(Classifier((4, 8)), Classifier((4, 8), num_classes=3), IMAGE)


def test_model_whose_output_is_no_tensor_is_refused() -> None:
    class Pair(nn.Linear):
        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            return x, super().forward(x)

    with pytest.raises(PartitionError, match=r"one returns a tuple. List its blocks"):
        suggest_block_map(nn.Linear(4, 4), Pair(4, 4), torch.zeros(1, 4))
