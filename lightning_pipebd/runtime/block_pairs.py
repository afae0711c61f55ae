"""Teacher and student cut into pairs of blocks, checked against each other."""

from __future__ import annotations

import copy
import difflib
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.planning.explain import BlockTraits
from lightning_pipebd.runtime.candidates import Candidate, expand_candidates
from lightning_pipebd.runtime.partition import (
    Partition,
    PartitionError,
    boundary_shapes,
    check_block_map,
    check_shapes,
    check_ties,
    cut_model,
    explicit_blocks,
    has_batch_statistics,
    is_stochastic,
)
from lightning_pipebd.runtime.row_trees import count_rows

__all__ = ["BlockPairs", "pair_blocks"]

_Value = TypeVar("_Value")
Blocks = Sequence[nn.Module | Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockPairs:
    """A teacher and a student in blocks.

    Attributes:
        names: Name of each block: the student's path, or its number where blocks were given as lists; with the
            candidate's number in brackets where a place has candidates.
        teacher_model: The whole teacher.
        student_model: The whole student.
        teacher: The teacher's blocks.
        student: The student's blocks.
        candidates: Per block, the candidate that it stands for, or ``None``.
    """

    names: tuple[str, ...]
    paths: tuple[tuple[str, str], ...]
    teacher_model: nn.Module
    student_model: nn.Module
    teacher: Partition
    student: Partition
    candidates: tuple[Candidate | None, ...]

    def parameters_of(self, block: int) -> list[nn.Parameter]:
        """Give one student block's parameters, in the student's order."""
        return self.student.parameters(self.student_model, block)

    def resolve_keys(self, values: Mapping[str | int, _Value], subject: str) -> dict[int, _Value]:
        """Replace block names by block indices; the name of a place means all its candidates.

        Raises:
            ValueError: A name or an index is no block's.
        """
        resolved: dict[int, _Value] = {}
        for key, value in values.items():
            places = [index for index, each in enumerate(self.candidates) if each is not None and each.place == key]
            if places:
                # Each candidate is trained by itself, and so is its adapter.
                is_module = isinstance(value, nn.Module)
                resolved |= {index: copy.deepcopy(value) if is_module else value for index in places}
                continue
            index = self.names.index(key) if key in self.names else key
            if not isinstance(index, int) or not 0 <= index < len(self.names):
                near = difflib.get_close_matches(str(key), self.names, n=3) or self.names
                msg = (
                    f"`{subject}` must name blocks by student path or by index below {len(self.names)}, but names "
                    f"{key!r}. Near: {', '.join(near)}."
                )
                raise ValueError(msg)
            resolved[index] = value
        return resolved

    def check_shapes(self, example: Any, adapters: Mapping[str, nn.Module]) -> None:
        """Raise where a student block's output does not have its teacher block's shape."""
        by_side: dict[str, dict[int, nn.Module]] = {"input": {}, "output": {}}
        for key, adapter in adapters.items():
            side, _, block = key.partition("_")
            by_side[side][int(block)] = adapter
        check_shapes(
            self.teacher,
            self.student,
            example,
            names=self.paths,
            adapters=by_side["output"],
            input_adapters=by_side["input"],
        )

    def traits(self, example: Any = None, *, is_synchronised: bool = False) -> list[BlockTraits]:
        """Say of each block what decides how exactly a plan repeats one process, and what it relays.

        Args:
            example: An input of the teacher; ``None`` leaves the boundaries' bytes unknown.
            is_synchronised: Whether shared blocks take their batch statistics over all rows.
        """
        sizes = self.boundary_bytes_per_row(example)
        return [
            BlockTraits(
                name=name,
                boundary_bytes_per_row=size,
                has_batch_statistics=has_batch_statistics(block),
                is_stochastic=is_stochastic(block),
                is_synchronised=is_synchronised,
            )
            for name, block, size in zip(self.names, self.student.blocks, sizes, strict=True)
        ]

    def boundary_bytes_per_row(self, example: Any) -> list[int | None]:
        """Count the bytes that each teacher block puts out for a row; unknown without an example."""
        if example is None:
            return [None] * len(self.names)
        num_rows = count_rows(example)
        trees = boundary_shapes(self.teacher, example)[1:]
        leaves = [[leaf for leaf in pytree.tree_leaves(tree) if isinstance(leaf, Tensor)] for tree in trees]
        return [sum(leaf.nbytes for leaf in tree) // num_rows for tree in leaves]


def pair_blocks(
    teacher: nn.Module,
    student: nn.Module,
    block_map: Mapping[str, str] | Sequence[tuple[str, str]] | None,
    teacher_blocks: Blocks | None,
    student_blocks: Blocks | None,
) -> BlockPairs:
    """Cut both models as the user says.

    Raises:
        PartitionError: The models cannot be cut so; parameters are shared between blocks or models; both or neither
            of ``block_map`` and the lists of blocks are given.
    """
    has_lists = teacher_blocks is not None and student_blocks is not None
    if (block_map is None) != has_lists or (teacher_blocks is None) != (student_blocks is None):
        msg = (
            "`block_map` must be given, or both `teacher_blocks` and `student_blocks`, but not all of them. Name "
            "module paths after which the activations shall match, or list the blocks of both models."
        )
        raise PartitionError(msg)
    if block_map is not None:
        paths = check_block_map(teacher, student, block_map)
        teacher_partition = cut_model(teacher, [path for path, _ in paths], role="teacher")
        student_partition = cut_model(student, [path for _, path in paths], role="student")
        names = tuple(path for _, path in paths)
    else:
        assert teacher_blocks is not None
        assert student_blocks is not None
        _check_lengths(teacher_blocks, student_blocks)
        teacher_partition = explicit_blocks(teacher, teacher_blocks, role="teacher")
        student_partition = explicit_blocks(student, student_blocks, role="student")
        names = tuple(str(index) for index in range(len(student_blocks)))
        paths = tuple((name, name) for name in names)
    teacher_partition, student_partition, names, candidates = expand_candidates(
        (teacher, student), teacher_partition, student_partition, names
    )
    paths = tuple(_expand_paths(paths, names, candidates))
    check_ties(student, student_partition, "student")
    _check_separate(teacher, student)
    _warn_of_untrained(student, student_partition)
    return BlockPairs(
        names=names,
        paths=paths,
        teacher_model=teacher,
        student_model=student,
        teacher=teacher_partition,
        student=student_partition,
        candidates=candidates,
    )


def _expand_paths(
    paths: Sequence[tuple[str, str]], names: Sequence[str], candidates: Sequence[Candidate | None]
) -> Iterator[tuple[str, str]]:
    given = iter(paths)
    path = ("", "")
    for name, candidate in zip(names, candidates, strict=True):
        if candidate is None or candidate.number == 0:
            path = next(given)
        yield path if candidate is None else (path[0], name)


def _check_lengths(teacher_blocks: Blocks, student_blocks: Blocks) -> None:
    if len(teacher_blocks) != len(student_blocks) or not teacher_blocks:
        msg = (
            f"`student_blocks` must have as many blocks as `teacher_blocks` and at least one, but has "
            f"{len(student_blocks)} and the teacher has {len(teacher_blocks)}. Pair every block."
        )
        raise PartitionError(msg)


def _check_separate(teacher: nn.Module, student: nn.Module) -> None:
    names = {id(parameter): name for name, parameter in teacher.named_parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in names]
    if shared:
        msg = (
            f"`student` must not share parameters with `teacher`, but shares {', '.join(shared[:3])}. The teacher is "
            "frozen: copy the modules (copy.deepcopy) before you give them to the student."
        )
        raise PartitionError(msg)


def _warn_of_untrained(student: nn.Module, partition: Partition) -> None:
    trained = {name for names in partition.parameter_names for name in names}
    left = [name for name, parameter in student.named_parameters() if name not in trained and parameter.requires_grad]
    if left:
        warnings.warn(
            f"{len(left)} parameters of `student` lie behind the last boundary and will not be trained: "
            f"{', '.join(left[:3])}{', ...' if len(left) > 3 else ''}. "
            "Add the module that ends the model to the block map; the path '' stands for the models themselves.",
            stacklevel=4,
        )
