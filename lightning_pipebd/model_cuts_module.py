"""A whole student and its teacher, cut into blocks: which tensors belong to which block, and what follows what."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.runtime.model_cuts import ModelCuts, match_blocks
from lightning_pipebd.runtime.momentum import Buffers, MomentumBlock, MomentumTeacher

__all__ = ["ModelCutsModule"]

_Self = TypeVar("_Self", bound="ModelCutsModule")


class ModelCutsModule(DistillationModule):
    """Two models in blocks, each by its own cuts, and where the teacher has momentum, its average.

    Args:
        cuts: The blocks of both models.
        student: The student.
        predictor: What belongs to the student's last block, and the teacher has not.
        momentum: ``None`` for a frozen teacher.
        teacher_delay: Optimizer steps by which the teacher is behind its average: 0 or 1.
        buffers: What a momentum teacher does with buffers.

    Raises:
        PartitionError: A momentum teacher is no copy of the student.
    """

    def __init__(
        self,
        cuts: ModelCuts,
        student: nn.Module,
        predictor: nn.Module | None,
        *,
        momentum: float | Callable[[int], float] | None,
        teacher_delay: int,
        buffers: Buffers,
    ) -> None:
        super().__init__()
        self.cuts = cuts
        # Student, predictor, teacher, average: checkpoints have them in the order in which they are set.
        self.student = student
        self.predictor = predictor
        self.momentum = momentum
        self.teacher_delay = teacher_delay
        if momentum is None:
            self.hide_teacher(cuts.teacher_model)
        else:
            match_blocks(student, cuts)
            self.teacher = cuts.teacher_model.requires_grad_(False).eval()
        self.average = copy.deepcopy(self.teacher) if teacher_delay else None
        self._buffer_policy: Buffers = buffers

    @property
    def averaged_teacher(self) -> nn.Module:
        """The latest average of the student; the teacher itself if it is frozen or has no delay."""
        return self.teacher if self.average is None else self.average

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Give what an optimizer should train: all parameters that want a gradient, also those of a loss."""
        return [parameter for parameter in self.parameters() if parameter.requires_grad]

    @override
    def block_modules(self) -> list[nn.Module]:
        whole = (model for model in (self.average, self.predictor) if model is not None)
        return [*self.cuts.teacher.blocks, *self.cuts.student.blocks, *whole]

    @property
    def num_student_blocks(self) -> int:
        """Number of the student's blocks; the predictor belongs to the last."""
        return len(self.cuts.student.blocks)

    @property
    def num_teacher_blocks(self) -> int:
        """Number of the teacher's blocks."""
        return len(self.cuts.teacher.blocks)

    def student_parameters(self, block: int) -> list[nn.Parameter]:
        """Give the parameters that a student block trains."""
        own = self.cuts.student.parameters(self.student, block)
        is_last = block == self.num_student_blocks - 1 and self.predictor is not None
        return [*own, *self.predictor.parameters()] if is_last and self.predictor is not None else own

    def student_tensors(self, block: int) -> list[Tensor]:
        """Give a student block's parameters and buffers."""
        return [*self.student_parameters(block), *self._student_buffers(block)]

    def _student_buffers(self, block: int) -> list[Tensor]:
        buffers = self.cuts.student.buffers(self.student, block)
        if block == self.num_student_blocks - 1 and self.predictor is not None:
            buffers += self.predictor.buffers()
        return buffers

    def teacher_tensors(self, block: int) -> list[Tensor]:
        """Give the parameters and buffers of a teacher block, of what teaches and of what runs ahead."""
        cuts = self.cuts.teacher
        models = [self.teacher] if self.average is None else [self.teacher, self.average]
        return [own for model in models for own in (*cuts.parameters(model, block), *cuts.buffers(model, block))]

    def make_momentum(self) -> MomentumTeacher:
        """Bring the tensors of each block together; anew when they have moved to another device."""
        teacher, student, ahead = self.cuts.teacher, self.cuts.student, self.average
        blocks = [
            MomentumBlock(
                student.parameters(self.student, block),
                teacher.parameters(self.teacher, block),
                None if ahead is None else teacher.parameters(ahead, block),
                student.buffers(self.student, block),
                teacher.buffers(self.teacher, block),
                None if ahead is None else teacher.buffers(ahead, block),
            )
            for block in range(self.num_teacher_blocks)
        ]
        return MomentumTeacher(blocks, self._buffer_policy)

    @override
    def train(self: _Self, mode: bool = True) -> _Self:
        super().train(mode)
        for model in (self.teacher, self.average):
            if model is not None:
                model.eval()
        return self
