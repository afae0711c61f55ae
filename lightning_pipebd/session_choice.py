"""Which session trains which module: blocks that learn by themselves, or a whole student with a loss of its own."""

from __future__ import annotations

from datetime import timedelta
from typing import NamedTuple

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.trainer.states import TrainerFn
from torch.optim import Optimizer

from lightning_pipebd.ahead_session import session_kind
from lightning_pipebd.automatic_pipeline import FoundPipeline, check_pipeline_request, find_pipeline_of_fit
from lightning_pipebd.automatic_plan import FoundPlan, PlanFinder, explain_found, find_plan_of_fit
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.pipeline_options import PipelineOptions, check_pipeline_optimizers, pipeline_edges
from lightning_pipebd.pipeline_replicas import sharing_groups
from lightning_pipebd.pipeline_session import PipelineSession
from lightning_pipebd.placement import bring_others
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.preflight import check_accumulation, check_optimizers, check_trainer, warn_of_statistics
from lightning_pipebd.runtime.freed_memory import keep_freed_memory
from lightning_pipebd.runtime.transport import ProcessGroupTransport
from lightning_pipebd.session import TrainingSession, plan_edges
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["PlanRequest", "SessionChoice", "check_session_optimizers", "require_module"]


def require_module(module: LightningModule | None) -> DistillationModule:
    """Give the module as one of ours.

    Raises:
        TypeError: It is another kind of module, or one that trains by itself.
    """
    if not isinstance(module, (BlockwiseDistillationModule, TeacherStudentModule)):
        msg = (
            f"`strategy='pipebd'` must train a BlockwiseDistillationModule or a TeacherStudentModule, but got "
            f"{type(module).__name__}. Subclass one of them, or use another strategy."
        )
        raise TypeError(msg)
    return module


class PlanRequest(NamedTuple):
    """What the user said about the plan.

    Args:
        finder: For blocks that learn by themselves.
        options: For a whole student.
    """

    finder: PlanFinder
    options: PipelineOptions

    def given_plan(self, module: DistillationModule, num_ranks: int) -> Plan | PipelinePlan | None:
        """Give the plan as far as it is known without measuring.

        Raises:
            PlanError: The given plan does not fit the module or the ranks.
        """
        if isinstance(module, TeacherStudentModule):
            return self.options.given_plan(self.finder.given, module, num_ranks)
        assert isinstance(module, BlockwiseDistillationModule)
        return self.finder.given_plan(module, num_ranks)

    def check(self, trainer: Trainer, module: DistillationModule, num_ranks: int) -> None:
        """Raise for what is known to be wrong before other processes start.

        Raises:
            TypeError: The module overrides what a plan replaces.
            ValueError: An option, setting or callback cannot work with the module.
        """
        check_accumulation(trainer)
        plan, strategy = self.given_plan(module, num_ranks), trainer.strategy
        if isinstance(module, TeacherStudentModule):
            self.options.check(trainer, module)
            check_pipeline_request(self.finder, self.options, module, num_ranks)
        elif isinstance(module, BlockwiseDistillationModule) and not isinstance(plan, PipelinePlan):
            self.options.refuse_for_blocks()
            check_trainer(trainer, module, plan)
            if trainer.state.fn == TrainerFn.FITTING:
                assert isinstance(strategy, ProcessGroupStrategy)
                self.finder.check(plan, module, strategy)


class SessionChoice(NamedTuple):
    """The session of a fit, with what its plan was found by.

    Args:
        session: Trains on this rank.
        found: The plan, with what is foreseen of it.
        explanation: Says what the plan does.
    """

    session: TrainingSession | PipelineSession
    found: FoundPlan | FoundPipeline
    explanation: str

    @classmethod
    def open(
        cls,
        request: PlanRequest,
        strategy: ProcessGroupStrategy,
        trainer: Trainer,
        module: DistillationModule,
        transport: ProcessGroupTransport,
        *,
        max_in_flight: int,
        time_limits: tuple[timedelta | None, timedelta],
    ) -> SessionChoice:
        """**Collective** over all ranks: find the plan, connect the ranks, and put the blocks in their places."""
        # Before anything is measured: training shall take the times that were measured.
        keep_freed_memory(strategy.root_device)
        bring_others(module, strategy.root_device)
        if isinstance(module, TeacherStudentModule):
            way = find_pipeline_of_fit(strategy, request.finder, request.options, trainer, module, transport)
            edges = pipeline_edges(
                way.plan, has_momentum=module.momentum is not None, is_full_batch=module.full_batch_loss
            )
            transport.keep_only(edges, groups := sharing_groups(way.plan))
            transport.connect(edges, groups)
            pipeline = PipelineSession(
                module,
                way.plan,
                way.options,
                way.durations,
                transport,
                strategy,
                max_in_flight=max_in_flight,
                time_limits=time_limits,
            )
            pipeline.placement.place()
            return cls(pipeline, way, way.options.announce(way.plan, module, way.outlook))
        assert isinstance(module, BlockwiseDistillationModule)
        found = find_plan_of_fit(strategy, request.finder, trainer, module, transport)
        return cls.open_found(found, strategy, module, transport, max_in_flight=max_in_flight, time_limits=time_limits)

    @classmethod
    def open_found(
        cls,
        found: FoundPlan,
        strategy: ProcessGroupStrategy,
        module: BlockwiseDistillationModule,
        transport: ProcessGroupTransport,
        *,
        max_in_flight: int,
        time_limits: tuple[timedelta | None, timedelta],
    ) -> SessionChoice:
        """**Collective** over all ranks: connect the ranks for a plan of blocks, and put the blocks in their places."""
        groups = [found.plan.student_ranks(block) for block in range(found.plan.num_blocks)]
        edges = plan_edges(found.plan, module.target_blocks)
        # What links were measured with, and other plans tried, goes first: it holds memory.
        transport.keep_only(edges, groups)
        transport.connect(edges, groups)
        session = session_kind(found.plan, module)(
            module, found.plan, transport, strategy, max_in_flight=max_in_flight, time_limits=time_limits
        )
        if strategy.layer_sync:
            session.synchronise_batch_norm(transport)
        session.placement.place()
        warn_of_statistics(found.plan, module, is_synchronised=strategy.layer_sync)
        return cls(session, found, explain_found(found, module, is_synchronised=strategy.layer_sync))

    def report(self, *, replans: bool) -> None:
        """Have the session log how its steps' time compares with what was foreseen."""
        if isinstance(self.found, FoundPlan) and isinstance(self.session, TrainingSession):
            self.session.report(self.found.outlook, replans=replans)
        elif isinstance(self.found, FoundPipeline) and isinstance(self.session, PipelineSession):
            self.session.report(self.found.outlook)


def check_session_optimizers(optimizers: list[Optimizer], module: DistillationModule) -> None:
    """Raise for optimizers that cannot be divided over ranks.

    Raises:
        ValueError: An optimizer couples what different ranks train, or trains the teacher.
    """
    if isinstance(module, TeacherStudentModule):
        check_pipeline_optimizers(optimizers, module)
    elif isinstance(module, BlockwiseDistillationModule):
        check_optimizers(optimizers, module)
