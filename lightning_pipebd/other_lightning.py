"""The package `pytorch_lightning`: the same classes once more, which ours are no subclasses of.

Most mixtures of both are refused by Lightning itself before anything of ours is asked. What would fail with a message
that helps nobody, or not at all, is refused here.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

__all__ = ["check_origin", "refuse_other_trainer"]

_OTHER = "pytorch_lightning"


class _WrongTrainer:
    """Stands for our strategy in the other package's registry, to say why it cannot be used there."""

    def __init__(self, **kwargs: Any) -> None:
        raise TypeError(
            "`strategy='pipebd'` must be given to the Trainer of `lightning`, but was given to that of "
            f"`{_OTHER}`, whose classes are others. Write `from lightning.pytorch import Trainer`, and import "
            "callbacks, loggers and modules from there, too."
        )


def refuse_other_trainer(name: str) -> None:
    """Have a Trainer of `pytorch_lightning` say what is wrong if it is given the strategy of this name.

    Without effect while that package is not imported; called wherever ours is about to be used.
    """
    registry = getattr(sys.modules.get(f"{_OTHER}.strategies"), "StrategyRegistry", None)
    if registry is not None and name not in registry:
        registry.register(name, _WrongTrainer, description="Needs the Trainer of `lightning`.")


def check_origin(objects: Iterable[object], role: str) -> None:
    """Raise for objects whose classes come from `pytorch_lightning`.

    Args:
        objects: Those of a trainer.
        role: What they are to it, for the message.

    Raises:
        TypeError: One does.
    """
    for given in objects:
        origins = [parent for parent in type(given).__mro__ if parent.__module__.split(".")[0] == _OTHER]
        if origins:
            raise TypeError(
                f"`{role}` must be made of classes of `lightning`, but {type(given).__name__} is made of "
                f"{origins[0].__module__}.{origins[0].__name__}, which this Trainer does not know as what it is. "
                f"Import it from `lightning.pytorch` instead of `{_OTHER}`."
            )
