"""The plan of an end-to-end training: which rank has which block of the teacher and of the student."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_pipebd.planning.balance import balanced_sizes
from lightning_pipebd.planning.plan import PlanError

__all__ = ["PipelinePlan", "Stage"]

_ITEM = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?")
_FORM = "Write the student's blocks rank by rank ('0-1|2-3'), or both models' ('0-3|4-7 / 0-1|2-3')."


class Stage(NamedTuple):
    """Consecutive blocks of one model on one rank."""

    rank: int
    first: int
    last: int

    @property
    def blocks(self) -> range:
        """The blocks, in order."""
        return range(self.first, self.last + 1)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelinePlan:
    """Which rank has which block of the teacher and of the student.

    The two models may have different numbers of blocks. A rank may have blocks that do not follow each other, blocks of
    one model only, or none.

    Args:
        num_ranks: Ranks the plan speaks about, at least 1.
        teacher: For every teacher block its rank.
        student: For every student block its rank.

    Raises:
        PlanError: A model has no block, or a rank does not exist.

    Example:
        >>> plan = PipelinePlan.parse("0-3|4-7 / 0-1|2")
        >>> plan.num_ranks, plan.student, plan.loss_rank
        (2, (0, 0, 1), 1)
        >>> str(plan)
        '0-3|4-7 / 0-1|2'
    """

    num_ranks: int
    teacher: tuple[int, ...]
    student: tuple[int, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", tuple(self.teacher))
        object.__setattr__(self, "student", tuple(self.student))
        for side, ranks in (("teacher", self.teacher), ("student", self.student)):
            if not ranks:
                raise PlanError(f"`{side}` must have at least one block, but is empty. Name the rank of every block.")
            for block, rank in enumerate(ranks):
                if rank not in range(self.num_ranks):
                    raise PlanError(
                        f"`{side}[{block}]` must be a rank from 0 to {self.num_ranks - 1}, but is {rank!r}. "
                        "Correct the rank or raise `num_ranks`."
                    )

    @classmethod
    def balanced(
        cls, teacher_weights: Sequence[float], student_weights: Sequence[float], num_ranks: int
    ) -> PipelinePlan:
        """Spread each model's blocks over all ranks so that its heaviest stage is as light as possible."""

        def deal(weights: Sequence[float]) -> tuple[int, ...]:
            sizes = balanced_sizes(weights, num_ranks)
            return tuple(rank for rank, size in enumerate(sizes) for _ in range(size))

        return cls(num_ranks=num_ranks, teacher=deal(teacher_weights), student=deal(student_weights))

    @classmethod
    def parse(cls, text: str) -> PipelinePlan:
        """Read a plan from its text form; without a slash both models are divided alike.

        Raises:
            PlanError: A token is not understood, or a block is missing or there twice.
        """
        teacher, slash, student = "".join(text.split()).partition("/")
        sides = [_parse_side(teacher, text), _parse_side(student if slash else teacher, text)]
        return cls(num_ranks=max(num_ranks for _, num_ranks in sides), teacher=sides[0][0], student=sides[1][0])

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PipelinePlan:
        """Read back what :meth:`to_dict` gave.

        Raises:
            PlanError: A key is missing or unknown, or a value is of another kind.
        """
        if set(data) != {"num_ranks", "teacher", "student"}:
            keys = ", ".join(map(str, data)) or "none"
            raise PlanError(
                f"`plan` must have the keys num_ranks, teacher and student, but has {keys}. List every block's rank."
            )
        return cls(num_ranks=data["num_ranks"], teacher=tuple(data["teacher"]), student=tuple(data["student"]))

    def to_dict(self) -> dict[str, Any]:
        """Describe the plan in numbers and lists."""
        return {"num_ranks": self.num_ranks, "teacher": list(self.teacher), "student": list(self.student)}

    def __str__(self) -> str:
        sides = [_format_side(ranks, self.num_ranks) for ranks in (self.teacher, self.student)]
        return sides[0] if sides[0] == sides[1] else " / ".join(sides)

    @property
    def teacher_stages(self) -> tuple[Stage, ...]:
        """The teacher's stages, in the order of the data."""
        return _stages(self.teacher)

    @property
    def student_stages(self) -> tuple[Stage, ...]:
        """The student's stages, in the order of the data."""
        return _stages(self.student)

    @property
    def loading_rank(self) -> int:
        """The rank that loads batches: that of the student's first block."""
        return self.student[0]

    @property
    def loss_rank(self) -> int:
        """The rank that computes the loss: that of the student's last block."""
        return self.student[-1]


def _stages(ranks: Sequence[int]) -> tuple[Stage, ...]:
    stages: list[Stage] = []
    for block, rank in enumerate(ranks):
        if stages and stages[-1].rank == rank:
            stages[-1] = stages[-1]._replace(last=block)
        else:
            stages.append(Stage(rank, block, block))
    return tuple(stages)


def _parse_side(side: str, text: str) -> tuple[tuple[int, ...], int]:
    ranks: dict[int, int] = {}
    parts = side.split("|")
    for rank, part in enumerate(parts):
        for token in [] if part == "-" else part.split(","):
            match = _ITEM.fullmatch(token)
            if match is None:
                raise PlanError(f"`plan` must be a plan text, but has the token {token!r} (in {text!r}). {_FORM}")
            first = int(match["first"])
            for block in range(first, int(match["last"] or first) + 1):
                if block in ranks:
                    raise PlanError(
                        f"`plan` must name a block once, but names block {block} twice (in {text!r}). {_FORM}"
                    )
                ranks[block] = rank
    missing = sorted(set(range(max(ranks, default=-1) + 1)) - set(ranks))
    if missing:
        raise PlanError(f"`plan` must name every block, but leaves out {missing} (in {text!r}). {_FORM}")
    return tuple(ranks[block] for block in sorted(ranks)), len(parts)


def _format_side(ranks: Sequence[int], num_ranks: int) -> str:
    items: list[list[str]] = [[] for _ in range(num_ranks)]
    for rank, first, last in _stages(ranks):
        items[rank].append(str(first) if first == last else f"{first}-{last}")
    return "|".join(",".join(item) or "-" for item in items)
