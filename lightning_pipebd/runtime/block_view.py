"""Blocks that were cut out of a model: code of their own over modules and parameters that stay the model's.

::

    model            "encoder.layers.0"  "encoder.layers.1"  "encoder.pos_embedding"  ...
                             |                   |                    |
    BlockView  finds these by name in the model, whenever it runs or is asked for its parameters

So whatever happens to the model (moved, loaded, copied together with its blocks) happens to the blocks.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

__all__ = ["BlockCode", "BlockView", "WholeBoundary"]


@dataclass(frozen=True, slots=True)
class WholeBoundary:
    """Hands a boundary to a block as one value, so that a tuple of one tensor is not taken for the tensor."""

    value: Any


class BlockCode:
    """The operations of one block as a function of the model and the boundary; copies and pickles.

    Args:
        graph: The operations; the inputs are its placeholders, followed by the constants.
        inputs: Names of the inputs.
        constants: Tensors the operations use that are neither parameter nor buffer, by placeholder.
        takes_whole: Whether the only input is the boundary as a whole, whatever its type.
        takes_items: Whether the only uses of the boundary are items by number or key.
    """

    def __init__(
        self,
        graph: fx.Graph,
        inputs: tuple[str, ...],
        constants: Mapping[str, Tensor],
        *,
        takes_whole: bool,
        takes_items: bool,
    ) -> None:
        python_code = graph.python_code("self")
        self.source = python_code.src
        self.inputs = inputs
        self.constants = dict(constants)
        self.takes_whole = takes_whole
        self.takes_items = takes_items
        self._globals = python_code.globals
        self._function = self._compile()
        self._brought: tuple[torch.device, dict[str, Tensor]] | None = None

    def __call__(self, model: nn.Module, *args: Any, **kwargs: Any) -> Any:
        """Run the operations."""
        # A compiler would have them brought anew in every call: it runs after :meth:`bring_constants`.
        if self.constants and not torch.compiler.is_compiling():
            self.bring_constants((args, kwargs))
        constants = self.constants if self._brought is None else self._brought[1]
        return self._function(model, *args, **kwargs, **constants)

    def bring_constants(self, boundary: Any) -> None:
        """Have the constants on the device of a boundary, for the calls that follow.

        Code that asks a parameter or an input for its device has been recorded where the model was made.
        """
        leaves = (leaf for leaf in pytree.tree_leaves(boundary) if isinstance(leaf, Tensor))
        device = next((leaf.device for leaf in leaves), None)
        if device is None or (self._brought is not None and self._brought[0] == device):
            return
        # Training may save them for its backward pass, whoever was first to call.
        with torch.inference_mode(mode=False):
            moved = {name: value.to(device) for name, value in self.constants.items()}
        # The stand-ins of a compiler or a counter of operations must not outlive it.
        is_real = all(type(value) is type(self.constants[name]) for name, value in moved.items())
        self._brought = (device, moved) if is_real else None

    @property
    def globals(self) -> list[Any]:
        """Functions, modules and constants that the operations name."""
        # torch.fx adds some that code may need, such as `torch`.
        used = self._function.__code__.co_names
        return [value for name, value in self._globals.items() if name in used]

    def is_same(self, other: BlockCode) -> bool:
        """Say whether two codes do the same."""
        if (self.source, self.inputs, self.constants.keys()) != (other.source, other.inputs, other.constants.keys()):
            return False
        return all(value.equal(other.constants[name]) for name, value in self.constants.items())

    def __getstate__(self) -> dict[str, Any]:
        # Neither modules nor compiled functions can be pickled; both come back from their names and the source.
        modules = {name: value.__name__ for name, value in self._globals.items() if isinstance(value, ModuleType)}
        others = {name: value for name, value in self._globals.items() if name not in modules}
        left_out = ("_globals", "_function", "_brought")
        state = {name: value for name, value in self.__dict__.items() if name not in left_out}
        return state | {"modules": modules, "others": others}

    def __setstate__(self, state: dict[str, Any]) -> None:
        modules = {name: importlib.import_module(module) for name, module in state.pop("modules").items()}
        self._globals = modules | state.pop("others")
        self._brought = None
        self.__dict__.update(state)
        self._function = self._compile()

    def _compile(self) -> Callable[..., Any]:
        names = dict(self._globals)
        exec(compile(self.source, "<block>", "exec"), names)
        function: Callable[..., Any] = names["forward"]
        return function


class BlockView(nn.Module):
    """A block of a model as a module of its own, whose parameters have the names and identity they have in the model.

    Holds nothing itself: modules, parameters and buffers are looked up in the model. Moving or loading a block moves
    or loads that part of the model. Hooks of the containers it was cut from do not run.

    Args:
        model: The model it was cut from.
        subject: What messages call it.
        module_paths: Modules it calls.
        tensor_paths: Parameters and buffers it uses directly.
        opened: Containers it was cut from, which decide between the two codes.
        evaluation_code: What it does in ``eval()``.
        training_code: What it does in ``train()``; ``None`` where the model can only be cut for ``eval()``.
        draws: Whether the code itself (not a module it calls) draws random numbers.
        shared: Buffers that other blocks read as well, such as a table of positions; nobody may change them.
        borrowed: Those of them that belong to an earlier block.
    """

    _model: nn.Module

    def __init__(
        self,
        model: nn.Module,
        *,
        subject: str,
        module_paths: tuple[str, ...],
        tensor_paths: tuple[str, ...],
        opened: tuple[str, ...],
        evaluation_code: BlockCode,
        training_code: BlockCode | None,
        draws: bool,
        shared: tuple[str, ...] = (),
        borrowed: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__()
        # Past nn.Module on purpose: registered, the whole model would be part of every block.
        self.__dict__["_model"] = model
        self.draws_random_numbers = draws
        self.borrowed_buffers = borrowed
        self._shared = shared
        self._subject = subject
        self._module_paths = tuple(sorted(module_paths))
        self._tensor_paths = tuple(sorted(tensor_paths))
        self._opened = opened
        self._evaluation_code = evaluation_code
        self._training_code = training_code
        self._refresh()

    @property
    def takes_whole(self) -> bool:
        """Whether the block takes its boundary as one value."""
        return self._evaluation_code.takes_whole

    def bring_constants(self, boundary: Any) -> None:
        """Have what the block's code made while it was recorded on the device of a boundary."""
        for code in (self._evaluation_code, self._training_code):
            if code is not None and code.constants:
                code.bring_constants(boundary)

    @property
    def called_globals(self) -> list[Any]:
        """What the block's code calls beside the model's own modules."""
        codes = (self._evaluation_code, self._training_code)
        return [value for code in codes if code is not None for value in code.globals]

    @property
    def opened_modules(self) -> list[nn.Module]:
        """Containers of the model that the block was cut from."""
        return [self._model.get_submodule(path) for path in self._opened]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """Map a boundary to the next one.

        Raises:
            TypeError: The boundary does not have the parts that the block takes.
            RuntimeError: The model is in a mode that it could not be cut for, or changes a buffer that blocks share.
        """
        if not self._shared or torch.compiler.is_compiling():
            return self._run(args, kwargs)
        tensors = [self._model.get_buffer(path) for path in self._shared]
        versions = [None if tensor.is_inference() else tensor._version for tensor in tensors]
        output = self._run(args, kwargs)
        for path, tensor, version in zip(self._shared, tensors, versions, strict=True):
            if version is not None and (tensor._version != version or self._model.get_buffer(path) is not tensor):
                msg = (
                    f"{self._subject} must leave the buffer `{path}` as it is, because other blocks read it, too, but "
                    "changes it. Merge these blocks by leaving out the boundaries between them."
                )
                raise RuntimeError(msg)
        return output

    def _run(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        code = self._choose_code()
        if code.takes_whole:
            return code(self._model, self._pack(code, args, kwargs))
        if len(args) + len(kwargs) != len(code.inputs) or not kwargs.keys() <= {*code.inputs[len(args) :]}:
            given = ", ".join([*(f"#{index}" for index in range(len(args))), *kwargs]) or "nothing"
            msg = (
                f"{self._subject} must get exactly {', '.join(f'`{name}`' for name in code.inputs)}, but got {given}. "
                "An argument with a default keeps it in a model that is cut; list the blocks yourself to use it."
            )
            raise TypeError(msg)
        return code(self._model, *args, **kwargs)

    def _choose_code(self) -> BlockCode:
        if self._training_code is self._evaluation_code:
            return self._evaluation_code
        modes = {module.training for module in self.opened_modules}
        if modes == {False}:
            return self._evaluation_code
        if modes == {True} and self._training_code is not None:
            return self._training_code
        paths = ", ".join(f"`{path}`" if path else "the model" for path in self._opened)
        msg = f"{self._subject} does not do the same in `train()` and in `eval()`: {paths} must be all in one of them."
        if self._training_code is None:
            msg = f"{self._subject} could be cut for `eval()` only: {paths} must be in `eval()`, but are not."
        raise RuntimeError(msg)

    def _pack(self, code: BlockCode, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if len(args) != 1:
            return kwargs or args
        if isinstance(args[0], WholeBoundary):
            return args[0].value
        if code.takes_items and isinstance(args[0], Tensor):
            msg = (
                f"{self._subject} must know whether its boundary is a tensor or a tuple that holds one, but was called "
                "with a single tensor. Use `call_block(block, boundary)`."
            )
            raise TypeError(msg)
        return args[0]

    # What nn.Module reads from its own tables must be what the model holds now.

    def named_modules(
        self, memo: set[nn.Module] | None = None, prefix: str = "", remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Module]]:
        """Give the block itself and the model's modules in it, under their names in the model."""
        self._refresh()
        yield from super().named_modules(memo, prefix, remove_duplicate)

    def named_children(self) -> Iterator[tuple[str, nn.Module]]:
        """Give the outermost modules of the block."""
        self._refresh()
        return super().named_children()

    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Give the block's part of the model's ``state_dict``, under the same keys."""
        self._refresh()
        return super().state_dict(*args, **kwargs)

    def load_state_dict(self, *args: Any, **kwargs: Any) -> Any:
        """Load the block's part of the model."""
        self._refresh()
        result = super().load_state_dict(*args, **kwargs)
        self._write_back()
        return result

    def train(self, mode: bool = True) -> BlockView:
        """Set the mode of the block's modules and of the containers it was cut from."""
        for module in self.opened_modules:
            module.training = mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> BlockView:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call] # torch leaves it untyped
        self._write_back()
        return self

    def _refresh(self) -> None:
        for table in (self._modules, self._parameters, self._buffers, self._non_persistent_buffers_set):
            table.clear()
        for path in self._module_paths:
            owner, _, name = path.rpartition(".")
            self._mirror(owner)._modules[name] = self._model.get_submodule(path)
        for mine, models, name in self._tensor_owners():
            if name in models._parameters:
                mine._parameters[name] = models._parameters[name]
            elif name in models._buffers:
                mine._buffers[name] = models._buffers[name]
                mine._non_persistent_buffers_set |= {name} & models._non_persistent_buffers_set

    def _write_back(self) -> None:
        for mine, models, name in self._tensor_owners():
            if name in mine._parameters:
                models._parameters[name] = mine._parameters[name]
            elif name in mine._buffers:
                models._buffers[name] = mine._buffers[name]

    def _tensor_owners(self) -> Iterator[tuple[nn.Module, nn.Module, str]]:
        for path in self._tensor_paths:
            owner, _, name = path.rpartition(".")
            yield self._mirror(owner), self._model.get_submodule(owner), name

    def _mirror(self, path: str) -> nn.Module:
        """Give the module that stands for a container of the model, made where it is missing."""
        module: nn.Module = self
        for name in path.split(".") if path else ():
            child = module._modules.get(name)
            if child is None:
                child = module._modules[name] = nn.Module()
            module = child
        return module
