"""Where the blocks of a module are during a fit: on whose device, in whose optimizer, and whose values count."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipebd.checkpoint import PrunedOptimizer
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.lightning_internals.module import set_device
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.runtime.momentum import MomentumTeacher
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["BlockPlacement", "PipelinePlacement", "Placement", "bring_others"]

PlacedT = TypeVar("PlacedT", nn.Module, list[Tensor])


def bring_others(module: DistillationModule, device: torch.device) -> None:
    """Have on a device what belongs to no block: metrics, losses, further parameters and buffers, the models' ends.

    Blocks stay where they are, and so does what of them is known to the module under a second name.

    Args:
        module: Has the blocks.
        device: This rank's.
    """
    set_device(module, device)
    if device.type == "cpu":
        return
    of_blocks = [tensor for block in module.block_modules() for tensor in (*block.parameters(), *block.buffers())]
    of_blocks += [tensor.grad for tensor in of_blocks if tensor.grad is not None]
    # The list keeps them alive: no other tensor can have the identity of one of them meanwhile.
    kept = {id(tensor) for tensor in of_blocks}
    # As `to` does, so that parameters stay the same objects and metrics, which hold tensors elsewhere, follow.
    module._apply(lambda tensor: tensor if id(tensor) in kept else tensor.to(device))


class Placement(ABC):
    """The places that a plan gives to the blocks of a module, as one rank sees them.

    Args:
        module: Has the blocks.
        rank: This rank.
        device: This rank's.
    """

    def __init__(self, module: DistillationModule, rank: int, device: torch.device) -> None:
        self._whole = module
        self._rank = rank
        self._device = device

    def place(self) -> None:
        """Have the blocks of this rank on its device, and the others in host memory."""
        set_device(self._whole, self._device)
        if self._device.type != "cpu":
            self._move_blocks()

    def prune(self, optimizer: Optimizer) -> PrunedOptimizer:
        """Leave this rank's parameters in an optimizer."""
        learners, others = self._learners(), self._learners_of_others

        def is_local(parameter: nn.Parameter) -> bool:
            return self._rank in learners.get(id(parameter), others)

        def is_owned(parameter: nn.Parameter) -> bool:
            return self._rank == learners.get(id(parameter), others)[0]

        return PrunedOptimizer(optimizer, is_local, is_owned)

    @abstractmethod
    def gather(self) -> None:
        """Have everything that evaluation needs on this rank's device."""

    @abstractmethod
    def owned_tensors(self) -> list[tuple[list[Tensor], int]]:
        """Give all tensors that training changes, in groups, each with the rank whose values count."""

    @abstractmethod
    def _move_blocks(self) -> None: ...

    @abstractmethod
    def _learners(self) -> dict[int, tuple[int, ...]]:
        """Give for the identity of each block's parameter the ranks that update it, its owner first."""

    @property
    @abstractmethod
    def _learners_of_others(self) -> tuple[int, ...]:
        """The ranks that update what belongs to no block, its owner first."""


class BlockPlacement(Placement):
    """The places of blocks that learn by themselves.

    Args:
        module: Has the blocks.
        plan: Gives them to ranks.
        rank: This rank.
        device: This rank's.
    """

    def __init__(self, module: BlockwiseDistillationModule, plan: Plan, rank: int, device: torch.device) -> None:
        super().__init__(module, rank, device)
        self._module = module
        self._plan = plan

    @override
    def _move_blocks(self) -> None:
        pairs = self._module.block_pairs
        places: list[tuple[bool, nn.Module]] = []
        for block in range(self._plan.num_blocks):
            places.append((self._rank in self._plan.teacher_ranks(block), pairs.teacher.blocks[block]))
            is_learned = self._rank in self._plan.student_ranks(block)
            places += [(is_learned, model) for model in (pairs.student.blocks[block], *self._module.adapters_of(block))]
        for is_here, model in _others_first(places):
            model.to(self._device if is_here else "cpu")

    @override
    def gather(self) -> None:
        self._module.student.to(self._device)
        self._module.adapters.to(self._device)
        if self._module.block_momentum is not None:
            self._module.teacher.to(self._device)
        set_device(self._module, self._device)

    @override
    def owned_tensors(self) -> list[tuple[list[Tensor], int]]:
        module = self._module
        owned = [
            ([*module.block_parameters(block), *module.block_buffers(block)], self._plan.owner(block))
            for block in range(self._plan.num_blocks)
        ]
        if module.block_momentum is not None:
            owned += [
                (module.block_momentum.tensors(block), shares[0].rank)
                for block, shares in enumerate(self._plan.teacher)
            ]
        return [(tensors, rank) for tensors, rank in owned if tensors]

    @override
    def _learners(self) -> dict[int, tuple[int, ...]]:
        return {
            id(parameter): tuple(share.rank for share in shares)
            for block, shares in enumerate(self._plan.student)
            for parameter in self._module.block_parameters(block)
        }

    @property
    @override
    def _learners_of_others(self) -> tuple[int, ...]:
        return (0,)


class PipelinePlacement(Placement):
    """The places of the blocks of a whole student and its teacher.

    Args:
        module: Has the blocks.
        plan: Gives them to ranks.
        rank: This rank.
        device: This rank's.

    Attributes:
        momentum: The momentum teacher, made of the tensors where :meth:`place` put them; ``None`` if it is frozen.
    """

    def __init__(self, module: TeacherStudentModule, plan: PipelinePlan, rank: int, device: torch.device) -> None:
        super().__init__(module, rank, device)
        self._module = module
        self._plan = plan
        self._place_in_replica = plan.place(rank)[1]
        self.momentum: MomentumTeacher | None = None

    @override
    def place(self) -> None:
        super().place()
        # Buffers that move are other tensors.
        self.momentum = self._module.make_momentum() if self._module.momentum is not None else None

    @override
    def _move_blocks(self) -> None:
        module, plan = self._module, self._plan
        # With the buffers of earlier blocks that a block reads.
        student = [
            (rank, [*module.student_tensors(block), *module.cuts.student.blocks[block].buffers()])
            for block, rank in enumerate(plan.student)
        ]
        teacher = [
            (rank, [*module.teacher_tensors(block), *module.cuts.teacher.blocks[block].buffers()])
            for block, rank in enumerate(plan.teacher)
        ]
        places = [(rank == self._place_in_replica, tensors) for rank, tensors in (*student, *teacher)]
        for is_here, tensors in _others_first(places):
            _put(tensors, self._device if is_here else torch.device("cpu"))

    @override
    def gather(self) -> None:
        self._module.to(self._device)
        set_device(self._module, self._device)

    @override
    def owned_tensors(self) -> list[tuple[list[Tensor], int]]:
        module, plan = self._module, self._plan
        owned = [(module.student_tensors(block), rank) for block, rank in enumerate(plan.student)]
        if module.momentum is not None:
            owned += [(module.teacher_tensors(block), rank) for block, rank in enumerate(plan.teacher)]
        known = {id(tensor) for tensors, _ in owned for tensor in tensors}
        others = [tensor for tensor in [*module.parameters(), *module.buffers()] if id(tensor) not in known]
        return [(tensors, rank) for tensors, rank in [*owned, (others, plan.loss_rank)] if tensors]

    @override
    def _learners(self) -> dict[int, tuple[int, ...]]:
        return {
            id(parameter): self._plan.sharing_ranks(rank)
            for block, rank in enumerate(self._plan.student)
            for parameter in self._module.student_parameters(block)
        }

    @property
    @override
    def _learners_of_others(self) -> tuple[int, ...]:
        # What belongs to no block is the loss's.
        return self._plan.sharing_ranks(self._plan.loss_rank)


def _others_first(places: Iterable[tuple[bool, PlacedT]]) -> list[tuple[bool, PlacedT]]:
    """Put what is here last: a table that blocks share, such as one of positions, stays where one of this rank is."""
    return sorted(places, key=lambda place: place[0])


def _put(tensors: Iterable[Tensor], device: torch.device) -> None:
    for tensor in tensors:
        tensor.data = tensor.data.to(device)
