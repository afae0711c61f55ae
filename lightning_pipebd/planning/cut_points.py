"""Cut points: where the chain of all jobs may be divided between one stage and the next.

A cut point lies before, behind or inside a block: so many rows of its teacher job and so many of its student job belong
to what comes before the cut, the rest to what comes behind. The teacher is never behind its student.

    border          (i, 0, 0)        between two blocks
    half cut        (i, all, 0)      between a block's teacher and its student
    split teacher   (i, some, 0)     the two stages share the rows of the teacher; the student is behind the cut
    split student   (i, all, some)   the teacher is before the cut; the two stages share the rows of the student
    split block     (i, some, some)  the two stages share the rows of both
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction
from itertools import pairwise
from typing import NamedTuple

from lightning_pipebd.planning.plan import Plan, Share

__all__ = [
    "CutPoint",
    "Stage",
    "are_in_order",
    "border_points",
    "fraction_points",
    "half_cut_points",
    "sort_points",
    "stage_rows",
    "stages_to_plan",
]


class CutPoint(NamedTuple):
    """A place in the chain of jobs: the rows of one block's two jobs that lie before it."""

    block: int
    teacher_rows: int = 0
    student_rows: int = 0


class Stage(NamedTuple):
    """What lies between two cut points, and the ranks that divide its rows evenly, in row order."""

    start: CutPoint
    stop: CutPoint
    ranks: tuple[int, ...]


def border_points(num_blocks: int) -> list[CutPoint]:
    """List the cuts between blocks, and both ends."""
    return [CutPoint(block) for block in range(num_blocks + 1)]


def half_cut_points(num_blocks: int, num_rows: int) -> list[CutPoint]:
    """List the cuts between blocks, both ends, and the cuts between a block's teacher and its student."""
    return sort_points([*border_points(num_blocks), *(CutPoint(block, num_rows) for block in range(num_blocks))])


def fraction_points(
    num_blocks: int, num_rows: int, num_parts: int, *, whole_students: Collection[int] = ()
) -> list[CutPoint]:
    """List all borders and half cuts, and cuts inside jobs at every `num_parts`-th of their rows.

    Args:
        num_blocks: Blocks of the chain.
        num_rows: Rows of the batch.
        num_parts: Parts into which the rows of a job may be divided.
        whole_students: Blocks whose student job may not be divided.
    """
    cuts = sorted({round(part * num_rows / num_parts) for part in range(1, num_parts)} - {0, num_rows})
    points = half_cut_points(num_blocks, num_rows)
    for block in range(num_blocks):
        points += [CutPoint(block, cut, 0) for cut in cuts]
        if block not in whole_students:
            points += [CutPoint(block, cut, cut) for cut in cuts]
            points += [CutPoint(block, num_rows, cut) for cut in cuts]
    return sort_points(points)


def sort_points(points: Collection[CutPoint]) -> list[CutPoint]:
    """Order points so that whatever lies before another one comes before it."""
    return sorted(set(points), key=lambda point: (point.block, point.teacher_rows + point.student_rows, point))


def stages_to_plan(stages: Sequence[Stage], num_blocks: int, num_rows: int, num_ranks: int) -> Plan:
    """Give the plan in which every stage's ranks divide its rows evenly; other ranks have no job.

    Example:
        >>> half = CutPoint(0, teacher_rows=8)
        >>> stages = [Stage(CutPoint(0), half, (0,)), Stage(half, CutPoint(1), (1,))]
        >>> stages_to_plan(stages, 1, 8, 2) == Plan(
        ...     num_ranks=2, teacher=[[(0, Fraction(1))]], student=[[(1, Fraction(1))]]
        ... )
        True
    """
    teacher: list[list[Share]] = [[] for _ in range(num_blocks)]
    student: list[list[Share]] = [[] for _ in range(num_blocks)]
    for start, stop, ranks in stages:
        for block in range(start.block, min(stop.block + 1, num_blocks)):
            taught, learned = stage_rows(start, stop, block, num_rows)
            for jobs, rows in ((teacher, taught), (student, learned)):
                if rows:
                    jobs[block] += [Share(rank, Fraction(rows, num_rows * len(ranks))) for rank in ranks]
    return Plan(num_ranks=num_ranks, teacher=tuple(map(tuple, teacher)), student=tuple(map(tuple, student)))


def stage_rows(start: CutPoint, stop: CutPoint, block: int, num_rows: int) -> tuple[int, int]:
    """Give the rows of a block's teacher and student job that lie between two cut points."""
    first = start[1:] if block == start.block else (0, 0)
    last = stop[1:] if block == stop.block else (num_rows, num_rows)
    return last[0] - first[0], last[1] - first[1]


def are_in_order(points: Sequence[CutPoint]) -> bool:
    """Tell whether each point lies before the next one, with something in between."""
    return all(
        first.block < second.block
        or (
            first.block == second.block
            and first != second
            and first.teacher_rows <= second.teacher_rows
            and first.student_rows <= second.student_rows
        )
        for first, second in pairwise(points)
    )
