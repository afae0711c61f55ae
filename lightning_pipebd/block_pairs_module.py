"""A teacher and a student in pairs of blocks, with adapters: which parameters belong to which block, and which rest."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from torch import Tensor, nn
from typing_extensions import override

from lightning_pipebd.block_momentum import BlockMomentum
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.nonfinite import FiniteGuard
from lightning_pipebd.runtime.block_pairs import BlockPairs

__all__ = ["BlockPairsModule"]

_FROZEN = "frozen_blocks"
_Self = TypeVar("_Self", bound="BlockPairsModule")


class BlockPairsModule(DistillationModule):
    """Two models whose blocks train by themselves, one by one, until they are frozen or stopped.

    Args:
        pairs: The blocks of both models.
        block_momentum: Lets teacher blocks follow; ``None`` for a frozen teacher.
        adapters: Per student block what follows it.
        input_adapters: Per student block what precedes it.
        on_nonfinite: What follows when a block's gradient is not finite.

    Attributes:
        adapters: The adapters, keyed ``"output_<block>"`` and ``"input_<block>"``.
    """

    adapters: nn.ModuleDict

    def __init__(
        self,
        pairs: BlockPairs,
        block_momentum: BlockMomentum | None,
        *,
        adapters: Mapping[int, nn.Module],
        input_adapters: Mapping[int, nn.Module],
        on_nonfinite: str,
    ) -> None:
        super().__init__()
        # Student, teacher, adapters: optimizers and checkpoints have them in the order in which they are set.
        self.student = pairs.student_model
        self.block_pairs = pairs
        self.block_momentum = block_momentum
        if block_momentum is None:
            self.hide_teacher(pairs.teacher_model)
        else:
            self.teacher = pairs.teacher_model.requires_grad_(False).eval()
        self.adapters = nn.ModuleDict(
            {f"output_{block}": adapter for block, adapter in adapters.items()}
            | {f"input_{block}": adapter for block, adapter in input_adapters.items()}
        )
        self.finite_guard = FiniteGuard(on_nonfinite)
        self._frozen: set[int] = set()

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.block_pairs.names)

    def check_shapes(self, example_input: Any) -> None:
        """Raise where a student block's output does not have the teacher's shape; trains and changes nothing.

        Args:
            example_input: An input of the teacher, of any batch size.

        Raises:
            PartitionError: Names the boundary, both shapes and the way out.
        """
        self.block_pairs.check_shapes(example_input, dict(self.adapters.items()))

    @override
    def block_modules(self) -> list[nn.Module]:
        return [*self.block_pairs.teacher.blocks, *self.block_pairs.student.blocks, *self.adapters.values()]

    def adapters_of(self, block: int) -> list[nn.Module]:
        """Give the adapters of a student block."""
        return [adapter for adapter in self.adapters_around(block) if adapter is not None]

    def adapters_around(self, block: int) -> tuple[nn.Module | None, nn.Module | None]:
        """Give what precedes a student block, and what follows it; ``None`` for none."""
        # To ask a ModuleDict takes as long as a small layer, and most models have no adapters.
        adapters = self.adapters._modules
        return (adapters.get(f"input_{block}"), adapters.get(f"output_{block}")) if adapters else (None, None)

    def block_parameters(self, block: int) -> list[nn.Parameter]:
        """Give the parameters that a block trains: those of its student block, then those of its adapters."""
        own = self.block_pairs.parameters_of(block)
        for adapter in self.adapters_of(block):
            own += adapter.parameters()
        return own

    def block_buffers(self, block: int) -> list[Tensor]:
        """Give the buffers of a student block and its adapters, for example running statistics."""
        own = self.block_pairs.student.buffers(self.student, block)
        for adapter in self.adapters_of(block):
            own += adapter.buffers()
        return own

    def trainable_parameters(self) -> list[nn.Parameter]:
        """Give what an optimizer should train: the student's and the adapters' parameters that want a gradient."""
        both = [*self.student.parameters(), *self.adapters.parameters()]
        return [parameter for parameter in both if parameter.requires_grad]

    def freeze_block(self, block: int) -> None:
        """Train a block no longer: its parameters stay as they are, also after a resumption. Call it on all ranks.

        Its loss is still computed and logged, and its buffers still change, as those of any module in training mode;
        there is no backward pass and no update.

        Raises:
            ValueError: There is no such block, or no other one that is still trained.
        """
        if not 0 <= block < self.num_blocks:
            msg = f"`block` must be below {self.num_blocks}, but is {block}. Blocks are counted from 0."
            raise ValueError(msg)
        if len(self._frozen | {block}) == self.num_blocks:
            msg = f"`block` must leave another block to train, but {block} is the last one. Stop the trainer instead."
            raise ValueError(msg)
        self._frozen.add(block)
        for parameter in self.block_parameters(block):
            parameter.grad = None

    @property
    def frozen_blocks(self) -> frozenset[int]:
        """Blocks of which nothing is trained: frozen, without parameters that want a gradient, or stopped here."""
        wanting = (any(own.requires_grad for own in self.block_parameters(block)) for block in range(self.num_blocks))
        idle = {block for block, wants in enumerate(wanting) if not wants}
        return frozenset(self._frozen | idle | self.finite_guard.stopped.keys())

    @override
    def train(self: _Self, mode: bool = True) -> _Self:
        super().train(mode)
        if self.block_momentum is not None:
            self.teacher.eval()
        return self

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of the random streams and the blocks that were stopped or frozen."""
        super().on_save_checkpoint(checkpoint)
        if self._frozen:
            checkpoint[_FROZEN] = sorted(self._frozen)
        self.finite_guard.flush()
        self.finite_guard.save(checkpoint, [self.finite_guard.stopped])
        if self.block_momentum is not None:
            self.block_momentum.save(checkpoint)

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the seed of the run that wrote the checkpoint, and its stopped and frozen blocks."""
        super().on_load_checkpoint(checkpoint)
        self._frozen = set(checkpoint.get(_FROZEN, ()))
        self.finite_guard.load(checkpoint)
        if self.block_momentum is not None:
            self.block_momentum.load(checkpoint)
