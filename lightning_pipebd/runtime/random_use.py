"""Which blocks may draw from Python's :mod:`random`: those that run code of the user's."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from types import ModuleType
from typing import Any

from torch import nn
from torch.nn.modules import module as module_hooks

from lightning_pipebd.runtime.block_view import BlockView

__all__ = ["PythonDrawing", "may_draw_from_python"]

_KNOWN = ("torch.nn.modules.", "torchvision.models.", "torchvision.ops.")
# Layers that call what the user hands them.
_OPEN = frozenset({"torch.nn.modules.transformer"})
_KNOWN_CODE = frozenset({"torch", "torchvision", "builtins", "operator", "_operator", "math"})


class PythonDrawing:
    """Remember for an epoch which blocks may draw from Python's generator."""

    def __init__(self) -> None:
        self._epoch = -1
        self._found: dict[int, bool] = {}

    def may_draw(self, block: int, epoch: int, find_modules: Callable[[int], Iterable[nn.Module] | None]) -> bool:
        """Tell whether a block may; looked up anew in every epoch, because modules may get hooks.

        Args:
            block: Index of the block.
            epoch: The epoch.
            find_modules: Gives what a block runs; ``None`` if that is more than modules.
        """
        if epoch != self._epoch:
            self._epoch, self._found = epoch, {}
        if block not in self._found:
            modules = find_modules(block)
            self._found[block] = modules is None or any(map(may_draw_from_python, modules))
        return self._found[block]


def may_draw_from_python(block: nn.Module) -> bool:
    """Tell whether a block may draw from Python's generator: unless it is known to run torch's own code alone.

    Example:
        >>> class Branch(nn.Module): ...
        >>> may_draw_from_python(nn.Sequential(nn.Linear(2, 2), nn.Dropout())), may_draw_from_python(Branch())
        (False, True)
    """
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return True
    return not all(map(_runs_known_code, block.modules()))


def _runs_known_code(module: nn.Module) -> bool:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return False
    if isinstance(module, BlockView):
        return all(map(_is_known, module.called_globals))
    name = type(module).__module__
    return f"{name}.".startswith(_KNOWN) and name not in _OPEN


def _is_known(value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (not callable(value) and not isinstance(value, ModuleType)) or str(name).split(".")[0] in _KNOWN_CODE
