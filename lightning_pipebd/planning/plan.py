"""The plan: for every job, which rank computes which rows of the batch, as exact fractions."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from numbers import Rational
from typing import Any, NamedTuple

__all__ = ["Plan", "PlanError", "Rows", "Share"]


class PlanError(ValueError):
    """A plan, or the text or data that describes one, breaks a law of plans."""


class Rows(NamedTuple):
    """Half-open interval of the batch's rows.

    Example:
        >>> Rows(0, 32).intersect(Rows(24, 48))
        Rows(start=24, stop=32)
        >>> str(Rows(24, 32)), Rows(24, 32).num_rows
        ('24:32', 8)
    """

    start: int
    stop: int

    @property
    def num_rows(self) -> int:
        """Number of rows in the interval."""
        return self.stop - self.start

    @property
    def is_empty(self) -> bool:
        """Whether the interval has no row."""
        return self.stop <= self.start

    def intersect(self, other: Rows) -> Rows:
        """Give the rows that both intervals have; an empty interval where they have none."""
        start = max(self.start, other.start)
        return Rows(start, max(start, min(self.stop, other.stop)))

    def contains(self, other: Rows) -> bool:
        """Tell whether every row of `other` lies in this interval; an empty `other` always does."""
        return other.is_empty or (self.start <= other.start and other.stop <= self.stop)

    def __str__(self) -> str:
        return f"{self.start}:{self.stop}"


class Share(NamedTuple):
    """The exact fraction of a job's rows that one rank computes."""

    rank: int
    share: Fraction


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """Which rank computes which rows of which job; nothing else.

    The rows of a job are dealt in the order its shares are listed: the first listed rank has the first rows. The cut
    after a cumulative share `c` lies at row `ceil(c * num_rows)`, the same function for every job, so equal cuts give
    equal rows, every row is computed exactly once, and a rank may get no row of a short batch.

    Args:
        num_ranks: Ranks the plan speaks about, at least 1. A rank without any job is allowed.
        teacher: For every block, the shares of its teacher job in row order: positive, sum exactly 1, a rank once.
        student: The same for the student jobs; as many blocks as `teacher`.
        teaches_ahead: Whether the teacher blocks work one batch ahead where rows come round by other ranks.

    Raises:
        PlanError: A law above is broken; the message names the job. Or teacher blocks shall work ahead though the rows
            of a job are divided.
        TypeError: A share is not an exact fraction, or a rank is not an integer.

    Example:
        >>> plan = Plan.straight([2, 1])
        >>> plan.num_blocks, plan.student_ranks(2), plan.loading_ranks
        (3, (1,), (0,))
        >>> Plan.joint(num_blocks=1, num_ranks=3).teacher_rows(0, num_rows=4)
        {0: Rows(start=0, stop=2), 1: Rows(start=2, stop=3), 2: Rows(start=3, stop=4)}
    """

    num_ranks: int
    teacher: tuple[tuple[Share, ...], ...]
    student: tuple[tuple[Share, ...], ...]
    teaches_ahead: bool = False

    def __post_init__(self) -> None:
        # Lists and plain pairs are welcome, but a plan must be hashable: programs are cached by it.
        object.__setattr__(self, "teacher", _normalized(self.teacher, "teacher"))
        object.__setattr__(self, "student", _normalized(self.student, "student"))
        if self.num_ranks < 1:
            raise PlanError(f"`num_ranks` must be at least 1, but is {self.num_ranks}. Give the plan a rank.")
        if len(self.teacher) != len(self.student):
            raise PlanError(
                f"`teacher` and `student` must have the same number of blocks, but `teacher` has {len(self.teacher)} "
                f"and `student` has {len(self.student)}. List both jobs of every block."
            )
        if not self.teacher:
            raise PlanError("`teacher` must have at least one block, but is empty. List the shares of every block.")
        for side, jobs in (("teacher", self.teacher), ("student", self.student)):
            for block, shares in enumerate(jobs):
                _check_shares(f"{side}[{block}]", shares, self.num_ranks)
        if self.teaches_ahead and (self.has_split_students or self.has_split_teachers):
            raise PlanError(
                "`teaches_ahead` must be false for a plan that divides the rows of a job, but is true. Give every job "
                "to one rank, or leave `teaches_ahead` out."
            )

    @classmethod
    def straight(cls, sizes: Sequence[int]) -> Plan:
        """Give consecutive blocks to one rank each.

        Args:
            sizes: Number of blocks of each rank; 0 leaves a rank without a job.
        """
        return cls.hybrid([(size, 1) for size in sizes])

    @classmethod
    def joint(cls, num_blocks: int, num_ranks: int) -> Plan:
        """Give every rank an equal part of the rows of every job: data parallelism."""
        return cls.hybrid([(num_blocks, num_ranks)])

    @classmethod
    def hybrid(cls, stages: Sequence[tuple[int, int]]) -> Plan:
        """Give consecutive blocks to a stage of ranks that divide the rows evenly.

        Args:
            stages: For each stage, number of its blocks and number of its ranks.

        Raises:
            PlanError: A stage has a negative number of blocks or no rank, or there is no block at all.
        """
        jobs: list[tuple[Share, ...]] = []
        first_rank = 0
        for index, (num_blocks, num_ranks) in enumerate(stages):
            if num_blocks < 0 or num_ranks < 1:
                raise PlanError(
                    f"`stages[{index}]` must have at least 0 blocks and 1 rank, but has {num_blocks} blocks and "
                    f"{num_ranks} ranks. Leave the stage out or give it a rank."
                )
            ranks = range(first_rank, first_rank + num_ranks)
            jobs += [tuple(Share(rank, Fraction(1, num_ranks)) for rank in ranks)] * num_blocks
            first_rank += num_ranks
        return cls(num_ranks=first_rank, teacher=tuple(jobs), student=tuple(jobs))

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Plan:
        """Read back what `to_dict` gave, or what a person wrote into a YAML or JSON file.

        Raises:
            PlanError: A key is missing or unknown, a job is not a list of `[rank, share]` pairs, or a share is no
                fraction such as `"1/3"`; and whatever the plan itself refuses.
        """
        if set(data) - {"teaches_ahead"} != {"num_ranks", "teacher", "student"}:
            raise PlanError(
                "A plan's keys must be `num_ranks`, `teacher` and `student`, with or without `teaches_ahead`, but are "
                f"{sorted(map(str, data))}. Write the keys of `Plan.to_dict`."
            )
        num_ranks, is_ahead = data["num_ranks"], data.get("teaches_ahead", False)
        if not isinstance(is_ahead, bool):
            raise PlanError(f"`teaches_ahead` must be true or false, but is {is_ahead!r}. Write one of them.")
        if not isinstance(num_ranks, int):
            raise PlanError(f"`num_ranks` must be an integer, but is {num_ranks!r}. Write the number of ranks.")
        teacher, student = (_read_jobs(side, data[side]) for side in ("teacher", "student"))
        return cls(num_ranks=num_ranks, teacher=teacher, student=student, teaches_ahead=is_ahead)

    def to_dict(self) -> dict[str, Any]:
        """Describe the plan in strings, integers and lists, fit for YAML and JSON.

        Example:
            >>> Plan.straight([1]).to_dict()
            {'num_ranks': 1, 'teacher': [[[0, '1']]], 'student': [[[0, '1']]]}
        """
        teacher, student = (
            [[[rank, str(share)] for rank, share in shares] for shares in jobs] for jobs in (self.teacher, self.student)
        )
        ahead = {"teaches_ahead": True} if self.teaches_ahead else {}
        return {"num_ranks": self.num_ranks, "teacher": teacher, "student": student} | ahead

    @property
    def num_blocks(self) -> int:
        """Number of blocks, the same for teacher and student."""
        return len(self.teacher)

    @property
    def loading_ranks(self) -> tuple[int, ...]:
        """Ranks that load rows of the batch, in row order: those with a share of the first teacher block."""
        return tuple(rank for rank, _ in self.teacher[0])

    @property
    def has_split_students(self) -> bool:
        """Whether the rows of some student block are shared by several ranks."""
        return any(len(shares) > 1 for shares in self.student)

    @property
    def has_split_teachers(self) -> bool:
        """Whether the rows of some teacher block are shared by several ranks."""
        return any(len(shares) > 1 for shares in self.teacher)

    def teacher_rows(self, block: int, num_rows: int) -> dict[int, Rows]:
        """Map each rank with a share of this teacher block to its rows, empty ones included."""
        return _deal_rows(self.teacher[block], num_rows)

    def student_rows(self, block: int, num_rows: int) -> dict[int, Rows]:
        """Map each rank with a share of this student block to its rows, empty ones included."""
        return _deal_rows(self.student[block], num_rows)

    def student_ranks(self, block: int) -> tuple[int, ...]:
        """List the ranks that train this student block, in ascending order."""
        return tuple(sorted(rank for rank, _ in self.student[block]))

    def teacher_ranks(self, block: int) -> tuple[int, ...]:
        """List the ranks that run this teacher block, in ascending order."""
        return tuple(sorted(rank for rank, _ in self.teacher[block]))

    def strangers(self, block: int) -> list[int]:
        """List the ranks that run this teacher block and do not train its student block, in ascending order."""
        return sorted(set(self.teacher_ranks(block)) - set(self.student_ranks(block)))

    def owner(self, block: int) -> int:
        """Give the rank whose copy of this student block is handed over: the one with its first rows."""
        return self.student[block][0].rank


def _deal_rows(shares: Iterable[Share], num_rows: int) -> dict[int, Rows]:
    rows: dict[int, Rows] = {}
    cut, start = Fraction(0), 0
    for rank, share in shares:
        cut += share
        stop = ceil(cut * num_rows)
        rows[rank] = Rows(start, stop)
        start = stop
    return rows


def _normalized(jobs: Iterable[Iterable[tuple[int, Fraction]]], side: str) -> tuple[tuple[Share, ...], ...]:
    return tuple(
        tuple(_exact_share(f"{side}[{block}]", rank, share) for rank, share in shares)
        for block, shares in enumerate(jobs)
    )


def _exact_share(job: str, rank: int, share: Fraction) -> Share:
    if not isinstance(rank, int):
        raise TypeError(f"`{job}` must name ranks by integers, but names {rank!r}. Write the rank's number.")
    # A float such as 0.1 is not the fraction it looks like, so its sum is rarely exactly 1.
    if not isinstance(share, Rational):
        raise TypeError(
            f"`{job}` must have shares that are exact fractions, but rank {rank} has {share!r} "
            f"({type(share).__name__}). Write `Fraction(1, 3)`."
        )
    return Share(rank, Fraction(share))


def _check_shares(job: str, shares: Sequence[Share], num_ranks: int) -> None:
    listed = ", ".join(f"rank {rank}: {share}" for rank, share in shares) or "no rank"
    seen: set[int] = set()
    for rank, share in shares:
        if not 0 <= rank < num_ranks:
            raise PlanError(
                f"`{job}` must name ranks from 0 to {num_ranks - 1}, but names rank {rank} ({listed}). "
                "Correct the rank or raise `num_ranks`."
            )
        if rank in seen:
            raise PlanError(
                f"`{job}` must name a rank at most once, but names rank {rank} twice ({listed}). Add its shares up."
            )
        if share <= 0:
            raise PlanError(
                f"`{job}` must have positive shares, but rank {rank} has {share} ({listed}). "
                "Leave out a rank without rows."
            )
        seen.add(rank)
    total = sum((share for _, share in shares), Fraction(0))
    if total != 1:
        raise PlanError(
            f"`{job}` must have shares that sum to exactly 1, but they sum to {total} ({listed}). "
            "Give every row to exactly one rank."
        )


def _read_jobs(side: str, jobs: object) -> tuple[tuple[Share, ...], ...]:
    if not isinstance(jobs, (list, tuple)):
        raise PlanError(f"`{side}` must be a list with one entry per block, but is {jobs!r}. Write a list.")
    return tuple(
        tuple(_read_share(f"{side}[{block}]", entry) for entry in _read_entries(f"{side}[{block}]", shares))
        for block, shares in enumerate(jobs)
    )


def _read_entries(job: str, shares: object) -> Sequence[object]:
    if not isinstance(shares, (list, tuple)):
        raise PlanError(f"`{job}` must be a list of `[rank, share]` pairs, but is {shares!r}. Write such a list.")
    return shares


def _read_share(job: str, entry: object) -> Share:
    if not isinstance(entry, (list, tuple)) or len(entry) != 2 or not isinstance(entry[0], int):
        raise PlanError(f"`{job}` must list pairs `[rank, share]`, but lists {entry!r}. Write for example [0, 1/3].")
    rank, share = entry
    try:
        return Share(rank, Fraction(share if isinstance(share, (int, str)) else str(share)))
    except (ValueError, ZeroDivisionError):
        raise PlanError(
            f"`{job}` must have shares written as fractions, but rank {rank} has {share!r}. Write for example 1/3."
        ) from None
