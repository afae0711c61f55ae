"""Batch statistics over all rows of a student block that several ranks share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["SynchronisedNorms", "has_norms"]


def has_norms(block: nn.Module) -> bool:
    """Tell whether a block has layers whose batch statistics can be synchronised."""
    return any(map(_can_be_synchronised, block.modules()))


class SynchronisedNorms:
    """Replace the BatchNorm layers of shared blocks by torch's synchronised ones, until :meth:`restore`.

    Parameters and running statistics are those of the layers that were replaced, under the same names.

    Args:
        model: Holds the blocks.
        blocks: Blocks of the model, each with the process group of the ranks that share it.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[tuple[nn.Module, Any]]) -> None:
        self._replaced: list[tuple[nn.Module, str, nn.Module, nn.Module]] = []
        for block, group in blocks:
            chosen = {id(module) for module in block.modules() if _can_be_synchronised(module)}
            for parent in list(model.modules()):
                for name, child in list(parent.named_children()):
                    if id(child) in chosen:
                        synchronised = nn.SyncBatchNorm.convert_sync_batchnorm(child, group)  # type: ignore[no-untyped-call]
                        setattr(parent, name, synchronised)
                        self._replaced.append((parent, name, child, synchronised))

    def restore(self) -> None:
        """Put the ordinary layers back, with the statistics of now."""
        for parent, name, ordinary, synchronised in self._replaced:
            # Moving a module to another device replaces its buffers, so that the two may no longer share them.
            for key, buffer in synchronised.named_buffers(recurse=False):
                setattr(ordinary, key, buffer)
            ordinary.train(synchronised.training)
            setattr(parent, name, ordinary)
        self._replaced.clear()


def _can_be_synchronised(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) and not isinstance(module, nn.SyncBatchNorm)
