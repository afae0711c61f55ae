"""Running modules in training mode without leaving a trace: what they change is put back, bit by bit."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from lightning_pipebd.runtime.random_streams import borrowed_random_states, random_states

__all__ = ["at_work", "on_device", "preserved_modes", "preserved_random_states", "untouched"]

_Snapshot = list[tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]]


@contextmanager
def preserved_random_states() -> Iterator[None]:
    """Let the generators of torch (of all devices), Python and NumPy go on afterwards as if nothing was drawn.

    Example:
        >>> _ = torch.manual_seed(1)
        >>> with preserved_random_states():
        ...     first = torch.rand(2)
        >>> torch.equal(first, torch.rand(2))
        True
    """
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]  # torch's own function
    with torch.random.fork_rng(devices=devices), borrowed_random_states(random_states()):
        yield


@contextmanager
def preserved_modes(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Put each of these modules back into the mode, training or evaluation, that it was in."""
    before = [(module, module.training) for module in modules]
    try:
        yield
    finally:
        # Not by `train()`: users override it, for example to keep BatchNorm frozen.
        for module, was_training in before:
            module.training = was_training


@contextmanager
def on_device(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have modules on a device inside the context, and afterwards where they were."""
    homes = [next((parameter.device for parameter in module.parameters()), device) for module in modules]
    for module in modules:
        module.to(device)
    try:
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


@contextmanager
def untouched(modules: Iterable[nn.Module], *, alone: Iterable[nn.Module] = ()) -> Iterator[None]:
    """Put back what modules change of themselves inside the context, and keep their gradients aside.

    Put back are parameters, buffers and all other attributes: which objects they are, the values of tensors, and the
    entries of lists, dictionaries and sets. What an attribute's own attributes become is not seen.

    Args:
        modules: Modules that may run; a module inside one of them is covered, too.
        alone: Further modules, without what is inside them.

    Example:
        >>> norm = nn.BatchNorm1d(1)
        >>> with untouched([norm]):
        ...     _ = norm(torch.tensor([[1.0], [3.0]]))
        >>> norm.running_mean, norm.num_batches_tracked
        (tensor([0.]), tensor(0))
    """
    everything = {id(inner): inner for module in modules for inner in module.modules()}
    everything |= {id(module): module for module in alone}
    parameters = {id(own): own for module in everything.values() for own in module.parameters(recurse=False)}
    gradients = [(parameter, parameter.grad) for parameter in parameters.values()]
    snapshot: _Snapshot = [_take(table) for module in everything.values() for table in _tables(module)]
    for parameter in parameters.values():
        parameter.grad = None
    try:
        yield
    finally:
        with torch.no_grad():
            for saved in snapshot:
                _put_back(*saved)
        for parameter, gradient in gradients:
            parameter.grad = gradient


@contextmanager
def at_work(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    """Have modules on a device, and afterwards where and as they were."""
    with on_device(modules, device), untouched(modules):
        yield


def _tables(module: nn.Module) -> tuple[dict[str, Any], ...]:
    return module.__dict__, module._parameters, module._buffers


def _take(table: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any], list[tuple[Any, Any]]]:
    contents = [(value, _copy(value)) for value in table.values()]
    return table, dict(table), [(value, copied) for value, copied in contents if copied is not None]


def _copy(value: Any) -> Any:
    if isinstance(value, Tensor):
        is_plain = not is_lazy(value) and not value.is_meta and value.layout is torch.strided
        return value.detach().clone() if is_plain else None
    # Containers of torch's own tables are restored as entries of their own; here it is users' lists and counters.
    return copy.copy(value) if type(value) in (list, dict, set, deque) else None


def _put_back(table: dict[str, Any], entries: dict[str, Any], contents: list[tuple[Any, Any]]) -> None:
    for value, copied in contents:
        if isinstance(value, Tensor):
            # Only where it differs: writing counts as a change, and somebody may have kept the tensor for backward.
            if value.shape != copied.shape or not _are_equal(value, copied):
                value.detach().resize_(copied.shape).copy_(copied)
        elif isinstance(value, list):
            value[:] = copied
        else:
            value.clear()
            _refill(value, copied)
    table.clear()
    table.update(entries)


def _are_equal(left: Tensor, right: Tensor) -> bool:
    # As bytes, so that not-a-number equals itself.
    if left.is_quantized:
        return False
    bytes_of = (tensor.detach().contiguous().view(-1).view(torch.uint8) for tensor in (left, right))
    return torch.equal(*bytes_of)


def _refill(value: Any, copied: Any) -> None:
    if isinstance(value, deque):
        value.extend(copied)
    else:
        value.update(copied)
