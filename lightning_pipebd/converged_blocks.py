"""Blocks whose losses fall no more: told, not acted upon."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from typing_extensions import override

from lightning_pipebd.fit_callbacks import FitCallback
from lightning_pipebd.module import BlockwiseDistillationModule

__all__ = ["ConvergedBlocks", "stands_still"]

_NUM_EPOCHS = 3
_LEAST_GAIN = 0.001


def stands_still(means: Sequence[float]) -> bool:
    """Tell whether the last three of some epochs' mean losses are not a thousandth below the one before them.

    Example:
        >>> stands_still([1.0, 0.9995, 0.9993, 0.9999]), stands_still([1.0, 0.9995, 0.998, 0.9999]), stands_still([1.0])
        (True, False, False)
    """
    if len(means) <= _NUM_EPOCHS:
        return False
    return min(means[-_NUM_EPOCHS:]) > (1 - _LEAST_GAIN) * means[-_NUM_EPOCHS - 1]


class ConvergedBlocks(FitCallback):
    """Say once of every block that its mean loss has stopped falling, and what could be done."""

    def __init__(self) -> None:
        self._means: defaultdict[int, list[float]] = defaultdict(list)
        self._told: set[int] = set()

    @override
    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take in the means of the epoch before."""
        assert isinstance(pl_module, BlockwiseDistillationModule)
        for block in sorted({*range(pl_module.num_blocks)} - pl_module.frozen_blocks - self._told):
            mean = trainer.callback_metrics.get(f"{pl_module.block_key(block)}_epoch")
            if mean is None:
                continue
            self._means[block].append(float(mean))
            if stands_still(self._means[block]):
                self._told.add(block)
                rank_zero_info(
                    f"Block {block} ({pl_module.block_pairs.names[block]}): its mean loss has not fallen by "
                    f"{_LEAST_GAIN:.1%} in the last {_NUM_EPOCHS} epochs. If that is all it shall learn, "
                    f"`module.freeze_block({block})` saves its backward pass and update."
                )
