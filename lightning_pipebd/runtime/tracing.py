"""Follows a model's `forward` and notes its operations, opening only the containers that hold a boundary.

Every other module stays one operation, run later as the real module. That keeps dropout, BatchNorm and whatever leaf
modules decide by themselves alive, and following a large model takes milliseconds.
"""

from __future__ import annotations

import inspect
import math
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TraceError

__all__ = ["AUTOCAST_DEVICES", "BoundaryEnd", "BoundaryTracer", "PartitionError", "name_module", "way_out"]

AUTOCAST_DEVICES = ("cpu", "cuda")


class PartitionError(ValueError):
    """A model cannot be divided into the blocks asked for; the message names the place and the way out."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundaryEnd:
    """Where a boundary lies in a recording: after ``position`` operations, with the activation ``value``."""

    position: int
    value: Any


class BoundaryTracer(fx.Tracer):
    """Opens the containers of the boundaries and notes where the last call of each boundary ends.

    Args:
        model: The model to follow; its leaf modules are not run.
        boundaries: Paths as ``model.named_modules()`` gives them.
        role: ``"teacher"`` or ``"student"``, for messages.

    Attributes:
        ends: Where each boundary lies, keyed by path. The key ``""`` is the model's output.
        inputs: Arguments of ``forward`` without a default, in order.
    """

    # A buffer that is sliced or moved in an opened `forward` must be read when the block runs, not now.
    proxy_buffer_attributes = True

    def __init__(self, model: nn.Module, boundaries: Sequence[str], role: str) -> None:
        super().__init__(autowrap_modules=(math,))
        self.ends: dict[str, BoundaryEnd] = {}
        self.inputs: tuple[str, ...] = ()
        self._model = model
        self._role = role
        self._boundaries = tuple(boundaries)
        self._paths = {id(module): path for path, module in model.named_modules()}
        self._opened = {id(model.get_submodule(prefix)) for path in boundaries for prefix in _proper_prefixes(path)}
        # Of an exception's innermost container; on purpose not taken back where one is raised.
        self._open_paths = [""]
        self._thread = threading.get_ident()
        self._settings: tuple[bool, ...] = ()

    def containers(self) -> dict[str, nn.Module]:
        """Give the containers to be opened by path, the model itself under the empty path."""
        return {path: self._model.get_submodule(path) for key, path in self._paths.items() if key in self._opened}

    def trace_model(self) -> fx.Graph:
        """Record the whole model.

        Raises:
            PartitionError: It cannot be recorded; the message names the innermost opened container.
        """
        self._settings = self._read_settings()
        try:
            graph = self.trace(self._model)
        except PartitionError:
            raise
        except TraceError as error:
            raise self._error("do the same operations on every batch", "a value decides what is done", error) from error
        except Exception as error:
            raise self._error("be made of operations that can be recorded", "one could not", error) from error
        self.ends[""] = BoundaryEnd(position=len(graph.nodes) - 1, value=next(iter(reversed(graph.nodes))).args[0])
        return graph

    def create_args_for_root(
        self, root_fn: Callable[..., Any], is_module: bool, concrete_args: Any = None
    ) -> tuple[Callable[..., Any], list[Any]]:
        """Make an input of every argument without a default; the others keep their default, also ``None``."""
        # From the instance, whose `forward` may have been replaced.
        forward = self._model.forward
        positional: list[fx.Proxy] = []
        keywords: dict[str, fx.Proxy] = {}
        for parameter in inspect.signature(forward).parameters.values():
            is_variable = parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD)
            if is_variable or parameter.default is not parameter.empty:
                continue
            proxy = self.create_proxy("placeholder", parameter.name, (), {})
            if parameter.kind is parameter.KEYWORD_ONLY:
                keywords[parameter.name] = proxy
            else:
                positional.append(proxy)
            self.inputs = (*self.inputs, parameter.name)
        if not self.inputs:
            msg = (
                f"{name_module('', self._role)} must have an input without a default to be cut, but its signature is "
                f"`forward{inspect.signature(forward)}`. {way_out(self._role)} `layer_blocks` makes them of a model "
                "with a list of layers."
            )
            raise PartitionError(msg)

        def run() -> Any:
            return forward(*positional, **keywords)

        return run, []

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Run opened containers, record any other module as one operation."""
        path = self._paths.get(id(m))
        # Recording patches `nn.Module` for all threads, and a module made in `forward` (a slice of an nn.Sequential)
        # has no name in the model: both are simply run.
        if threading.get_ident() != self._thread or path is None:
            return forward(*args, **kwargs)
        if id(m) in self._opened:
            self._open_paths.append(path)
            value = forward(*args, **kwargs)
            self._open_paths.pop()
        else:
            value = self.create_proxy("call_module", path, args, kwargs)
        if path in self._boundaries:
            nodes = self._to_nodes(value)
            self.ends[path] = BoundaryEnd(position=len(self.graph.nodes), value=nodes)
        return value

    def getattr(self, attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Any]) -> Any:
        """Record the use of parameters and buffers, by this thread only."""
        if threading.get_ident() != self._thread:
            return attr_val
        return super().getattr(attr, attr_val, parameter_proxy_cache)

    def create_node(self, kind: str, *args: Any, **kwargs: Any) -> fx.Node:
        """Refuse an operation inside a context that the recording would lose."""
        if kind.startswith("call_") and self._read_settings() != self._settings:
            msg = (
                f"{name_module(self._open_paths[-1], self._role)} must leave gradient and autocast mode alone to be "
                f"cut{self._inside()}, but its `forward` computes in another mode, which the blocks would not repeat. "
                f"Move that part into a module of its own without a boundary inside. {way_out(self._role, also=True)}"
            )
            raise PartitionError(msg)
        return super().create_node(kind, *args, **kwargs)

    def _read_settings(self) -> tuple[bool, ...]:
        # A teacher never computes gradients, so it may say so itself.
        gradient = self._role == "teacher" or (torch.is_grad_enabled() and not torch.is_inference_mode_enabled())
        return (gradient, *(torch.is_autocast_enabled(device) for device in AUTOCAST_DEVICES))

    def _to_nodes(self, value: Any) -> Any:
        if isinstance(value, tuple):
            return tuple(self._to_nodes(item) for item in value)
        if isinstance(value, dict):
            return {key: self._to_nodes(item) for key, item in value.items()}
        return self.create_arg(value)

    def _inside(self) -> str:
        path = self._open_paths[-1]
        inside = [boundary for boundary in self._boundaries if not path or boundary.startswith(f"{path}.")]
        return f" at `{inside[0]}`" if inside else ""

    def _error(self, law: str, finding: str, error: Exception) -> PartitionError:
        path = self._open_paths[-1]
        outside = f"Choose boundaries outside `{path}`. " if path else ""
        return PartitionError(
            f"{name_module(path, self._role)} must {law} to be cut{self._inside()}, but in its `forward` {finding} "
            f"({type(error).__name__}: {error}). {outside}{way_out(self._role, also=bool(path))}"
        )


def name_module(path: str, role: str) -> str:
    """Name a module of a model in a message.

    Example:
        >>> name_module("layer1", "student"), name_module("", "student")
        ('`layer1` of the student', '`student`')
    """
    return f"`{path}` of the {role}" if path else f"`{role}`"


def way_out(role: str, *, also: bool = False) -> str:
    """Say how any model can be divided: by listing its blocks."""
    return f"{'Or pass' if also else 'Pass'} the blocks yourself (`{role}_blocks`)."


def _proper_prefixes(path: str) -> list[str]:
    parts = path.split(".")
    return [".".join(parts[:count]) for count in range(len(parts))]
