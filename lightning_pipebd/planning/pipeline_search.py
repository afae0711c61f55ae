"""Both models' cuts, best first: every way to deal consecutive blocks to ranks, by the load of the heaviest rank.

From the end backwards a table is filled: the least load of the heaviest rank, if these blocks of both models are left
for these ranks. With it as the estimate of what is still to come, A* never looks at a cut before a better one.

Source: Hart, Nilsson and Raphael, "A Formal Basis for the Heuristic Determination of Minimum Cost Paths" (1968).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush
from itertools import accumulate, pairwise
from math import inf
from typing import NamedTuple

__all__ = ["Loads", "Split", "splits_by_load"]


class Split(NamedTuple):
    """Where two models are cut.

    Args:
        load: Load of the heaviest rank.
        teacher: For every teacher block its rank.
        student: For every student block its rank.
    """

    load: float
    teacher: tuple[int, ...]
    student: tuple[int, ...]


@dataclass(frozen=True, kw_only=True)
class Loads:
    """What blocks weigh.

    Args:
        teacher: Load of every teacher block.
        student: Load of every student block.
        teacher_bytes: What every teacher block needs of a rank's room; empty for nothing.
        student_bytes: What every student block needs.
        room: For every rank its room; ``None`` for no limit.
    """

    teacher: Sequence[float]
    student: Sequence[float]
    teacher_bytes: Sequence[float] = ()
    student_bytes: Sequence[float] = ()
    room: Sequence[float | None]


def splits_by_load(
    loads: Loads, *, is_aligned: bool = False, below: Callable[[], float] = lambda: inf
) -> Iterator[Split]:
    """Give every way to deal consecutive blocks of both models to ranks in order, the lightest heaviest rank first.

    A rank may get blocks of one model only, or none. What has no room is left out.

    Args:
        loads: What blocks weigh.
        is_aligned: Whether both models, of equally many blocks, are to be cut alike.
        below: Gives the load from which on nothing is wanted any more; it may fall while the search goes on.

    Example:
        >>> loads = Loads(teacher=[1, 1], student=[3, 1], room=[None, None])
        >>> next(splits_by_load(loads))
        Split(load=3.0, teacher=(1, 1), student=(0, 1))
    """
    return _Search(loads, is_aligned=is_aligned).run(below)


_Cuts = tuple[tuple[int, int], ...]  # for every rank, where its blocks of the student and of the teacher end


class _Search:
    def __init__(self, loads: Loads, *, is_aligned: bool) -> None:
        self.loads = loads
        self.is_aligned = is_aligned
        self.num_student, self.num_teacher = len(loads.student), len(loads.teacher)
        self.num_ranks = len(loads.room)
        self.student, self.teacher = _sums(loads.student), _sums(loads.teacher)
        self.student_bytes = _sums(loads.student_bytes or [0.0] * self.num_student)
        self.teacher_bytes = _sums(loads.teacher_bytes or [0.0] * self.num_teacher)

    def run(self, below: Callable[[], float]) -> Iterator[Split]:
        remaining = self._remaining()
        start = (remaining[0][0, 0], 0, 0.0, ((0, 0),))
        heap: list[tuple[float, int, float, _Cuts]] = [start] if start[0] < inf else []
        while heap:
            estimate, negated_rank, load, cuts = heappop(heap)
            rank, begin = -negated_rank, cuts[-1]
            if rank == self.num_ranks:
                yield Split(estimate, *self._ranks(cuts))
                continue
            limit = below()
            for end, mine in self._ends(rank, begin, limit):
                rest = remaining[rank + 1].get(end, inf)
                if rest < limit:
                    known = max(load, mine)
                    heappush(heap, (max(known, rest), -(rank + 1), known, (*cuts, end)))

    def _remaining(self) -> list[dict[tuple[int, int], float]]:
        """Give, for every number of ranks gone and blocks dealt, the least load of the heaviest rank to come."""
        tables: list[dict[tuple[int, int], float]] = [{(self.num_student, self.num_teacher): 0.0}]
        for rank in reversed(range(self.num_ranks)):
            following, table = tables[-1], {}
            for begin in self._begins(is_first=rank == 0):
                table[begin] = self._least(rank, begin, following)
            tables.append(table)
        return tables[::-1]

    def _least(self, rank: int, begin: tuple[int, int], following: dict[tuple[int, int], float]) -> float:
        if rank == self.num_ranks - 1:
            return self._load(rank, begin, (self.num_student, self.num_teacher))
        least = inf
        for student in range(begin[0], self.num_student + 1):
            if self.student[student] - self.student[begin[0]] >= least:
                break
            for teacher in [student] if self.is_aligned else range(begin[1], self.num_teacher + 1):
                mine = self._load(rank, begin, (student, teacher))
                # More blocks on this rank only weigh more, and leave less for the others.
                if mine >= least:
                    break
                rest = following[student, teacher]
                least = min(least, max(mine, rest))
                if rest <= mine:
                    break
        return least

    def _begins(self, *, is_first: bool) -> Iterator[tuple[int, int]]:
        if is_first:
            yield 0, 0
            return
        for student in range(self.num_student + 1):
            for teacher in [student] if self.is_aligned else range(self.num_teacher + 1):
                yield student, teacher

    def _ends(self, rank: int, begin: tuple[int, int], limit: float) -> Iterator[tuple[tuple[int, int], float]]:
        """Give where a rank's blocks may end, with their load below a limit."""
        if rank == self.num_ranks - 1:
            mine = self._load(rank, begin, (self.num_student, self.num_teacher))
            if mine < limit:
                yield (self.num_student, self.num_teacher), mine
            return
        for student in range(begin[0], self.num_student + 1):
            if self.student[student] - self.student[begin[0]] >= limit:
                return
            for teacher in [student] if self.is_aligned else range(begin[1], self.num_teacher + 1):
                mine = self._load(rank, begin, (student, teacher))
                # More blocks on this rank only weigh more.
                if mine >= limit:
                    break
                yield (student, teacher), mine

    def _load(self, rank: int, begin: tuple[int, int], end: tuple[int, int]) -> float:
        room = self.loads.room[rank]
        if room is not None and (
            self.student_bytes[end[0]]
            - self.student_bytes[begin[0]]
            + self.teacher_bytes[end[1]]
            - self.teacher_bytes[begin[1]]
            > room
        ):
            return inf
        return self.student[end[0]] - self.student[begin[0]] + self.teacher[end[1]] - self.teacher[begin[1]]

    def _ranks(self, cuts: _Cuts) -> tuple[tuple[int, ...], tuple[int, ...]]:
        student, teacher = (
            tuple(rank for rank, (begin, end) in enumerate(pairwise(cuts)) for _ in range(end[model] - begin[model]))
            for model in (0, 1)
        )
        return teacher, student


def _sums(values: Sequence[float]) -> list[float]:
    return [0.0, *accumulate(map(float, values))]
