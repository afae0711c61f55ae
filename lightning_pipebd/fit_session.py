"""One fit on one rank, as far as it is alike for blocks that learn by themselves and for a whole student."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from contextlib import AbstractContextManager
from datetime import timedelta
from functools import partial
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException
from torch.optim import Optimizer

from lightning_pipebd.callbacks import BlockMetrics
from lightning_pipebd.checkpoint import PrunedOptimizer
from lightning_pipebd.clipping import trained_ids
from lightning_pipebd.data_position import DataPosition
from lightning_pipebd.fit_callbacks import add_callback, remove_callback
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.placement import Placement
from lightning_pipebd.runtime.executor import Executor
from lightning_pipebd.runtime.freed_memory import give_memory_back, keep_freed_memory
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.mailbox import Mailbox, Outbox
from lightning_pipebd.runtime.pipeline_executor import PipelineExecutor
from lightning_pipebd.runtime.progress import Progress
from lightning_pipebd.runtime.relay import Relay
from lightning_pipebd.runtime.transport import Lane, Transport
from lightning_pipebd.runtime.watcher import Watcher
from lightning_pipebd.signals import SignalFollower, describe_end
from lightning_pipebd.step_pace import StepPace
from lightning_pipebd.stray_buffers import StrayBuffers

__all__ = ["FitSession"]


class FitSession:
    """The connections of one rank during a fit, and how they end.

    Args:
        transport: Reaches the other ranks.
        strategy: Whose precision plugin and device are used.
        placement: Where the blocks are.
        max_in_flight: Steps by which a rank may run ahead.
        time_limits: Times without progress after which the run ends: in steps (``None``: any), and elsewhere.

    Attributes:
        placement: Where the blocks are.
        num_steps: Batches that were trained on.
        loading_rank: The first rank that loads; its random states are those of one process.
        progress: Where this rank stands.
        resumed: Where in the data a resumed run goes on.
    """

    _executor: Executor | PipelineExecutor
    _step_report: StepPace[Any] | None = None
    _reducer: GradientReducer | None = None

    def __init__(
        self,
        transport: Transport,
        strategy: ProcessGroupStrategy,
        placement: Placement,
        *,
        max_in_flight: int,
        time_limits: tuple[timedelta | None, timedelta],
    ) -> None:
        self.placement = placement
        self.num_steps = 0
        self.loading_rank = 0
        self.progress = Progress()
        self.resumed: DataPosition | None = None
        self._time_limits = time_limits
        self._watcher: Watcher | None = None
        self._transport = transport
        self._strategy = strategy
        self._max_in_flight = max_in_flight
        self._rank = transport.rank
        self._pruned: dict[int, PrunedOptimizer] = {}
        self._observers: list[Callable[[Any], None]] = []
        self._loader_epoch = -1
        self._is_abandoned = False
        self._is_open = False

    def _connect(
        self,
        trainer: Trainer,
        edges: Iterable[tuple[int, int]],
        first: int,
        contributors: Collection[int],
        sharing_logs: Callable[[], AbstractContextManager[None]],
        assemble_student: Callable[[], None],
    ) -> None:
        """Open relay, headers from the first loading rank, and metrics from their contributors."""
        transport = self._transport
        keep_freed_memory(self._strategy.root_device)
        edges = list(edges)
        self._relay = Relay(
            transport,
            sources=[sender for sender, receiver in edges if receiver == self._rank],
            destinations=[receiver for sender, receiver in edges if sender == self._rank],
            max_in_flight=self._max_in_flight,
        )
        transport.meeting = partial(self.progress.meeting, tuple(set(range(transport.num_ranks)) - {self._rank}))
        others = [rank for rank in range(transport.num_ranks) if rank != first]
        self._outbox = Outbox(transport, others, Lane.HEADERS) if self._rank == first and others else None
        self._mailbox = Mailbox(transport, first, Lane.HEADERS) if self._rank != first else None
        self.loading_rank = first
        self.strays = StrayBuffers(trainer.lightning_module, self.placement.owned_tensors)
        self._metrics = BlockMetrics(transport, frozenset(contributors), sharing_logs, assemble_student)
        add_callback(trainer, self._metrics)
        self._follower = SignalFollower(trainer, self.progress)
        add_callback(trainer, self._follower, is_last=True)
        self._trainer = trainer
        self._begun_with = (trainer, sharing_logs, assemble_student)

    def observe(self, observer: Callable[[Any], None]) -> Callable[[], None]:
        """Have every action of this rank told to somebody, with its times; give what ends that."""
        self._observers.append(observer)
        self._tell_observers()

        def end() -> None:
            self._observers.remove(observer)
            self._tell_observers()

        return end

    def _tell_observers(self) -> None:
        def tell(span: Any) -> None:
            for observer in self._observers:
                observer(span)

        # Nobody measures for nobody.
        self._executor.observer = tell if self._observers else None

    @property
    def _listen(self) -> Callable[[Callable[[Any], None]], Callable[[], None]] | None:
        # On a GPU an action is over when it was begun: its time says nothing.
        return self.observe if self._strategy.root_device.type == "cpu" else None

    @property
    def step_time_ms(self) -> float | None:
        """Measured time of a step; ``None`` before the end of the first epoch, or if nothing was foreseen."""
        return self._step_report.step_time_ms if self._step_report is not None else None

    def gather(self, value: Any) -> list[Any]:
        """**Collective** over all ranks: give every rank's value, in rank order."""
        return self._transport.all_gather_object(value)

    def close(self) -> None:
        """Finish all exchanges; every rank must do so after the same step."""
        if self._is_open:
            self.progress.mark("ending the training")
            self._relay.close()
            if self._outbox is not None:
                self._outbox.close()
            if self._mailbox is not None:
                self._mailbox.close()
            self._metrics.close()
            # Last: until then this rank may wait for one that is lost.
            if self._watcher is not None:
                self._watcher.close()
            self._is_open = False

    def abandon(self, error: BaseException) -> str:
        """This rank ends with an error: wait for nobody any more; gives the report of what is known of the run."""
        self._is_abandoned = True
        report = self._watcher.fail(error) if self._watcher is not None else ""
        if isinstance(error, SIGTERMException):
            report = describe_end(self._rank, self.num_steps)
        if self._is_open:
            self._is_open = False
            self._relay.abandon()
            self._metrics.abandon()
            if self._outbox is not None:
                self._outbox.abandon()
        return report

    def end(self) -> None:
        """Take back what was changed in the trainer, and close what is still open."""
        if self._step_report is not None:
            remove_callback(self._trainer, self._step_report)
            self._step_report.close()
        if hasattr(self, "_metrics"):
            remove_callback(self._trainer, self._metrics)
            remove_callback(self._trainer, self._follower)
        if self._is_open and not self._is_abandoned:
            self.close()
        give_memory_back(self._strategy.root_device)

    def prune(self, optimizers: list[Optimizer]) -> None:
        """Leave this rank's parameters in the optimizers."""
        for optimizer in optimizers:
            self._pruned[id(optimizer)] = self.placement.prune(optimizer)
            if self._reducer is not None:
                self._reducer.trained = partial(trained_ids, optimizer)

    def pruned_optimizer(self, optimizer: Optimizer) -> PrunedOptimizer:
        """Give what is known of an optimizer's layout; Lightning may pass its own wrapper of it."""
        return self._pruned[id(getattr(optimizer, "_optimizer", optimizer))]

    def _begin_epoch(self, *, has_loader: bool) -> None:
        """Refuse a second training loader in one epoch."""
        epoch = self._trainer.current_epoch
        if has_loader and self._loader_epoch == epoch:
            msg = (
                "`train_dataloader` must be one loader, but several were given. Combine them in one dataset "
                "(torch.utils.data.ConcatDataset or StackDataset)."
            )
            raise ValueError(msg)
        self._loader_epoch = epoch
