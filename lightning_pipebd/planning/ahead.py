"""Teachers one batch ahead: programs for plans in which a rank's rows come round by other ranks.

A rank with an early and a late teacher block would wait, within a step, for the teacher blocks between, and so would
one with an early teacher block and a late student block. If it says so, teacher jobs work on the next batch:

    a step      TEACH the next batch, LEARN the present one, whose boundaries were made a step ago
    one rank    teacher blocks up to the first that needs rows which come round; some student blocks, for which all
                is there; the next teacher blocks; and so on

What comes round has the time of the student blocks between, and these are dealt by the number of blocks it comes round
by. So the order follows from the plan alone, and all ranks know it without a word. A message about the next batch that
is for a teacher block is received in the step in which it is sent; one that is for a student block is received when
that learns, a step later: ranks may go on drifting apart.

A batch without a predecessor (the first of an epoch) is taught within its own step before the rest is done, and one
without a successor that is known (the last) leaves the teacher blocks idle.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import pairwise

from lightning_pipebd.planning.compiler import check_batch, compile_programs, round_trips
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program
from lightning_pipebd.planning.routing import Message, route

__all__ = ["compile_ahead", "steady_programs", "teaches_ahead", "with_teacher_ahead"]


def teaches_ahead(plan: Plan, *, has_momentum: bool = False) -> bool:
    """Tell whether the plan's teacher blocks work one batch ahead: it wants that, and rows come round.

    Args:
        plan: Who computes what.
        has_momentum: Whether each teacher block follows its student block: then it cannot work ahead of it.

    Example:
        >>> from lightning_pipebd.planning.plan_text import parse_plan
        >>> (
        ...     teaches_ahead(parse_plan("0|1|2")),
        ...     teaches_ahead(
        ...         Plan.from_dict(
        ...             {
        ...                 "num_ranks": 2,
        ...                 "teacher": [[[0, 1]], [[1, 1]], [[0, 1]]],
        ...                 "student": [[[0, 1]], [[1, 1]], [[0, 1]]],
        ...                 "teaches_ahead": True,
        ...             }
        ...         )
        ...     ),
        ... )
        (False, True)
    """
    return plan.teaches_ahead and not has_momentum and bool(round_trips(plan, 1))


def with_teacher_ahead(plan: Plan) -> Plan:
    """Give the plan with teacher blocks that work one batch ahead, if it has rows that come round."""
    return replace(plan, teaches_ahead=bool(round_trips(plan, 1)))


def steady_programs(
    plan: Plan, num_rows: int, *, target_blocks: Collection[int] = (), has_momentum: bool = False
) -> tuple[Program, ...]:
    """Give every rank its program for a batch in the middle of an epoch, with batches of as many rows around it.

    Args:
        plan: Who computes what.
        num_rows: Rows of the batch, at least 1.
        target_blocks: Student blocks whose loss reads the labels.
        has_momentum: Whether each teacher block follows its student block.
    """
    if not teaches_ahead(plan, has_momentum=has_momentum):
        return compile_programs(plan, num_rows, target_blocks=target_blocks)
    return compile_ahead(plan, num_rows, num_next_rows=num_rows, is_taught=True, target_blocks=target_blocks)


def compile_ahead(
    plan: Plan,
    num_rows: int,
    *,
    num_next_rows: int = 0,
    is_taught: bool = False,
    target_blocks: Collection[int] = (),
    update: bool = True,
) -> tuple[Program, ...]:
    """Give every rank its program for one batch under a plan whose teacher blocks work one batch ahead.

    Args:
        plan: Who computes what; see :func:`teaches_ahead`.
        num_rows: Rows of the batch, at least 1.
        num_next_rows: Rows of the next batch; 0 if there is none, or none that may be looked at.
        is_taught: Whether the teacher blocks have worked on the batch a step ago.
        target_blocks: Student blocks whose loss reads the labels; their ranks receive the labels.
        update: False leaves out UPDATE, for a batch that only accumulates gradients.

    Returns:
        One program per rank, index = rank. The same arguments give the same object, from a cache.

    Raises:
        ValueError: `num_rows` is below 1 or a target block does not exist.

    Example:
        >>> plan = Plan.from_dict(
        ...     {
        ...         "num_ranks": 2,
        ...         "teacher": [[[0, 1]], [[1, 1]], [[0, 1]]],
        ...         "student": [[[1, 1]], [[0, 1]], [[0, 1]]],
        ...     }
        ... )
        >>> print(compile_ahead(plan, 8, num_next_rows=4, is_taught=True)[0])
        PROGRAM rank=0 rows=8 next=4 taught
        LOAD rows=0:4 next
        SEND boundary=0 rows=0:4 to=1 next
        TEACH block=0 rows=0:4 next
        SEND boundary=1 rows=0:4 to=1 next
        LEARN block=1 rows=0:8
        LEARN block=2 rows=0:8
        RECV boundary=2 rows=0:4 from=1 next
        TEACH block=2 rows=0:4 next
        UPDATE block=1
        UPDATE block=2
    """
    if not is_taught and not num_next_rows:
        return compile_programs(plan, num_rows, target_blocks=target_blocks, update=update)
    targets = check_batch(plan, num_rows, target_blocks)
    return _compile(plan, num_rows, num_next_rows, is_taught, targets, update)


@lru_cache(maxsize=128)
def _compile(
    plan: Plan, num_rows: int, num_next_rows: int, is_taught: bool, targets: frozenset[int], update: bool
) -> tuple[Program, ...]:
    messages = route(plan, 1, target_blocks=targets)
    return tuple(
        Program(
            rank,
            num_rows,
            tuple(_RankWriter(plan, messages, targets, rank).write(num_rows, num_next_rows, is_taught, update)),
            num_next_rows,
            is_taught,
        )
        for rank in range(plan.num_ranks)
    )


class _RankWriter:
    """Writes one rank's actions. Jobs are whole, so that every action has all rows of its batch."""

    def __init__(self, plan: Plan, messages: Sequence[Message], targets: frozenset[int], rank: int) -> None:
        self.taught = [block for block in range(plan.num_blocks) if rank in plan.teacher_ranks(block)]
        self.learned = [block for block in range(plan.num_blocks) if rank in plan.student_ranks(block)]
        self.targets = targets
        self.sends: dict[int, list[int]] = {}
        for message in messages:
            if message.sender == rank:
                self.sends.setdefault(message.boundary, []).append(message.receiver)
        self.sources = {message.boundary: message.sender for message in messages if message.receiver == rank}
        # Where the next teacher block is: rows that another rank needs to teach on go first.
        self.teachers = {block: plan.teacher[block][0].rank for block in range(plan.num_blocks)}

    def write(self, num_rows: int, num_next_rows: int, is_taught: bool, update: bool) -> Iterator[Action]:
        own, following = Rows(0, num_rows), Rows(0, num_next_rows)
        if not is_taught:
            for run in self._runs():
                yield from self._teach(run, own, is_next=False)
        runs = self._runs() if num_next_rows else []
        parts = self._parts(runs)
        present = {block for block in self.taught if block in self.sources}
        for index, part in enumerate(parts):
            if index < len(runs):
                yield from self._teach(runs[index], following, is_next=True)
            for block in part:
                yield from self._learn(block, own, present)
        for run in runs[len(parts) :]:
            yield from self._teach(run, following, is_next=True)
        if update:
            yield from (Action(Kind.UPDATE, block) for block in self.learned)

    def _runs(self) -> list[list[int]]:
        """Divide the teacher blocks where rows come round."""
        runs: list[list[int]] = []
        for block in self.taught:
            if runs and runs[-1][-1] == block - 1:
                runs[-1].append(block)
            else:
                runs.append([block])
        return runs

    def _parts(self, runs: Sequence[Sequence[int]]) -> list[list[int]]:
        """Divide the student blocks by the number of blocks that rows come round by, which they have the time of."""
        detours = [later[0] - earlier[-1] - 1 for earlier, later in pairwise(runs)] or [1]
        parts, passed, start = [], 0, 0
        for detour in detours:
            passed += detour
            stop = (2 * len(self.learned) * passed + sum(detours)) // (2 * sum(detours))
            parts.append(self.learned[start:stop])
            start = stop
        return parts

    def _teach(self, run: Sequence[int], rows: Rows, *, is_next: bool) -> Iterator[Action]:
        if run[0] in self.sources:
            yield Action(Kind.RECV, run[0], rows, peer=self.sources[run[0]], is_next=is_next)
        if run[0] == 0:
            yield Action(Kind.LOAD, rows=rows, is_next=is_next)
            yield from self._send(TARGETS, rows, is_next=is_next)
            yield from self._send(0, rows, is_next=is_next)
        for block in run:
            yield Action(Kind.TEACH, block, rows, is_next=is_next)
            yield from self._send(block + 1, rows, is_next=is_next)

    def _send(self, boundary: int, rows: Rows, *, is_next: bool) -> Iterator[Action]:
        teacher = self.teachers.get(boundary)
        for receiver in sorted(self.sends.get(boundary, ()), key=lambda rank: (rank != teacher, rank)):
            yield Action(Kind.SEND, boundary, rows, peer=receiver, is_next=is_next)

    def _learn(self, block: int, rows: Rows, present: set[int]) -> Iterator[Action]:
        """Receive what is not there yet, and learn."""
        for boundary in (*([TARGETS] if block in self.targets else []), block, block + 1):
            if boundary in self.sources and boundary not in present:
                present.add(boundary)
                yield Action(Kind.RECV, boundary, rows, peer=self.sources[boundary])
        yield Action(Kind.LEARN, block, rows)
