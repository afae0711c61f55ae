"""What a rank of a pipeline shares with the ranks that have the same blocks in other replicas."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from torch import Tensor

from lightning_pipebd.pipeline_measuring import one_replica_reason
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.plan import PlanError
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.row_trees import versions_of
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["Replica", "check_replicas", "sharing_groups", "unchanged_blocks"]


class Replica:
    """A rank's part of its replica.

    Args:
        plan: The plan.
        transport: Reaches the other ranks.

    Attributes:
        blocks: The student blocks of this rank.
    """

    def __init__(self, plan: PipelinePlan, transport: Transport) -> None:
        self._plan = plan
        self._transport = transport
        rank = plan.place(transport.rank)[1]
        self.blocks = [block for block, owner in enumerate(plan.student) if owner == rank]
        self._ranks = plan.sharing_ranks(rank)

    def share(self, tensors: Sequence[Tensor]) -> None:
        """**Collective** over the ranks that have the same blocks: sum tensors of one type, in place."""
        if len(self._ranks) > 1:
            self._transport.all_reduce(tensors, self._ranks).wait()

    def reducer(self, module: TeacherStudentModule) -> GradientReducer:
        """Make what sums the gradients of this rank's blocks."""
        parameters = {block: module.student_parameters(block) for block in self.blocks}
        last = module.num_student_blocks - 1
        if last in parameters:
            # What belongs to no block is the loss's, which is where the last block is.
            of_blocks = {id(own) for block in range(last + 1) for own in module.student_parameters(block)}
            parameters[last] += [own for own in module.trainable_parameters() if id(own) not in of_blocks]
        return GradientReducer(self._transport, parameters)


@contextmanager
def unchanged_blocks(plan: PipelinePlan, module: TeacherStudentModule) -> Iterator[None]:
    """Have `on_teacher_update`, which runs inside on one rank, leave the blocks alone that other replicas have, too.

    Raises:
        RuntimeError: A parameter or buffer of a block was changed.
    """
    if plan.replicas == 1 or type(module).on_teacher_update is TeacherStudentModule.on_teacher_update:
        yield
        return
    blocks = [
        (f"{model} block {block}", tensors_of(block))
        for model, tensors_of, number in (
            ("student", module.student_tensors, module.num_student_blocks),
            ("teacher", module.teacher_tensors, module.num_teacher_blocks),
        )
        for block in range(number)
    ]
    before = [versions_of(tensors) for _, tensors in blocks]
    yield
    for (name, tensors), versions in zip(blocks, before, strict=True):
        if versions_of(tensors) != versions:
            msg = (
                f"`on_teacher_update` must leave the blocks of both models alone where a plan has replicas, but has "
                f"changed {name}: the other replicas' would differ from it. Change buffers of the module only, or let "
                "one pipeline have all ranks."
            )
            raise RuntimeError(msg)


def sharing_groups(plan: PipelinePlan) -> list[tuple[int, ...]]:
    """Give the sets of ranks that sum together."""
    return [tuple(range(plan.num_ranks)), *map(plan.sharing_ranks, range(plan.ranks_per_replica))]


def check_replicas(plan: PipelinePlan, module: TeacherStudentModule) -> None:
    """Raise for modules that train in one replica only.

    Raises:
        PlanError: The plan has more.
    """
    reason = one_replica_reason(module) if plan.replicas > 1 else ""
    if reason:
        raise PlanError(
            f"`plan` must have one replica for {type(module).__name__}, because {reason}, but {plan} has "
            f"{plan.replicas}. Let one pipeline have all ranks."
        )
