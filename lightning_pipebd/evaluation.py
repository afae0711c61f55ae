"""Evaluation batches with fewer rows than ranks: every rank sees them whole, so nothing is added up over ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from torch.utils import _pytree as pytree
from torchmetrics import Metric

from lightning_pipebd.data import EvaluationLoader
from lightning_pipebd.distillation_module import DistillationModule

__all__ = ["CompleteValues"]


class CompleteValues:
    """Keep what the user's step makes of whole batches from being exchanged: sums would count each row once per rank.

    That holds for logged values, and for torchmetrics, which exchange their states by themselves.
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


def _is_alone() -> bool:
    return False
