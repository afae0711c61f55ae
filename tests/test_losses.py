"""Losses are means over rows, compare like with like, and refuse what they cannot compare."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_pipebd.losses import BLOCK_LOSSES, kl_divergence, mean_squared_error, soft_cross_entropy


def pair(*shape: int) -> tuple[Tensor, Tensor]:
    return torch.randn(*shape, dtype=torch.float64, requires_grad=True), torch.randn(*shape, dtype=torch.float64)


@pytest.mark.parametrize("name", BLOCK_LOSSES)
def test_a_loss_is_the_mean_of_its_rows(name: str) -> None:
    student, teacher = pair(6, 5)
    loss = BLOCK_LOSSES[name]
    parts = torch.stack([loss(student[row : row + 1], teacher[row : row + 1]) for row in range(6)])
    torch.testing.assert_close(loss(student, teacher), parts.mean())


@pytest.mark.parametrize("name", ["mse", "kl"])
def test_a_loss_of_equals_is_zero(name: str) -> None:
    student, _ = pair(4, 5)
    assert BLOCK_LOSSES[name](student, student.detach()).item() == pytest.approx(0, abs=1e-12)


def test_mean_squared_error_adds_up_the_tensors_that_carry_a_gradient() -> None:
    (first, first_target), (second, second_target), mask = pair(4, 3), pair(4, 2), torch.ones(3, 3)
    loss = mean_squared_error((first, {"y": second}, mask), (first_target, {"y": second_target}, mask + 1))
    torch.testing.assert_close(loss, F.mse_loss(first, first_target) + F.mse_loss(second, second_target))


def test_mean_squared_error_never_broadcasts() -> None:
    student, _ = pair(4, 1)
    with pytest.raises(ValueError, match=r"but has \(4, 1\) and the teacher's has \(4, 5\)"):
        mean_squared_error(student, torch.zeros(4, 5))


def test_mean_squared_error_refuses_another_form() -> None:
    student, teacher = pair(4, 3)
    with pytest.raises(ValueError, match=r"(?s)must be a tree of the teacher's form.*override `block_loss`"):
        mean_squared_error(student, (teacher, teacher))


@pytest.mark.parametrize("output", [torch.zeros(4, 3), (torch.zeros(4, 3), 5)])
def test_mean_squared_error_refuses_what_nothing_can_improve(output: Any) -> None:
    with pytest.raises(ValueError, match=r"must depend on a trainable parameter of its block.*Merge the block"):
        mean_squared_error(output, output)


@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_divergence])
def test_logits_of_other_classes_are_refused(loss: Any) -> None:
    student, _ = pair(4, 3)
    with pytest.raises(ValueError, match=r"has \(4, 3\) and the teacher's has \(4, 5\).*of the same classes"):
        loss(student, torch.zeros(4, 5))


def test_soft_cross_entropy_is_the_cross_entropy_with_probabilities() -> None:
    student, teacher = pair(4, 5)
    torch.testing.assert_close(soft_cross_entropy(student, teacher), F.cross_entropy(student, teacher.softmax(-1)))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_divergence_is_cross_entropy_less_entropy_scaled_by_the_square_of_the_temperature(temperature: float) -> None:
    student, teacher = pair(4, 5)
    entropy = soft_cross_entropy(teacher, teacher, temperature)
    difference = soft_cross_entropy(student, teacher, temperature) - entropy
    torch.testing.assert_close(kl_divergence(student, teacher, temperature), difference * temperature**2)


@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_divergence])
def test_sequences_are_compared_position_by_position(loss: Any) -> None:
    student, teacher = pair(2, 3, 5)
    torch.testing.assert_close(loss(student, teacher), loss(student.flatten(0, 1), teacher.flatten(0, 1)))


@pytest.mark.parametrize("loss", [soft_cross_entropy, kl_divergence])
def test_large_logits_stay_finite(loss: Any) -> None:
    student, teacher = pair(4, 5)
    assert loss(student * 1e4, teacher * 1e4).isfinite()
