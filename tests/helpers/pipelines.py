"""End-to-end training on rank threads, and the same rule written down for one process, step by step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineKind, Stream
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.momentum import MomentumBlock, MomentumTeacher
from lightning_pipebd.runtime.pipeline_executor import PipelineExecutor, PipelineSpan
from lightning_pipebd.runtime.relay import Relay
from lightning_pipebd.runtime.row_trees import RowTree, leading_row_leaves
from tests.helpers.ranks import run_threads

__all__ = ["Task", "Trained", "train_in_threads", "train_in_turn"]

Loss = Callable[[Any, Any, Any], Tensor]


@dataclass(frozen=True, kw_only=True)
class Task:
    """What is trained.

    Args:
        teacher: Blocks of the teacher.
        student: Blocks of the student.
        loss: Mean over rows, unless the step says that it needs the full batch.
        batches: Pairs of inputs and labels.
        momentum: ``None`` for a frozen teacher.
        delay: Of the teacher, in optimizer steps.
        accumulate: Batches of an optimizer step.
        make_optimizer: Takes parameters.
    """

    teacher: Sequence[nn.Module]
    student: Sequence[nn.Module]
    loss: Loss
    batches: Sequence[tuple[Any, Any]]
    momentum: float | None = None
    delay: int = 0
    accumulate: int = 1
    make_optimizer: Callable[[Any], Any] = lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9)


@dataclass(frozen=True, kw_only=True)
class Trained:
    """Parameters by block, and the loss of every batch."""

    student: list[list[Tensor]]
    teacher: list[list[Tensor]]
    losses: list[float]


def train_in_turn(task: Task) -> Trained:
    """Train in one process: all versions of the teacher are kept, and the rule picks one."""
    student, losses = copy.deepcopy(nn.ModuleList(task.student)), []
    versions = [copy.deepcopy(nn.ModuleList(task.teacher))]
    optimizer = task.make_optimizer(student.parameters())
    for index, (inputs, labels) in enumerate(task.batches):
        step = index // task.accumulate + 1  # counted from 1, as the rule is written
        teacher = versions[max(step - 1 - task.delay, 0)] if task.momentum is not None else versions[0]
        with torch.no_grad():
            taught = _run(teacher, inputs)
        loss = task.loss(_run(student, inputs), taught, labels)
        torch.autograd.backward(loss / task.accumulate)
        losses.append(loss.item())
        if (index + 1) % task.accumulate == 0:
            optimizer.step()
            optimizer.zero_grad()
            if task.momentum is not None:
                newest = copy.deepcopy(versions[-1])
                with torch.no_grad():
                    for old, new in zip(newest.parameters(), student.parameters(), strict=True):
                        old.copy_(task.momentum * old + (1 - task.momentum) * new)
                versions.append(newest)
    return Trained(student=_parameters(student), teacher=_parameters(versions[-1]), losses=losses)


def train_in_threads(
    task: Task,
    plan: PipelinePlan,
    step: PipelineStep,
    *,
    looks_ahead: bool = True,
    timeout: float = 30.0,
    observer: Callable[[int, PipelineSpan], None] | None = None,
) -> Trained:
    """Train on threads as ranks; rows, updates and who teaches when are filled into ``step``."""
    world = LocalWorld(plan.num_ranks)
    results = run_threads(plan.num_ranks, _train_rank, world, task, plan, step, looks_ahead, observer, timeout=timeout)
    replicas = [_put_together(results[first:], plan) for first in range(0, plan.num_ranks, plan.ranks_per_replica)]
    for replica in replicas[1:]:
        assert_equal(replica.student, replicas[0].student)
        assert_equal(replica.teacher, replicas[0].teacher)
    losses = zip(*(results[rank].losses for rank in plan.sharing_ranks(plan.loss_rank)), strict=True)
    return replace(replicas[0], losses=[sum(parts) for parts in losses])


def _put_together(results: Sequence[Trained], plan: PipelinePlan) -> Trained:
    """Give the blocks of a replica, whose ranks' results come first."""
    return Trained(
        student=[results[rank].student[block] for block, rank in enumerate(plan.student)],
        teacher=[results[rank].teacher[block] for block, rank in enumerate(plan.teacher)],
        losses=[],
    )


def assert_equal(found: list[list[Tensor]], expected: list[list[Tensor]]) -> None:
    """Assert that replicas have the same bits."""
    for own, other in zip(found, expected, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(own, other, strict=True))


def _train_rank(
    rank: int,
    world: LocalWorld,
    task: Task,
    plan: PipelinePlan,
    template: PipelineStep,
    looks_ahead: bool,
    observer: Callable[[int, PipelineSpan], None] | None,
) -> Trained:
    try:
        mine = _Rank(rank, world, task, plan, template)
        mine.executor.observer = None if observer is None else partial(observer, rank)
        return mine.train(looks_ahead=looks_ahead)
    except BaseException:
        world.end(rank)
        raise


class _Rank:
    """One rank's copy of everything; only its own blocks learn."""

    def __init__(self, rank: int, world: LocalWorld, task: Task, plan: PipelinePlan, template: PipelineStep) -> None:
        self.rank, self.task, self.plan, self.template = rank, task, plan, template
        self.jobs = _Jobs(task)
        num_rows = plan.replicas
        every = replace(
            template,
            num_rows=num_rows,
            num_next_rows=num_rows,
            has_targets=True,
            has_momentum=task.momentum is not None,
        )
        edges = {
            (program.rank, action.peer)
            for program in compile_pipeline(plan, every)
            for action in program.actions
            if action.kind is PipelineKind.SEND
        }
        self.relay = Relay(
            world.transports[rank],
            sources=[sender for sender, receiver in edges if receiver == rank],
            destinations=[receiver for sender, receiver in edges if sender == rank],
        )
        self.executor = PipelineExecutor(
            self.jobs,
            self.relay,
            num_teacher_blocks=len(task.teacher),
            num_student_blocks=len(task.student),
            reducer=GradientReducer(world.transports[rank], self._own_parameters()),
        )

    def _own_parameters(self) -> dict[int, list[nn.Parameter]]:
        place = self.plan.place(self.rank)[1]
        return {block: self.jobs.parameters(block) for block, owner in enumerate(self.plan.student) if owner == place}

    def train(self, *, looks_ahead: bool) -> Trained:
        task = self.task
        own = [parameter for block in self._own_parameters().values() for parameter in block]
        optimizer = task.make_optimizer(own) if own else None
        losses = []
        try:
            for number, (batch, following) in enumerate(pairwise([*task.batches, None])):
                update = (number + 1) % task.accumulate == 0
                terms = self._run(number, batch, following if looks_ahead else None, update, number and looks_ahead)
                losses.append(terms["loss"].item() if terms else 0.0)
                if update and optimizer is not None:
                    optimizer.step()
                    optimizer.zero_grad()
                self.executor.finish()
            self.relay.close()
        finally:
            self.relay.abandon()
        return Trained(
            student=_parameters(self.jobs.student),
            teacher=_parameters(self.jobs.average if self.jobs.average is not None else self.jobs.teacher),
            losses=losses,
        )

    def _run(self, number: int, batch: Any, following: Any, update: bool, is_taught: Any) -> dict[str, Tensor]:
        num_rows = len(batch[1])
        step = replace(
            self.template,
            num_rows=num_rows,
            num_next_rows=len(following[1]) if following is not None else 0,
            teaches_own=not is_taught,
            has_targets=True,
            update=update,
            has_momentum=self.task.momentum is not None,
        )
        self.jobs.num_rows = num_rows
        loads = self.rank == self.plan.loading_rank
        program = compile_pipeline(self.plan, step)[self.rank]
        loaded, ahead = ({} if not loads or each is None else _loaded(*each) for each in (batch, following))
        return self.executor.run(program, number, loaded, ahead)


def _loaded(inputs: Any, labels: Tensor) -> dict[Stream, RowTree]:
    trees = {Stream.HIDDEN: inputs, Stream.BOUNDARY: inputs, Stream.TARGETS: labels}
    return {stream: _rows(tree, len(labels)) for stream, tree in trees.items()}


class _Jobs:
    """Blocks without a module of ours around them."""

    def __init__(self, task: Task) -> None:
        self.task = task
        self.teacher = copy.deepcopy(nn.ModuleList(task.teacher))
        self.student = copy.deepcopy(nn.ModuleList(task.student))
        self.average = copy.deepcopy(self.teacher) if task.delay else None
        self.num_rows = 0
        if task.momentum is not None:
            self.momentum = MomentumTeacher(
                [
                    MomentumBlock(
                        list(self.student[block].parameters()),
                        list(self.teacher[block].parameters()),
                        None if self.average is None else list(self.average[block].parameters()),
                        average_buffers=None if self.average is None else (),
                    )
                    for block in range(len(self.student))
                ]
            )

    def teach(self, block: int, boundary: Any) -> Any:
        with torch.no_grad():
            return self.teacher[block](boundary)

    def forward(self, block: int, boundary: Any, rows: Rows) -> Any:
        return self.student[block](boundary)

    def loss(self, student_output: Any, teacher_output: Any, targets: Any, rows: Rows, num_rows: int) -> Any:
        loss = self.task.loss(student_output, teacher_output, targets) * (rows.num_rows / num_rows)
        torch.autograd.backward(loss / self.task.accumulate)
        return {"loss": loss.detach()}

    def parameters(self, block: int) -> list[nn.Parameter]:
        return list(self.student[block].parameters())

    def weights(self, block: int) -> list[Tensor]:
        return list(self.student[block].parameters())

    def promote(self, block: int) -> None:
        if self.task.momentum is not None:
            self.momentum.promote(block)

    def follow(self, block: int) -> None:
        assert self.task.momentum is not None
        self.momentum.follow(block, self.task.momentum)

    def stay(self, block: int) -> None:
        self.momentum.stay(block)


def _run(blocks: Any, boundary: Any) -> Any:
    for block in blocks:
        boundary = block(boundary)
    return boundary


def _parameters(blocks: Any) -> list[list[Tensor]]:
    return [[parameter.detach().clone() for parameter in block.parameters()] for block in blocks]


def _rows(tree: Any, num_rows: int) -> RowTree:
    return RowTree(Rows(0, num_rows), tree, leading_row_leaves(tree, num_rows))
