"""The loss scale of a whole student in float16: one for all ranks, which step or skip together."""

from __future__ import annotations

import torch
from torch import Tensor
from typing_extensions import override

from lightning_pipebd.runtime.transport import Transport

__all__ = ["StepScaler"]


class StepScaler(torch.amp.GradScaler):
    """A gradient scaler that skips a step, and lowers its scale, where a gradient of any rank overflows.

    Every rank has one, and all of them are alike: they begin with one state and hear of the same overflows.

    Args:
        scaler: Whose scale, factors and count of good steps it begins with.
        transport: Reaches the other ranks.
        device: Where this rank computes.

    Source: torch's ``ShardedGradScaler``, which asks the ranks of a process group.
    """

    def __init__(self, scaler: torch.amp.GradScaler, transport: Transport, device: torch.device) -> None:
        super().__init__(device.type)
        self.load_state_dict(scaler.state_dict())
        self._transport = transport
        self._compute_device = device

    @override
    def _unscale_grads_(
        self, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
    ) -> dict[torch.device, Tensor]:
        """**Collective** over all ranks: divide by the scale, and tell whether any rank found an overflow."""
        # Both ways to a step lead here: Lightning unscales before it clips, fused optimizers unscale by themselves.
        found = super()._unscale_grads_(optimizer, inv_scale, found_inf, allow_fp16)
        # A rank may have nothing to train, or no gradient of it.
        number = torch.zeros((), device=self._compute_device)
        for own in found.values():
            number += own.to(number.device)
        if self._transport.num_ranks > 1:
            self._transport.all_reduce([number], tuple(range(self._transport.num_ranks))).wait()
        return {number.device: number}
