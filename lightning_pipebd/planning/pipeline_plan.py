"""The plan of an end-to-end training: which rank has which block of the teacher and of the student."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lightning_pipebd.planning.balance import balanced_sizes
from lightning_pipebd.planning.plan import PlanError, Rows

__all__ = ["PipelinePlan", "Stage"]

_ITEM = re.compile(r"(?P<first>\d+)(-(?P<last>\d+))?")
_REPLICAS = re.compile(r"(?P<replicas>\d+)x(?P<one>.*)")
_FORM = "Write the student's blocks rank by rank ('0-1|2-3'), or both models' ('0-3|4-7 / 0-1|2-3')."
_KEYS = {"num_ranks", "teacher", "student"}


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

    With replicas, the ranks are that many equal pipelines, one after another: ``"2 x 0-1|2"`` has block 2 on ranks 1
    and 3. Each replica trains on its part of the rows of every batch, and the gradients of a block are summed over the
    ranks that have it.

    Args:
        num_ranks: Ranks the plan speaks about, at least 1.
        teacher: For every teacher block its rank in a replica.
        student: For every student block its rank in a replica.
        replicas: Pipelines side by side; divides ``num_ranks``.

    Raises:
        PlanError: A model has no block, a rank does not exist, or ranks cannot be dealt to so many replicas.

    Example:
        >>> plan = PipelinePlan.parse("0-3|4-7 / 0-1|2")
        >>> plan.num_ranks, plan.student, plan.loss_rank
        (2, (0, 0, 1), 1)
        >>> str(plan)
        '0-3|4-7 / 0-1|2'
        >>> side_by_side = PipelinePlan.parse("2 x 0-1|2")
        >>> side_by_side.num_ranks, side_by_side.sharing_ranks(1), str(side_by_side)
        (4, (1, 3), '2 x 0-1|2')
    """

    num_ranks: int
    teacher: tuple[int, ...]
    student: tuple[int, ...]
    replicas: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "teacher", tuple(self.teacher))
        object.__setattr__(self, "student", tuple(self.student))
        if self.replicas < 1 or self.num_ranks % self.replicas:
            raise PlanError(
                f"`replicas` must divide the {self.num_ranks} ranks, but is {self.replicas}. All replicas are alike: "
                "choose a divisor of the number of ranks."
            )
        for side, ranks in (("teacher", self.teacher), ("student", self.student)):
            if not ranks:
                raise PlanError(f"`{side}` must have at least one block, but is empty. Name the rank of every block.")
            for block, rank in enumerate(ranks):
                if rank not in range(self.ranks_per_replica):
                    raise PlanError(
                        f"`{side}[{block}]` must be a rank from 0 to {self.ranks_per_replica - 1}, but is {rank!r}. "
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
        bare = "".join(text.split())
        match = _REPLICAS.fullmatch(bare)
        replicas = int(match["replicas"]) if match else 1
        teacher, slash, student = (match["one"] if match else bare).partition("/")
        sides = [_parse_side(teacher, text), _parse_side(student if slash else teacher, text)]
        num_ranks = max(num_ranks for _, num_ranks in sides)
        return cls(num_ranks=max(replicas, 1) * num_ranks, teacher=sides[0][0], student=sides[1][0], replicas=replicas)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> PipelinePlan:
        """Read back what :meth:`to_dict` gave.

        Raises:
            PlanError: A key is missing or unknown, or a value is of another kind.
        """
        if set(data) - {"replicas"} != _KEYS:
            keys = ", ".join(map(str, data)) or "none"
            raise PlanError(
                f"`plan` must have the keys num_ranks, teacher and student, but has {keys}. List every block's rank; "
                "`replicas` may be left out."
            )
        return cls(**{**data, "teacher": tuple(data["teacher"]), "student": tuple(data["student"])})

    def to_dict(self) -> dict[str, Any]:
        """Describe the plan in numbers and lists."""
        plain = {"num_ranks": self.num_ranks, "teacher": list(self.teacher), "student": list(self.student)}
        return plain if self.replicas == 1 else {**plain, "replicas": self.replicas}

    def __str__(self) -> str:
        sides = [_format_side(ranks, self.ranks_per_replica) for ranks in (self.teacher, self.student)]
        text = sides[0] if sides[0] == sides[1] else " / ".join(sides)
        return text if self.replicas == 1 else f"{self.replicas} x {text}"

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
        """The rank that loads batches: that of the student's first block, in the first replica."""
        return self.student[0]

    @property
    def loss_rank(self) -> int:
        """The rank that computes the loss: that of the student's last block, in the first replica."""
        return self.student[-1]

    @property
    def ranks_per_replica(self) -> int:
        """Ranks of one pipeline."""
        return self.num_ranks // self.replicas

    @property
    def one(self) -> PipelinePlan:
        """The plan of one replica by itself."""
        return self if self.replicas == 1 else replace(self, num_ranks=self.ranks_per_replica, replicas=1)

    def place(self, rank: int) -> tuple[int, int]:
        """Give a rank's replica, and its rank in it, under which `teacher` and `student` have its blocks."""
        return divmod(rank, self.ranks_per_replica)

    def sharing_ranks(self, rank: int) -> tuple[int, ...]:
        """Give the ranks that have the same blocks as a rank of a replica."""
        return tuple(replica * self.ranks_per_replica + rank for replica in range(self.replicas))

    def loss_ranks(self, *, is_full_batch: bool) -> tuple[int, ...]:
        """Give the ranks that compute a loss: one in each replica, or one for the rows of all."""
        return (self.loss_rank,) if is_full_batch else self.sharing_ranks(self.loss_rank)

    def rows(self, replica: int, num_rows: int) -> Rows:
        """Give a replica's rows of a batch; the first has a row of every batch.

        Example:
            >>> plan = PipelinePlan.parse("3 x 0-1")
            >>> [str(plan.rows(replica, 5)) for replica in range(3)]
            ['0:2', '2:4', '4:5']
        """
        return Rows(*(-(-edge * num_rows // self.replicas) for edge in (replica, replica + 1)))


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
