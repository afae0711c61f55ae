"""Meetings: where layers exchange statistics, the ranks that share a block must learn it at the same time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from lightning_pipebd.planning.clock import clock_ticks
from lightning_pipebd.planning.program import Action, Kind, Program

__all__ = ["find_missed_meeting"]


def find_missed_meeting(
    programs: Sequence[Program], sharers: Mapping[int, tuple[int, ...]]
) -> tuple[int, Action] | None:
    """Give a rank and the action at which it would wait for ever, if the ranks of some blocks meet in learning them.

    Args:
        programs: One program per rank, index = rank, for one batch.
        sharers: Ranks of the blocks whose layers exchange statistics.

    Returns:
        `None` if all ranks come to their ends.

    Example:
        >>> from lightning_pipebd.planning.compiler import compile_programs
        >>> from lightning_pipebd.planning.plan import Plan
        >>> find_missed_meeting(compile_programs(Plan.joint(2, 2), 8), {0: (0, 1), 1: (0, 1)})
    """
    # A REDUCE has the one property that matters: it starts on all its ranks at once.
    meeting = [program._replace(actions=tuple(_with_meetings(program, sharers))) for program in programs]
    for program, ticks in zip(meeting, clock_ticks(meeting), strict=True):
        if len(ticks) < len(program.actions):
            action = program.actions[len(ticks)]
            return program.rank, program.actions[len(ticks) + 1] if action.kind is Kind.REDUCE else action
    return None


def _with_meetings(program: Program, sharers: Mapping[int, tuple[int, ...]]) -> Iterator[Action]:
    for action in program.actions:
        if action.kind is Kind.LEARN and action.index in sharers:
            yield Action(Kind.REDUCE, action.index, ranks=sharers[action.index])
        # Sums go on beside the blocks that learn: nobody waits for them before the end of the step.
        if action.kind is not Kind.REDUCE:
            yield action
