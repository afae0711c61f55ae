"""Checks of what the user names: module paths, their order in the map, and parameters that two blocks would share."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence

from torch import nn

from lightning_pipebd.runtime.blocks import Partition
from lightning_pipebd.runtime.tracing import PartitionError, name_module

__all__ = ["check_block_map", "check_ties", "resolve_paths"]


def check_block_map(
    teacher: nn.Module, student: nn.Module, block_map: Mapping[str, str] | Iterable[Sequence[str]]
) -> tuple[tuple[str, str], ...]:
    """Bring a block map into the form of pairs (teacher path, student path), and check both sides' paths.

    Args:
        teacher: The teacher.
        student: The student.
        block_map: Teacher path -> student path, in the order of the blocks; a mapping or a sequence of pairs.

    Raises:
        PartitionError: The map is empty; a path is unknown or twice there.
        TypeError: The map is no mapping and no sequence of pairs of paths.

    Example:
        >>> teacher, student = nn.Sequential(nn.ReLU(), nn.ReLU()), nn.Sequential(nn.ReLU())
        >>> check_block_map(teacher, student, {"1": "0"})
        (('1', '0'),)
    """
    pairs = list(block_map.items() if isinstance(block_map, Mapping) else block_map)
    for pair in pairs:
        if isinstance(pair, str) or len(pair) != 2 or not all(isinstance(path, str) for path in pair):
            msg = (
                "`block_map` must map teacher paths to student paths, or be a sequence of such pairs, but holds "
                f"{pair!r}. Write {{'layer1': 'stage1'}} or [['layer1', 'stage1']]."
            )
            raise TypeError(msg)
    if not pairs:
        msg = "`block_map` must have at least one pair of module paths, but is empty. Write {'layer1': 'stage1'}."
        raise PartitionError(msg)
    resolve_paths(teacher, [path for path, _ in pairs], "teacher")
    resolve_paths(student, [path for _, path in pairs], "student")
    return tuple((teacher_path, student_path) for teacher_path, student_path in pairs)


def check_ties(model: nn.Module, partition: Partition, role: str) -> None:
    """Raise if two blocks use one parameter or buffer: each would train it in its own way.

    Raises:
        PartitionError: Names the parameter or buffer, all its names, the blocks, and the way out.
    """
    for kind, names_of_blocks in (("parameter", partition.parameter_names), ("buffer", partition.buffer_names)):
        users: dict[str, list[int]] = {}
        for index, names in enumerate(names_of_blocks):
            for name in names:
                users.setdefault(name, []).append(index)
        for name, blocks in users.items():
            if len(blocks) > 1:
                others = [f"`{other}`" for other in _all_names(model, name) if other != name]
                also = f" (also named {', '.join(others)})" if others else ""
                msg = (
                    f"{kind.capitalize()} `{name}`{also} of the {role} must belong to one block, but is used by blocks "
                    f"{' and '.join(map(str, blocks))}. Merge these blocks by leaving out the boundaries between them, "
                    f"or give each its own {kind}."
                )
                raise PartitionError(msg)


def resolve_paths(model: nn.Module, paths: Sequence[str], role: str) -> list[str]:
    """Give every path as the model's ``named_modules()`` has it; a module may have several."""
    modules = dict(model.named_modules(remove_duplicate=False))
    names = {id(module): path for path, module in model.named_modules()}
    resolved: list[str] = []
    for path in paths:
        if path not in modules:
            near = difflib.get_close_matches(path, modules, n=3, cutoff=0.5) or [
                name for name, _ in model.named_children()
            ]
            msg = (
                f"`{path}` must be the path of a module of the {role}, but `{type(model).__name__}` has none of that "
                f"name. The nearest are {', '.join(f'`{name}`' for name in near)}."
            )
            raise PartitionError(msg)
        name = names[id(modules[path])]
        if name in resolved:
            msg = f"{name_module(path, role)} must end one block only, but is there twice. Leave one of the two out."
            raise PartitionError(msg)
        resolved.append(name)
    if not resolved:
        msg = f"The {role} must have at least one boundary, but none is given. Name a module path."
        raise PartitionError(msg)
    return resolved


def _all_names(model: nn.Module, name: str) -> list[str]:
    tensors = {
        **dict(model.named_parameters(remove_duplicate=False)),
        **dict(model.named_buffers(remove_duplicate=False)),
    }
    return [other for other, value in tensors.items() if value is tensors[name]]
