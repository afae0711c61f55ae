"""Block losses: how far a student block's output is from the teacher block's."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor
from torch.utils import _pytree as pytree

__all__ = ["BLOCK_LOSSES", "kl_divergence", "mean_squared_error", "resolve_loss", "soft_cross_entropy"]


def mean_squared_error(student_output: Any, teacher_output: Any) -> Tensor:
    """Mean squared error, summed over the tensors of a boundary that the student block has a say in.

    Tensors that merely pass through the block (masks, rotary tables) carry no gradient and are left out.

    Args:
        student_output: Tree of tensors.
        teacher_output: Tree of the same form.

    Raises:
        ValueError: Forms or shapes differ (nothing is broadcast), or no tensor carries a gradient.

    Example:
        >>> import torch
        >>> student = torch.tensor([[1.0, 2.0]], requires_grad=True)
        >>> mean_squared_error(student, torch.tensor([[1.0, 4.0]]))
        tensor(2., grad_fn=<MseLossBackward0>)
    """
    pairs = _trained_pairs(student_output, teacher_output)
    for student, teacher in pairs:
        if student.shape != teacher.shape:
            msg = (
                f"`student_output` must have the teacher's shape, but has {tuple(student.shape)} and the teacher's "
                f"has {tuple(teacher.shape)}. Move the boundary, or name an adapter for this block."
            )
            raise ValueError(msg)
    first, *others = (F.mse_loss(student, teacher) for student, teacher in pairs)
    return sum(others, first)


def soft_cross_entropy(student_output: Tensor, teacher_output: Tensor, temperature: float = 1.0) -> Tensor:
    """Cross-entropy of the student's logits against the teacher's probabilities, mean over rows.

    Args:
        student_output: Logits of shape ``(num_rows, ..., num_classes)``.
        teacher_output: Logits of the same shape.
        temperature: Divides both logits; above 1 softens the teacher.

    Example:
        >>> import torch
        >>> soft_cross_entropy(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.6931)
    """
    _check_logits(student_output, teacher_output)
    log_student = F.log_softmax(student_output / temperature, dim=-1)
    return -(F.softmax(teacher_output / temperature, dim=-1) * log_student).sum(dim=-1).mean()


def kl_divergence(student_output: Tensor, teacher_output: Tensor, temperature: float = 1.0) -> Tensor:
    """Kullback-Leibler divergence of the student's from the teacher's probabilities, mean over rows.

    Scaled by the square of the temperature, so that gradients keep their size when it changes (Hinton et al.,
    "Distilling the Knowledge in a Neural Network", *Distillation*).

    Args:
        student_output: Logits of shape ``(num_rows, ..., num_classes)``.
        teacher_output: Logits of the same shape.
        temperature: Divides both logits; above 1 softens both.

    Example:
        >>> import torch
        >>> kl_divergence(torch.zeros(1, 2), torch.zeros(1, 2))
        tensor(0.)
    """
    _check_logits(student_output, teacher_output)
    log_student = F.log_softmax(student_output / temperature, dim=-1)
    log_teacher = F.log_softmax(teacher_output / temperature, dim=-1)
    divergence = (log_teacher.exp() * (log_teacher - log_student)).sum(dim=-1).mean()
    return divergence * temperature**2


BLOCK_LOSSES: Mapping[str, Callable[[Any, Any], Tensor]] = {
    "mse": mean_squared_error,
    "soft_cross_entropy": soft_cross_entropy,
    "kl": kl_divergence,
}
"""Names that ``block_losses`` understands."""


def resolve_loss(loss: str | Callable[[Any, Any], Tensor]) -> Callable[[Any, Any], Tensor]:
    """Give the function that a user named or gave.

    Raises:
        ValueError: The name is no loss's.
    """
    if callable(loss):
        return loss
    if loss not in BLOCK_LOSSES:
        msg = f"`block_losses` must name one of {', '.join(BLOCK_LOSSES)}, but names {loss!r}. Or give a function."
        raise ValueError(msg)
    return BLOCK_LOSSES[loss]


def _trained_pairs(student_output: Any, teacher_output: Any) -> list[tuple[Tensor, Tensor]]:
    if isinstance(student_output, Tensor) and isinstance(teacher_output, Tensor) and student_output.requires_grad:
        return [(student_output, teacher_output)]
    student_leaves, student_form = pytree.tree_flatten(student_output)
    teacher_leaves, teacher_form = pytree.tree_flatten(teacher_output)
    if student_form != teacher_form:
        msg = (
            f"`student_output` must be a tree of the teacher's form, but is {student_form} and the teacher's is "
            f"{teacher_form}. Let both blocks return the same structure, or override `block_loss`."
        )
        raise ValueError(msg)
    pairs = [
        (student, teacher)
        for student, teacher in zip(student_leaves, teacher_leaves, strict=True)
        if isinstance(student, Tensor) and student.requires_grad
    ]
    if not pairs:
        msg = (
            "`student_output` must depend on a trainable parameter of its block, but none of its tensors does. "
            "Merge the block with a neighbour, or unfreeze its parameters."
        )
        raise ValueError(msg)
    return pairs


def _check_logits(student_output: Tensor, teacher_output: Tensor) -> None:
    if student_output.shape != teacher_output.shape:
        msg = (
            f"`student_output` must have the teacher's shape, but has {tuple(student_output.shape)} and the teacher's "
            f"has {tuple(teacher_output.shape)}. Use this loss for blocks that end in logits of the same classes."
        )
        raise ValueError(msg)
