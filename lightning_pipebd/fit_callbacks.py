"""Callbacks that belong to one fit: put among the user's for that time, and cheap at every batch."""

from __future__ import annotations

from typing import Any, ClassVar

from lightning.pytorch import Callback, Trainer

__all__ = ["FitCallback", "add_callback", "remove_callback", "user_callbacks"]


class FitCallback(Callback):
    """A callback without the hooks that Lightning calls within every batch.

    Lightning skips what cannot be called, and measures what can, also if it does nothing: that costs more than the
    rest of a small callback. A subclass overrides those that it wants.
    """

    on_train_batch_start: ClassVar[Any] = None
    on_before_zero_grad: ClassVar[Any] = None
    on_before_backward: ClassVar[Any] = None
    on_after_backward: ClassVar[Any] = None
    on_before_optimizer_step: ClassVar[Any] = None


def add_callback(trainer: Trainer, callback: Callback, *, is_last: bool = False) -> None:
    """Add a callback for this fit, before the user's: its values are there when theirs look for them; or after."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # Lightning's connectors set it
    callbacks.insert(len(callbacks) if is_last else 0, callback)


def remove_callback(trainer: Trainer, callback: Callback) -> None:
    """Take back what :func:`add_callback` did."""
    if callback in trainer.callbacks:  # type: ignore[attr-defined]
        trainer.callbacks.remove(callback)  # type: ignore[attr-defined]


def user_callbacks(trainer: Trainer) -> list[Callback]:
    """Give the trainer's callbacks."""
    return list(trainer.callbacks)  # type: ignore[attr-defined]
