"""One fit of an end-to-end training on one rank: the plan's programs, and everything that runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipebd.data import num_trained, save_position
from lightning_pipebd.fit_callbacks import add_callback
from lightning_pipebd.fit_session import FitSession
from lightning_pipebd.lifeline import start_watcher
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.lightning_internals.trainer import seed_workers
from lightning_pipebd.loaded_streams import LoadedStreams
from lightning_pipebd.pipeline_data import AheadHeaderLoader, AheadLoader, Announced
from lightning_pipebd.pipeline_jobs import PipelineBlockJobs
from lightning_pipebd.pipeline_measuring import student_modules
from lightning_pipebd.pipeline_options import PipelineOptions, pipeline_edges
from lightning_pipebd.pipeline_replicas import Replica, unchanged_blocks
from lightning_pipebd.pipeline_step_report import PipelineStepReport
from lightning_pipebd.placement import PipelinePlacement
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Durations
from lightning_pipebd.runtime.deferred_norms import DeferredNorms
from lightning_pipebd.runtime.gradients import clip_norm_over_ranks
from lightning_pipebd.runtime.pipeline_executor import PipelineExecutor
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.scaling import step_scale
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["PipelineSession"]


class PipelineSession(FitSession):
    """What one rank needs to train its part of a plan, from the start of a fit to its end.

    Args:
        module: Teacher, student and loss.
        plan: Fits the module and the ranks.
        options: How batches are cut and ordered.
        durations: What the order of the work follows from; the same on all ranks.
        transport: Reaches the other ranks.
        strategy: Whose precision plugin and device are used.
        max_in_flight: Steps by which a rank may run ahead.
        time_limits: Times without progress after which the run ends: in steps (``None``: any), and elsewhere.

    Attributes:
        progress: Where this rank stands.
        resumed: Where in the data a resumed run goes on.
    """

    placement: PipelinePlacement
    _executor: PipelineExecutor

    def __init__(
        self,
        module: TeacherStudentModule,
        plan: PipelinePlan,
        options: PipelineOptions,
        durations: Durations,
        transport: Transport,
        strategy: ProcessGroupStrategy,
        *,
        max_in_flight: int,
        time_limits: tuple[timedelta | None, timedelta],
    ) -> None:
        placement = PipelinePlacement(module, plan, transport.rank, strategy.root_device)
        super().__init__(transport, strategy, placement, max_in_flight=max_in_flight, time_limits=time_limits)
        self._module = module
        self._plan = plan
        self._options = options
        self._durations = durations
        self._terms: dict[str, Tensor] = {}
        self._staged: tuple[Announced, Any, int] | None = None
        self._taught: tuple[object, int] | None = None
        self._train_loader: AheadLoader | AheadHeaderLoader | None = None
        self._streams = LoadedStreams(module, strategy.batch_to_device, strategy.precision_plugin.train_step_context)
        self._life = ExitStack()

    # Life.

    def begin(
        self,
        trainer: Trainer,
        sharing_logs: Callable[[], AbstractContextManager[None]],
        assemble_student: Callable[[], None],
    ) -> None:
        """Open the connections; every rank of the plan must do so.

        Args:
            trainer: Gets a callback that logs the loss.
            sharing_logs: Context in which logged values are exchanged.
            assemble_student: Gives every rank the present weights of all blocks.
        """
        is_full_batch = self._module.full_batch_loss
        edges = pipeline_edges(self._plan, has_momentum=self._module.momentum is not None, is_full_batch=is_full_batch)
        losses = self._plan.loss_ranks(is_full_batch=is_full_batch)
        self._connect(trainer, edges, self._plan.loading_rank, losses, sharing_logs, assemble_student)
        self._life.enter_context(
            step_scale(self._strategy.precision_plugin, self._strategy.root_device, self._transport)
        )
        self._jobs = PipelineBlockJobs(self._module, self._strategy.precision_plugin)
        is_cut = self._options.micro_batches(self._module, self._plan.ranks_per_replica) > 1
        replica = Replica(self._plan, self._transport)
        if is_cut or self._plan.replicas > 1:
            models = {block: student_modules(self._module)[block] for block in replica.blocks}
            self._jobs.norms = DeferredNorms(models, replica.share if self._plan.replicas > 1 else None) or None
        self._reducer = replica.reducer(self._module)
        self._executor = PipelineExecutor(
            self._jobs,
            self._relay,
            num_teacher_blocks=self._module.num_teacher_blocks,
            num_student_blocks=self._module.num_student_blocks,
            reducer=self._reducer,
        )
        self._module.follow_in_plan, self._module.clip_in_plan = self._follow, self._clip
        self._module.step_guard.agree = self._agree
        self._watcher = start_watcher(
            self._strategy,
            self._transport,
            self.progress,
            self._executor,
            replica.blocks,
            lambda *_: (),
            self._time_limits,
        )
        self._is_open = True

    @override
    def end(self) -> None:
        """Take back what was changed in the trainer and the module."""
        self._module.follow_in_plan = self._module.clip_in_plan = self._module.step_guard.agree = None
        self._life.close()
        super().end()

    @property
    def plan(self) -> PipelinePlan:
        """The plan."""
        return self._plan

    @property
    def module(self) -> TeacherStudentModule:
        """Teacher, student and loss."""
        return self._module

    @property
    def options(self) -> PipelineOptions:
        """How batches are cut and ordered."""
        return self._options

    @property
    def losses(self) -> dict[str, Tensor]:
        """The terms of the last step's loss, on the rank that computes it."""
        return self._terms

    def report(self, outlook: PipelineOutlook | None) -> None:
        """Log how the steps' time compares with what was foreseen."""
        if outlook is not None:
            self._step_report = PipelineStepReport(outlook, self._transport, self._listen)
            add_callback(self._trainer, self._step_report)

    def is_for(self, module: object) -> bool:
        """Tell whether this fit is or was the module's."""
        return module is self._module

    def save(self, checkpoint: dict[str, Any]) -> None:
        """**Collective** over all ranks: add to a checkpoint what Lightning does not know of."""
        num_batches = num_trained(self._trainer.fit_loop.epoch_loop.batch_progress)
        loader = self._train_loader
        mine = loader.position(num_batches, self._streams.before_next) if isinstance(loader, AheadLoader) else None
        save_position(checkpoint, mine, self._transport, self._plan.loading_rank)

    # Optimizers.

    def _clip(self, optimizer: Optimizer, max_norm: float) -> None:
        """**Collective** over all ranks: clip by the norm of all gradients, wherever they are."""
        pruned = self.pruned_optimizer(optimizer)
        parameters = [parameter for group in pruned.optimizer.param_groups for parameter in group["params"]]
        clip_norm_over_ranks(
            self._transport,
            parameters,
            pruned.local_numbers,
            pruned.dtypes,
            max_norm=max_norm,
            device=self._strategy.root_device,
            is_first=self._plan.place(self._rank)[0] == 0,
        )

    # Data.

    def process_dataloader(self, loader: Any) -> AheadLoader | AheadHeaderLoader:
        """Make of the user's training loader what this rank iterates over."""
        self._begin_epoch(has_loader=self._train_loader is not None)
        if self._mailbox is not None:
            self._train_loader = AheadHeaderLoader(loader, self._mailbox)
            self._train_loader.observe = partial(self.progress.loading, waits_for=(self._plan.loading_rank,))
            return self._train_loader
        seed_workers(loader, 0)
        # The state of a stateful loader would be a batch ahead of the training.
        is_stateful = hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")
        self._train_loader = AheadLoader(
            loader,
            self._outbox,
            num_batches=lambda: self._trainer.num_training_batches,
            looks_ahead=self._options.looks_ahead(self._module) and not is_stateful,
        )
        self._train_loader.observe = self.progress.loading
        self._train_loader.resumed, self.resumed = self.resumed, None
        return self._train_loader

    # Steps.

    def stage(self, batch: Any, batch_idx: int) -> None:
        """Put a batch in place for :meth:`run`."""
        assert self._train_loader is not None
        self._staged = (self._train_loader.announced.popleft(), batch, batch_idx)

    def run(self, optimizer: Optimizer | None, *, update: bool) -> None:
        """Run this rank's program for the staged batch, up to the optimizer step.

        Args:
            optimizer: Handed on to Lightning's backward.
            update: Whether an optimizer step follows; gradients accumulate otherwise.
        """
        assert self._staged is not None
        announced, batch, batch_idx = self._staged
        self._staged = None
        is_taught = self._taught == (announced.epoch, announced.batch_index)
        if not is_taught:
            self._executor.forget()
        self._taught = (announced.epoch, announced.batch_index + 1) if announced.num_next_rows else None
        step = self._step(announced, is_taught=is_taught, update=update)
        program = compile_pipeline(self._plan, step, self._durations)[self._rank]
        self._jobs.optimizer, self._jobs.batch_idx = optimizer, batch_idx
        self._jobs.momentum = self.placement.momentum
        self._jobs.num_accumulated = self._trainer.accumulate_grad_batches
        is_loading = self._rank == self._plan.loading_rank
        deferred = nullcontext() if self._jobs.norms is None else self._jobs.norms.batch()
        with deferred, self.progress.program(self.num_steps, announced.num_rows, is_update=update):
            loaded = self._streams.present(batch, announced.num_rows, is_taught=is_taught) if is_loading else {}
            following = self._streams.following(announced.following)
            self._terms = terms = self._executor.run(program, self.num_steps, loaded, following)
        self.num_steps += 1
        if not update:
            self._executor.finish()
        rate = self._module.rate() if self._rank == self._plan.loss_rank else {}
        self._metrics.record({**terms, **rate}, announced.num_rows)

    def _step(self, announced: Announced, *, is_taught: bool, update: bool) -> PipelineStep:
        return self._options.step(
            self._module,
            self._plan.ranks_per_replica,
            num_rows=announced.num_rows,
            num_next_rows=announced.num_next_rows,
            teaches_own=not is_taught,
            update=update,
        )

    def _agree(self, is_good: bool) -> bool:
        """**Collective** over all ranks: tell whether all of them may take the step."""
        num_bad = torch.tensor([0.0 if is_good else 1.0], device=self._strategy.root_device)
        if self._transport.num_ranks > 1:
            self._transport.all_reduce([num_bad], tuple(range(self._transport.num_ranks))).wait()
        return not bool(num_bad)

    def _follow(self, is_skipped: bool) -> None:
        """Do what follows an optimizer step: the momentum teacher follows, wherever its blocks are."""
        if is_skipped:
            self._executor.finish(is_skipped=True)
            return
        if self._module.momentum is not None:
            self._jobs.rate = self._module.teacher_momentum(self._module.num_teacher_updates)
        self._executor.finish()
        if self._rank == self._plan.loss_rank:
            with unchanged_blocks(self._plan, self._module):
                self._module.on_teacher_update()
