"""What the blocks of a whole student compute under the trainer's precision."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch.plugins import Precision
from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.deferred_norms import DeferredNorms
from lightning_pipebd.runtime.momentum import MomentumTeacher
from lightning_pipebd.scaling import scale_loss
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["PipelineBlockJobs"]


class PipelineBlockJobs:
    """The module's blocks under the trainer's precision, as the executor wants them.

    Args:
        module: Has the blocks.
        plugin: The trainer's precision plugin.

    Attributes:
        optimizer: Handed on to Lightning's backward.
        batch_idx: Index of the batch in the epoch.
        num_accumulated: Batches of an optimizer step.
        momentum: The momentum teacher; ``None`` if it is frozen.
        rate: Its momentum in the next step.
        norms: Defers running statistics; ``None`` where batches are whole.
    """

    def __init__(self, module: TeacherStudentModule, plugin: Precision) -> None:
        self._module = module
        self._plugin = plugin
        self.optimizer: Optimizer | None = None
        self.batch_idx = 0
        self.num_accumulated = 1
        self.momentum: MomentumTeacher | None = None
        self.rate = 1.0
        self.norms: DeferredNorms | None = None

    def teach(self, block: int, boundary: Any) -> Any:
        """Give the teacher's next boundary."""
        with self._plugin.train_step_context():
            return self._module.teach(block, boundary)

    def forward(self, block: int, boundary: Any, rows: Rows) -> Any:
        """Give the student's next boundary."""
        if self.norms is not None:
            self.norms.begin(block)
        with self._plugin.train_step_context():
            return self._module.study(block, boundary, batch_idx=self.batch_idx, first_row=rows.start)

    def loss(
        self, student_output: Any, teacher_output: Any, targets: Any, rows: Rows, num_rows: int
    ) -> dict[str, Tensor]:
        """Put the gradients of the loss into the leaves of ``student_output``; give its terms' parts, detached."""
        with self._plugin.train_step_context():
            terms = self._module.loss_terms(
                student_output, teacher_output, targets, batch_idx=self.batch_idx, first_row=rows.start
            )
        if rows.num_rows < num_rows:
            terms = {name: term * (rows.num_rows / num_rows) for name, term in terms.items()}
        scaled = scale_loss(self._plugin, terms["loss"] / self.num_accumulated)
        self._plugin.backward(scaled, self._module, self.optimizer)
        return {name: term.detach() for name, term in terms.items()}

    def parameters(self, block: int) -> Sequence[nn.Parameter]:
        """Give what a student block trains."""
        return self._module.student_parameters(block)

    def weights(self, block: int) -> Sequence[Tensor]:
        """Give what a momentum teacher wants to know of a student block."""
        return self._module.student_tensors(block)

    def promote(self, block: int) -> None:
        """Let a delayed momentum teacher's block move on to the next batch."""
        if self.momentum is not None:
            self.momentum.promote(block)

    def follow(self, block: int) -> None:
        """Let a momentum teacher's block follow the student's."""
        assert self.momentum is not None
        self.momentum.follow(block, self.rate)

    def stay(self, block: int) -> None:
        """End a step that was skipped for a momentum teacher's block."""
        assert self.momentum is not None
        self.momentum.stay(block)
