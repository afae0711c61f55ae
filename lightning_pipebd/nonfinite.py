"""Numbers that go wrong in one block: found before its update, named, and kept away from the other blocks."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lightning_pipebd.runtime.transport import Transport

__all__ = ["FiniteGuard", "finite_flags", "finite_flags_by_norm"]

_POLICIES = ("raise", "skip", "stop_block")
_KEY = "stopped_blocks"


class _Flags(NamedTuple):
    """What is known, or on its way from the device, of one block's step."""

    block: int
    name: str
    step: int
    finite: Tensor  # of loss and gradient
    arrival: torch.cuda.Event | None


class FiniteGuard:
    """Look at every block's gradient before its update.

    What is done follows from the gradient alone, which is the same on all ranks that share a block; the loss only helps
    to say what was not finite.

    On a GPU, ``"raise"`` does not wait for the device: the flags are copied aside, and read in a later step, or before
    a checkpoint is written. The other policies must know now, and wait once per block and step.

    Args:
        policy: ``"raise"``, ``"skip"`` or ``"stop_block"``.

    Attributes:
        stopped: Blocks of this rank that stay as they are, with the step that stopped them.

    Raises:
        ValueError: The policy is another word.
    """

    def __init__(self, policy: str) -> None:
        if policy not in _POLICIES:
            words = ", ".join(map(repr, _POLICIES))
            raise ValueError(f"`on_nonfinite` must be one of {words}, but is {policy!r}. Choose one of them.")
        self._policy = policy
        self.stopped: dict[int, int] = {}
        self._losses: dict[int, Tensor | None] = {}
        self._buffers: dict[int, list[Tensor]] = {}
        self._under_way: list[_Flags] = []
        self._warned: set[int] = set()

    @property
    def noted_blocks(self) -> list[int]:
        """Blocks that have run since the last look at them."""
        return sorted(self._losses)

    @property
    def keeps_buffers(self) -> bool:
        """Whether buffers may have to be put back: a step that is skipped leaves no trace in them, either."""
        return self._policy != "raise"

    def before_block(self, block: int, buffers: Sequence[Tensor]) -> None:
        """Keep the buffers of a block that is about to run."""
        if self.keeps_buffers and block not in self._buffers:
            self._buffers[block] = [buffer.clone() for buffer in buffers]

    def note_loss(self, block: int, loss: Tensor) -> None:
        """Remember a loss, reading nothing from the device."""
        # One that is not finite stays so in a sum.
        known = self._losses.get(block)
        self._losses[block] = loss.detach() if known is None else known + loss.detach()

    def note_block(self, block: int) -> None:
        """Remember a block that other ranks may have run: this one takes their gradients, and must judge as they do."""
        self._losses.setdefault(block, None)

    def check(
        self, block: int, name: str, parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], step: int
    ) -> bool:
        """Look at the gradients of a block that is about to be updated, and take them away where they must not count.

        Gives whether they count.

        Args:
            block: Index of the block.
            name: Its name in messages.
            parameters: Its parameters.
            buffers: Its buffers.
            step: The optimizer step.

        Raises:
            FloatingPointError: The policy is to raise, and a gradient of this step or of an earlier one is not finite.
        """
        loss = self._losses.pop(block, None)
        kept = self._buffers.pop(block, [])
        gradients = [gradient for own in parameters if (gradient := own.grad) is not None]
        if block in self.stopped:
            _undo(parameters, buffers, kept)
            return False
        if all(gradient.is_cpu and math.isfinite(_values(gradient).sum().item()) for gradient in gradients):
            return True
        # What is on a device must not be read now, and a sum may overflow where no element does.
        finite = finite_flags(gradients).all()
        loss_flag = torch.ones_like(finite) if loss is None else torch.isfinite(loss).all().to(finite.device)
        flags = torch.stack([loss_flag, finite])
        if self._policy == "raise":
            self._send(block, name, step, flags)
            self._read(wait=False)
        elif not bool(finite):
            self._report(block, name, step, _statistic(flags))
            _undo(parameters, buffers, kept)
            return False
        return True

    def flush(self) -> None:
        """Wait for what is under way from the device.

        Raises:
            FloatingPointError: A gradient was not finite.
        """
        self._read(wait=True)

    def save(self, checkpoint: dict[str, Any], stopped: Iterable[Mapping[int, int]]) -> None:
        """Add the stopped blocks of some ranks to a checkpoint, if there are any."""
        everyone = {block: step for of_rank in stopped for block, step in of_rank.items()}
        if everyone:
            checkpoint[_KEY] = dict(sorted(everyone.items()))

    def gather(self, checkpoint: dict[str, Any], transport: Transport) -> None:
        """**Collective** over all ranks: add the stopped blocks of all ranks to a checkpoint."""
        self.save(checkpoint, transport.all_gather_object(self.stopped))

    def load(self, checkpoint: Mapping[str, Any]) -> None:
        """Take up the stopped blocks of a checkpoint; without the policy to stop blocks, they go on."""
        self.stopped = dict(checkpoint.get(_KEY, {})) if self._policy == "stop_block" else {}

    def _send(self, block: int, name: str, step: int, flags: Tensor) -> None:
        arrival = None
        if flags.is_cuda:
            flags = flags.to("cpu", non_blocking=True)
            arrival = torch.cuda.Event()  # type: ignore[no-untyped-call]  # as torch has it
            arrival.record()
        self._under_way.append(_Flags(block, name, step, flags, arrival))

    def _read(self, *, wait: bool) -> None:
        while self._under_way:
            flags = self._under_way[0]
            if flags.arrival is not None and not flags.arrival.query():  # type: ignore[no-untyped-call]  # as above
                if not wait:
                    return
                flags.arrival.synchronize()
            del self._under_way[0]
            if not bool(flags.finite[1]):
                raise FloatingPointError(
                    f"Block {flags.block} ({flags.name}) must have a finite gradient, but its "
                    f"{_statistic(flags.finite)} is not, at step {flags.step}. Clip gradients or lower the learning "
                    "rate; or go on without this update or this block: `on_nonfinite='skip'` or 'stop_block'."
                )

    def _report(self, block: int, name: str, step: int, statistic: str) -> None:
        what = "It stays as it is from now on." if self._policy == "stop_block" else "Its update is skipped."
        if self._policy == "stop_block":
            self.stopped[block] = step
        if block not in self._warned:
            self._warned.add(block)
            warnings.warn(f"Block {block} ({name}): its {statistic} is not finite at step {step}. {what}", stacklevel=3)


def _values(gradient: Tensor) -> Tensor:
    values = gradient.coalesce().values() if gradient.is_sparse else gradient
    return torch.view_as_real(values) if values.is_complex() else values


def finite_flags(gradients: Sequence[Tensor]) -> Tensor:
    """Tell of each of some gradients whether all its elements are finite, without reading the answers from the device.

    Args:
        gradients: At least one.
    """
    if all(gradient.is_cpu for gradient in gradients):
        return torch.stack([_is_finite(_values(gradient)) for gradient in gradients])
    return finite_flags_by_norm(gradients)


def finite_flags_by_norm(gradients: Sequence[Tensor]) -> Tensor:
    """Give what :func:`finite_flags` gives, with a few kernels for all gradients of a type together.

    On a CPU, where a kernel costs little, that is slower than looking at one gradient after the other.

    Args:
        gradients: At least one.
    """
    kinds: dict[tuple[torch.device, torch.dtype], list[tuple[int, Tensor]]] = {}
    for number, values in enumerate(map(_values, gradients)):
        if values.numel():
            kinds.setdefault((values.device, values.dtype), []).append((number, values))
    # A tensor without elements has no largest one, and none that is not finite.
    flags = [torch.ones((), dtype=torch.bool, device=gradients[0].device)] * len(gradients)
    for kind in kinds.values():
        # The largest magnitude is NaN if an element is, and exact in every type: it cannot overflow.
        norms = torch._foreach_norm([values for _, values in kind], math.inf)
        found = torch.isfinite(torch.stack(norms)).to(gradients[0].device)
        if len(kind) == len(gradients):
            return found
        for (number, _), flag in zip(kind, found.unbind(), strict=True):
            flags[number] = flag
    return torch.stack(flags)


def _is_finite(values: Tensor) -> Tensor:
    if not values.numel():
        return torch.ones((), dtype=torch.bool, device=values.device)
    # Cheaper than a norm, exact in every type: the extremes are NaN if an element is, and overflow only if one has.
    return torch.isfinite(torch.stack(torch.aminmax(values))).all()


def _statistic(flags: Tensor) -> str:
    return "gradient" if bool(flags[0]) else "loss"


def _undo(parameters: Sequence[nn.Parameter], buffers: Sequence[Tensor], kept: Sequence[Tensor]) -> None:
    # Without a gradient, an optimizer leaves the parameter and its own state alone.
    for parameter in parameters:
        parameter.grad = None
    for buffer, value in zip(buffers, kept, strict=False):
        buffer.copy_(value)
