"""The jobs of a module's blocks, under the trainer's precision."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

from lightning.pytorch.plugins import Precision
from torch import Tensor
from torch.optim import Optimizer

from lightning_pipebd.loaded_boundaries import load_boundaries
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.row_trees import RowTree
from lightning_pipebd.scaling import BlockScalers
from lightning_pipebd.shared_backward import SharedBackward

__all__ = ["BlockJobs", "step_context"]


def step_context(plugin: Precision) -> Callable[[], AbstractContextManager[None]]:
    """Give the plugin's context for a training step, or one that does nothing where the plugin's does nothing."""
    kind = type(plugin)
    is_plain = (
        kind.train_step_context is Precision.train_step_context and kind.forward_context is Precision.forward_context
    )
    return nullcontext if is_plain else plugin.train_step_context


class BlockJobs:
    """The module's blocks under the trainer's precision, as the executor wants them.

    Args:
        module: Teacher, student and losses.
        plugin: The trainer's precision plugin.
        scalers: Scales of the losses; `None` scales nothing.

    Attributes:
        optimizer: Handed on to Lightning's backward.
        epoch: The epoch.
        batch_idx: Number of the batch in it.
        num_accumulated: Batches whose gradients make one update.
        shares_backward: Whether neighbouring small blocks may have one backward pass.
    """

    def __init__(
        self, module: BlockwiseDistillationModule, plugin: Precision, scalers: BlockScalers | None = None
    ) -> None:
        self._module = module
        self._plugin = plugin
        self._scalers = scalers
        self._context = step_context(plugin)
        self.optimizer: Optimizer | None = None
        self.epoch = self.batch_idx = 0
        self.num_accumulated = 1
        self.shares_backward = True
        self._backward = SharedBackward(self._run_backward)

    @property
    def is_full(self) -> bool:
        """Whether :meth:`settle` must come before the next :meth:`learn`."""
        return not self.shares_backward or self._backward.is_full

    def load(self, batch: Any, rows: Rows) -> dict[int, RowTree]:
        """Give what a program starts from, of a batch that holds some rows."""
        with self._context():
            return load_boundaries(self._module, batch, rows)

    def teach(self, block: int, boundary: Any) -> Any:
        """Give the next boundary."""
        with self._context():
            return self._module.teach(block, boundary)

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        """Give some rows' part of the batch's mean loss, detached; :meth:`settle` adds its gradients."""
        is_part = rows.num_rows < num_rows
        first_row = rows.start if is_part else 0
        self._backward.begin()
        with self._context():
            loss = self._module.imitate(
                block, boundary, target, labels, epoch=self.epoch, batch_idx=self.batch_idx, first_row=first_row
            )
        if is_part:
            loss = loss * (rows.num_rows / num_rows)
        # A frozen block only tells its loss; the gradients of a stopped one would be thrown away.
        if loss.requires_grad and block not in self._module.finite_guard.stopped:
            scaled = loss if self.num_accumulated == 1 else loss / self.num_accumulated
            if self._scalers is not None:
                scaled = self._scalers.scale(block, scaled)
            self._backward.add(block, boundary, scaled)
        return loss.detach()

    def settle(self) -> None:
        """Add the gradients of all that was learned."""
        self._backward.settle()

    def _run_backward(self, loss: Tensor) -> None:
        self._plugin.backward(loss, self._module, self.optimizer)
