"""The loss scales of float16 training: one for each block that learns by itself, and one for a whole student."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.pytorch.plugins import MixedPrecision, Precision
from torch import Tensor, nn

from lightning_pipebd.runtime.gradients import BlockScaler
from lightning_pipebd.runtime.step_scaler import StepScaler
from lightning_pipebd.runtime.transport import Transport

__all__ = ["BlockScalers", "scale_loss", "step_scale"]

_KEY = "block_loss_scales"


class BlockScalers:
    """Takes the place of the precision plugin's one scaler while a plan runs; does nothing without one.

    One scale for all blocks of a rank would let an overflow in one block skip the update of the others, and the result
    would depend on the plan.

    Args:
        plugin: The trainer's precision plugin; its scaler is put aside until :meth:`restore`.
        parameters: Per block of this rank, its parameters.
        device: Where the blocks compute.
        transport: Reaches the other ranks.
    """

    def __init__(
        self,
        plugin: Precision,
        parameters: Mapping[int, Sequence[nn.Parameter]],
        device: torch.device,
        transport: Transport,
    ) -> None:
        self._plugin = plugin
        self._transport = transport
        self._scaler: Any = None
        self._scalers: dict[int, BlockScaler] = {}
        if not isinstance(plugin, MixedPrecision) or plugin.scaler is None:
            return
        self._scaler = plugin.scaler
        for block, own in parameters.items():
            copy = torch.amp.GradScaler(device.type)
            copy.load_state_dict(self._scaler.state_dict())
            self._scalers[block] = BlockScaler(copy, own)
        plugin.scaler = None

    def scale(self, block: int, loss: Tensor) -> Tensor:
        """Multiply a block's loss by its scale."""
        return self._scalers[block].scale(loss) if self._scaler is not None else loss

    def unscale(self) -> None:
        """Divide all gradients by their scales; a block with an overflow loses its gradients for this step."""
        found = ((scaler, scaler.unscale()) for scaler in self._scalers.values())
        overflows = {scaler: overflow for scaler, overflow in found if overflow is not None}
        if not overflows:
            return
        # One wait for the device, not one per block.
        for scaler, has_overflow in zip(overflows, torch.stack(list(overflows.values())).tolist(), strict=True):
            if has_overflow:
                scaler.drop()

    def save(self, checkpoint: dict[str, Any]) -> None:
        """**Collective** over all ranks: add every block's scale, and one for plain Lightning, which has only one."""
        if self._scaler is None:
            return
        mine = {block: scaler.scaler.state_dict() for block, scaler in self._scalers.items()}
        scales = {block: state for states in self._transport.all_gather_object(mine) for block, state in states.items()}
        checkpoint[_KEY] = dict(sorted(scales.items()))
        checkpoint[type(self._plugin).__qualname__] = min(scales.values(), key=lambda state: state["scale"])

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the scales of a checkpoint, also of one that plain Lightning has written."""
        common = checkpoint.get(type(self._plugin).__qualname__)
        for block, scaler in self._scalers.items():
            state = checkpoint.get(_KEY, {}).get(block, common)
            if state:
                scaler.scaler.load_state_dict(state)

    def restore(self) -> None:
        """Give the plugin its scaler back."""
        if self._scaler is not None and isinstance(self._plugin, MixedPrecision):
            self._plugin.scaler = self._scaler


@contextmanager
def step_scale(plugin: Precision, device: torch.device, transport: Transport) -> Iterator[None]:
    """Have the precision plugin's scaler agree with all ranks inside the context; does nothing without one."""
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    if not isinstance(plugin, MixedPrecision) or scaler is None or not scaler.is_enabled():
        yield
        return
    plugin.scaler = shared = StepScaler(scaler, transport, device)
    try:
        yield
    finally:
        # The user's scaler goes on where the run has ended, as after a fit in one process.
        scaler.load_state_dict(shared.state_dict())
        plugin.scaler = scaler


def scale_loss(plugin: Precision, loss: Tensor) -> Tensor:
    """Multiply the loss of a whole student by the plugin's scale, if it has one."""
    scaler = plugin.scaler if isinstance(plugin, MixedPrecision) else None
    return loss if scaler is None else scaler.scale(loss)
