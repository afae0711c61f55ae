"""A model divided into blocks, and how a block is called."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import CellType, FunctionType, ModuleType, NoneType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.block_view import WholeBoundary
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["CallableBlock", "Partition", "UncutTail", "call_block", "make_partition"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Partition:
    """A model divided into blocks that, one after another, do what the model does.

    Copied or pickled together with its model it belongs to the copy. Owns nothing: keep it out of ``nn.Module``'s
    tables, or every parameter would be there twice.

    Attributes:
        blocks: Block *i* maps boundary *i* to boundary *i + 1*, see :func:`call_block`. Boundary 0 is the
            model's input.
        tail: What the model does after the last boundary; ``None`` where the last boundary is the model's output, and
            for blocks that were listed. Raises when called where it needs more than the last boundary.
        parameter_names: Per block, the names of its parameters in the model.
        buffer_names: Per block, the names of its buffers in the model, persistent or not.
    """

    blocks: tuple[nn.Module, ...]
    tail: nn.Module | None
    parameter_names: tuple[tuple[str, ...], ...]
    buffer_names: tuple[tuple[str, ...], ...]

    def parameters(self, model: nn.Module, block: int) -> list[nn.Parameter]:
        """Give a block's parameters in the model, or in a copy of it."""
        return [_find(model, name) for name in self.parameter_names[block]]

    def buffers(self, model: nn.Module, block: int) -> list[Tensor]:
        """Give a block's buffers in the model, or in a copy of it."""
        return [_find(model, name) for name in self.buffer_names[block]]


def _find(model: nn.Module, name: str) -> Any:
    """Give a model's tensor, as ``get_parameter`` does, at a third of its time: blocks ask at every step."""
    path, _, own_name = name.rpartition(".")
    owner: nn.Module | None = model
    for part in path.split(".") if path else ():
        owner = owner._modules.get(part) if owner is not None else None
    found = owner._parameters.get(own_name, owner._buffers.get(own_name)) if owner is not None else None
    return getattr(model.get_submodule(path), own_name) if found is None else found


class UncutTail(nn.Module):
    """Stands for the end of a model that needs more than the last boundary, as a decoder with skip connections does.

    Args:
        reason: What it needs.
    """

    def __init__(self, reason: str) -> None:
        super().__init__()
        self.reason = reason

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Raise the reason.

        Raises:
            PartitionError: Always.
        """
        raise PartitionError(self.reason)


class CallableBlock(nn.Module):
    """A block made of a function and the modules that it uses.

    Args:
        function: Maps the parts of a boundary to the next boundary.
        modules: Modules of the model whose parameters the function uses; a parameter that the model holds itself as
            ``nn.ParameterList([model.token])``.

    To be copied with its model, the function must find the modules in its closure, in its defaults or as a bound
    method's object; those it finds as global names stay the original's. To be pickled it must be no lambda.

    Example:
        >>> embedding, norm = nn.Embedding(5, 4), nn.LayerNorm(4)
        >>> block = CallableBlock(lambda tokens: norm(embedding(tokens)), modules=[embedding, norm])
        >>> [tuple(parameter.shape) for parameter in block.parameters()]
        [(5, 4), (4,), (4,)]
    """

    def __init__(self, function: Callable[..., Any], modules: Sequence[nn.Module] = ()) -> None:
        super().__init__()
        self.function = function
        self.modules_used = nn.ModuleList(modules)
        self._is_checked = False

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Call the function.

        Raises:
            PartitionError: The function uses a trainable parameter of no module that was named.
        """
        if self._is_checked or not torch.is_grad_enabled() or torch.compiler.is_compiling():
            return self.function(*args, **kwargs)
        # Before the call, which may change its inputs in place.
        before = {leaf.grad_fn for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)}
        output = self.function(*args, **kwargs)
        self._check_parameters(output, (args, kwargs), before)
        self._is_checked = True
        return output

    def _check_parameters(self, output: Any, given: Any, before: Collection[Any]) -> None:
        """Look at what the gradients of an output would reach; nobody would train it as this block's."""
        known = {id(value) for value in (*self.parameters(), *pytree.tree_leaves(given))}
        reached = [leaf.grad_fn for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
        seen = set(before)
        while reached:
            node = reached.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            reached += [next_node for next_node, _ in node.next_functions]
            leaf = getattr(node, "variable", None)
            if isinstance(leaf, nn.Parameter) and id(leaf) not in known:
                msg = (
                    "A `CallableBlock` must use no trainable parameters but those of its `modules`, but uses one of "
                    f"shape {tuple(leaf.shape)}. Name the module that holds it; if the model itself does, name "
                    "`nn.ParameterList([model.name])`."
                )
                raise PartitionError(msg)

    def __deepcopy__(self, memo: dict[int, Any]) -> CallableBlock:
        copied = type(self).__new__(type(self))
        memo[id(self)] = copied
        for name, value in self.__dict__.items():
            # Python does not copy functions, so a copied block would go on using the original's modules.
            copied.__dict__[name] = _copy_captured(value, memo) if name == "function" else copy.deepcopy(value, memo)
        return copied


def call_block(block: nn.Module, boundary: Any) -> Any:
    """Map a boundary to the next one: the parts of a tuple are arguments, those of a dict keyword arguments.

    A block that was cut out of a model gets what its boundary module returned just as it was, also a tuple of one
    tensor or a named tuple, so use this instead of calling the block.

    Example:
        >>> call_block(CallableBlock(lambda hidden, scale: (hidden * scale, scale)), (2, 3))
        (6, 3)
    """
    if getattr(block, "takes_whole", False):
        return block(WholeBoundary(boundary))
    if isinstance(boundary, Mapping):
        return block(**boundary)
    if isinstance(boundary, tuple):
        return block(*boundary)
    return block(boundary)


def make_partition(model: nn.Module, blocks: tuple[nn.Module, ...], tail: nn.Module | None) -> Partition:
    """Note which of a model's parameters and buffers each block uses, under their names in the model.

    A buffer that several blocks only read belongs to the first of them.
    """
    used = [({id(value) for value in block.parameters()}, _own_buffers(model, block)) for block in blocks]
    return Partition(
        blocks=blocks,
        tail=tail,
        parameter_names=tuple(
            tuple(name for name, value in model.named_parameters() if id(value) in parameters) for parameters, _ in used
        ),
        buffer_names=tuple(
            tuple(name for name, value in model.named_buffers() if id(value) in buffers) for _, buffers in used
        ),
    )


def _own_buffers(model: nn.Module, block: nn.Module) -> set[int]:
    borrowed = {id(model.get_buffer(path)) for path in getattr(block, "borrowed_buffers", ())}
    return {id(value) for value in block.buffers()} - borrowed


def _copy_captured(value: Any, memo: dict[int, Any]) -> Any:
    """Copy what a function holds, as deepcopy does, but functions too."""
    if id(value) in memo:
        return memo[id(value)]
    if isinstance(value, FunctionType):
        return _copy_function(value, memo)
    if isinstance(value, functools.partial):
        function, args, keywords = (_copy_captured(part, memo) for part in (value.func, value.args, value.keywords))
        return functools.partial(function, *args, **keywords)
    if type(value) is tuple:
        return tuple(_copy_captured(item, memo) for item in value)
    if type(value) is list:
        items: list[Any] = []
        memo[id(value)] = items
        items.extend(_copy_captured(item, memo) for item in value)
        return items
    if type(value) is dict:
        table: dict[Any, Any] = {}
        memo[id(value)] = table
        table.update({key: _copy_captured(item, memo) for key, item in value.items()})
        return table
    return value if isinstance(value, ModuleType) else copy.deepcopy(value, memo)


def _copy_function(function: FunctionType, memo: dict[int, Any]) -> FunctionType:
    defaults = (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values())
    if not function.__closure__ and all(isinstance(value, (int, float, str, NoneType)) for value in defaults):
        return function
    cells = tuple(CellType() for _ in function.__closure__ or ())
    copied = FunctionType(function.__code__, function.__globals__, function.__name__, None, cells or None)
    # Before anything it holds is copied: a function may capture itself.
    memo[id(function)] = copied
    copied.__dict__.update(function.__dict__)
    copied.__qualname__, copied.__module__ = function.__qualname__, function.__module__
    copied.__defaults__ = _copy_captured(function.__defaults__, memo)
    copied.__kwdefaults__ = _copy_captured(function.__kwdefaults__, memo)
    for mine, theirs in zip(cells, function.__closure__ or (), strict=True):
        # A cell is empty while its variable is not assigned where the function was defined.
        with contextlib.suppress(ValueError):
            mine.cell_contents = _copy_captured(theirs.cell_contents, memo)
    return copied
