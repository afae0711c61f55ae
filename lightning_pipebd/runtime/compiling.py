"""Blocks under ``torch.compile``: each by itself, with the names of the model's parameters left as they are."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

import torch
from torch import nn

from lightning_pipebd.runtime.block_view import BlockView
from lightning_pipebd.runtime.blocks import call_block

__all__ = ["compile_options", "compiled_block"]


def compile_options(given: Any) -> dict[str, Any] | None:
    """Give the keyword arguments for ``torch.compile``; ``None`` compiles nothing.

    Args:
        given: ``True`` for torch's defaults, ``False`` for none, or keyword arguments.

    Raises:
        TypeError: It is neither a truth value nor a mapping.
        ValueError: ``torch.compile`` has no such argument.

    Example:
        >>> compile_options(True), compile_options({"mode": "reduce-overhead"}), compile_options(False)
        ({}, {'mode': 'reduce-overhead'}, None)
    """
    if isinstance(given, bool):
        return {} if given else None
    if not isinstance(given, Mapping):
        msg = (
            f"`compile` must be True, False or keyword arguments of torch.compile, but is {given!r}. "
            "Write for example `compile={'mode': 'reduce-overhead'}`."
        )
        raise TypeError(msg)
    known = sorted(inspect.signature(torch.compile).parameters.keys() - {"model", "disable"})
    if unknown := sorted(given.keys() - known):
        msg = f"`compile` must hold keyword arguments of torch.compile, but holds {unknown}. It takes {known}."
        raise ValueError(msg)
    return dict(given)


def compiled_block(block: nn.Module, name: str, options: Mapping[str, Any]) -> Callable[[Any], Any]:
    """Give :func:`~lightning_pipebd.runtime.blocks.call_block` of one block, compiled when it is first called.

    The block itself stays as it is: no wrapper enters the model, so that its parameters keep their names.

    Args:
        block: The block.
        name: What the compiler's messages call it.
        options: Keyword arguments of ``torch.compile``.
    """

    def call(boundary: Any) -> Any:
        return call_block(block, boundary)

    # The compiler keeps what it makes with the code, and only a few versions of each: blocks must not share it.
    code = call.__code__.replace(co_name=name)
    own = FunctionType(code, call.__globals__, name, call.__defaults__, call.__closure__)
    compiled: Callable[[Any], Any] = torch.compile(own, **options)
    if not isinstance(block, BlockView):
        return compiled

    def call_with_constants(boundary: Any) -> Any:
        block.bring_constants(boundary)
        return compiled(boundary)

    return call_with_constants
