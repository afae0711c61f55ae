"""Numbers that go wrong in a whole student: found before the optimizer step, which is then not taken at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from lightning_pipebd.nonfinite import finite_flags

__all__ = ["StepGuard"]

_POLICIES = ("raise", "skip")


class StepGuard:
    """Look at all gradients of a student before its optimizer step.

    On a GPU, ``"raise"`` does not wait for the device: what is found is read at the next step, or before a checkpoint
    is written. ``"skip"`` must know now, on all ranks, and waits once per step.

    Args:
        policy: ``"raise"`` or ``"skip"``.

    Attributes:
        agree: **Collective** over all ranks: tells whether all of them say yes; ``None`` asks nobody.

    Raises:
        ValueError: The policy is another word.
    """

    def __init__(self, policy: str) -> None:
        if policy not in _POLICIES:
            raise ValueError(
                f"`on_nonfinite` must be 'raise' or 'skip', but is {policy!r}. One block cannot be stopped by itself: "
                "all blocks learn from one loss."
            )
        self._skips = policy == "skip"
        self._buffers: dict[int, list[Tensor]] = {}
        self._under_way: tuple[Tensor, list[str], int] | None = None
        self._has_warned = False
        self.agree: Callable[[bool], bool] | None = None

    def before_block(self, block: int, buffers: Callable[[], Sequence[Tensor]]) -> None:
        """Keep the buffers of a block that is about to run: a step that is skipped leaves no trace in them, either."""
        if self._skips and block not in self._buffers:
            self._buffers[block] = [buffer.clone() for buffer in buffers()]

    def allows(
        self, parameters: Mapping[str, nn.Parameter], buffers: Callable[[int], Sequence[Tensor]], step: int
    ) -> bool:
        """Tell whether the step may be taken; if not, gradients are taken away and buffers are put back.

        Args:
            parameters: What is trained here, by name.
            buffers: Gives a block's buffers.
            step: The optimizer step.

        Raises:
            FloatingPointError: The policy is to raise, and a gradient of this step or of the one before is not finite.
        """
        kept, self._buffers = self._buffers, {}
        found = {name: own.grad for name, own in parameters.items() if own.grad is not None and own.grad.numel()}
        flags = finite_flags(list(found.values())) if found else torch.ones(1).bool()
        if not self._skips:
            self.flush()
            self._under_way = (flags, list(found), step)
            if not flags.is_cuda:
                self.flush()
            return True
        is_good = bool(flags.all())
        if is_good if self.agree is None else self.agree(is_good):
            return True
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(f"The student's gradient is not finite at step {step}. The step is skipped.", stacklevel=2)
        for own in parameters.values():
            own.grad = None
        with torch.no_grad():
            for block, values in kept.items():
                for buffer, value in zip(buffers(block), values, strict=True):
                    buffer.copy_(value)
        return False

    def flush(self) -> None:
        """Read what was found in the last step.

        Raises:
            FloatingPointError: A gradient was not finite.
        """
        if self._under_way is None:
            return
        flags, names, step = self._under_way
        self._under_way = None
        if bool(flags.all()):
            return
        bad = [name for name, flag in zip(names, flags.tolist(), strict=False) if not flag]
        more = f" and of {len(bad) - 1} more" if len(bad) > 1 else ""
        raise FloatingPointError(
            f"The student must have a finite gradient, but that of {bad[0]}{more} is not, at step {step}. Clip "
            "gradients or lower the learning rate; or go on without this step: `on_nonfinite='skip'`."
        )
