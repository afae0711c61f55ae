"""Blocks that sleep instead of computing, so that many ranks run on few cores: all but the blocks' work is real."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipebd import BlockwiseDistillationModule
from lightning_pipebd.planning.curve import Curve

__all__ = ["Sleep", "SleepingBlock", "SleepingModule", "sleep"]

# The most that a sleep is shortened by because the one before lasted too long.
_MAX_DEBT_S = 0.001


class _Sleeper:
    """Sleeps so long on average as it is asked to: what one sleep lasts too long, the next is shorter.

    The system wakes a sleeper some tenths of a ms late, which is no work of the block's. Whoever is late by more waits
    for a core: that is not made up for.
    """

    def __init__(self) -> None:
        self._debt_s = 0.0

    def sleep(self, seconds: float, since_s: float | None = None) -> None:
        start = time.perf_counter() if since_s is None else since_s
        stop = start + max(0.0, seconds - self._debt_s)
        self._debt_s = max(0.0, self._debt_s - seconds)
        time.sleep(max(0.0, stop - time.perf_counter()))
        self._debt_s = min(_MAX_DEBT_S, self._debt_s + time.perf_counter() - stop)


sleep = _Sleeper().sleep
"""Sleep some seconds, counted from now or from a time before; lasts as long on average as is asked for."""


class Sleep(torch.autograd.Function):
    """Sleeps in the forward pass, and twice as long in the backward pass; what it computes is in that time."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, seconds: float) -> Tensor:
        """Sleep, and scale the input."""
        start, ctx.seconds = time.perf_counter(), seconds
        output = x * scale
        sleep(seconds, start)
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        """Sleep twice as long; the input's gradient is passed on if somebody wants it."""
        start = time.perf_counter()
        own = gradient.sum().reshape(1)
        sleep(2 * ctx.seconds, start)
        return gradient if ctx.needs_input_grad[0] else None, own, None


class SleepingBlock(nn.Module):
    """Computes next to nothing, slowly; has one parameter.

    Args:
        forward_ms: Time of the forward pass by rows; the backward pass takes twice as long.
    """

    def __init__(self, forward_ms: Curve) -> None:
        super().__init__()
        self.forward_ms = forward_ms
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x: Tensor) -> Tensor:
        """Sleep as long as these rows take."""
        output: Tensor = Sleep.apply(x, self.scale, self.forward_ms.at(len(x)) / 1000)
        return output


class SleepingModule(BlockwiseDistillationModule):
    """A teacher and a student of sleeping blocks.

    Args:
        teach_ms: Forward of every teacher block, by rows.
        learn_ms: Forward and backward of every student block, by rows.
    """

    def __init__(self, teach_ms: Sequence[Curve], learn_ms: Sequence[Curve]) -> None:
        thirds = [Curve((rows, ms / 3) for rows, ms in curve) for curve in learn_ms]
        teacher, student = (nn.Sequential(*map(SleepingBlock, curves)) for curves in (teach_ms, thirds))
        super().__init__(teacher, student, {str(block): str(block) for block in range(len(teach_ms))})

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.trainable_parameters(), lr=1e-4)
