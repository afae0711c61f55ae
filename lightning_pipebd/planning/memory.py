"""The memory model: what a rank holds while it works off its program.

    weights    parameters of all its blocks, gradients and optimizer state of its student blocks, and a second copy of
               the gradients that are under way in a REDUCE
    working    the most that is alive at one action: boundaries from the action that brings them to their last use, and
               what the teacher or student block itself needs
    queues     `max_in_flight` steps of everything the rank sends and receives: a sender keeps what was not received,
               a receiver has what came early

Where teacher blocks work one batch ahead, boundaries for student blocks are alive from one step to the next, and those
that other ranks sent are in the queue a step longer.

The queues are what they can be, not what they are on average: the limit shall hold on the worst day, too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from typing import NamedTuple

from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program

__all__ = ["MemoryUse", "boundary_bytes", "rank_memory"]


class MemoryUse(NamedTuple):
    """What one rank holds, in bytes."""

    weight_bytes: int
    working_bytes: int
    queue_bytes: int

    @property
    def total_bytes(self) -> int:
        """The rank's peak."""
        return self.weight_bytes + self.working_bytes + self.queue_bytes


def rank_memory(
    plan: Plan,
    program: Program,
    costs: CostTable,
    *,
    max_in_flight: int = 2,
    target_blocks: Collection[int] = (),
) -> MemoryUse:
    """Give what one rank holds at its peak.

    Args:
        plan: Which blocks the rank keeps.
        program: The rank's program for one batch.
        costs: Sizes of blocks and boundaries.
        max_in_flight: Steps by which a sender may be ahead of its receiver.
        target_blocks: Student blocks whose loss reads the labels.

    Example:
        >>> from lightning_pipebd.planning.compiler import compile_programs
        >>> from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, Curve, DeviceTimes
        >>> times = BlockTimes(teach_ms=Curve([(1, 1.0)]), learn_ms=Curve([(1, 1.0)]))
        >>> block = BlockSizes(name="only", teacher_parameter_bytes=100, learn_bytes_per_row=7)
        >>> devices = [DeviceTimes(device_class="default", blocks=[times])]
        >>> costs = CostTable(blocks=[block], devices=devices, boundary_bytes_per_row=[2, 3])
        >>> plan = Plan.straight([1])
        >>> rank_memory(plan, compile_programs(plan, 10)[0], costs)
        MemoryUse(weight_bytes=100, working_bytes=120, queue_bytes=0)
    """
    return MemoryUse(
        _weight_bytes(plan, program, costs),
        _working_bytes(program, costs, has_targets=bool(target_blocks)),
        sum(
            # What was sent a step ago is there beside what may come early.
            (max_in_flight + (program.is_taught and action.kind is Kind.RECV and not action.is_next))
            * boundary_bytes(costs, action.index)
            * action.rows.num_rows
            for action in program.actions
            if action.kind in (Kind.SEND, Kind.RECV)
        ),
    )


def boundary_bytes(costs: CostTable, boundary: int) -> int:
    """Give the bytes per row of a boundary, or of the labels."""
    return costs.target_bytes_per_row if boundary == TARGETS else costs.boundary_bytes_per_row[boundary]


def _weight_bytes(plan: Plan, program: Program, costs: CostTable) -> int:
    total = 0
    for block, sizes in enumerate(costs.blocks):
        if any(rank == program.rank for rank, _ in plan.teacher[block]):
            total += sizes.teacher_parameter_bytes
        if any(rank == program.rank for rank, _ in plan.student[block]):
            total += sizes.student_parameter_bytes + sizes.gradient_bytes + sizes.optimizer_bytes
    reduced = (action.index for action in program.actions if action.kind is Kind.REDUCE)
    return total + sum(costs.blocks[block].gradient_bytes for block in reduced)


def _working_bytes(program: Program, costs: CostTable, *, has_targets: bool) -> int:
    ends: dict[int, list[tuple[int, bool]]] = {}
    for is_next, last_uses in ((False, program.last_uses()), (True, program.last_uses_of_next())):
        for boundary, last in last_uses.items():
            ends.setdefault(last, []).append((boundary, is_next))
    alive = {(boundary, False): size for boundary, size in _kept_bytes(program, costs, has_targets=has_targets)}
    total = peak = sum(alive.values())
    for index, action in enumerate(program.actions):
        for boundary in _brings(action, has_targets=has_targets):
            size = boundary_bytes(costs, boundary) * action.rows.num_rows
            key = (boundary, action.is_next)
            alive[key] = alive.get(key, 0) + size
            total += size
        peak = max(peak, total + _transient_bytes(action, costs))
        for key in ends.get(index, ()):
            total -= alive.pop(key, 0)
    return peak


def _kept_bytes(program: Program, costs: CostTable, *, has_targets: bool) -> Iterator[tuple[int, int]]:
    """List what a rank has kept of a batch that was taught a step ago: it was made there, or received to teach on."""
    if not program.is_taught:
        return
    there = {
        boundary
        for action in program.actions
        if action.is_next
        for boundary in _brings(action, has_targets=has_targets)
    }
    for boundary in sorted(there & program.kept()):
        yield boundary, boundary_bytes(costs, boundary) * program.num_rows


def _brings(action: Action, *, has_targets: bool) -> tuple[int, ...]:
    if action.kind is Kind.LOAD:
        return (0, TARGETS) if has_targets else (0,)
    if action.kind is Kind.TEACH:
        return (action.index + 1,)
    return (action.index,) if action.kind is Kind.RECV else ()


def _transient_bytes(action: Action, costs: CostTable) -> int:
    if action.kind is Kind.TEACH:
        return costs.blocks[action.index].teach_bytes_per_row * action.rows.num_rows
    if action.kind is Kind.LEARN:
        return costs.blocks[action.index].learn_bytes_per_row * action.rows.num_rows
    return 0
