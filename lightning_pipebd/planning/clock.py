"""The clock: when each action of all ranks' programs would run if every action took one tick."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pipebd.planning.program import Action, Kind, Program

__all__ = ["clock_ticks"]


def clock_ticks(programs: Sequence[Program]) -> tuple[tuple[int, ...], ...]:
    """Run all programs on a clock whose every action takes one tick, and give the tick at which each one starts.

    A SEND never waits; a RECV waits for the tick after its SEND, unless that was a step ago; a REDUCE starts on all its
    ranks at once.

    Returns:
        For each program the ticks of its actions, in order. A tuple shorter than the program's actions means that the
        rank waits there for ever.

    Example:
        >>> from lightning_pipebd.planning.compiler import compile_programs
        >>> from lightning_pipebd.planning.plan import Plan
        >>> clock_ticks(compile_programs(Plan.straight([1, 1]), 8))
        ((0, 1, 2, 3, 4), (3, 4, 5, 6))
    """
    ticks: list[list[int]] = [[] for _ in programs]
    is_taught = any(program.is_taught for program in programs)
    sent: set[tuple[object, ...]] = set()
    tick = 0
    while True:
        nexts = {
            program.rank: program.actions[len(done)]
            for program, done in zip(programs, ticks, strict=True)
            if len(done) < len(program.actions)
        }
        starting = {rank: action for rank, action in nexts.items() if _may_start(rank, action, nexts, sent, is_taught)}
        if not starting:
            return tuple(map(tuple, ticks))
        for program, done in zip(programs, ticks, strict=True):
            if program.rank in starting:
                done.append(tick)
        sent |= {
            (action.index, action.rows, rank, action.peer, action.is_next)
            for rank, action in starting.items()
            if action.kind is Kind.SEND
        }
        tick += 1


def _may_start(
    rank: int, action: Action, nexts: dict[int, Action], sent: set[tuple[object, ...]], is_taught: bool
) -> bool:
    if action.kind is Kind.RECV:
        # What was taught a step ago was sent then.
        is_there = is_taught and not action.is_next
        return is_there or (action.index, action.rows, action.peer, rank, action.is_next) in sent
    if action.kind is Kind.REDUCE:
        return all(nexts.get(member) == action for member in action.ranks)
    return True
