"""Which random generators a block may draw from: none, or torch's, if it runs known code alone."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.nn.modules import module as module_hooks

from lightning_pipebd.runtime.block_view import BlockView
from lightning_pipebd.runtime.random_streams import random_stream, stream_key

__all__ = ["Draws", "KnownDraws", "block_stream", "draws_of"]

_KNOWN = ("torch.nn.modules.", "torchvision.models.", "torchvision.ops.")
# Layers that call what the user hands them.
_OPEN = frozenset({"torch.nn.modules.transformer"})
_KNOWN_CODE = frozenset({"torch", "torchvision", "builtins", "operator", "_operator", "math"})
_LAYERS = (
    *("activation", "adaptive", "batchnorm", "channelshuffle", "container", "conv", "distance", "flatten", "fold"),
    *("instancenorm", "linear", "module", "normalization", "padding", "pixelshuffle", "pooling", "sparse"),
    "upsampling",
)
_SILENT = frozenset(
    {
        *(f"torch.nn.modules.{name}" for name in _LAYERS),
        *(f"torchvision.models.{name}" for name in ("efficientnet", "mobilenetv2", "mobilenetv3", "resnet", "vgg")),
        "torchvision.ops.misc",
    }
)
# Found where the silent ones are.
_DRAWING = (nn.RReLU, nn.MultiheadAttention, nn.FractionalMaxPool2d, nn.FractionalMaxPool3d)
_SILENT_CODE = frozenset({"builtins", "operator", "_operator", "math"})


class Draws(enum.IntEnum):
    """What a block may draw from; each includes those before it."""

    NOTHING = 0
    TORCH = 1
    PYTHON = 2


class KnownDraws:
    """Remember for an epoch what blocks may draw from."""

    def __init__(self) -> None:
        self._epoch = -1
        self._found: dict[int, Draws] = {}

    def of(self, block: int, epoch: int, find_modules: Callable[[int], Iterable[nn.Module] | None]) -> Draws:
        """Tell what a block may draw from; looked up anew in every epoch, because modules may get hooks.

        Args:
            block: Index of the block.
            epoch: The epoch.
            find_modules: Gives what a block runs; ``None`` if that is more than modules.
        """
        if epoch != self._epoch:
            self._epoch, self._found = epoch, {}
        if block not in self._found:
            modules = find_modules(block)
            found = Draws.PYTHON if modules is None else max(map(draws_of, modules), default=Draws.NOTHING)
            self._found[block] = found
        return self._found[block]


def block_stream(draws: Draws, coordinates: tuple[int, ...], device: torch.device) -> AbstractContextManager[None]:
    """Have a block draw from a stream of its own inside the context, from each generator that it may draw from.

    Args:
        draws: What the block may draw from: something.
        coordinates: Seed and coordinates of the stream, see :func:`~.random_streams.stream_key`.
        device: Where the block computes.
    """
    return random_stream(stream_key(*coordinates), device, with_python=draws is Draws.PYTHON)


def draws_of(block: nn.Module) -> Draws:
    """Tell what a block may draw from: everything, unless it is known to run torch's own code alone.

    Example:
        >>> class Branch(nn.Module): ...
        >>> draws_of(nn.Sequential(nn.Linear(2, 2), nn.ReLU())).name, draws_of(nn.Dropout(0.0)).name
        ('NOTHING', 'TORCH')
        >>> draws_of(Branch()).name
        'PYTHON'
    """
    if module_hooks._global_forward_hooks or module_hooks._global_forward_pre_hooks:
        return Draws.PYTHON
    return max(map(_draws_of_one, block.modules()))


def _draws_of_one(module: nn.Module) -> Draws:
    if module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module):
        return Draws.PYTHON
    if isinstance(module, BlockView):
        return _draws_of_code(module)
    name = type(module).__module__
    if not f"{name}.".startswith(_KNOWN) or name in _OPEN:
        return Draws.PYTHON
    # By the kind alone: whether a dropout drops may change from step to step.
    return Draws.TORCH if name not in _SILENT or isinstance(module, _DRAWING) else Draws.NOTHING


def _draws_of_code(block: BlockView) -> Draws:
    called = block.called_globals
    if not all(_is_from(_KNOWN_CODE, value) for value in called):
        return Draws.PYTHON
    is_silent = not block.draws_random_numbers and all(_is_from(_SILENT_CODE, value) for value in called)
    return Draws.NOTHING if is_silent else Draws.TORCH


def _is_from(packages: frozenset[str], value: Any) -> bool:
    name = value.__name__ if isinstance(value, ModuleType) else getattr(value, "__module__", None)
    return (not callable(value) and not isinstance(value, ModuleType)) or str(name).split(".")[0] in packages
