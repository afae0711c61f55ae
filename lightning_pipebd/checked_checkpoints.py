"""The strategy's checkpoints: complete, verified, the newest intact one, with blocks named that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipebd.checkpoint import PrunedOptimizer, hand_over
from lightning_pipebd.checkpoint_io import CheckedCheckpointIO, choose_intact
from lightning_pipebd.data import POSITION
from lightning_pipebd.data_position import DataPosition
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.lightning_internals.trainer import begin_next_epoch, find_last_checkpoint, silence_resume_warning
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.pipeline_session import PipelineSession
from lightning_pipebd.runtime.transport import ProcessGroupTransport
from lightning_pipebd.session import TrainingSession
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["CheckedCheckpoints", "find_differences"]


class CheckedCheckpoints(ProcessGroupStrategy):
    """The part of the strategy that puts checkpoints together and takes them apart.

    Args:
        kwargs: See :class:`~lightning_pipebd.lightning_internals.processes.ProcessGroupStrategy`; without a
            ``checkpoint_io``, :class:`~lightning_pipebd.checkpoint_io.CheckedCheckpointIO` writes and reads.

    Attributes:
        position: Where in the data the loaded checkpoint was written.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("checkpoint_io") is None:
            kwargs["checkpoint_io"] = CheckedCheckpointIO()
        super().__init__(**kwargs)
        self.position: DataPosition | None = None
        self._transport: ProcessGroupTransport | None = None
        self._session: TrainingSession | PipelineSession | None = None
        self._handed_over_at = -1

    @property
    def session(self) -> TrainingSession | PipelineSession | None:
        """What trains on this rank; ``None`` before the first ``fit``."""
        return self._session

    @override
    def connect(self, model: Any) -> None:
        super().connect(model)
        if isinstance(self.checkpoint_io, CheckedCheckpointIO) and isinstance(model, DistillationModule):
            self.checkpoint_io.block_of = _blocks_of_names(model).get

    @override
    def setup_environment(self) -> None:
        """**Collective** over all ranks: meet, and see whether all of them resume.

        Raises:
            ValueError: With ``ckpt_path="last"`` this rank finds a checkpoint where rank 0 finds none, or the reverse.
        """
        super().setup_environment()
        if not self.resumes_last:
            return
        assert self.lightning_module is not None
        mine = find_last_checkpoint(self.lightning_module.trainer)
        theirs = self.broadcast(mine)
        if (mine is None) != (theirs is None):
            raise ValueError(
                f"`ckpt_path='last'` must find a checkpoint on all ranks or on none, but finds {mine or 'none'} on "
                f"rank {self.global_rank} and {theirs or 'none'} on rank 0. Save to a directory that all machines see."
            )

    @override
    def load_checkpoint(self, checkpoint_path: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """**Collective** over all ranks: load the file, or with ``ckpt_path="last"`` the newest intact one."""
        if self.resumes_last:
            mine = choose_intact(checkpoint_path, self.checkpoint_io) if self.global_rank == 0 else None
            checkpoint_path = self.broadcast(mine)
        checkpoint: dict[str, Any] = super().load_checkpoint(checkpoint_path, *args, **kwargs)
        if POSITION in checkpoint:
            self.position = DataPosition.from_plain(checkpoint[POSITION])
            silence_resume_warning()
        return checkpoint

    @override
    def on_train_start(self) -> None:
        assert self.lightning_module is not None
        begin_next_epoch(self.lightning_module.trainer)
        super().on_train_start()

    @override
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's state.

        Raises:
            ValueError: The checkpoint is of another model; names the blocks that differ.
        """
        try:
            super().load_model_state_dict(checkpoint, strict)
        except RuntimeError as error:
            assert isinstance(self.lightning_module, DistillationModule)
            differences = find_differences(self.lightning_module, checkpoint["state_dict"])
            msg = f"The checkpoint must be of this model, but differs in {'; '.join(differences)}. Use its model."
            raise ValueError(msg) from error

    def _assemble_student(self) -> None:
        """**Collective** over all ranks: give every rank the present weights of all blocks."""
        assert self._session is not None
        assert self._transport is not None
        if self._session.num_steps != self._handed_over_at:
            owned = self._session.placement.owned_tensors()
            hand_over(self._transport, [*owned, *self._session.strays.owned(self._transport)])
            self._session.strays.settle()
            self._handed_over_at = self._session.num_steps

    @override
    def lightning_module_state_dict(self) -> dict[str, Any]:
        """**Collective** over all ranks: give the module's state with all blocks up to date."""
        if self._session is not None:
            self._assemble_student()
        return super().lightning_module_state_dict()

    @override
    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """**Collective** over all ranks: give the optimizer's state as one device would; complete on rank 0 only."""
        assert self._transport is not None
        return self._pruned(optimizer).state(self._transport)

    @override
    def load_optimizer_state_dict(self, checkpoint: Any) -> None:
        for optimizer, state in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            self._pruned(optimizer).load(state)
        if isinstance(self._session, TrainingSession):
            self._session.scalers.load(checkpoint)

    @override
    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        """**Collective** over all ranks: complete the checkpoint, and write it on rank 0."""
        if self._session is not None:
            self._session.progress.mark("saving a checkpoint")
            self._session.save(checkpoint)
        super().save_checkpoint(checkpoint, filepath, storage_options)

    def _pruned(self, optimizer: Optimizer) -> PrunedOptimizer:
        assert self._session is not None
        return self._session.pruned_optimizer(optimizer)


def find_differences(module: DistillationModule, state: Mapping[str, Any]) -> list[str]:
    """Say for every block in which a state differs from the module's: what is missing, too much or of another shape."""
    own = dict(module.state_dict())
    blocks = _blocks_of_names(module)
    differences: dict[str, list[str]] = {}
    for name in sorted(own.keys() | state.keys()):
        block = f"block {blocks[name]}" if name in blocks else "no block of this model"
        if name not in state:
            differences.setdefault(block, []).append(f"{name} is missing")
        elif name not in own:
            differences.setdefault(block, []).append(f"{name} is too much")
        elif isinstance(own[name], Tensor) and own[name].shape != state[name].shape:
            shapes = f"{tuple(state[name].shape)} instead of {tuple(own[name].shape)}"
            differences.setdefault(block, []).append(f"{name} is {shapes}")
    return [f"{block} ({', '.join(found[:3])}{', ...' if found[3:] else ''})" for block, found in differences.items()]


def _blocks_of_names(module: DistillationModule) -> dict[str, str]:
    owners: dict[int, str] = {}
    if isinstance(module, BlockwiseDistillationModule):
        for block in range(module.num_blocks):
            tensors: list[Tensor | nn.Parameter] = [*module.block_parameters(block), *module.block_buffers(block)]
            owners |= {id(tensor): module.block_pairs.names[block] for tensor in tensors}
    elif isinstance(module, TeacherStudentModule):
        for block in range(module.num_student_blocks):
            owners |= {id(tensor): str(block) for tensor in module.student_tensors(block)}
    state = module.state_dict(keep_vars=True)
    return {name: owners[id(tensor)] for name, tensor in state.items() if id(tensor) in owners}
