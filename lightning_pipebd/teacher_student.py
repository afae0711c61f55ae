"""The module of end-to-end training: a student, a frozen or momentum teacher, and one loss of their outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipebd.clipping import check_clipping
from lightning_pipebd.model_cuts_module import ModelCutsModule
from lightning_pipebd.runtime.block_calls import BlockCalls
from lightning_pipebd.runtime.layouts import keep_gradient_layouts, without_gaps
from lightning_pipebd.runtime.model_cuts import cut_models
from lightning_pipebd.runtime.momentum import Buffers, check_momentum
from lightning_pipebd.runtime.random_streams import random_stream, stream_key
from lightning_pipebd.runtime.row_trees import count_rows
from lightning_pipebd.step_guard import StepGuard

__all__ = ["TeacherStudentModule"]

_UPDATES_KEY = "teacher_updates"


class TeacherStudentModule(ModelCutsModule):
    """Train a whole student by a loss of its own and a teacher's output.

    .. code-block:: python

        class Distil(TeacherStudentModule):
            def __init__(self):
                super().__init__(teacher=..., student=..., teacher_cuts=["layer2"], student_cuts=["layer1"])

            def loss(self, student_output, teacher_output, targets):
                return F.cross_entropy(student_output, targets) + kl_divergence(student_output, teacher_output)

            def configure_optimizers(self):
                return torch.optim.AdamW(self.trainable_parameters())

    The teacher is frozen, or, with ``momentum``, the moving average of the student. It never takes a gradient and is in
    ``eval()`` always. Both models are cut into blocks, which matters only where a plan deals them to several devices:
    ``Trainer()`` trains the same student on one.

    A momentum teacher is part of the checkpoint. With ``teacher_delay=1`` the student learns batch *k* from the teacher
    of one optimizer step before the latest, which lets devices work on the next batch's teacher outputs meanwhile.

    Args:
        teacher: The teacher. ``None``, with ``momentum``, begins with a copy of the student.
        student: The student.
        block_map: Ordered pairs *teacher module path -> student module path* of modules that end a block.
        teacher_cuts: Instead of ``block_map``, paths of the modules that end the teacher's blocks; the student's where
            left out. What follows the last one is a block of its own.
        student_cuts: Paths of the modules that end the student's blocks.
        teacher_blocks: Instead of paths, the teacher's blocks in order, for models that cannot be cut by paths.
        student_blocks: The student's blocks in order.
        predictor: What the student has at its end and the teacher has not, as in BYOL. Trained with the last block.
        momentum: ``None`` for a frozen teacher. Otherwise the part that the teacher keeps of itself at every optimizer
            step: a number from 0 to 1, or a function of the number of steps so far.
        teacher_delay: 0, or 1 with a momentum teacher.
        buffers: What a momentum teacher does with buffers such as running statistics: ``"average"`` (integers are
            copied), ``"copy"`` the student's, or ``"leave"`` its own as they are.
        views: Whether inputs are a list of views of each row: each goes through the models by itself, and ``loss`` gets
            lists of outputs.
        full_batch_loss: Whether the loss needs the whole batch at once (contrastive losses). Otherwise it must be a
            mean over rows, so that it can be taken micro-batch by micro-batch.
        on_nonfinite: What follows when a gradient is not finite: ``"raise"`` ends the run, ``"skip"`` leaves the step
            out, for a momentum teacher as well.

    Attributes:
        student: The student without its predictor.
        teacher: What teaches: the delayed teacher, if there is a delay.
        averaged_teacher: The latest average of the student; the teacher itself if it is frozen or has no delay.

    Raises:
        PartitionError: The models cannot be cut so, or a momentum teacher is no copy of the student.
        ValueError: Options contradict each other.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        block_map: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        *,
        teacher_cuts: Sequence[str] | None = None,
        student_cuts: Sequence[str] | None = None,
        teacher_blocks: Sequence[nn.Module | Callable[..., Any]] | None = None,
        student_blocks: Sequence[nn.Module | Callable[..., Any]] | None = None,
        predictor: nn.Module | None = None,
        momentum: float | Callable[[int], float] | None = None,
        teacher_delay: int = 0,
        buffers: Buffers = "average",
        views: bool = False,
        full_batch_loss: bool = False,
        on_nonfinite: str = "raise",
    ) -> None:
        _check_options(teacher, momentum, teacher_delay, buffers)
        cuts = cut_models(
            teacher,
            student,
            block_map=block_map,
            teacher_cuts=teacher_cuts,
            student_cuts=student_cuts,
            teacher_blocks=teacher_blocks,
            student_blocks=student_blocks,
        )
        super().__init__(cuts, student, predictor, momentum=momentum, teacher_delay=teacher_delay, buffers=buffers)
        self.has_views = views
        self.full_batch_loss = full_batch_loss
        self.num_teacher_updates = 0
        self._teacher_calls = BlockCalls(self.cuts.teacher, "teacher")
        self._student_calls = BlockCalls(self.cuts.student, "student")
        self.step_guard = StepGuard(on_nonfinite)
        self._is_skipped = False
        # Set by a strategy that has the blocks on several devices.
        self.follow_in_plan: Callable[[bool], None] | None = None
        self.clip_in_plan: Callable[[Optimizer, float], None] | None = None

    # What users override.

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor | dict[str, Tensor]:
        """Say how good the student is: a mean over rows, unless ``full_batch_loss``.

        Override this. Give the loss, or a dictionary with the key ``"loss"`` and further terms, which are logged.

        Args:
            student_output: The student's output (with views, a list of them).
            teacher_output: The teacher's, without gradient.
            targets: What :meth:`unpack_batch` gave beside the inputs.
        """
        raise NotImplementedError(
            f"`{type(self).__name__}` must define `loss(student_output, teacher_output, targets)`"
        )

    def teacher_inputs(self, inputs: Any) -> Any:
        """Give what the teacher sees of the inputs: all of it. Override to show it fewer views, or others."""
        return inputs

    def teacher_momentum(self, num_updates: int) -> float:
        """Give the part that the teacher keeps of itself in the optimizer step after so many."""
        assert self.momentum is not None
        return float(self.momentum(num_updates) if callable(self.momentum) else self.momentum)

    def on_teacher_update(self) -> None:
        """Do what belongs to a step of the teacher, such as moving a centre of its outputs; once per optimizer step.

        A step that is skipped (``on_nonfinite``) is none.

        Under a plan this runs on the rank that computes the loss. What ``loss`` keeps in the module's own buffers is
        there, and comes into checkpoints. Plans with replicas are refused, unless ``full_batch_loss`` has one rank
        compute the loss of all rows; the blocks of both models must then be left as they are.
        """

    # What a strategy calls, and `training_step` below.

    def teach(self, block: int, boundary: Any) -> Any:
        """Give the teacher's boundary ``block + 1``; ``boundary`` stays unchanged."""
        with torch.no_grad():
            return self._for_views(lambda view: self._teacher_calls(block, view), boundary)

    def study(self, block: int, boundary: Any, *, batch_idx: int, first_row: int = 0) -> Any:
        """Give the student's boundary ``block + 1``, drawing from the block's own random stream.

        Args:
            block: Index of the block.
            boundary: The student's boundary ``block``; stays unchanged.
            batch_idx: Index of the batch in the epoch.
            first_row: Row of the batch at which the boundary starts; every part draws other numbers.
        """

        def call(view: Any) -> Any:
            output = self._student_calls(block, view)
            is_end = block == self.num_student_blocks - 1 and self.predictor is not None
            return self.predictor(output) if is_end and self.predictor is not None else output

        self.step_guard.before_block(block, lambda: self._student_buffers(block))
        with self._stream(batch_idx, block, first_row):
            return without_gaps(self._for_views(call, boundary))

    def loss_terms(
        self, student_output: Any, teacher_output: Any, targets: Any, *, batch_idx: int, first_row: int = 0
    ) -> dict[str, Tensor]:
        """Give the loss and its terms.

        Raises:
            ValueError: ``loss`` gave a dictionary without the key ``"loss"``.
        """
        with self._stream(batch_idx, self.num_student_blocks, first_row):
            found = self.loss(student_output, teacher_output, targets)
        terms = {"loss": found} if isinstance(found, Tensor) else dict(found)
        if "loss" not in terms:
            msg = (
                f"`loss` must give the key 'loss', but gave {', '.join(terms) or 'none'}. Name the sum of the terms so."
            )
            raise ValueError(msg)
        return terms

    def follow(self) -> None:
        """Let the momentum teacher follow the student, unless the step was skipped; runs after every optimizer step."""
        is_skipped, self._is_skipped = self._is_skipped, False
        if self.follow_in_plan is not None:
            self.follow_in_plan(is_skipped)
        elif self.momentum is not None:
            momentum = self.make_momentum()
            for block in range(self.num_teacher_blocks):
                if is_skipped:
                    momentum.stay(block)
                else:
                    momentum.follow(block, self.teacher_momentum(self.num_teacher_updates))
        if is_skipped:
            return
        if self.momentum is not None:
            self.num_teacher_updates += 1
        if self.follow_in_plan is None:
            self.on_teacher_update()

    def metrics(self, terms: Mapping[str, Any]) -> dict[str, Any]:
        """Name the terms of a loss, and what else a step logs."""
        return {f"train/{name}": value for name, value in terms.items()}

    def _for_views(self, call: Callable[[Any], Any], boundary: Any) -> Any:
        return [call(view) for view in boundary] if self.has_views else call(boundary)

    def _stream(self, batch_idx: int, block: int, first_row: int) -> Any:
        coordinates = (self.trainer.current_epoch, batch_idx, block, first_row)
        return random_stream(stream_key(self.random_seed, *coordinates), self.device)

    # Lightning's hooks: the reference, in one process.

    @override
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Train on one batch; a strategy that knows plans does not call this."""
        inputs, targets = self.take_apart(batch)
        num_rows = count_rows(inputs)
        taught, studied = without_gaps(self.teacher_inputs(inputs)), inputs
        # With data-parallel replicas, each draws as if its rows followed those of the one before.
        first_row = self.global_rank * num_rows
        for block in range(self.num_teacher_blocks):
            taught = self.teach(block, taught)
        for block in range(self.num_student_blocks):
            studied = self.study(block, studied, batch_idx=batch_idx, first_row=first_row)
            keep_gradient_layouts(studied)
        terms = self.loss_terms(studied, taught, targets, batch_idx=batch_idx, first_row=first_row)
        values = self.metrics({name: term.detach() for name, term in terms.items()} | self.rate())
        self.log_dict(values, prog_bar=True, on_step=True, on_epoch=False, batch_size=num_rows)
        means = {f"{key}_epoch": value for key, value in values.items()}
        self.log_dict(means, on_step=False, on_epoch=True, batch_size=num_rows, sync_dist=True)
        return {"loss": terms["loss"]}

    def rate(self) -> dict[str, Tensor]:
        """Give the momentum of the next step of the teacher, to be logged."""
        if self.momentum is None:
            return {}
        return {"momentum": torch.tensor(self.teacher_momentum(self.num_teacher_updates), dtype=torch.float64)}

    @override
    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step, and let the teacher follow: once per optimizer step, however many batches it took."""
        scaler = getattr(self.trainer.precision_plugin, "scaler", None)
        scale = None if scaler is None else scaler.get_scale()
        super().optimizer_step(*args, **kwargs)
        # A scale falls where the step was skipped, and nowhere else.
        self._is_skipped = self._is_skipped if scaler is None else scaler.get_scale() < scale
        self.follow()

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip by the norm of all gradients together, wherever they are; also looks for what is not finite."""
        # A loss scaler, where plain Lightning has one, looks for itself, and skips the step.
        if getattr(self.trainer.precision_plugin, "scaler", None) is None:
            parameters = {name: own for name, own in self.named_parameters() if own.requires_grad}
            step = self.trainer.global_step
            self._is_skipped = not self.step_guard.allows(parameters, self._student_buffers, step)
        is_by_value = str(gradient_clip_algorithm or "norm").lower().endswith("value")
        if self.clip_in_plan is not None and gradient_clip_val and not is_by_value:
            check_clipping(self.trainer.precision_plugin, optimizer)
            self.clip_in_plan(optimizer, float(gradient_clip_val))
        else:
            self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of the teacher's steps, so that a schedule of the momentum goes on."""
        super().on_save_checkpoint(checkpoint)
        self.step_guard.flush()
        checkpoint[_UPDATES_KEY] = self.num_teacher_updates

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the number of the teacher's steps."""
        super().on_load_checkpoint(checkpoint)
        self.num_teacher_updates = int(checkpoint.get(_UPDATES_KEY, 0))


def _check_options(teacher: nn.Module | None, momentum: Any, teacher_delay: int, buffers: str) -> None:
    if teacher is None and momentum is None:
        raise ValueError("`teacher` must be a model unless it has momentum, but is None. Give it, or set `momentum`.")
    if teacher_delay not in (0, 1) or (teacher_delay and momentum is None):
        msg = (
            f"`teacher_delay` must be 0, or 1 for a teacher with momentum, but is {teacher_delay}. A frozen teacher is "
            "the same at all times, so it needs no delay to work ahead."
        )
        raise ValueError(msg)
    check_momentum(momentum, buffers)
