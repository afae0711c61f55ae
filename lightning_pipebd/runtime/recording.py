"""Records what a model does between its modules, in one mode, and leaves the model as it was."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from lightning_pipebd.runtime.random_streams import random_states, set_random_states
from lightning_pipebd.runtime.side_effects import preserved_modes
from lightning_pipebd.runtime.tracing import (
    AUTOCAST_DEVICES,
    BoundaryEnd,
    BoundaryTracer,
    PartitionError,
    name_module,
    way_out,
)

__all__ = ["Recording", "record"]

# Recording replaces methods of `nn.Module` for the whole process.
_LOCK = threading.Lock()

_CONSTANT_PREFIX = "_tensor_constant"


@dataclass(frozen=True, slots=True, kw_only=True)
class Recording:
    """The operations of a model in one mode, its opened containers dissolved.

    Attributes:
        graph: All operations in order; targets are names in the model.
        ends: Where each boundary lies, keyed by path. The key ``""`` is the model's output.
        inputs: Arguments of the model's ``forward`` without a default, in order.
        constants: Tensors that an opened ``forward`` made from no input, keyed by the name the graph reads them by.
        opened: Paths of the opened containers.
    """

    graph: fx.Graph
    ends: Mapping[str, BoundaryEnd]
    inputs: tuple[str, ...]
    constants: Mapping[str, Tensor]
    opened: tuple[str, ...]


def record(model: nn.Module, boundaries: Sequence[str], *, role: str, training: bool) -> Recording:
    """Record a model's operations in training or in evaluation mode; the model is left as it was.

    Args:
        model: The model; its leaf modules are not run.
        boundaries: Paths as ``model.named_modules()`` gives them.
        role: ``"teacher"`` or ``"student"``, for messages.
        training: Mode to record in.

    Raises:
        PartitionError: An opened container does something that a recording would lose or freeze.
    """
    tracer = BoundaryTracer(model, boundaries, role)
    containers = tracer.containers()
    _check_hooks(containers, role)
    # Training is recorded with autocast on, evaluation with autocast off: code that forces either is seen in one.
    with _LOCK, _modes(model, training), _settings(autocast=training), _guard(containers, role) as constants:
        graph = tracer.trace_model()
    return Recording(
        graph=graph, ends=tracer.ends, inputs=tracer.inputs, constants=constants, opened=tuple(sorted(containers))
    )


@contextmanager
def _settings(*, autocast: bool) -> Iterator[None]:
    before = [torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES]
    try:
        for device in AUTOCAST_DEVICES:
            torch.set_autocast_enabled(device, autocast)
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        for device, enabled in zip(AUTOCAST_DEVICES, before, strict=True):
            torch.set_autocast_enabled(device, enabled)


@contextmanager
def _modes(model: nn.Module, training: bool) -> Iterator[None]:
    # Not `model.train()`: users override it, for example to keep BatchNorm frozen.
    with preserved_modes(model.modules()):
        for module in model.modules():
            module.training = training
        yield


@contextmanager
def _guard(containers: Mapping[str, nn.Module], role: str) -> Iterator[dict[str, Tensor]]:
    """Undo what opened containers did beside computing, and raise if they did; give the constants they made."""
    constants: dict[str, Tensor] = {}
    states = random_states()
    before = {path: [dict(values) for values in _attributes(module)] for path, module in containers.items()}
    changes: list[str] = []
    try:
        yield constants
    finally:
        for path, module in containers.items():
            for now, then in zip(_attributes(module), before[path], strict=True):
                changed = [name for name in {**then, **now} if now.get(name) is not then.get(name)]
                made = {name: now[name] for name in changed if not path and name.startswith(_CONSTANT_PREFIX)}
                constants.update(made)
                changes += [f"{name_module(path, role)} sets `{name}`" for name in changed if name not in made]
                if changed:
                    now.clear()
                    now.update(then)
        drew = not _is_same(states, random_states())
        set_random_states(states)
    if drew:
        changes.append("one draws random numbers, which would be the same on every batch")
    if changes:
        msg = (
            f"The `forward` of a module that holds a boundary must only compute, but {changes[0]}. Move that into a "
            f"module of the {role} without a boundary inside. {way_out(role, also=True)}"
        )
        raise PartitionError(msg)


def _is_same(first: Mapping[str, Any], second: Mapping[str, Any]) -> bool:
    """Compare the states of generators; NumPy's is a tuple with an array in it."""
    if "numpy" in first and "numpy" in second:
        (_, keys, *rest), (_, other_keys, *other_rest) = first["numpy"], second["numpy"]
        if rest != other_rest or (keys != other_keys).any():
            return False
    return torch.equal(first["torch"], second["torch"]) and bool(first["python"] == second["python"])


def _attributes(module: nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    return module.__dict__, module._buffers


def _check_hooks(containers: Mapping[str, nn.Module], role: str) -> None:
    for path, module in containers.items():
        hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
        if any(hooks):
            msg = (
                f"{name_module(path, role)} must have no hooks to be cut inside, because its blocks never call it, but "
                f"it has. Remove them, or hook a module inside it. {way_out(role, also=True)}"
            )
            raise PartitionError(msg)
