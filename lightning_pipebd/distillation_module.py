"""What all modules have in common: a teacher, a student, and batches that are inputs and labels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import nn
from typing_extensions import override

from lightning_pipebd.lightning_internals.module import StagedBatchModule
from lightning_pipebd.other_lightning import refuse_other_trainer
from lightning_pipebd.runtime.layouts import without_gaps

__all__ = ["DistillationModule"]

_SEED_KEY = "block_random_seed"
_Self = TypeVar("_Self", bound="DistillationModule")


class DistillationModule(StagedBatchModule):
    """A teacher and a student; subclasses say how the one learns from the other.

    Attributes:
        teacher: The teacher, whole.
        student: The student, whole.
    """

    teacher: nn.Module
    student: nn.Module
    _random_seed: int | None = None

    def hide_teacher(self, teacher: nn.Module) -> None:
        """Freeze a teacher and keep it out of parameters, checkpoints and ``train()``; it follows to devices."""
        # Here, because a module is mostly made after all imports, and before the Trainer.
        refuse_other_trainer("pipebd")
        # Past nn.Module's bookkeeping on purpose: a frozen teacher must not reach checkpoints, optimizers or train().
        object.__setattr__(self, "teacher", teacher.requires_grad_(False).eval())

    def block_modules(self) -> list[nn.Module]:
        """Give the blocks of both models, and what is trained with them."""
        raise NotImplementedError

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        """Divide a batch into the models' input and the labels.

        A pair is ``(inputs, labels)``; anything else is all input. Override for other batches.
        """
        if isinstance(batch, (tuple, list)) and len(batch) == 2:
            return batch[0], batch[1]
        if isinstance(batch, (tuple, list)) and len(batch) == 1:
            return batch[0], None
        return batch, None

    def take_apart(self, batch: Any) -> tuple[Any, Any]:
        """Give what :meth:`unpack_batch` makes of a batch, as it would arrive at another rank."""
        inputs, targets = self.unpack_batch(batch)
        return without_gaps(inputs), without_gaps(targets)

    @override
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Run the whole student."""
        return self.student(*args, **kwargs)

    @property
    def random_seed(self) -> int:
        """Seed of all blocks' random streams: that of the run, kept in checkpoints."""
        if self._random_seed is None:
            self._random_seed = torch.initial_seed()
        return self._random_seed

    @random_seed.setter
    def random_seed(self, seed: int) -> None:
        self._random_seed = seed

    @override
    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Keep the seed of the random streams, so that a resumed run draws what the first would have drawn."""
        checkpoint[_SEED_KEY] = self.random_seed

    @override
    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up the seed of the run that wrote the checkpoint."""
        self._random_seed = checkpoint.get(_SEED_KEY, self._random_seed)

    @override
    def _apply(self: _Self, fn: Callable[[Any], Any], recurse: bool = True) -> _Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own hook
        if "teacher" not in self._modules:
            self.teacher._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's own hook
        return self
