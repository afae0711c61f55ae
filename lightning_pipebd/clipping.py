"""Which gradients are clipped: those that the optimizer uses, and when they have no loss scale on them any more."""

from __future__ import annotations

from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch.plugins import Precision
from torch.optim import Optimizer

__all__ = ["check_clipping", "trained_ids"]

_known: WeakKeyDictionary[Optimizer, tuple[list[tuple[list[Any], int]], frozenset[int]]] = WeakKeyDictionary()


def trained_ids(optimizer: Optimizer) -> frozenset[int]:
    """Give the ``id`` of every parameter that an optimizer steps.

    Nobody takes away the gradients of others: they add up from step to step, and must count nowhere.
    """
    groups = [group["params"] for group in optimizer.param_groups]
    known = _known.get(optimizer)
    # The lists themselves: another plan has other ones, perhaps of the same length. Comparing elements takes long.
    if known is None or [(id(group), len(group)) for group in groups] != [(id(old), size) for old, size in known[0]]:
        ids = frozenset(id(parameter) for group in groups for parameter in group)
        known = _known[optimizer] = ([(group, len(group)) for group in groups], ids)
    return known[1]


def check_clipping(plugin: Precision, optimizer: Optimizer) -> None:
    """Raise if gradients still have a loss scale on them when they are to be clipped.

    Raises:
        ValueError: The optimizer takes the scale out of the gradients in its step.
    """
    if getattr(plugin, "scaler", None) is not None and getattr(optimizer, "_step_supports_amp_scaling", False):
        raise ValueError(
            "`gradient_clip_val` must be left out with `precision='16-mixed'` and an optimizer that takes the loss "
            f"scale out of gradients in its step, as {type(optimizer).__name__}(fused=True) does: they are still "
            "scaled when they are clipped. Make the optimizer with `fused=False`."
        )
