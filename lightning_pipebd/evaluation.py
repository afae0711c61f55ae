"""Evaluation under the strategy: the whole student on every rank, each rank its rows of every batch."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from fractions import Fraction
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities.types import STEP_OUTPUT
from torch import Tensor
from torch.utils import _pytree as pytree
from torchmetrics import Metric
from typing_extensions import override

from lightning_pipebd.checked_checkpoints import CheckedCheckpoints
from lightning_pipebd.data import BatchHeader, EvaluationLoader
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.lightning_internals.module import COMPLETE
from lightning_pipebd.lightning_internals.trainer import logged_keys, seed_workers
from lightning_pipebd.row_loader import RowLoader
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.session_choice import require_module

__all__ = ["CompleteValues", "Evaluation", "check_logged_alike"]


class CompleteValues:
    """Keep what the user's step makes of whole batches from being exchanged: sums would count each row once per rank.

    Batches with fewer rows than ranks are whole on every rank. What is kept are logged values, and torchmetrics, which
    exchange their states by themselves.
    """

    def __init__(self) -> None:
        self._silenced: list[tuple[Metric, Callable[[], bool]]] = []

    @contextmanager
    def step(self, module: DistillationModule, dataloader_idx: int) -> Iterator[None]:
        """Run the user's step on a batch of a loader inside the context."""
        trainer = module.trainer
        loaders = pytree.tree_leaves(trainer.test_dataloaders if trainer.testing else trainer.val_dataloaders)
        loader = loaders[dataloader_idx]
        if not isinstance(loader, EvaluationLoader) or not loader.row_loader.is_whole:
            yield
            return
        metrics = [metric for metric in module.modules() if isinstance(metric, Metric)]
        counts = [metric.update_count for metric in metrics]
        module.sees_whole_batch = True
        try:
            yield
        finally:
            module.sees_whole_batch = False
        for metric, count in zip(metrics, counts, strict=True):
            if metric.update_count != count and metric.distributed_available_fn is not _is_alone:
                self._silenced.append((metric, metric.distributed_available_fn))
                metric.distributed_available_fn = _is_alone

    def restore(self) -> None:
        """Let the metrics exchange their states again."""
        for metric, is_distributed in self._silenced:
            metric.distributed_available_fn = is_distributed
        self._silenced.clear()


class Evaluation(CheckedCheckpoints):
    """The part of the strategy that validates and tests.

    Args:
        kwargs: See :class:`~lightning_pipebd.checked_checkpoints.CheckedCheckpoints`.
    """

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self._shares_logs = False
        self._is_in_evaluation_step = False
        self._complete_values = CompleteValues()

    @property
    def is_distributed(self) -> bool:
        """Whether logged values are to be exchanged: while ranks hold different rows, and when an epoch ends."""
        return self._shares_logs

    def evaluation_loader(self, loader: Any) -> EvaluationLoader:
        """Give what this rank iterates over instead of the user's loader."""
        assert self._transport is not None
        rank, num_ranks = self._transport.rank, self._transport.num_ranks
        seed_workers(loader, rank)
        interval = (Fraction(rank, num_ranks), Fraction(rank + 1, num_ranks))
        rows = RowLoader(loader, interval, min_rows=num_ranks)
        return EvaluationLoader(rows, self._transport, lambda: self._session.loading_rank if self._session else 0)

    @override
    def on_validation_start(self) -> None:
        self._begin_evaluation()

    @override
    def on_test_start(self) -> None:
        self._begin_evaluation()

    @override
    def validation_step(self, batch: Any, *args: Any) -> STEP_OUTPUT:
        with self._evaluation_step(*args[1:]):
            return None if isinstance(batch, BatchHeader) else super().validation_step(batch, *args)

    @override
    def test_step(self, batch: Any, *args: Any) -> STEP_OUTPUT:
        with self._evaluation_step(*args[1:]):
            return None if isinstance(batch, BatchHeader) else super().test_step(batch, *args)

    @override
    def on_validation_end(self) -> None:
        self._end_evaluation()

    @override
    def on_test_end(self) -> None:
        self._end_evaluation()

    @override
    def reduce(self, tensor: Any, group: Any = None, reduce_op: Any = "mean") -> Any:
        # While training, every rank has the same epoch means already. While evaluating, a rank without rows of a short
        # batch is not in its step: values are exchanged once, when the loop has ended.
        is_training = self._session is not None and require_module(self.lightning_module).trainer.training
        if self._is_in_evaluation_step or is_training or group is COMPLETE:
            return tensor
        self._check_logged()
        if isinstance(tensor, Tensor):
            # A value that was logged in host memory is there still, and NCCL reaches devices only.
            tensor = tensor.to(self.root_device)
            if reduce_op in ("mean", "avg"):
                # Sums and numbers of rows alike: a mean rounded to float32, or to an integer, would be a wrong weight.
                tensor = tensor.double()
        return super().reduce(tensor, group, reduce_op)

    @override
    def reduce_boolean_decision(self, decision: bool, all: bool = True) -> bool:
        # Not by `reduce`, which leaves values alone while training.
        if self._transport is None:
            return decision
        decisions = self._transport.all_gather_object(decision)
        return False not in decisions if all else True in decisions

    @contextmanager
    def sharing_logs(self) -> Generator[None, None, None]:
        """Exchange what is logged inside the context."""
        self._share_logs(True)
        try:
            yield
        finally:
            self._share_logs(False)

    def _share_logs(self, is_shared: bool) -> None:
        self._shares_logs = is_shared
        require_module(self.lightning_module).shares_logs = is_shared

    @contextmanager
    def _evaluation_step(self, dataloader_idx: int = 0) -> Generator[None, None, None]:
        self._is_in_evaluation_step = True
        if self._session is not None:
            self._session.progress.mark("evaluating")
        try:
            with self._complete_values.step(require_module(self.lightning_module), dataloader_idx):
                yield
        finally:
            self._is_in_evaluation_step = False

    def _begin_evaluation(self) -> None:
        self._share_logs(True)
        if self._session is not None:
            self._assemble_student()
            self._session.placement.gather()

    def _check_logged(self) -> None:
        if self._transport is not None:
            check_logged_alike(self._transport, require_module(self.lightning_module).trainer)

    def _end_evaluation(self) -> None:
        self._check_logged()
        self._share_logs(False)
        self._complete_values.restore()
        if self._session is not None:
            self._session.placement.place()


def check_logged_alike(transport: Transport, trainer: Trainer) -> None:
    """**Collective** over all ranks: compare what is about to be exchanged; values of different names must not meet.

    Raises:
        ValueError: The ranks have logged different values; on all of them.
    """
    everyone = transport.all_gather_object(logged_keys(trainer)) if transport.num_ranks > 1 else [[]]
    for rank, theirs in enumerate(everyone):
        if theirs != everyone[0]:
            raise ValueError(
                f"`self.log` must log the same names in the same order on every rank, but an evaluation logged "
                f"{everyone[0]} on rank 0 and {theirs} on rank {rank}: each rank sees its rows of a batch alone. Log "
                "every name in every step, or log it once in the hook at the end of the epoch."
            )


def _is_alone() -> bool:
    return False
