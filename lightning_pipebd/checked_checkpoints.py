"""How the strategy loads checkpoints: verified, the newest intact file, with blocks named that do not fit."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn
from typing_extensions import override

from lightning_pipebd.checkpoint_io import CheckedCheckpointIO, choose_intact
from lightning_pipebd.data import POSITION
from lightning_pipebd.data_position import DataPosition
from lightning_pipebd.lightning_internals import ProcessGroupStrategy, silence_resume_warning
from lightning_pipebd.module import BlockwiseDistillationModule

__all__ = ["CheckedCheckpoints", "find_differences"]


class CheckedCheckpoints(ProcessGroupStrategy):
    """The part of the strategy that reads checkpoint files.

    Args:
        kwargs: See :class:`~lightning_pipebd.lightning_internals.ProcessGroupStrategy`; without a ``checkpoint_io``,
            checkpoints are written and read by :class:`~lightning_pipebd.checkpoint_io.CheckedCheckpointIO`.

    Attributes:
        position: Where in the data the loaded checkpoint was written.
    """

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.get("checkpoint_io") is None:
            kwargs["checkpoint_io"] = CheckedCheckpointIO()
        super().__init__(**kwargs)
        self.position: DataPosition | None = None

    @override
    def connect(self, model: Any) -> None:
        super().connect(model)
        if isinstance(self.checkpoint_io, CheckedCheckpointIO) and isinstance(model, BlockwiseDistillationModule):
            self.checkpoint_io.block_of = _blocks_of_names(model).get

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
    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load the module's state.

        Raises:
            ValueError: The checkpoint is of another model; names the blocks that differ.
        """
        try:
            super().load_model_state_dict(checkpoint, strict)
        except RuntimeError as error:
            assert isinstance(self.lightning_module, BlockwiseDistillationModule)
            differences = find_differences(self.lightning_module, checkpoint["state_dict"])
            msg = f"The checkpoint must be of this model, but differs in {'; '.join(differences)}. Use its model."
            raise ValueError(msg) from error


def find_differences(module: BlockwiseDistillationModule, state: Mapping[str, Any]) -> list[str]:
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


def _blocks_of_names(module: BlockwiseDistillationModule) -> dict[str, str]:
    owners: dict[int, str] = {}
    for block in range(module.num_blocks):
        tensors: list[Tensor | nn.Parameter] = [*module.block_parameters(block), *module.block_buffers(block)]
        owners |= {id(tensor): module.block_pairs.names[block] for tensor in tensors}
    state = module.state_dict(keep_vars=True)
    return {name: owners[id(tensor)] for name, tensor in state.items() if id(tensor) in owners}
