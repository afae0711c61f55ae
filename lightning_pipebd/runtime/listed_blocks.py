"""Blocks that are listed instead of cut, for models that no recording can follow."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from types import MethodType
from typing import Any

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.blocks import CallableBlock, Partition, make_partition
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["as_module", "explicit_blocks"]


def explicit_blocks(
    model: nn.Module, blocks: Sequence[nn.Module | Callable[..., Any]], *, role: str = "student"
) -> Partition:
    """Take a model's blocks as they are listed, for models that cannot be cut at module paths.

    A boundary may then be any tree of tensors, see :func:`call_block`.

    Args:
        model: The model whose parameters and buffers the blocks use.
        blocks: Modules, :class:`CallableBlock` or functions without parameters, in order.
        role: ``"teacher"`` or ``"student"``, for messages.

    Raises:
        PartitionError: There are no blocks; a block holds a parameter or buffer that is not the model's; a plain
            function uses parameters.
        TypeError: A block is neither a module nor callable.

    Example:
        >>> model = nn.ModuleDict({"embed": nn.Embedding(5, 4), "head": nn.Linear(4, 2)})
        >>> explicit_blocks(model, [model["embed"], model["head"]]).parameter_names
        (('embed.weight',), ('head.weight', 'head.bias'))
    """
    if not blocks:
        msg = f"`{role}_blocks` must list at least one block, but is empty."
        raise PartitionError(msg)
    modules = tuple(as_module(block, f"`{role}_blocks[{index}]`") for index, block in enumerate(blocks))
    known = {id(value) for value in (*model.parameters(), *model.buffers())}
    for index, module in enumerate(modules):
        foreign = [name for name, value in _named_tensors(module) if id(value) not in known]
        if foreign:
            msg = (
                f"`{role}_blocks[{index}]` must be made of modules of the {role}, but its `{foreign[0]}` is no "
                f"parameter or buffer of `{type(model).__name__}`. Register the module in the {role}, "
                f"or use the {role}'s own."
            )
            raise PartitionError(msg)
    return make_partition(model, modules, None)


def as_module(block: Any, subject: str) -> nn.Module:
    """Give a block as a module.

    Raises:
        PartitionError: A plain function uses parameters.
        TypeError: It is neither a module nor callable.
    """
    if isinstance(block, nn.Module):
        return block
    if not callable(block):
        msg = f"{subject} must be a module or callable, but is {type(block).__name__}."
        raise TypeError(msg)
    for name, value in _captured(block):
        parameters = (
            value.parameters() if isinstance(value, nn.Module) else [value] if isinstance(value, Tensor) else []
        )
        if any(parameter.requires_grad or isinstance(parameter, nn.Parameter) for parameter in parameters):
            msg = (
                f"{subject} must use no parameters as a plain function, but uses `{name}`. Say which modules it uses: "
                "`CallableBlock(function, modules=[...])`."
            )
            raise PartitionError(msg)
    return CallableBlock(block)


def _captured(function: Any) -> Iterator[tuple[str, Any]]:
    """Give what a function can reach without being handed it, as far as Python tells."""
    if isinstance(function, functools.partial):
        yield from _captured(function.func)
        values: dict[str, Any] = {f"argument {index}": value for index, value in enumerate(function.args)}
        values.update(function.keywords)
    elif isinstance(function, MethodType):
        values = {"self": function.__self__}
    elif inspect.isfunction(function):
        try:
            variables = inspect.getclosurevars(function)
            values = {**variables.nonlocals, **variables.globals}
        except ValueError:  # a variable that is not yet assigned
            values = {}
        arguments = inspect.signature(function).parameters
        values.update({name: argument.default for name, argument in arguments.items()})
    else:
        values = dict(getattr(function, "__dict__", {}))
    for name, value in values.items():
        yield from ((name, leaf) for leaf in pytree.tree_leaves(value))


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from module.named_parameters()
    yield from module.named_buffers()
