"""What the optimizer step of each block takes, measured on copies."""

from __future__ import annotations

from collections import OrderedDict, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.momentum import MomentumBlock, MomentumTeacher
from lightning_pipebd.runtime.sampling import device_clock, median_ms

__all__ = ["UpdateCosts", "measure_follow", "measure_updates"]

_NUM_STEPS = 7


class UpdateCosts(NamedTuple):
    """What updates cost.

    Args:
        update_ms: Per block, the time of its check and step beyond that of a step without parameters.
        optimizer_bytes: Per block, the state that the optimizer keeps.
        step_ms: Time of a step without parameters: paid once, however many blocks a rank has.
    """

    update_ms: tuple[float, ...]
    optimizer_bytes: tuple[int, ...]
    step_ms: float


def measure_updates(
    optimizers: Sequence[Optimizer],
    parameters: Sequence[Sequence[nn.Parameter]],
    device: torch.device,
    check: Callable[[Sequence[nn.Parameter]], object] = lambda _: None,
) -> UpdateCosts:
    """Time the optimizer step of every block, on copies of its parameters.

    Optimizers that are not torch's own are timed as AdamW: stepping a copy of one might change what it shares with the
    original.

    Args:
        optimizers: The user's; neither they nor their parameters change.
        parameters: Per block, what it trains.
        device: Where the blocks are updated.
        check: What is done to a block's parameters before its update.
    """
    now_ms = device_clock(device)
    step_ms, _ = _time_steps(optimizers, (), device, now_ms, check)
    found = [_time_steps(optimizers, own, device, now_ms, check) for own in parameters]
    return UpdateCosts(tuple(max(0.0, ms - step_ms) for ms, _ in found), tuple(size for _, size in found), step_ms)


def measure_follow(tensors: Sequence[Tensor], device: torch.device) -> float:
    """Time a momentum teacher's step, in milliseconds, on copies of these tensors of its."""
    own = [tensor.detach().to(device, copy=True) for tensor in tensors]
    teacher = MomentumTeacher([MomentumBlock(own, [tensor.clone() for tensor in own])])
    now_ms, times = device_clock(device), []
    for _ in range(_NUM_STEPS):
        start = now_ms()
        teacher.follow(0, 0.5)
        times.append(now_ms() - start)
    return median_ms(times[1:])


def _time_steps(
    optimizers: Sequence[Optimizer],
    parameters: Sequence[nn.Parameter],
    device: torch.device,
    now_ms: Callable[[], float],
    check: Callable[[Sequence[nn.Parameter]], object],
) -> tuple[float, int]:
    copies = {id(own): _copy(own, device) for own in parameters if own.requires_grad}
    clones = [_clone(optimizer, copies) for optimizer in optimizers]
    times = []
    for _ in range(_NUM_STEPS):
        start = now_ms()
        check(list(copies.values()))
        for clone in clones:
            clone.step()
        times.append(now_ms() - start)
    states = [leaf for clone in clones for leaf in pytree.tree_leaves(dict(clone.state)) if isinstance(leaf, Tensor)]
    # The first step makes the state.
    return median_ms(times[1:]), sum(state.nbytes for state in states)


def _copy(parameter: nn.Parameter, device: torch.device) -> nn.Parameter:
    copied = nn.Parameter(parameter.detach().to(device, copy=True))
    copied.grad = torch.zeros_like(copied)
    return copied


def _clone(optimizer: Optimizer, copies: dict[int, nn.Parameter]) -> Optimizer:
    groups = [
        {**group, "params": [copies[id(own)] for own in group["params"] if id(own) in copies]}
        for group in optimizer.param_groups
    ]
    if not type(optimizer).__module__.startswith("torch.optim"):
        return torch.optim.AdamW([{"params": group["params"]} for group in groups])
    clone: Any = object.__new__(type(optimizer))
    clone.__dict__.update(optimizer.__dict__)
    # A scheduler wraps `step` of the original; hooks are the user's.
    clone.__dict__.pop("step", None)
    clone._optimizer_step_pre_hooks = OrderedDict()
    clone._optimizer_step_post_hooks = OrderedDict()
    clone.param_groups = groups
    clone.state = defaultdict(dict)
    result: Optimizer = clone
    return result
