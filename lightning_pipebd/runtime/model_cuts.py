"""Two models cut for end-to-end training: each at its own places, and each to its very end."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_pipebd.runtime.partition import (
    Partition,
    PartitionError,
    check_block_map,
    check_ties,
    cut_model,
    explicit_blocks,
)

__all__ = ["ModelCuts", "cut_models", "match_blocks"]

Blocks = Sequence[nn.Module | Callable[..., Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelCuts:
    """A teacher and a student in blocks; together the blocks of a model do all that it does.

    Attributes:
        teacher_model: The whole teacher.
        teacher: Its blocks.
        student: The student's blocks.
    """

    teacher_model: nn.Module
    teacher: Partition
    student: Partition


def cut_models(
    teacher: nn.Module | None,
    student: nn.Module,
    *,
    block_map: Mapping[str, str] | Sequence[tuple[str, str]] | None = None,
    teacher_cuts: Sequence[str] | None = None,
    student_cuts: Sequence[str] | None = None,
    teacher_blocks: Blocks | None = None,
    student_blocks: Blocks | None = None,
) -> ModelCuts:
    """Cut both models as the user says.

    Args:
        teacher: The teacher; ``None`` makes a copy of the student, cut alike.
        student: The student.
        block_map: Pairs *teacher path -> student path* of modules that end a block.
        teacher_cuts: Paths of modules that end a block of the teacher; ``None`` takes the student's.
        student_cuts: Paths of modules that end a block of the student.
        teacher_blocks: The teacher's blocks, for models that cannot be cut by paths.
        student_blocks: The student's blocks.

    Raises:
        PartitionError: More than one way to cut is used; a path is wrong; two blocks, or the models, share a
            parameter.
    """
    ways = [block_map is not None, teacher_cuts is not None or student_cuts is not None, student_blocks is not None]
    if sum(ways) > 1 or (teacher_blocks is not None) > (student_blocks is not None):
        msg = (
            "Models must be cut in one way, but several are given. Give `block_map`, or `student_cuts` (and "
            "`teacher_cuts`), or `student_blocks` (and `teacher_blocks`)."
        )
        raise PartitionError(msg)
    if student_blocks is not None:
        cuts = _listed(teacher, student, teacher_blocks, student_blocks)
    else:
        if block_map is not None:
            paths = check_block_map(student if teacher is None else teacher, student, block_map)
            teacher_cuts, student_cuts = [path for path, _ in paths], [path for _, path in paths]
        student_cuts = list(student_cuts or [""])
        teacher_model = copy.deepcopy(student) if teacher is None else teacher
        # The student first: its paths may have been given for both.
        student_partition = _cut_whole(student, student_cuts, "student")
        teacher_partition = _cut_whole(teacher_model, list(teacher_cuts or student_cuts), "teacher")
        cuts = ModelCuts(teacher_model=teacher_model, teacher=teacher_partition, student=student_partition)
    check_ties(student, cuts.student, "student")
    _check_separate(cuts.teacher_model, student)
    return cuts


def match_blocks(student: nn.Module, cuts: ModelCuts) -> None:
    """Raise unless every teacher block has the parameters and buffers of its student block, shape by shape.

    Raises:
        PartitionError: A momentum teacher could not be a moving average of the student.
    """
    sides = [
        [
            [tuple(own.shape) for own in (*partition.parameters(model, block), *partition.buffers(model, block))]
            for block in range(len(partition.blocks))
        ]
        for model, partition in ((cuts.teacher_model, cuts.teacher), (student, cuts.student))
    ]
    if sides[0] != sides[1]:
        msg = (
            "A momentum teacher must have the student's blocks, tensor by tensor, but has others. Leave `teacher` out "
            "to begin with a copy of the student, and give what only the student has as `predictor`."
        )
        raise PartitionError(msg)


def _listed(teacher: nn.Module | None, student: nn.Module, teacher_blocks: Blocks | None, blocks: Blocks) -> ModelCuts:
    if teacher is None:
        # In one copy, so that the copied blocks use the copied model's modules.
        teacher, teacher_blocks = copy.deepcopy((student, list(blocks)))
    if teacher_blocks is None:
        msg = "`teacher_blocks` must list the teacher's blocks where `student_blocks` does, but is missing. List them."
        raise PartitionError(msg)
    return ModelCuts(
        teacher_model=teacher,
        teacher=explicit_blocks(teacher, teacher_blocks, role="teacher"),
        student=explicit_blocks(student, blocks, role="student"),
    )


def _cut_whole(model: nn.Module, paths: list[str], role: str) -> Partition:
    partition = cut_model(model, paths, role=role)
    if partition.tail is None:
        return partition
    try:
        # What a model does behind its last boundary belongs to its output.
        return cut_model(model, [*paths, ""], role=role)
    except PartitionError as error:
        msg = (
            f"{error} The loss is of the {role}'s output, so its blocks must reach to its end: or end it earlier, by a "
            "module of your own whose `forward` returns what the loss needs."
        )
        raise PartitionError(msg) from error


def _check_separate(teacher: nn.Module, student: nn.Module) -> None:
    names = {id(parameter): name for name, parameter in teacher.named_parameters()}
    shared = [name for name, parameter in student.named_parameters() if id(parameter) in names]
    if shared:
        msg = (
            f"`student` must not share parameters with `teacher`, but shares {', '.join(shared[:3])}. The teacher "
            "takes no gradient: copy the modules (copy.deepcopy) before you give them to the student."
        )
        raise PartitionError(msg)
