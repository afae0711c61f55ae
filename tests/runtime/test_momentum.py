"""The momentum teacher: what becomes of parameters and buffers, and when."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from lightning_pipebd.runtime.momentum import Buffers, MomentumBlock, MomentumTeacher


def values(*numbers: float) -> list[Tensor]:
    return [torch.tensor([number], dtype=torch.float64) for number in numbers]


def test_the_average_keeps_its_part_of_itself() -> None:
    teacher = values(1.0, 2.0)
    MomentumTeacher([MomentumBlock(values(5.0, 6.0), teacher)]).follow(0, 0.75)
    assert [tensor.item() for tensor in teacher] == [2.0, 3.0]


@pytest.mark.parametrize(("policy", "statistics", "count"), [("average", 0.5, 7), ("copy", 2.0, 7), ("leave", 0.0, 0)])
@pytest.mark.parametrize("delayed", [False, True])
def test_buffers_follow_the_policy(policy: Buffers, statistics: float, count: int, delayed: bool) -> None:
    def buffers(value: float, number: int) -> list[Tensor]:
        return [torch.full((2,), value, dtype=torch.float64), torch.tensor(number)]

    teacher, average = buffers(0.0, 0), buffers(0.0, 0)
    block = MomentumBlock(
        values(1.0),
        values(0.0),
        values(0.0) if delayed else None,
        buffers(2.0, 7),
        teacher,
        average if delayed else None,
    )
    momentum = MomentumTeacher([block], policy)
    momentum.follow(0, 0.75)
    momentum.promote(0)
    assert teacher[0].tolist() == [statistics] * 2
    assert teacher[1].item() == count


def test_a_delayed_teacher_teaches_what_the_average_was_a_step_ago() -> None:
    student, teacher, average = values(1.0), values(0.0), values(0.0)
    momentum = MomentumTeacher([MomentumBlock(student, teacher, average, average_buffers=())])
    seen = []
    for _ in range(3):
        momentum.follow(0, 0.5)
        seen.append((teacher[0].item(), average[0].item()))
    assert seen == [(0.0, 0.5), (0.5, 0.75), (0.75, 0.875)]


def test_moving_on_early_and_then_following_moves_on_once() -> None:
    teacher, average = values(0.0), values(8.0)
    momentum = MomentumTeacher([MomentumBlock(values(0.0), teacher, average, average_buffers=())])
    momentum.promote(0)
    assert teacher[0].item() == 8.0
    momentum.follow(0, 0.5)
    assert (teacher[0].item(), average[0].item()) == (8.0, 4.0)
    momentum.promote(0)
    assert teacher[0].item() == 4.0


def test_without_a_delay_there_is_nothing_to_move_on_to() -> None:
    teacher = values(3.0)
    MomentumTeacher([MomentumBlock(values(0.0), teacher)]).promote(0)
    assert teacher[0].item() == 3.0
