"""What users may say about an end-to-end training under a plan, checked against the module."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
import yaml
from lightning.pytorch import Trainer
from lightning.pytorch.trainer.states import TrainerFn

from lightning_pipebd.lightning_internals.trainer import validates_by_time
from lightning_pipebd.pipeline_measuring import coupled_blocks
from lightning_pipebd.pipeline_replicas import check_replicas
from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline
from lightning_pipebd.planning.pipeline_explain import explain_pipeline, pipeline_exactness
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineKind
from lightning_pipebd.planning.pipeline_schedule import Durations, Schedule
from lightning_pipebd.planning.plan import PlanError
from lightning_pipebd.preflight import check_callbacks
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = [
    "PipelineOptions",
    "check_pipeline_optimizers",
    "default_micro_batches",
    "even_plan",
    "pipeline_edges",
    "resolve_pipeline_plan",
]

# In the steady state three micro-batches per rank and batch are lost in filling and draining a student's pipeline; the
# teacher fills that time if there are about four of them per rank.
_MICRO_BATCHES_PER_RANK = 4


@dataclass(frozen=True, slots=True)
class PipelineOptions:
    """How batches are cut and ordered.

    Args:
        num_micro_batches: Parts of a batch; ``None`` chooses four for each rank, or one where cutting would change what
            the student learns.
        schedule: Name of the order; ``None`` leaves it to the planner, and is ``"1f1b"`` where a plan is given.
        split_backward: Whether the gradients of the weights may wait.

    Raises:
        ValueError: A number is below 1, or a schedule is unknown.
    """

    num_micro_batches: int | None = None
    schedule: str | None = None
    split_backward: bool = False

    def __post_init__(self) -> None:
        if self.num_micro_batches is not None and self.num_micro_batches < 1:
            msg = f"`num_micro_batches` must be at least 1, but is {self.num_micro_batches}. 1 leaves batches whole."
            raise ValueError(msg)
        names = [schedule.value for schedule in Schedule]
        if self.schedule is not None and self.schedule not in names:
            msg = f"`schedule` must be one of {', '.join(names)}, but is {self.schedule!r}. Choose one of them."
            raise ValueError(msg)

    def refuse_for_blocks(self) -> None:
        """Raise if something was said that means nothing where blocks learn by themselves.

        Raises:
            ValueError: An option is not its default.
        """
        given = [name for name in ("num_micro_batches", "schedule", "split_backward") if _is_set(self, name)]
        if given:
            msg = (
                f"`{given[0]}` must be left out for a BlockwiseDistillationModule: blocks share no gradient, so no "
                "batch is cut along time. It is for a TeacherStudentModule."
            )
            raise ValueError(msg)

    def micro_batches(self, module: TeacherStudentModule, num_ranks: int) -> int:
        """Give the number of micro-batches for a pipeline of some ranks."""
        if self.num_micro_batches is not None:
            return self.num_micro_batches
        return default_micro_batches(num_ranks, is_whole=bool(coupled_blocks(module)))

    def settled(
        self, module: TeacherStudentModule, num_ranks: int, exactness: Exactness | None = None
    ) -> PipelineOptions:
        """Give the options with nothing left to choose."""
        number = self.micro_batches(module, num_ranks)
        if self.num_micro_batches is None and exactness is Exactness.BITWISE:
            number = 1
        return replace(self, num_micro_batches=number, schedule=self._schedule.value)

    @property
    def _schedule(self) -> Schedule:
        return Schedule.ONE_FORWARD_ONE_BACKWARD if self.schedule is None else Schedule(self.schedule)

    def looks_ahead(self, module: TeacherStudentModule) -> bool:
        """Tell whether the teacher may work on the next batch."""
        is_known = module.momentum is None or module.teacher_delay == 1
        return is_known and self.schedule != Schedule.TEACHER_FIRST.value

    def durations(self, module: TeacherStudentModule) -> Durations:
        """Guess from sizes what blocks take; only the order of the work follows from it."""
        return Durations(teacher=tuple(_teacher_weights(module)), student=tuple(_student_weights(module)))

    def step(
        self,
        module: TeacherStudentModule,
        num_ranks: int,
        *,
        num_rows: int,
        num_next_rows: int,
        teaches_own: bool,
        update: bool,
    ) -> PipelineStep:
        """Say what one step has to do."""
        return PipelineStep(
            num_rows=num_rows,
            num_micro_batches=self.micro_batches(module, num_ranks),
            teaches_own=teaches_own,
            num_next_rows=num_next_rows,
            is_full_batch=module.full_batch_loss,
            # Whether a batch has labels is known where it is loaded; nothing is sent as quickly as labels.
            has_targets=True,
            schedule=self._schedule,
            splits_backward=self.split_backward,
            update=update,
            has_momentum=module.momentum is not None,
        )

    def given_plan(self, plan: Any, module: TeacherStudentModule, num_ranks: int) -> PipelinePlan | None:
        """Make a plan for a module of what the user gave, and check that it fits the module and the ranks.

        Without a plan there is none but where one rank leaves no choice.

        Args:
            plan: A :class:`PipelinePlan`, its text or dictionary, or the path of a YAML file with either.
            module: Whose blocks are planned.
            num_ranks: Ranks of the run.

        Raises:
            PlanError: The plan is none, or is for another number of blocks or ranks.
        """
        if plan is None:
            return even_plan(module, 1) if num_ranks == 1 else None
        numbers = (module.num_teacher_blocks, module.num_student_blocks)
        resolved = resolve_pipeline_plan(plan, numbers, num_ranks)
        check_replicas(resolved, module)
        return resolved

    def check(self, trainer: Trainer, module: TeacherStudentModule) -> None:
        """Raise for settings that cannot work.

        Raises:
            TypeError: The module overrides ``training_step``.
            ValueError: A setting or callback cannot work; the message says why and what to do instead.
        """
        if trainer.state.fn != TrainerFn.FITTING:
            return
        if type(module).training_step is not TeacherStudentModule.training_step:
            msg = (
                f"`{type(module).__name__}` must leave `training_step` alone, because its parts run on different "
                "ranks. Override `loss`, `teacher_inputs` or `unpack_batch`; return more terms from `loss` to log them."
            )
            raise TypeError(msg)
        if not module.automatic_optimization:
            raise ValueError("`automatic_optimization` must be True: a plan decides what runs when. Leave it on.")
        if validates_by_time(trainer):
            msg = "`val_check_interval` must count batches, but is a time: ranks must validate after the same batch."
            raise ValueError(msg)
        strategy: Any = trainer.strategy
        if strategy.layer_sync:
            msg = (
                "`sync_batchnorm` must be False: no layer of a whole student meets with other ranks. Set "
                "`num_micro_batches=1`, and have one replica, to give BatchNorm the whole batch."
            )
            raise ValueError(msg)
        check_callbacks(trainer)

    def announce(self, plan: PipelinePlan, module: TeacherStudentModule, outlook: PipelineOutlook | None = None) -> str:
        """Explain the plan with what is foreseen of it, and warn if cutting batches changes what is learned."""
        number, coupled = self.micro_batches(module, plan.ranks_per_replica), coupled_blocks(module)
        if pipeline_exactness(number, coupled, replicas=plan.replicas) is Exactness.STATISTICS:
            parts = [f"{plan.replicas} replicas"] * (plan.replicas > 1) + [f"{number} micro-batches"] * (number > 1)
            warnings.warn(
                f"Batches are cut into {' of '.join(parts)}, and student blocks {', '.join(map(str, coupled))} use "
                "batch statistics or random numbers: they train a little differently than on one process (exactness: "
                "statistics). Set `num_micro_batches=1` in one replica, or use layers that treat rows one by one "
                "(GroupNorm).",
                stacklevel=2,
            )
        return self.explain(plan, module) if outlook is None else str(outlook)

    def explain(self, plan: PipelinePlan, module: TeacherStudentModule) -> str:
        """Explain the plan."""
        return explain_pipeline(
            plan,
            num_micro_batches=self.micro_batches(module, plan.ranks_per_replica),
            schedule=self._schedule,
            looks_ahead=self.looks_ahead(module),
            coupled_blocks=coupled_blocks(module),
            is_full_batch=module.full_batch_loss,
        )


def default_micro_batches(num_ranks: int, *, is_whole: bool) -> int:
    """Give the number of micro-batches of a plan that was given without one, for the ranks of a replica.

    Example:
        >>> default_micro_batches(2, is_whole=False), default_micro_batches(2, is_whole=True)
        (8, 1)
        >>> default_micro_batches(1, is_whole=False)  # a rank that is alone has no gap to fill
        1
    """
    return 1 if is_whole or num_ranks == 1 else _MICRO_BATCHES_PER_RANK * num_ranks


def resolve_pipeline_plan(plan: Any, num_blocks: tuple[int, int], num_ranks: int) -> PipelinePlan:
    """Make a plan of what a user gave, and check that it fits.

    Args:
        plan: A :class:`PipelinePlan`, its text or dictionary, or the path of a YAML file with either.
        num_blocks: Blocks of the teacher and of the student.
        num_ranks: Ranks of the run.

    Raises:
        PlanError: The plan is none, or is for another number of blocks or ranks.
    """
    resolved = _read_plan(plan)
    sides = (("teacher", resolved.teacher), ("student", resolved.student))
    for (side, ranks), number in zip(sides, num_blocks, strict=True):
        if len(ranks) != number:
            raise PlanError(
                f"`plan` must cover the {side}'s {number} blocks, but covers {len(ranks)}. Write the blocks of "
                "both models, as in '0-3|4-7 / 0-1|2-3', where they differ."
            )
    if resolved.num_ranks != num_ranks:
        raise PlanError(
            f"`plan` must be for the {num_ranks} ranks of this run, but is for {resolved.num_ranks}. Set "
            f"`devices={resolved.num_ranks}` (times `num_nodes`), or give another plan."
        )
    return resolved


def even_plan(module: TeacherStudentModule, num_ranks: int) -> PipelinePlan:
    """Spread the blocks of both models over the ranks by size; a momentum teacher's blocks follow the student's."""
    teacher, student = _teacher_weights(module), _student_weights(module)
    if module.momentum is None:
        return PipelinePlan.balanced(teacher, student, num_ranks)
    # A student block's forward and backward are three forwards.
    both = [one + 3 * other for one, other in zip(teacher, student, strict=True)]
    return PipelinePlan.balanced(both, both, num_ranks)


@cache
def pipeline_edges(plan: PipelinePlan, *, has_momentum: bool, is_full_batch: bool) -> tuple[tuple[int, int], ...]:
    """Give the pairs (sender, receiver) that a plan's programs use for any batch.

    Example:
        >>> pipeline_edges(PipelinePlan.parse("0|1"), has_momentum=False, is_full_batch=False)
        ((0, 1), (1, 0))
    """
    rows = plan.replicas
    step = PipelineStep(
        num_rows=rows,
        num_next_rows=rows,
        is_full_batch=is_full_batch,
        has_targets=True,
        has_momentum=has_momentum,
    )
    return tuple(
        sorted(
            {
                (program.rank, action.peer)
                for program in compile_pipeline(plan, step)
                for action in program.actions
                if action.kind is PipelineKind.SEND
            }
        )
    )


def check_pipeline_optimizers(optimizers: Sequence[torch.optim.Optimizer], module: TeacherStudentModule) -> None:
    """Raise for optimizers that cannot be divided by blocks, or train the teacher.

    Raises:
        ValueError: An optimizer couples parameters, or has the teacher's.
    """
    models = [module.teacher] if module.average is None else [module.teacher, module.average]
    teacher = {id(parameter) for model in models for parameter in model.parameters()}
    for optimizer in optimizers:
        if isinstance(optimizer, torch.optim.LBFGS):
            msg = (
                "`configure_optimizers` must not return LBFGS: its step couples all parameters, and each rank steps "
                "its own. Use an optimizer that treats parameters one by one (SGD, AdamW, ...)."
            )
            raise ValueError(msg)
        if any(id(parameter) in teacher for group in optimizer.param_groups for parameter in group["params"]):
            msg = (
                "`configure_optimizers` must leave the teacher's parameters out: they take no gradient. Give it "
                "`self.trainable_parameters()`."
            )
            raise ValueError(msg)


def _is_set(options: PipelineOptions, name: str) -> bool:
    return bool(getattr(options, name) != getattr(PipelineOptions(), name))


def _read_plan(plan: Any) -> PipelinePlan:
    if isinstance(plan, str) and plan.endswith((".yaml", ".yml")):
        try:
            plan = yaml.safe_load(Path(plan).read_text(encoding="utf-8"))
        except (OSError, UnicodeError, yaml.YAMLError) as error:
            raise PlanError(f"`plan` must name a readable YAML file, but {plan} is not: {error}") from error
    if isinstance(plan, PipelinePlan):
        return plan
    if isinstance(plan, dict):
        return PipelinePlan.from_dict(plan)
    if isinstance(plan, str):
        return PipelinePlan.parse(plan)
    raise PlanError(
        f"`plan` of a TeacherStudentModule must be a PipelinePlan, its text or its dictionary, but is a "
        f"{type(plan).__name__}. Write which rank has which block, as in '0-1|2-3'."
    )


def _teacher_weights(module: TeacherStudentModule) -> list[float]:
    # No block is free, also one without parameters.
    return [
        1.0 + sum(parameter.numel() for parameter in module.cuts.teacher.parameters(module.teacher, block))
        for block in range(module.num_teacher_blocks)
    ]


def _student_weights(module: TeacherStudentModule) -> list[float]:
    return [
        1.0 + sum(parameter.numel() for parameter in module.student_parameters(block))
        for block in range(module.num_student_blocks)
    ]
