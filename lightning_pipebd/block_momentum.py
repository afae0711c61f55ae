"""Momentum teachers of blocks: each teacher block follows its student block, where both are, without any message."""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_pipebd.planning.plan import Plan, PlanError
from lightning_pipebd.runtime.block_pairs import BlockPairs
from lightning_pipebd.runtime.model_cuts import ModelCuts, match_blocks
from lightning_pipebd.runtime.momentum import Buffers, MomentumBlock, MomentumTeacher, check_momentum

__all__ = ["BlockMomentum", "first_teacher"]

_KEY = "teacher_updates"
_followed: WeakKeyDictionary[Optimizer, BlockMomentum] = WeakKeyDictionary()


def first_teacher(teacher: nn.Module | None, student: nn.Module, momentum: object, listed: object) -> nn.Module:
    """Give the teacher that training begins with: a copy of the student, if a momentum teacher is left out.

    Raises:
        ValueError: A teacher is missing.
    """
    if teacher is not None:
        return teacher
    if momentum is None or listed is not None:
        msg = (
            "`teacher` must be a model unless it has `momentum` and the models are cut by `block_map`, but is None. "
            "Give it; copy.deepcopy(student) makes one like the student."
        )
        raise ValueError(msg)
    return copy.deepcopy(student)


class BlockMomentum:
    """Lets every teacher block follow its student block after each optimizer step.

    Args:
        pairs: Both models' blocks.
        momentum: The part that the teacher keeps of itself: a number from 0 to 1, or a function of the steps so far.
        buffers: What becomes of buffers such as running statistics.

    Attributes:
        num_updates: Steps so far.
        blocks: Blocks that follow on this rank; ``None`` for all.

    Raises:
        PartitionError: A teacher block has other tensors than its student block.
        ValueError: The momentum or the policy for buffers is none, or a block has candidates.
    """

    def __init__(self, pairs: BlockPairs, momentum: float | Callable[[int], float], buffers: Buffers) -> None:
        check_momentum(momentum, buffers)
        if any(candidate is not None for candidate in pairs.candidates):
            raise ValueError(
                "`momentum` must be left out where a place has candidates: one teacher block cannot follow several "
                "student blocks. Train one candidate per place."
            )
        match_blocks(
            pairs.student_model,
            ModelCuts(teacher_model=pairs.teacher_model, teacher=pairs.teacher, student=pairs.student),
        )
        self._pairs = pairs
        self._momentum = momentum
        self._buffers: Buffers = buffers
        self.num_updates = 0
        self.blocks: Collection[int] | None = None

    def follow_steps_of(self, optimizer: Optimizer, still: Callable[[], Collection[int]]) -> None:
        """Follow after every step of an optimizer, also of the one that is under way.

        Args:
            optimizer: Trains the student.
            still: Gives the blocks whose update was left out.
        """
        # No override of the module's `optimizer_step`: Lightning warns every user of a class that has one.
        if _followed.get(optimizer) is not self:
            _followed[optimizer] = self
            optimizer.register_step_post_hook(lambda *_: self.follow(still()))

    def follow(self, still: Collection[int]) -> None:
        """Let the blocks of this rank follow, except for those whose update was left out."""
        momentum = self._momentum(self.num_updates) if callable(self._momentum) else self._momentum
        for block in range(len(self._pairs.names)) if self.blocks is None else self.blocks:
            if block not in still:
                MomentumTeacher([self._block(block)], self._buffers).follow(0, float(momentum))
        self.num_updates += 1

    def tensors(self, block: int) -> list[Tensor]:
        """Give the parameters and buffers of a teacher block."""
        own = self._block(block)
        return [*own.teacher, *own.teacher_buffers]

    def check_plan(self, plan: Plan) -> None:
        """Raise if a teacher block is on a rank that does not train its student block.

        Raises:
            PlanError: Names the block and the ranks.
        """
        for block in range(plan.num_blocks):
            if strangers := plan.strangers(block):
                raise PlanError(
                    f"`plan` must have teacher block {block} where its student block is trained, because it follows "
                    f"it, but rank {strangers[0]} has the teacher's alone. Use a straight plan, such as '0-1|2-3', "
                    "or 'joint'."
                )

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Keep the number of steps, so that a schedule of the momentum goes on."""
        checkpoint[_KEY] = self.num_updates

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the number of steps."""
        self.num_updates = int(checkpoint.get(_KEY, 0))

    def _block(self, block: int) -> MomentumBlock:
        sides: list[Sequence[Tensor]] = []
        for model, partition in (
            (self._pairs.student_model, self._pairs.student),
            (self._pairs.teacher_model, self._pairs.teacher),
        ):
            sides += [partition.parameters(model, block), partition.buffers(model, block)]
        return MomentumBlock(sides[0], sides[2], student_buffers=sides[1], teacher_buffers=sides[3])
