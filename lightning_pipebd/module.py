"""The module: a teacher, a student and a block map, trained block by block under any strategy."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cached_property
from typing import Any, TypeVar

import torch
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_pipebd.block_momentum import BlockMomentum, first_teacher
from lightning_pipebd.block_pairs_module import BlockPairsModule
from lightning_pipebd.clipping import check_clipping, trained_ids
from lightning_pipebd.lightning_internals.module import log_again
from lightning_pipebd.losses import BLOCK_LOSSES, resolve_loss
from lightning_pipebd.runtime.block_calls import BlockCalls
from lightning_pipebd.runtime.block_pairs import pair_blocks
from lightning_pipebd.runtime.candidates import target_of
from lightning_pipebd.runtime.compiling import compile_options
from lightning_pipebd.runtime.graph_memory import copy_gradients, copy_tensors, has_compiled, makes_graphs
from lightning_pipebd.runtime.momentum import Buffers
from lightning_pipebd.runtime.random_use import Draws, KnownDraws, block_stream
from lightning_pipebd.runtime.row_trees import count_rows, versions_of

__all__ = ["BlockwiseDistillationModule"]

_Self = TypeVar("_Self", bound="BlockwiseDistillationModule")


class BlockwiseDistillationModule(BlockPairsModule):
    """Train every block of a student to imitate its block of a teacher, from the teacher's own activations.

    .. code-block:: python

        class Compress(BlockwiseDistillationModule):
            def __init__(self, lr: float = 1e-3):
                super().__init__(teacher=..., student=..., block_map={"features.4": "features.2", "fc": "fc"})

            def configure_optimizers(self):
                return torch.optim.AdamW(self.trainable_parameters(), lr=self.hparams.lr)

    Block *i* of the student reads the teacher's boundary *i* and imitates boundary *i + 1*. Blocks share no gradient,
    so they may be trained on different devices, at different times, with the same result: ``Trainer()`` trains them on
    one device, ``Trainer(strategy="pipebd", devices=4)`` on four.

    The teacher is frozen and in ``eval()``, whatever the trainer does. It is no submodule: it is neither in
    ``parameters()`` nor in checkpoints, and follows the module from device to device. With ``momentum`` it follows the
    student instead, block by block, and is a submodule that takes no gradient.

    Args:
        teacher: The model to imitate; used as it is. ``None``, with ``momentum``, begins with a copy of the student.
        student: The model to train; its parameters keep their names.
        block_map: Ordered pairs *teacher module path -> student module path*: after these two modules the activations
            shall match. A block ends with its module and begins where the previous one ended.
        teacher_blocks: Instead of ``block_map``, for models that cannot be cut by paths: the teacher's blocks in order,
            modules or callables. A block gets the boundary (the elements of a tuple as arguments, those of a dict as
            keyword arguments) and returns the next one, any tree of tensors.
        student_blocks: As many blocks of the student, made of modules of ``student``.
        adapters: Per student path (or block index), a module that maps the student block's output to the teacher's
            shape, where they differ. It is trained with the block and is no part of the student.
        input_adapters: Per student path (or block index), a module that maps the teacher's boundary to what this
            student block takes, where they differ. Trained with the block, no part of the student.
        target_blocks: Student paths (or block indices) whose loss wants the labels of the batch.
        block_losses: Per student path (or block index), ``"mse"``, ``"soft_cross_entropy"``, ``"kl"`` or a function
            of the student's and the teacher's output. Blocks not named use the mean squared error. A loss must be a
            mean over rows.
        momentum: ``None`` for a frozen teacher. Otherwise every teacher block, which must have its student block's
            tensors, follows it after each optimizer step: the part that it keeps of itself, a number from 0 to 1 or a
            function of the number of steps so far. Such a teacher is part of the checkpoint.
        buffers: What a momentum teacher does with buffers such as running statistics: ``"average"`` (integers are
            copied), ``"copy"`` the student's, or ``"leave"`` its own as they are.
        on_nonfinite: What follows when a block's gradient is not finite: ``"raise"`` ends the run, ``"skip"`` leaves
            out the block's update of this step, ``"stop_block"`` lets the block stay as it is from then on. The other
            blocks never notice. The block, the step and what was not finite are named in any case.
        compile: Whether each teacher and student block runs under ``torch.compile``, by itself: ``True``, or keyword
            arguments of it, such as ``{"mode": "reduce-overhead"}`` for CUDA graphs. Names in checkpoints stay.
        example_input: An input of the teacher, of any batch size, to check all shapes with; without it they are
            checked when the first batch arrives (or, under ``strategy="pipebd"``, with ``example_input_array``).

    Attributes:
        student: The student, whole.
        adapters: The adapters, keyed ``"output_<block>"`` and ``"input_<block>"``.
        compile_options: Keyword arguments of ``torch.compile`` for the blocks; ``None`` if they are not compiled.

    Raises:
        PartitionError: The block map does not fit the models; the message names the path and the way out.
        ValueError: Blocks, adapters or losses are named that do not exist, or arguments of ``torch.compile``.
        TypeError: ``compile`` is neither a truth value nor a mapping.
    """

    def __init__(
        self,
        teacher: nn.Module | None,
        student: nn.Module,
        block_map: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
        *,
        teacher_blocks: Sequence[nn.Module | Callable[..., Any]] | None = None,
        student_blocks: Sequence[nn.Module | Callable[..., Any]] | None = None,
        adapters: Mapping[str | int, nn.Module] | None = None,
        input_adapters: Mapping[str | int, nn.Module] | None = None,
        target_blocks: Sequence[str | int] = (),
        block_losses: Mapping[str | int, str | Callable[[Any, Any], Tensor]] | None = None,
        momentum: float | Callable[[int], float] | None = None,
        buffers: Buffers = "average",
        on_nonfinite: str = "raise",
        compile: bool | Mapping[str, Any] = False,
        example_input: Any = None,
    ) -> None:
        teacher = first_teacher(teacher, student, momentum, student_blocks)
        pairs = pair_blocks(teacher, student, block_map, teacher_blocks, student_blocks)
        super().__init__(
            pairs,
            None if momentum is None else BlockMomentum(pairs, momentum, buffers),
            adapters=pairs.resolve_keys(adapters or {}, "adapters"),
            input_adapters=pairs.resolve_keys(input_adapters or {}, "input_adapters"),
            on_nonfinite=on_nonfinite,
        )
        self.target_blocks = frozenset(pairs.resolve_keys(dict.fromkeys(target_blocks), "target_blocks"))
        self._losses = {
            block: resolve_loss(loss) for block, loss in pairs.resolve_keys(block_losses or {}, "block_losses").items()
        }
        self._still: set[int] = set()
        self._run_in_graphs: set[int] = set()
        self._known_draws = KnownDraws()
        self.compile_options = compile_options(compile)
        self._teacher_calls = BlockCalls(pairs.teacher, "teacher", self.compile_options)
        self._student_calls = BlockCalls(pairs.student, "student", self.compile_options)
        if example_input is not None:
            self.check_shapes(example_input)

    def block_key(self, block: int, what: str = "loss") -> str:
        """Give the key under which a block's metric is logged, the same for every plan.

        Example:
            ``train/block/03/loss``; ``train/block/features.3/candidate/1/loss`` where a block has candidates
        """
        candidate = self.block_pairs.candidates[block]
        if candidate is not None:
            return f"train/block/{candidate.place}/candidate/{candidate.number}/{what}"
        return f"train/block/{block:0{max(2, len(str(self.num_blocks - 1)))}d}/{what}"

    # What users override.

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        """Say how far a student block is from its teacher block: a mean over rows.

        Args:
            block: Index of the block.
            student_output: What the student block (and its adapter) made of the teacher's boundary.
            teacher_output: The teacher's next boundary, without gradient.
            targets: Labels of the batch for blocks named in ``target_blocks``, else ``None``.
        """
        return self._losses.get(block, BLOCK_LOSSES["mse"])(student_output, teacher_output)

    # What a strategy calls, and `training_step` below.

    def teach(self, block: int, boundary: Any) -> Any:
        """Give the teacher's boundary ``block + 1``; ``boundary`` stays unchanged."""
        with torch.no_grad():
            taught = self._teacher_calls(block, boundary)
            return copy_tensors(taught) if self.uses_graphs else taught

    def imitate(
        self,
        block: int,
        boundary: Any,
        teacher_output: Any,
        targets: Any,
        *,
        epoch: int,
        batch_idx: int,
        first_row: int = 0,
    ) -> Tensor:
        """Give the loss of a student block, drawing from the block's own random stream.

        Args:
            block: Index of the block.
            boundary: The teacher's boundary ``block``; stays unchanged.
            teacher_output: The teacher's boundary ``block + 1``.
            targets: Labels of the same rows; handed on to blocks that want them.
            epoch: The epoch.
            batch_idx: Index of the batch in it.
            first_row: Row of the batch at which the boundary starts; every part draws other numbers.
        """
        if self.finite_guard.keeps_buffers:
            self.finite_guard.before_block(block, self.block_buffers(block))
        draws = self._known_draws.of(block, epoch, self._modules_of)
        if draws is Draws.NOTHING:
            loss = self._rate(block, boundary, teacher_output, targets)
        else:
            coordinates = (self.random_seed, epoch, batch_idx, block, first_row)
            with block_stream(draws, coordinates, self.device):
                loss = self._rate(block, boundary, teacher_output, targets)
        # With gradients until here: by them a loss tells hidden states from masks.
        loss = loss.detach() if block in self._frozen else loss
        self.finite_guard.note_loss(block, loss)
        if self.uses_graphs:
            self._run_in_graphs.add(block)
        return loss

    def _modules_of(self, block: int) -> list[nn.Module] | None:
        """Give the modules that run for a block, or nothing if functions of the user's do, too."""
        own_loss = getattr(self.block_loss, "__func__", None) is BlockwiseDistillationModule.block_loss
        if not own_loss or self._losses.get(block, BLOCK_LOSSES["mse"]) not in BLOCK_LOSSES.values():
            return None
        return [self.block_pairs.student.blocks[block], *self.adapters_of(block)]

    def rate_blocks(self, batch: Any) -> list[Tensor]:
        """Give every block's loss on a batch, as it is in the mode that the module is in; trains nothing.

        The whole student must be on this device, as in the user's validation or after a fit.

        Args:
            batch: What a loader yields.
        """
        losses = []
        # With gradients, though none is used: by them a loss tells hidden states from masks.
        with torch.inference_mode(mode=False), torch.enable_grad():
            boundary, targets = self.take_apart(pytree.tree_map_only(Tensor, _out_of_inference, batch))
            for block in range(self.num_blocks):
                teacher_output = self.teach(block, boundary)
                losses.append(self._rate(block, boundary, teacher_output, targets).detach())
                boundary = teacher_output
        return losses

    def _rate(self, block: int, boundary: Any, teacher_output: Any, targets: Any) -> Tensor:
        versions = versions_of(boundary), versions_of(teacher_output)
        before, after = self.adapters_around(block)
        output = self._student_calls(block, boundary if before is None else before(boundary))
        output = output if after is None else after(output)
        wanted = targets if block in self.target_blocks else None
        loss = self.block_loss(block, output, target_of(teacher_output), wanted)
        if (versions_of(boundary), versions_of(teacher_output)) != versions:
            raise RuntimeError(
                f"The loss of block {block} and its input adapter must leave the teacher's boundaries as they are, "
                "because other blocks and ranks use them, but one was changed in place. Use operations that give a new "
                "tensor: `x / 2` instead of `x.div_(2)`, `inplace=False`."
            )
        # A block may give its loss itself.
        return loss.clone() if self.uses_graphs else loss

    @property
    def uses_graphs(self) -> bool:
        """Whether blocks may run in CUDA graphs, whose memory the next call of a compiled block reuses."""
        # Lightning looks for the device: last, because nearly nobody gets there.
        return (self._has_own_compiled or makes_graphs(self.compile_options)) and self.device.type == "cuda"

    @cached_property
    def _has_own_compiled(self) -> bool:
        # With which options, modules do not tell.
        return has_compiled([self, self.teacher])

    # Lightning's hooks: the reference, block after block in one process.

    @override
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Add the gradients of all blocks that have a part in the loss."""
        learned, self._run_in_graphs = self._run_in_graphs, set()
        parameters = (parameter for block in sorted(learned) for parameter in self.block_parameters(block))
        # What a parameter has already is added to; otherwise it takes the graph's own tensor.
        fresh = [parameter for parameter in parameters if parameter.grad is None]
        super().backward(loss, *args, **kwargs)
        copy_gradients(fresh)

    @override
    def _apply(self: _Self, fn: Callable[[Any], Any], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)
        # Losses are no submodules: their tensors are in no checkpoint.
        for loss in self._losses.values():
            if isinstance(loss, nn.Module):
                loss._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own hook
        return self

    @override
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        """Train all blocks on one batch, in order; a strategy that knows plans does not call this."""
        boundary, targets = self.take_apart(batch)
        num_rows, epoch = count_rows(boundary), self.trainer.current_epoch
        losses: list[Tensor] = []
        for block in range(self.num_blocks):
            teacher_output = self.teach(block, boundary)
            losses.append(self.imitate(block, boundary, teacher_output, targets, epoch=epoch, batch_idx=batch_idx))
            boundary = teacher_output
        total = sum(losses[1:], losses[0])
        self._log_losses({block: loss.detach() for block, loss in enumerate(losses)}, total.detach(), num_rows)
        return {"loss": total}

    def metrics(self, losses: Mapping[int, Any]) -> dict[str, Any]:
        """Name the blocks' losses as they are logged, and add their sum."""
        values = {self._keys[block]: loss for block, loss in sorted(losses.items())}
        return {**values, "train/loss": sum(losses.values())}

    @cached_property
    def _keys(self) -> list[str]:
        return [self.block_key(block) for block in range(self.num_blocks)]

    def _log_losses(self, losses: dict[int, Tensor], total: Tensor, num_rows: int) -> None:
        values = {self._keys[block]: loss for block, loss in losses.items()} | {"train/loss": total}
        if not log_again(self, values, num_rows):
            for key, value in values.items():
                # A number for every block does not fit on a progress bar.
                self.log(key, value, prog_bar=key == "train/loss", on_step=True, on_epoch=False, batch_size=num_rows)
        means = {f"{key}_epoch": value for key, value in values.items()}
        if not log_again(self, means, num_rows):
            self.log_dict(means, on_step=False, on_epoch=True, batch_size=num_rows, sync_dist=True)

    @override
    def configure_gradient_clipping(
        self,
        optimizer: Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip each block's gradients by themselves: no block's update depends on another block.

        Gradients that are not finite are found here, too (``on_nonfinite``).
        """
        if self.block_momentum is not None:
            self.block_momentum.follow_steps_of(optimizer, lambda: self._still)
        # A loss scaler, where plain Lightning has one, looks for itself, and skips the step.
        noted = self.finite_guard.noted_blocks
        self._still.clear()
        if noted and getattr(self.trainer.precision_plugin, "scaler", None) is None:
            step, trained = self.trainer.global_step, trained_ids(optimizer)
            for block in noted:
                name = self.block_pairs.names[block]
                parameters = [parameter for parameter in self.block_parameters(block) if id(parameter) in trained]
                buffers = self.block_buffers(block) if self.finite_guard.keeps_buffers else []
                if not self.finite_guard.check(block, name, parameters, buffers, step):
                    self._still.add(block)
        if not gradient_clip_val:
            return
        check_clipping(self.trainer.precision_plugin, optimizer)
        trained = trained_ids(optimizer)
        for block in range(self.num_blocks):
            parameters = [own for own in self.block_parameters(block) if own.grad is not None and id(own) in trained]
            if not parameters:
                continue
            if str(gradient_clip_algorithm or "norm").lower().endswith("value"):
                nn.utils.clip_grad_value_(parameters, gradient_clip_val)
            else:
                nn.utils.clip_grad_norm_(parameters, gradient_clip_val)


def _out_of_inference(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
