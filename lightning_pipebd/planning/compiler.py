"""The compiler: from a plan and a number of rows to every rank's program.

A rank works off its teacher jobs in block order: it receives just before the first use and sends the moment rows exist,
so that no rank waits for another one's student work. Then it learns, again in block order. Three refinements:

* Teacher jobs that nobody waits for, at the end of the chain, take turns with learning: what was taught is still in the
  cache, and boundaries go as soon as the next block has learned.
* A receive that can only be answered after a round trip of this rank's own rows through other ranks comes after all
  learning whose inputs are present: useful work instead of waiting. All such receives of one action are one wait.
* A REDUCE follows its LEARN, but never before the rank's last send and never before the LEARN of an earlier block. The
  first rule keeps a collective from delaying rows somebody waits for (which could close a cycle of waits), the second
  gives all ranks one order of collectives: ascending.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from functools import lru_cache
from typing import NamedTuple

from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program
from lightning_pipebd.planning.routing import Message, route

__all__ = ["check_batch", "compile_programs", "round_trips"]


def compile_programs(
    plan: Plan, num_rows: int, *, target_blocks: Collection[int] = (), update: bool = True
) -> tuple[Program, ...]:
    """Give every rank its program for one batch of `num_rows` rows.

    Args:
        plan: Who computes what.
        num_rows: Rows of the batch, at least 1.
        target_blocks: Student blocks whose loss reads the labels; their ranks receive the labels of their rows.
        update: False leaves out REDUCE and UPDATE, for a batch that only accumulates gradients.

    Returns:
        One program per rank, index = rank; a rank without work has one without actions. The same arguments give the
        same object, from a cache.

    Raises:
        ValueError: `num_rows` is below 1 or a target block does not exist.

    Example:
        >>> first, second = compile_programs(Plan.straight([1, 1]), 8)
        >>> print(first)
        PROGRAM rank=0 rows=8
        LOAD rows=0:8
        TEACH block=0 rows=0:8
        SEND boundary=1 rows=0:8 to=1
        LEARN block=0 rows=0:8
        UPDATE block=0
        >>> print(second.actions[0])
        RECV boundary=1 rows=0:8 from=0
    """
    targets = check_batch(plan, num_rows, target_blocks)
    return _compile(plan, num_rows, targets, update)


def check_batch(plan: Plan, num_rows: int, target_blocks: Collection[int]) -> frozenset[int]:
    """Give the target blocks of a batch that a plan has programs for.

    Raises:
        ValueError: `num_rows` is below 1 or a target block does not exist.
    """
    if num_rows < 1:
        raise ValueError(f"`num_rows` must be at least 1, but is {num_rows}. Skip an empty batch.")
    targets = frozenset(target_blocks)
    if unknown := sorted(targets - set(range(plan.num_blocks))):
        raise ValueError(
            f"`target_blocks` must lie between 0 and {plan.num_blocks - 1}, but contains {unknown}. "
            "Name blocks of the plan."
        )
    return targets


def round_trips(plan: Plan, num_rows: int) -> frozenset[Message]:
    """List the messages of a batch whose receiver's own rows come back to it by other ranks."""
    return _sort_out(plan, num_rows, route(plan, num_rows))[2]


@lru_cache(maxsize=128)
def _compile(plan: Plan, num_rows: int, targets: frozenset[int], update: bool) -> tuple[Program, ...]:
    batch = _Batch(
        targets,
        [plan.teacher_rows(block, num_rows) for block in range(plan.num_blocks)],
        [plan.student_rows(block, num_rows) for block in range(plan.num_blocks)],
        *_sort_out(plan, num_rows, route(plan, num_rows, target_blocks=targets)),
    )
    return tuple(
        Program(rank, num_rows, _RankCompiler(batch, rank, update).compile()) for rank in range(plan.num_ranks)
    )


class _Batch(NamedTuple):
    """What all ranks' programs are written from: rows by block and rank, and the messages."""

    targets: frozenset[int]
    taught: list[dict[int, Rows]]
    learned: list[dict[int, Rows]]
    messages: tuple[Message, ...]
    for_teacher: frozenset[Message]
    round_trips: frozenset[Message]


def _sort_out(
    plan: Plan, num_rows: int, messages: tuple[Message, ...]
) -> tuple[tuple[Message, ...], frozenset[Message], frozenset[Message]]:
    """Add to the messages those whose receiver teaches on, and those whose sender first has to hear from it."""
    by_boundary: dict[int, list[Message]] = {}
    for message in messages:
        by_boundary.setdefault(message.boundary, []).append(message)
    for_teacher: set[Message] = set()
    upstream: dict[int, frozenset[int]] = {}
    round_trips: set[Message] = set()
    for block in range(plan.num_blocks + 1):
        # `upstream` still tells whom a rank has waited for until it made its rows of this boundary: a rank works in
        # order, so whatever an earlier teacher block waited for, a later one waits for too.
        arriving = by_boundary.get(block, [])
        round_trips |= {message for message in arriving if message.receiver in upstream.get(message.sender, ())}
        if block < plan.num_blocks:
            taught = plan.teacher_rows(block, num_rows)
            teaching = [message for message in arriving if _shares_rows(message, taught)]
            for_teacher.update(teaching)
            waited: dict[int, set[int]] = {}
            for message in teaching:
                waited.setdefault(message.receiver, set()).update({message.sender}, upstream.get(message.sender, ()))
            upstream |= {rank: upstream.get(rank, frozenset()) | ranks for rank, ranks in waited.items()}
    return messages, frozenset(for_teacher), frozenset(round_trips)


def _shares_rows(message: Message, rows: dict[int, Rows]) -> bool:
    return not message.rows.intersect(rows.get(message.receiver, Rows(0, 0))).is_empty


class _RankCompiler:
    """Writes one rank's actions in their order; whatever is not written yet is pending."""

    def __init__(self, batch: _Batch, rank: int, update: bool) -> None:
        nothing = Rows(0, 0)
        self.batch = batch
        self.taught = [rows.get(rank, nothing) for rows in batch.taught]
        self.learned = [rows.get(rank, nothing) for rows in batch.learned]
        students = [block for block, rows in enumerate(batch.learned) if rank in rows]
        # Rows that another rank needs to teach on go first; nobody is held up by the others.
        outgoing = (message for message in batch.messages if message.sender == rank)
        self.sends = sorted(outgoing, key=lambda message: (message not in batch.for_teacher, message))
        self.pending_receives = [message for message in batch.messages if message.receiver == rank]
        self.pending_teaches = [block for block, rows in enumerate(self.taught) if not rows.is_empty]
        self.pending_learns = [block for block in students if not self.learned[block].is_empty]
        # A sharer without rows in this batch joins the REDUCE too: the others wait for it.
        self.pending_reduces = [block for block in students if update and len(batch.learned[block]) > 1]
        self.updates = students if update else []
        self.quiet = self._first_quiet()
        self.actions: list[Action] = []

    def compile(self) -> tuple[Action, ...]:
        """Write teacher work, student work, updates."""
        if not self.taught[0].is_empty:
            self.actions.append(Action(Kind.LOAD, rows=self.taught[0]))
            self._send(TARGETS)
            self._send(0)
        for block in list(self.pending_teaches):
            if block >= self.quiet:
                self._learn_what_is_ready()
            self._teach(block)
        self._reduce()
        while self.pending_learns:
            block = self.pending_learns[0]
            self._receive([message for message in self.pending_receives if self._is_input(message, block)])
            self._learn(block)
        self.actions += [Action(Kind.UPDATE, block) for block in self.updates]
        return tuple(self.actions)

    def _first_quiet(self) -> int:
        """Give the first of the last teacher jobs, for which nothing is received, and of which nothing is sent."""
        sent = {message.boundary - 1 for message in self.sends}
        heard = {message.boundary for message in self.pending_receives if message in self.batch.for_teacher}
        return max((sent | heard) & set(self.pending_teaches), default=-1) + 1

    def _teach(self, block: int) -> None:
        arriving = (message for message in self.pending_receives if message.boundary == block)
        self._receive([message for message in arriving if message in self.batch.for_teacher])
        self.pending_teaches.remove(block)
        self.actions.append(Action(Kind.TEACH, block, self.taught[block]))
        self._send(block + 1)

    def _learn(self, block: int) -> None:
        self.pending_learns.remove(block)
        self.actions.append(Action(Kind.LEARN, block, self.learned[block]))
        if all(block >= self.quiet for block in self.pending_teaches):
            self._reduce()

    def _learn_what_is_ready(self) -> None:
        for block in [block for block in self.pending_learns if self._is_ready(block)]:
            self._learn(block)

    def _reduce(self) -> None:
        """Write every REDUCE that no pending LEARN of its own or an earlier block precedes."""
        while self.pending_reduces and not any(block <= self.pending_reduces[0] for block in self.pending_learns):
            block = self.pending_reduces.pop(0)
            self.actions.append(Action(Kind.REDUCE, block, ranks=tuple(sorted(self.batch.learned[block]))))

    def _send(self, boundary: int) -> None:
        messages = (message for message in self.sends if message.boundary == boundary)
        self.actions += [Action(Kind.SEND, boundary, message.rows, peer=message.receiver) for message in messages]

    def _receive(self, messages: Sequence[Message]) -> None:
        """Write these receives, round trips last and after all learning that can be done meanwhile."""
        round_trips = [message for message in messages if message in self.batch.round_trips]
        self._write_receives([message for message in messages if message not in round_trips])
        if round_trips:
            self._learn_what_is_ready()
            self._write_receives(round_trips)

    def _write_receives(self, messages: Sequence[Message]) -> None:
        for message in messages:
            self.pending_receives.remove(message)
            self.actions.append(Action(Kind.RECV, message.boundary, message.rows, peer=message.sender))

    def _is_ready(self, block: int) -> bool:
        """Tell whether the student block's input, target activation and labels are all on this rank by now."""
        rows = self.learned[block]
        sources = (source for source in (block - 1, block) if source in self.pending_teaches)
        return all(self.taught[source].intersect(rows).is_empty for source in sources) and not any(
            self._is_input(message, block) for message in self.pending_receives
        )

    def _is_input(self, message: Message, block: int) -> bool:
        boundaries = {block, block + 1} | ({TARGETS} if block in self.batch.targets else set())
        return message.boundary in boundaries and not message.rows.intersect(self.learned[block]).is_empty
