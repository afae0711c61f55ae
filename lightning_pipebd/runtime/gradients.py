"""Gradients of student blocks whose rows are shared by several ranks, and the loss scale of each block."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import reduce
from typing import NamedTuple

import torch
from torch import Tensor, nn

from lightning_pipebd.planning.buckets import find_buckets
from lightning_pipebd.planning.pipeline_program import PipelineProgram
from lightning_pipebd.planning.program import Program
from lightning_pipebd.runtime.transport import Pending, Transport

__all__ = ["BlockScaler", "GradientReducer", "clip_norm_over_ranks"]


class GradientReducer:
    """Sum the gradients of shared student blocks over the ranks that share them, small blocks together.

    Of parameters that no optimizer has, gradients add up from step to step: sums of sums would grow without bound.

    Args:
        transport: Carries the sums.
        parameters: Per block of this rank, its parameters, in the same order on every rank that shares the block.

    Attributes:
        trained: Gives the ``id`` of every parameter that an optimizer has; ``None`` sums the gradients of all.
    """

    def __init__(self, transport: Transport, parameters: Mapping[int, Sequence[nn.Parameter]]) -> None:
        self._transport = transport
        self._parameters = parameters
        self._gradient_bytes = {
            block: sum(each.nbytes for each in own if each.requires_grad) for block, own in parameters.items()
        }
        self._program: Program | PipelineProgram | None = None
        self._buckets: dict[int, tuple[int, ...]] = {}
        self._under_way: list[_Sum] = []
        self.trained: Callable[[], frozenset[int]] | None = None

    def begin(self, program: Program | PipelineProgram) -> None:
        """Make ready for the REDUCEs of a program."""
        if program is not self._program:
            self._program, self._buckets = program, find_buckets(program, self._gradient_bytes)

    def start(self, block: int, ranks: tuple[int, ...]) -> None:
        """**Collective** over ``ranks``: give a block's gradients to their sum; they change in :meth:`finish`.

        The sum begins with the last block of its bucket.
        """
        by_dtype: dict[torch.dtype, list[nn.Parameter]] = {}
        trained = None if self.trained is None else self.trained()
        for each in self._buckets.get(block, ()):
            for parameter in self._parameters[each]:
                if parameter.grad is not None and parameter.grad.is_sparse:
                    msg = (
                        f"Student block {each}, shared by ranks {ranks}, must have dense gradients, but has a sparse "
                        "one. Keep the block on one rank, or make its embedding with `sparse=False`."
                    )
                    raise ValueError(msg)
                if parameter.requires_grad and (trained is None or id(parameter) in trained):
                    by_dtype.setdefault(parameter.dtype, []).append(parameter)
        for parameters in by_dtype.values():
            self._under_way.append(self._start_sum(parameters, ranks))

    def _start_sum(self, parameters: list[nn.Parameter], ranks: tuple[int, ...]) -> _Sum:
        gradients = [torch.zeros_like(each) if each.grad is None else each.grad for each in parameters]
        # The presence of each gradient travels behind them: a rank without rows has none, and zeros are not none.
        presence = _flags([each.grad is not None for each in parameters], gradients[0])
        return _Sum(self._transport.all_reduce([*gradients, presence], ranks), parameters, gradients, presence)

    def finish(self) -> None:
        """Wait for all sums; what they say is in the gradients then.

        A parameter that no rank had a gradient for keeps none: optimizers skip it, as they do on one process.
        """
        for each in self._under_way:
            each.pending.wait()
            if all(parameter.grad is not None for parameter in each.parameters):
                continue  # reading the presence would wait for the device
            for parameter, gradient, ranks_with in zip(
                each.parameters, each.gradients, each.presence.tolist(), strict=True
            ):
                if parameter.grad is None and ranks_with:
                    parameter.grad = gradient
        self._under_way.clear()


class _Sum(NamedTuple):
    """Gradients of one type of one bucket that are being summed, with how many ranks had each."""

    pending: Pending
    parameters: list[nn.Parameter]
    gradients: list[Tensor]
    presence: Tensor


def _flags(values: Sequence[bool], like: Tensor) -> Tensor:
    """Give truth values as numbers beside a tensor, without waiting for its device."""
    if all(values):
        return like.new_ones(len(values))
    return _brought(values, like.dtype, like.device)


def _brought(values: Sequence[int], dtype: torch.dtype, device: torch.device) -> Tensor:
    # From pinned memory, or the copy would wait for all that the device has to do.
    host = torch.tensor(values, dtype=dtype, device="cpu", pin_memory=device.type == "cuda")
    return host.to(device, non_blocking=True)


def clip_norm_over_ranks(
    transport: Transport,
    parameters: Sequence[nn.Parameter],
    numbers: Sequence[int],
    dtypes: Sequence[torch.dtype],
    *,
    max_norm: float,
    device: torch.device,
    is_first: bool = True,
) -> Tensor:
    """**Collective** over all ranks: clip gradients by their norm over all ranks, and give that norm.

    The ranks exchange the norm of each gradient, not the sum of their squares, so that the norm of all is computed as
    one process computes it, to the last bit.

    Args:
        transport: Reaches the other ranks.
        parameters: Parameters of this rank.
        numbers: Number of each among the parameters of all ranks.
        dtypes: Type of every parameter of all ranks.
        max_norm: Norm that gradients are clipped to.
        device: Where this rank computes.
        is_first: Whether this rank tells its norms; of ranks that have the same parameters, one does.
    """
    local = [(number, p.grad) for number, p in zip(numbers, parameters, strict=True) if p.grad is not None]
    local = local if is_first else []
    table = torch.zeros(2, len(dtypes), dtype=torch.float64, device=device)
    by_dtype: dict[torch.dtype, tuple[list[int], list[Tensor]]] = {}
    for (number, _), norm in zip(local, torch._foreach_norm([grad for _, grad in local]) if local else (), strict=True):
        known = by_dtype.setdefault(norm.dtype, ([], []))
        known[0].append(number)
        known[1].append(norm)
    for places, norms in by_dtype.values():
        index = _brought(places, torch.int64, device)
        table[0].index_copy_(0, index, torch.stack(norms).to(table))
        table[1].index_fill_(0, index, 1.0)
    if transport.num_ranks > 1:
        transport.all_reduce([table], tuple(range(transport.num_ranks))).wait()
    is_present = table[1] > 0
    present = [dtype for dtype, flag in zip(dtypes, is_present.tolist(), strict=True) if flag]
    if not present:
        return torch.zeros((), device=device)
    total: Tensor = torch.linalg.vector_norm(table[0][is_present].to(reduce(torch.promote_types, present)))
    nn.utils.clip_grads_with_norm_(parameters, max_norm, total)
    return total


class BlockScaler:
    """The loss scale of one student block in float16: an overflow skips this block's update, and no other's.

    Args:
        scaler: Gradient scaler of this block alone.
        parameters: The block's parameters.
    """

    def __init__(self, scaler: torch.amp.GradScaler, parameters: Sequence[nn.Parameter]) -> None:
        self.scaler = scaler
        self._optimizer = _ScaleProbe(parameters)

    def scale(self, loss: Tensor) -> Tensor:
        """Multiply the loss by the block's scale."""
        return self.scaler.scale(loss)

    def unscale(self) -> Tensor | None:
        """Divide the block's gradients by its scale.

        Returns:
            Zero if all of them are finite, unread from the device; ``None`` if there is no gradient.
        """
        probe = self._optimizer
        if all(parameter.grad is None for parameter in probe.parameters):
            return None
        # A rank without rows of the first batch has scaled no loss yet, and the scaler knows its scale only since then.
        self.scaler.scale(torch.zeros((), device=probe.parameters[0].device))
        self.scaler.unscale_(probe)
        self.scaler.step(probe)
        self.scaler.update()
        return probe.overflow

    def drop(self) -> None:
        """Take the block's gradients away: one was not finite."""
        for parameter in self._optimizer.parameters:
            parameter.grad = None


class _ScaleProbe(torch.optim.Optimizer):
    """An optimizer that only notes what the scaler found, as those that skip a step on the device do."""

    _step_supports_amp_scaling = True
    found_inf: Tensor  # the scaler sets it for the time of a step

    def __init__(self, parameters: Sequence[nn.Parameter]) -> None:
        super().__init__([{"params": list(parameters)}], {})  # a group may be empty, and so may a block
        self.parameters = list(parameters)
        self.overflow: Tensor | None = None

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        self.overflow = self.found_inf
