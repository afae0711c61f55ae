"""The strategy: Lightning's hooks in the order of their calls, each handing over in a few lines."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import StrategyRegistry
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.optim import Optimizer
from typing_extensions import override

from lightning_pipebd.automatic_pipeline import FoundPipeline
from lightning_pipebd.automatic_plan import FoundPlan, PlanFinder
from lightning_pipebd.checkpoint import synchronise_models
from lightning_pipebd.connections import connect_ranks
from lightning_pipebd.data import BatchHeader, check_loader
from lightning_pipebd.lifeline import check_time_limit, report_failure, start_limit, tie_to_launcher
from lightning_pipebd.lightning_internals.trainer import silence_sigterm_broadcast
from lightning_pipebd.other_lightning import refuse_other_trainer
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.pipeline_options import PipelineOptions
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.preflight import check_callbacks, check_schedulers
from lightning_pipebd.replanning import Replanning
from lightning_pipebd.same_settings import check_same_settings
from lightning_pipebd.session_choice import PlanRequest, SessionChoice, check_session_optimizers, require_module
from lightning_pipebd.signals import give_exit_status, handle_signals_outside_fit

__all__ = ["PipeBDStrategy"]


class PipeBDStrategy(Replanning):
    """Train the blocks of a :class:`~lightning_pipebd.BlockwiseDistillationModule` on several devices at once.

    .. code-block:: python

        Trainer(strategy="pipebd", devices=4)  # measures the blocks, and finds the fastest plan
        Trainer(strategy=PipeBDStrategy(plan="0-1|2-3"), devices=2)  # blocks 0 and 1 on rank 0, 2 and 3 on rank 1

    The student is the one that ``Trainer(devices=1)`` would train, and so are checkpoints, logged keys and the meaning
    of every trainer argument: ``batch_size`` stays that of the whole batch.

    Args:
        plan: Which rank computes which rows of which block: text (``"0-1|2-3"``, ``"0-1*2|2-5"``), ``"joint"``, the
            path of a YAML file, its content as a dictionary, or a :class:`~lightning_pipebd.planning.plan.Plan`.
            ``None`` measures the blocks at the beginning of ``fit``, and finds the plan with the smallest step time.
            For a :class:`~lightning_pipebd.TeacherStudentModule`, which rank has which block of both models: such
            text, ``"2 x 0-3|4-7 / 0-1|2-3"`` (replicas, other cuts), or a :class:`~lightning_pipebd.PipelinePlan`.
        exactness: How closely the student of one process must be reproduced: ``"bitwise"`` divides no rows; ``None``,
            as ``"summation"``, also divides the rows of blocks for which that changes only the order of sums.
        memory_limit: Memory that each rank may use, such as ``"16GiB"``; ``None`` takes what a GPU has free.
        costs: Costs to plan with instead of measuring: a file that ``pipebd plan --save-costs`` wrote, or a
            :class:`~lightning_pipebd.planning.costs.CostTable`.
        teach_ahead: Whether a plan that is found may have teacher blocks work on the next batch while student blocks
            learn from the present one: faster where whole jobs are dealt over several ranks. Only for a module whose
            teacher gives nothing but its boundaries, and hooks that leave teacher and batch alone.
        trials: How many plans to try for some steps, where predictions cannot tell which is the fastest.
        replan: ``"epoch"`` goes on with another plan, and the same student, where the last epoch's times, or frozen
            blocks, make one faster; ``None`` only tells.
        max_in_flight: Steps of boundaries that wait at the receiver, and as many under way to it, at least 1: a rank
            runs ahead of its receiver by up to twice that. More hides more jitter and holds more activations.
        num_micro_batches: Parts of each batch of a TeacherStudentModule along time; ``None`` chooses it with
            the plan; for a given one it takes four for each rank, or one where cutting would change what is learned.
        schedule: Order of a TeacherStudentModule's work: ``"1f1b"``, ``"gpipe"`` or ``"teacher-first"``; ``None``
            chooses it with the plan, and is ``"1f1b"`` for a given one.
        split_backward: Whether a TeacherStudentModule's gradients of weights may wait for a gap.
        process_group_backend: Backend of the default process group; ``None`` takes NCCL if each process has a GPU of
            its own, and gloo elsewhere. With gloo, what ranks exchange goes through host memory.
        timeout: Time after which a collective operation (validation, checkpoint, a shared block's reduction) fails,
            and after which hooks, evaluation and saving count as stalled.
        stall_timeout: Time without progress in training after which a rank counts as stalled and the run ends with a
            report; slow steps lengthen it to ten times the slowest of the last hundred. ``None`` waits for ever.
        start_timeout: Time in which all processes must have started.
        kwargs: Accelerator, plugins and environment, as Lightning passes them.

    Raises:
        PlanError: At ``fit``, before other processes start: the plan does not fit the module or the devices.
        ValueError: ``max_in_flight`` is below 1, a time is not above 0; or at ``fit``, a trainer setting cannot work.
    """

    def __init__(
        self,
        plan: str | dict[str, Any] | Plan | PipelinePlan | None = None,
        *,
        exactness: str | None = None,
        memory_limit: str | int | None = None,
        costs: str | CostTable | Measurement | PipelineMeasurement | None = None,
        teach_ahead: bool = False,
        trials: int = 0,
        replan: str | None = None,
        max_in_flight: int = 2,
        num_micro_batches: int | None = None,
        schedule: str | None = None,
        split_backward: bool = False,
        process_group_backend: str | None = None,
        timeout: timedelta = timedelta(minutes=30),
        stall_timeout: timedelta | None = timedelta(minutes=2),
        start_timeout: timedelta = timedelta(minutes=10),
        **kwargs: Any,
    ) -> None:
        super().__init__(process_group_backend=process_group_backend, timeout=timeout, **kwargs)
        if max_in_flight < 1:
            raise ValueError(f"`max_in_flight` must be at least 1, but is {max_in_flight}. Use the default of 2.")
        check_time_limit("stall_timeout", stall_timeout)
        check_time_limit("start_timeout", start_timeout)
        self._time_limits = (stall_timeout, timeout)
        self._start_timeout = start_timeout
        finder = PlanFinder(
            plan,
            exactness=exactness,
            memory_limit=memory_limit,
            costs=costs,
            max_in_flight=max_in_flight,
            replan=replan,
            trials=trials,
            may_teach_ahead=teach_ahead,
        )
        self._request = PlanRequest(finder, PipelineOptions(num_micro_batches, schedule, split_backward))
        self._found: FoundPlan | FoundPipeline | None = None
        self._max_in_flight = max_in_flight
        self._is_accumulating = False

    @classmethod
    @override
    def register_strategies(cls, strategy_registry: Any) -> None:
        strategy_registry.register("pipebd", cls, description=cls.__doc__ or "")

    @property
    def plan(self) -> Plan | PipelinePlan | None:
        """The plan for the connected module; ``None`` while one is yet to be found."""
        module = require_module(self.lightning_module)
        given = self._request.given_plan(module, self.num_nodes * self.num_processes)
        return given if self._found is None else self._found.plan

    @property
    def outlook(self) -> Outlook | PipelineOutlook | None:
        """What was foreseen of the plan at the last ``fit``; ``None`` if nothing was measured."""
        return self._found and self._found.outlook

    # Set-up.

    @override
    def preflight(self, trainer: Trainer) -> None:
        module = require_module(self.lightning_module)
        self._found = None
        self._request.check(trainer, module, self.num_nodes * self.num_processes)

    @override
    def setup_environment(self) -> None:
        with start_limit(self, self._start_timeout):
            super().setup_environment()

    @override
    def setup(self, trainer: Trainer) -> None:
        assert self.accelerator is not None
        self.accelerator.setup(trainer)
        module = require_module(self.lightning_module)
        self.model = self.precision_plugin.convert_module(module)
        is_fit = trainer.state.fn == TrainerFn.FITTING
        # After `fit` and `validate`, `trainer.save_checkpoint` still asks for the optimizer's state.
        if is_fit or self._session is None or not self._session.is_for(module):
            self._session = None
            self._handed_over_at = -1
        self._transport = connect_ranks(self, self._transport, self._timeout)
        check_same_settings(self._transport, trainer, module, self._request)
        synchronise_models(self._transport, module)
        if not is_fit:
            handle_signals_outside_fit(trainer)
            self.model_to_device()
            self.setup_precision_plugin()
            return
        check_callbacks(trainer)
        choice = SessionChoice.open(
            self._request,
            self,
            trainer,
            module,
            self._transport,
            max_in_flight=self._max_in_flight,
            time_limits=self._time_limits,
        )
        self._session, self._found = choice.session, choice.found
        self._session.resumed, self.position = self.position, None
        # Before the optimizers: `configure_optimizers` may ask for `trainer.estimated_stepping_batches`, which begins
        # to load.
        self._session.begin(trainer, self.sharing_logs, self._assemble_student)
        choice.report(replans=self._request.finder.replans)
        self.setup_optimizers(trainer)
        self.setup_precision_plugin()
        silence_sigterm_broadcast(trainer)
        rank_zero_info(choice.explanation)

    @override
    def setup_optimizers(self, trainer: Trainer) -> None:
        super().setup_optimizers(trainer)
        module = require_module(self.lightning_module)
        check_session_optimizers(self.optimizers, module)
        check_schedulers(self.lr_scheduler_configs)
        assert self._session is not None
        self._session.prune(self.optimizers)

    @contextmanager
    @override
    def tensor_init_context(self, empty_init: bool | None = None) -> Generator[None, None, None]:
        # Models are built in host memory: a rank's device holds the blocks of this rank alone.
        with self.precision_plugin.tensor_init_context():
            yield

    @override
    def process_dataloader(self, dataloader: Any) -> Any:
        module = require_module(self.lightning_module)
        check_loader(dataloader)
        if module.trainer.training:
            return self.training_loader(dataloader, replans=self._request.finder.replans)
        if module.trainer.predicting:
            return dataloader
        return self.evaluation_loader(dataloader)

    # Training.

    @override
    def batch_to_device(self, batch: Any, device: torch.device | None = None, dataloader_idx: int = 0) -> Any:
        if isinstance(batch, BatchHeader):
            return batch
        if isinstance(batch, AheadBatch):
            return batch.moved(require_module(self.lightning_module), self.batch_to_device)
        return super().batch_to_device(batch, device, dataloader_idx)

    @override
    def training_step(self, batch: Any, batch_idx: int) -> STEP_OUTPUT:
        # Only staged: Lightning zeroes the gradients between this hook and `backward`, which does the work.
        assert self._session is not None
        self._session.stage(batch, batch_idx)
        return {"loss": torch.zeros((), device=self.root_device)}

    @override
    def backward(
        self,
        closure_loss: Tensor,
        optimizer: Optimizer | None,
        *args: Any,
        **kwargs: Any,
    ) -> Tensor:
        assert self._session is not None
        module = require_module(self.lightning_module)
        self.precision_plugin.pre_backward(closure_loss, module)
        self._session.run(optimizer, update=not self._is_accumulating)
        self.precision_plugin.post_backward(closure_loss, module)
        return closure_loss

    @contextmanager
    @override
    def block_backward_sync(self) -> Generator[None, None, None]:
        self._is_accumulating = True
        try:
            yield
        finally:
            self._is_accumulating = False

    @override
    def on_train_end(self) -> None:
        assert self._session is not None
        self._session.close()
        self._assemble_student()

    # The end.

    @override
    def on_exception(self, exception: BaseException) -> None:
        give_exit_status(exception)
        if self._transport is not None:
            self._transport.has_failed = True
        report = self._session.abandon(exception) if self._session is not None else ""
        if self._session is not None or dist.is_initialized():
            report_failure(exception, report)

    @override
    def teardown(self) -> None:
        # The session stays: `trainer.save_checkpoint` after `fit` asks for the optimizer's state.
        if self._session is not None:
            self._session.end()
        self._share_logs(False)
        tie_to_launcher(is_tied=False)
        super().teardown()


PipeBDStrategy.register_strategies(StrategyRegistry)
refuse_other_trainer("pipebd")
