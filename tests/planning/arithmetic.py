"""Training in whole numbers: what a plan must not change, small enough to be exact.

A row is an integer and a label is an integer. Teacher block `i` maps `x` to `3 x + i`. Student block `i` has a weight
`w`; a row contributes `(w x - y) x` to its gradient, where `y` is what the teacher makes of `x`, plus the label where
the block reads labels. A step moves `w` against the mean over all rows since the last step. Fractions keep every bit.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from fractions import Fraction

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program

__all__ = ["train_alone", "train_by_programs"]

_RATE = Fraction(1, 1000)

Batch = Sequence[int]
Mail = dict[tuple[int, int, Rows, int, int], dict[int, int]]


def _label(row: int) -> int:
    return 7 * row % 11


def _contribution(weight: Fraction, row_input: int, target: int) -> Fraction:
    return (weight * row_input - target) * row_input


def train_alone(
    num_blocks: int, batches: Sequence[Batch], *, target_blocks: Collection[int], steps: Sequence[bool]
) -> list[Fraction]:
    """Train all blocks in one place, without any plan."""
    weights = [Fraction(block) for block in range(num_blocks)]
    gradients = [Fraction(0)] * num_blocks
    seen = 0
    for batch, is_step in zip(batches, steps, strict=True):
        seen += len(batch)
        for row in batch:
            value = row
            for block in range(num_blocks):
                taught = 3 * value + block
                target = taught + (_label(row) if block in target_blocks else 0)
                gradients[block] += _contribution(weights[block], value, target)
                value = taught
        if is_step:
            weights = [weight - _RATE * total / seen for weight, total in zip(weights, gradients, strict=True)]
            gradients, seen = [Fraction(0)] * num_blocks, 0
    return weights


class _Rank:
    """One rank that works off the programs of all batches and never looks at another rank's memory."""

    def __init__(
        self,
        rank: int,
        plan: Plan,
        batches: Sequence[Batch],
        target_blocks: Collection[int],
        steps: Sequence[bool],
        programs: Sequence[Sequence[Program]],
    ) -> None:
        self.rank = rank
        self.batches = batches
        self.target_blocks = target_blocks
        self.work: list[tuple[int, Action]] = []
        for index, of_step in enumerate(programs):
            self.work += [(index + action.is_next, action) for action in of_step[rank].actions]
        self.weights = {b: Fraction(b) for b in range(plan.num_blocks) if rank in plan.student_ranks(b)}
        self.gradients = dict.fromkeys(self.weights, Fraction(0))
        seen = 0
        self.seen: list[int] = []
        for batch, is_step in zip(batches, steps, strict=True):
            seen += len(batch)
            self.seen.append(seen)
            seen = 0 if is_step else seen
        self.memory: dict[tuple[int, int], dict[int, int]] = {}

    def advance(self, mail: Mail, ranks: Sequence[_Rank]) -> bool:
        """Do the next action if it need not wait; tell whether something was done."""
        if not self.work:
            return False
        batch, action = self.work[0]
        if action.kind is Kind.RECV:
            key = (batch, action.index, action.rows, action.peer, self.rank)
            if key not in mail:
                return False
            self.memory.setdefault((batch, action.index), {}).update(mail.pop(key))
        elif action.kind is Kind.REDUCE:
            return self._reduce(batch, action, [ranks[member] for member in action.ranks])
        else:
            self._compute(batch, action, mail)
        self.work.pop(0)
        return True

    def _reduce(self, batch: int, action: Action, members: Sequence[_Rank]) -> bool:
        if any(not member.work or member.work[0] != (batch, action) for member in members):
            return False
        total = sum((member.gradients[action.index] for member in members), Fraction(0))
        for member in members:
            member.gradients[action.index] = total
            member.work.pop(0)
        return True

    def _compute(self, batch: int, action: Action, mail: Mail) -> None:
        block, rows = action.index, range(action.rows.start, action.rows.stop)
        if action.kind is Kind.LOAD:
            self.memory[batch, 0] = {row: self.batches[batch][row] for row in rows}
            self.memory[batch, TARGETS] = {row: _label(self.batches[batch][row]) for row in rows}
        elif action.kind is Kind.TEACH:
            taught = {row: 3 * self.memory[batch, block][row] + block for row in rows}
            self.memory.setdefault((batch, block + 1), {}).update(taught)
        elif action.kind is Kind.SEND:
            kept = self.memory[batch, block]
            mail[batch, block, action.rows, self.rank, action.peer] = {row: kept[row] for row in rows}
        elif action.kind is Kind.LEARN:
            for row in rows:
                label = self.memory[batch, TARGETS][row] if block in self.target_blocks else 0
                target = self.memory[batch, block + 1][row] + label
                self.gradients[block] += _contribution(self.weights[block], self.memory[batch, block][row], target)
        else:
            self.weights[block] -= _RATE * self.gradients[block] / self.seen[batch]
            self.gradients[block] = Fraction(0)


def train_by_programs(
    plan: Plan,
    batches: Sequence[Batch],
    *,
    target_blocks: Collection[int],
    steps: Sequence[bool],
    order: Sequence[int],
    programs: Sequence[Sequence[Program]] | None = None,
) -> list[dict[int, Fraction]]:
    """Train by every rank's programs, by default those of batch after batch, and give each rank's weights by block.

    The first rank in `order` that need not wait goes next, so ranks early in `order` run ahead over several batches.
    """
    if programs is None:
        programs = [
            compile_programs(plan, len(batch), target_blocks=target_blocks, update=is_step)
            for batch, is_step in zip(batches, steps, strict=True)
        ]
    ranks = [_Rank(rank, plan, batches, target_blocks, steps, programs) for rank in range(plan.num_ranks)]
    mail: Mail = {}
    while any(rank.advance(mail, ranks) for rank in (ranks[index] for index in order)):
        pass
    assert not mail
    assert not any(rank.work for rank in ranks)
    return [rank.weights for rank in ranks]
