"""One fit on one rank: the plan's programs, and everything that runs them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from fractions import Fraction
from functools import partial
from math import lcm
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipebd.block_jobs import BlockJobs
from lightning_pipebd.converged_blocks import ConvergedBlocks
from lightning_pipebd.data import HeaderLoader, TrainLoader, header_loader, num_trained, save_position
from lightning_pipebd.data_position import DataPosition
from lightning_pipebd.fit_callbacks import add_callback, remove_callback
from lightning_pipebd.fit_session import FitSession
from lightning_pipebd.lifeline import watch_plan
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.lightning_internals.trainer import seed_workers
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.placement import BlockPlacement
from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.meetings import find_missed_meeting
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Kind, Program
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.batch_norm import SynchronisedNorms, has_norms
from lightning_pipebd.runtime.executor import Executor
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.step_agreement import END, SAVE
from lightning_pipebd.runtime.transport import ProcessGroupTransport, Transport
from lightning_pipebd.scaling import BlockScalers
from lightning_pipebd.step_report import StepReport

__all__ = ["TrainingSession", "plan_edges"]


def plan_edges(plan: Plan, target_blocks: frozenset[int] = frozenset()) -> list[tuple[int, int]]:
    """Give the pairs (sender, receiver) that a plan's programs use for any batch.

    Example:
        >>> plan_edges(Plan.straight([1, 1, 1]))
        [(0, 1), (1, 2)]
    """
    # A batch that every share divides has every edge: fewer rows only make intervals empty.
    num_rows = lcm(*(share.share.denominator for job in (*plan.teacher, *plan.student) for share in job))
    programs = compile_programs(plan, num_rows, target_blocks=target_blocks)
    sends = (
        (program.rank, action.peer) for program in programs for action in program.actions if action.kind is Kind.SEND
    )
    return sorted(set(sends))


class TrainingSession(FitSession):
    """What one rank needs to train its part of a plan, from the start of a fit to its end.

    Args:
        module: Teacher, student and losses.
        plan: Fits the module and the ranks.
        transport: Reaches the other ranks.
        strategy: Whose precision plugin and device are used.
        max_in_flight: Steps by which a rank may run ahead.
        time_limits: Times without progress after which the run ends: in steps (``None``: any), and elsewhere.

    Attributes:
        progress: Where this rank stands.
        resumed: Where in the data a resumed run goes on.
        tells_programs: Whether a batch's rows tell all ranks' programs, so that failure reports can lay them out.
    """

    tells_programs = True

    _jobs: BlockJobs
    _jobs_kind: type[BlockJobs] = BlockJobs
    _executor: Executor
    _step_report: StepReport | None = None

    def __init__(
        self,
        module: BlockwiseDistillationModule,
        plan: Plan,
        transport: Transport,
        strategy: ProcessGroupStrategy,
        *,
        max_in_flight: int,
        time_limits: tuple[timedelta | None, timedelta],
    ) -> None:
        placement = BlockPlacement(module, plan, transport.rank, strategy.root_device)
        super().__init__(transport, strategy, placement, max_in_flight=max_in_flight, time_limits=time_limits)
        self._module = module
        self._plan = plan
        self._learned = [block for block in range(plan.num_blocks) if self._rank in plan.student_ranks(block)]
        self._programs: dict[tuple[int, bool], Program] = {}
        self._staged: tuple[Loaded, Any, int] | None = None
        self._train_loader: TrainLoader | HeaderLoader | None = None
        self._norms: SynchronisedNorms | None = None
        self._meetings: dict[int, tuple[int, ...]] = {}
        self._converged = ConvergedBlocks()

    # Life.

    def begin(
        self,
        trainer: Trainer,
        sharing_logs: Callable[[], AbstractContextManager[None]],
        assemble_student: Callable[[], None],
    ) -> None:
        """Open the connections; every rank of the plan must do so.

        Args:
            trainer: Gets a callback that logs the block losses.
            sharing_logs: Context in which logged values are exchanged.
            assemble_student: Gives every rank the present weights of all blocks.
        """
        edges = plan_edges(self._plan, self._module.target_blocks)
        contributors = {rank for block in range(self._plan.num_blocks) for rank in self._plan.student_ranks(block)}
        first = self._plan.loading_ranks[0]
        self._connect(trainer, edges, first, contributors, sharing_logs, assemble_student)
        parameters = {block: self._module.block_parameters(block) for block in self._learned}
        self.scalers = BlockScalers(
            self._strategy.precision_plugin, parameters, self._strategy.root_device, self._transport
        )
        self._jobs = self._jobs_kind(self._module, self._strategy.precision_plugin, self.scalers)
        # Which blocks share a pass depends on a rank's rows; layers must meet the other ranks' in one order.
        self._jobs.shares_backward = not self._meetings
        self._reducer = GradientReducer(self._transport, parameters)
        self._executor = Executor(
            self._jobs,
            self._relay,
            self._reducer,
            cuts_rows=self._plan.has_split_students or self._plan.has_split_teachers,
        )
        self._watcher = watch_plan(
            self._strategy,
            self._transport,
            self.progress,
            self._executor,
            self._plan,
            self._module.target_blocks,
            self._time_limits,
            tells_programs=self.tells_programs,
        )
        if self._module.block_momentum is not None:
            self._module.block_momentum.blocks = [
                block for block in range(self._plan.num_blocks) if self._rank in self._plan.teacher_ranks(block)
            ]
        self._is_open = True

    def report(self, outlook: Outlook | None, *, replans: bool = False) -> None:
        """Log how the steps' time compares with what was foreseen, and what has changed since."""
        if outlook is not None:
            self._step_report = StepReport(outlook, self._transport, self._module, self._listen, replans=replans)
            add_callback(self._trainer, self._step_report)
            add_callback(self._trainer, self._converged)

    @property
    def better(self) -> Outlook | None:
        """The plan to go on with from the next epoch on; ``None`` to keep this one."""
        return self._step_report.better if self._step_report is not None else None

    def take_over(self, old: TrainingSession) -> None:
        """**Collective** over all ranks: begin where another session has ended, with its steps and its observers."""
        self.begin(*old._begun_with)
        self.num_steps = old.num_steps
        self._converged = old._converged
        # The list itself: who ends listening takes himself out of it.
        self._observers = old._observers
        self._tell_observers()
        # A signal that came between two sessions, or that the old one had yet to follow.
        for kind in (END, SAVE):
            if old.progress.agreement.is_open(kind):
                self.progress.agreement.request(kind)

    @property
    def plan(self) -> Plan:
        """The plan."""
        return self._plan

    @property
    def module(self) -> BlockwiseDistillationModule:
        """Teacher, student and losses."""
        return self._module

    def place_in_data(self) -> DataPosition | None:
        """**Collective** over all ranks: give the place between two epochs at which the data stands."""
        loader, first = self._train_loader, self._plan.loading_ranks[0]
        mine = loader.position(None) if isinstance(loader, TrainLoader) and self._rank == first else None
        found = self._transport.all_gather_object(mine.to_plain() if mine else None)[first]
        return DataPosition.from_plain(found) if found is not None else None

    def release_optimizers(self) -> None:
        """Give the optimizers all parameters back."""
        for pruned in self._pruned.values():
            pruned.restore()

    @property
    def synchronises_batch_norm(self) -> bool:
        """Whether shared blocks take their batch statistics over the rows of all ranks."""
        return self._norms is not None

    @property
    def losses(self) -> dict[int, Tensor]:
        """This rank's parts of the block losses of the last step."""
        return self._metrics.latest

    @override
    def end(self) -> None:
        """Take back what was changed in the trainer, the optimizers and the precision plugin."""
        if hasattr(self, "scalers"):
            remove_callback(self._trainer, self._converged)
            self.scalers.restore()
        if self._norms is not None:
            self._norms.restore()
        if self._module.block_momentum is not None:
            self._module.block_momentum.blocks = None
        super().end()

    def is_for(self, module: object) -> bool:
        """Tell whether this fit is or was the module's."""
        return module is self._module

    def synchronise_batch_norm(self, transport: ProcessGroupTransport) -> None:
        """**Collective** over all ranks: have shared blocks take batch statistics over the rows of all their ranks."""
        students = self._module.block_pairs.student.blocks
        shared = {
            block: ranks
            for block in range(self._plan.num_blocks)
            if len(ranks := self._plan.student_ranks(block)) > 1 and has_norms(students[block])
        }
        self._meetings = shared
        groups = transport.layer_groups(shared.values())
        blocks = [(students[block], groups[ranks]) for block, ranks in shared.items() if block in self._learned]
        self._norms = SynchronisedNorms(self._module.student, blocks)

    # Data.

    def process_dataloader(self, loader: Any) -> TrainLoader | HeaderLoader:
        """Make of the user's training loader what this rank iterates over."""
        self._begin_epoch(has_loader=self._train_loader is not None)
        shares = self._plan.teacher[0]
        ranks = self._plan.loading_ranks
        if self._rank not in ranks:
            assert self._mailbox is not None
            self._train_loader = header_loader(loader, self._mailbox)
            self._train_loader.observe = partial(self.progress.loading, waits_for=(ranks[0],))
            return self._train_loader
        position = ranks.index(self._rank)
        seed_workers(loader, position)
        start = sum((share.share for share in shares[:position]), Fraction(0))
        rows = RowLoader(loader, (start, start + shares[position].share))
        self._train_loader = self._make_loader(rows, loader)
        self._train_loader.observe = self.progress.loading
        self._train_loader.resumed, self.resumed = self.resumed, None
        return self._train_loader

    def _make_loader(self, rows: RowLoader, loader: Any) -> TrainLoader:
        """Make the loader of a rank that loads some rows of the user's loader."""
        peers = tuple(self._plan.loading_ranks[1:])
        return TrainLoader(rows, outbox=self._outbox, mailbox=self._mailbox, seeded_peers=peers)

    def save(self, checkpoint: dict[str, Any]) -> None:
        """**Collective** over all ranks: add to a checkpoint what Lightning does not know of."""
        self.scalers.save(checkpoint)
        self._module.finite_guard.gather(checkpoint, self._transport)
        num_batches = num_trained(self._trainer.fit_loop.epoch_loop.batch_progress)
        mine = self._train_loader.position(num_batches) if isinstance(self._train_loader, TrainLoader) else None
        save_position(checkpoint, mine, self._transport, self._plan.loading_ranks[0])

    # Steps.

    def stage(self, batch: Any, batch_idx: int) -> None:
        """Put a batch in place for :meth:`run`."""
        assert self._train_loader is not None
        self._staged = (self._train_loader.loaded.popleft(), batch, batch_idx)

    def run(self, optimizer: Optimizer | None, *, update: bool) -> None:
        """Run this rank's program for the staged batch.

        Args:
            optimizer: Handed on to Lightning's backward.
            update: Whether an optimizer step follows; gradients accumulate otherwise.
        """
        assert self._staged is not None
        loaded, batch, batch_idx = self._staged
        self._staged = None
        self._jobs.optimizer = optimizer
        self._jobs.epoch, self._jobs.batch_idx = self._trainer.current_epoch, batch_idx
        self._jobs.num_accumulated = self._trainer.accumulate_grad_batches
        with self.progress.program(self.num_steps, loaded.num_rows, is_update=update):
            losses = self._work_off(loaded, batch, update=update)
        self.num_steps += 1
        if update:
            for block in self._learned:
                self._module.finite_guard.note_block(block)
            self.scalers.unscale()
        self._metrics.record(losses, loaded.num_rows)

    def _work_off(self, loaded: Loaded, batch: Any, *, update: bool) -> dict[int, Tensor]:
        """Do this rank's part of a step; give its parts of the losses."""
        key = (loaded.num_rows, update)
        if key not in self._programs:
            self._check_rows(loaded.num_rows)
            programs = compile_programs(self._plan, key[0], target_blocks=self._module.target_blocks, update=update)
            self._programs[key] = programs[self._rank]
        boundaries = {} if loaded.rows.is_empty else self._jobs.load(batch, loaded.rows)
        return self._executor.run(self._programs[key], self.num_steps, boundaries)

    def _check_rows(self, num_rows: int) -> None:
        if not self._meetings:
            return
        for block in self._meetings:
            rows = self._plan.student_rows(block, num_rows)
            if any(part.is_empty for part in rows.values()):
                # All ranks raise alike; a rank without rows would leave the others waiting in the layer.
                msg = (
                    f"Each rank that shares block {block} must have a row of every batch, because its BatchNorm is "
                    f"synchronised, but a batch has {num_rows} rows for {len(rows)} ranks. Set `drop_last=True`."
                )
                raise ValueError(msg)
        programs = compile_programs(self._plan, num_rows, target_blocks=self._module.target_blocks)
        if (missed := find_missed_meeting(programs, self._meetings)) is not None:
            rank, action = missed
            raise ValueError(
                "`sync_batchnorm` must have the ranks that share a block learn it at the same time, but with this plan "
                f"and {num_rows} rows rank {rank} would wait for ever at {action}. Give each block with BatchNorm to "
                "one rank, or use a plan whose rows do not come round by other ranks."
            )
