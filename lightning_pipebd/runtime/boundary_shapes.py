"""Finds the shapes of all boundaries, and whether teacher and student agree on them, without training anything."""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime.blocks import Partition, call_block
from lightning_pipebd.runtime.candidates import target_of
from lightning_pipebd.runtime.side_effects import preserved_modes
from lightning_pipebd.runtime.tracing import PartitionError

__all__ = ["boundary_shapes", "check_shapes"]

_Modules = TypeVar("_Modules", bound="Sequence[Any]")
_Result = TypeVar("_Result")

# What a relay hands on beside tensors: sizes of an image, flags.
_PLAIN = (type(None), bool, int, float, str)


class _BlockRunError(PartitionError):
    """A block raised; on meta tensors it may have been for want of a meta kernel."""


def boundary_shapes(partition: Partition, example: Any) -> list[Any]:
    """Give all boundaries of an example as meta tensors: shapes and dtypes without values.

    Nothing is computed where the blocks can run on the meta device; otherwise they are run once in ``eval()``, without
    gradients, and everything they might have changed is put back.

    Args:
        partition: The blocks.
        example: An input of the model, of any batch size.

    Returns:
        ``num_blocks + 1`` trees; the first is the input, the last what the last block gives.

    Raises:
        PartitionError: A block fails on what the block before it gives, or gives something else than tensors.
    """

    def run(blocks: Sequence[nn.Module], boundary: Any) -> list[Any]:
        boundaries = [boundary]
        for index, block in enumerate(blocks):
            boundaries.append(_run_block(block, boundaries[-1], f"block {index}"))
        return boundaries

    return [_to_meta(boundary) for boundary in _run_without_trace(run, partition.blocks, example)]


def check_shapes(
    teacher: Partition,
    student: Partition,
    example: Any,
    *,
    names: Sequence[tuple[str, str]],
    adapters: Mapping[int, nn.Module],
    input_adapters: Mapping[int, nn.Module],
) -> None:
    """Raise unless every student block maps the teacher's boundary to the shape of the teacher's next boundary.

    Args:
        teacher: The teacher's blocks.
        student: As many blocks of the student.
        example: An input of the teacher, of any batch size.
        names: Per block, how messages call the teacher's and the student's boundary after it.
        adapters: Per block, what maps the student's output to the teacher's shape.
        input_adapters: Per block, what maps the teacher's boundary to what the student block takes.

    Raises:
        PartitionError: Names the first boundary that does not match, both shapes and the way out.
    """
    _check_counts(
        len(teacher.blocks), len(student.blocks), names, {"adapters": adapters, "input_adapters": input_adapters}
    )
    rows = [
        (*blocks, input_adapters.get(index), adapters.get(index))
        for index, blocks in enumerate(zip(teacher.blocks, student.blocks, strict=True))
    ]

    def run(rows: Sequence[tuple[nn.Module, nn.Module, nn.Module | None, nn.Module | None]], boundary: Any) -> None:
        for (teacher_name, student_name), (teacher_block, student_block, before, after) in zip(
            names, rows, strict=True
        ):
            target = _run_block(teacher_block, boundary, f"teacher block `{teacher_name}`")
            if before is not None:
                boundary = _run_adapter(before, boundary, f"the input adapter of `{student_name}`")
            given = f'`input_adapters={{"{student_name}": ...}}`'
            remedy = f"Change its {given}." if before is not None else f"Give the block an adapter by {given}."
            output = _run_block(student_block, boundary, f"student block `{student_name}`", remedy)
            if after is not None:
                output = _run_adapter(after, output, f"the adapter of `{student_name}`")
            _compare(teacher_name, target_of(target), student_name, output, has_adapter=after is not None)
            boundary = target

    _run_without_trace(run, rows, example)


def _check_counts(
    num_blocks: int, num_student_blocks: int, names: Sequence[Any], adapters: Mapping[str, Mapping[int, nn.Module]]
) -> None:
    if not num_blocks == num_student_blocks == len(names):
        msg = (
            f"The student must have one block, and a pair of names, for each of the teacher's {num_blocks} blocks, but "
            f"there are {num_student_blocks} student blocks and {len(names)} pairs of names. Pair every block."
        )
        raise PartitionError(msg)
    for subject, given in adapters.items():
        unknown = sorted(given.keys() - set(range(num_blocks)))
        if unknown:
            msg = f"`{subject}` must name blocks below {num_blocks}, but names {unknown}. Blocks are counted from 0."
            raise PartitionError(msg)


def _compare(teacher_name: str, target: Any, student_name: str, output: Any, *, has_adapter: bool) -> None:
    if _describe(target) == _describe(output):
        return
    given = f'`adapters={{"{student_name}": ...}}`'
    remedy = f"Change its adapter in {given}: it" if has_adapter else f"Give the block an adapter by {given}, which"
    msg = (
        f"Boundary `{teacher_name}` -> `{student_name}` must have one shape, but the teacher's `{teacher_name}` gives "
        f"{_describe(target)} and the student's `{student_name}` {'with its adapter ' if has_adapter else ''}gives "
        f"{_describe(output)}. {remedy} maps the student's activation to the teacher's shape."
    )
    raise PartitionError(msg)


def _run_block(block: nn.Module, boundary: Any, subject: str, remedy: str = "") -> Any:
    output = _call(lambda: call_block(block, boundary), boundary, subject, remedy)
    leaves = pytree.tree_leaves(output)
    others = [type(leaf).__name__ for leaf in leaves if not isinstance(leaf, (Tensor, *_PLAIN))]
    if others or not any(isinstance(leaf, Tensor) for leaf in leaves):
        msg = (
            f"{subject} must give a tensor or a tree of tensors (tuples, lists, dicts; beside tensors also numbers, "
            f"text and None), but gives {f'a tree with {others[0]} in it' if others else 'no tensor'}. End the block "
            "at a module that does, or list the blocks yourself."
        )
        raise PartitionError(msg)
    return output


def _run_adapter(adapter: nn.Module, activation: Any, subject: str) -> Any:
    return _call(lambda: adapter(activation), activation, subject, "")


def _call(function: Callable[[], Any], given: Any, subject: str, remedy: str) -> Any:
    try:
        return function()
    except Exception as error:
        msg = (
            f"{subject} must take the boundary before it, {_describe(given)}, but raises "
            f"{type(error).__name__}: {error}. {remedy}"
        )
        raise _BlockRunError(msg.rstrip()) from error


def _describe(tree: Any) -> str:
    """Write a tree with shapes for tensors.

    Example:
        >>> _describe((torch.zeros(2, 3), {"mask": torch.zeros(2)}))
        "((2, 3), {'mask': (2,)})"
    """
    return str(pytree.tree_map(lambda leaf: tuple(leaf.shape) if isinstance(leaf, Tensor) else leaf, tree))


def _to_meta(tree: Any) -> Any:
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().to("meta"), tree)


def _run_without_trace(run: Callable[[_Modules, Any], _Result], modules: _Modules, example: Any) -> _Result:
    """Run on copies without storage; where that fails, on the modules themselves, and put everything back."""
    everything = _all_modules(modules)
    devices = {tensor.device for module in everything for tensor in _tensors(module)}
    python_state = random.getstate()
    try:
        with torch.no_grad(), torch.random.fork_rng([device for device in devices if device.type == "cuda"]):
            try:
                return run(_copy_to_meta(modules, everything), _to_meta(example))
            except Exception as error:
                if isinstance(error, PartitionError) and not isinstance(error, _BlockRunError):
                    raise
            with _evaluating(everything):
                return run(modules, _to_device_of(everything, example))
    finally:
        random.setstate(python_state)


def _copy_to_meta(modules: _Modules, everything: Sequence[nn.Module]) -> _Modules:
    # deepcopy takes what its memo already holds: no tensor is ever copied with its values.
    memo: dict[int, Any] = {}
    for tensor in [tensor for module in everything for tensor in _tensors(module)]:
        if is_lazy(tensor):
            lazy_type: Any = type(tensor)
            memo[id(tensor)] = lazy_type(device="meta")
        elif isinstance(tensor, nn.Parameter):
            memo[id(tensor)] = nn.Parameter(tensor.detach().to("meta"), requires_grad=tensor.requires_grad)
        else:
            memo[id(tensor)] = tensor.detach().to("meta")
    copies = copy.deepcopy(modules, memo)
    for copied in _all_modules(copies):
        copied.training = False
    return copies


@contextmanager
def _evaluating(modules: Sequence[nn.Module]) -> Iterator[None]:
    buffers = [(module, name, buffer) for module in modules for name, buffer in module._buffers.items()]
    values = [None if buffer is None or is_lazy(buffer) else buffer.clone() for _, _, buffer in buffers]
    with preserved_modes(modules):
        for module in modules:
            module.training = False
        try:
            yield
        finally:
            for (module, name, buffer), value in zip(buffers, values, strict=True):
                module._buffers[name] = buffer
                if buffer is not None and value is not None and not buffer.equal(value):
                    buffer.copy_(value)


def _to_device_of(modules: Sequence[nn.Module], example: Any) -> Any:
    devices = [parameter.device for module in modules for parameter in module.parameters(recurse=False)]
    if not devices:
        return example
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().to(devices[0]), example)


def _all_modules(modules: _Modules) -> list[nn.Module]:
    """Give every module that may run, also those that a cut block reaches through its model."""
    found: dict[int, nn.Module] = {}
    for module in [leaf for leaf in pytree.tree_leaves(modules) if isinstance(leaf, nn.Module)]:
        for part in (module, *getattr(module, "opened_modules", ())):
            found.update({id(inner): inner for inner in part.modules()})
    return list(found.values())


def _tensors(module: nn.Module) -> Iterator[Tensor]:
    for table in (module._parameters, module._buffers, module.__dict__):
        yield from (value for value in table.values() if isinstance(value, Tensor))
