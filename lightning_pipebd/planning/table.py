"""The table: what all ranks do, step by step, for people and for failure reports."""

from __future__ import annotations

from collections.abc import Sequence

from lightning_pipebd.planning.clock import clock_ticks
from lightning_pipebd.planning.program import TARGETS, Action, Kind, Program

__all__ = ["align_columns", "format_table"]

_WAITING = "."
_NEVER = "-"


def format_table(programs: Sequence[Program], *, marker: tuple[int, int] | None = None) -> str:
    """Lay out all ranks' actions as a table of steps and ranks.

    Every action takes one step; a dot is a rank that waits. Actions that can never start, because their programs wait
    for each other, follow below the last step.

    Args:
        programs: One program per rank.
        marker: Rank and position of an action to point at with `<--`.

    Returns:
        The lines of the table, without a line break at the end.

    Raises:
        ValueError: `marker` points at no action.

    Example:
        >>> from lightning_pipebd.planning.compiler import compile_programs
        >>> from lightning_pipebd.planning.plan import Plan
        >>> print(format_table(compile_programs(Plan.straight([1, 1]), 8), marker=(1, 2)))
        step  rank 0         rank 1
        0     LOAD 0:8       .
        1     TEACH 0 0:8    .
        2     SEND 1 0:8 >1  .
        3     LEARN 0 0:8    RECV 1 0:8 <0
        4     UPDATE 0       TEACH 1 0:8
        5                    LEARN 1 0:8 <--
        6                    UPDATE 1
    """
    if marker is not None and not _points_at_action(programs, marker):
        raise ValueError(f"`marker` must be the rank and position of an action, but is {marker}. Count from 0.")
    ticks = clock_ticks(programs)
    num_steps = max((row[-1] + 1 for row in ticks if row), default=0)
    columns = [
        [f"rank {program.rank}", *_column(program, row, num_steps, marker)]
        for program, row in zip(programs, ticks, strict=True)
    ]
    height = max(map(len, columns), default=1)
    steps = ["step", *map(str, range(num_steps)), *[_NEVER] * (height - 1 - num_steps)]
    columns = [steps, *(column + [""] * (height - len(column)) for column in columns)]
    return "\n".join(align_columns(list(zip(*columns, strict=True))))


def align_columns(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lay out rows in columns as wide as their widest cell.

    Example:
        >>> align_columns([["job", "rank 0"], ["teacher 0", "all"]])
        ['job        rank 0', 'teacher 0  all']
    """
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]


def _points_at_action(programs: Sequence[Program], marker: tuple[int, int]) -> bool:
    rank, position = marker
    return any(program.rank == rank and 0 <= position < len(program.actions) for program in programs)


def _column(program: Program, ticks: Sequence[int], num_steps: int, marker: tuple[int, int] | None) -> list[str]:
    cells = [
        _cell(action) + (" <--" if (program.rank, position) == marker else "")
        for position, action in enumerate(program.actions)
    ]
    started = dict(zip(ticks, cells[: len(ticks)], strict=True))
    stuck = cells[len(ticks) :]
    # A rank that is done shows nothing; one that is stuck goes on waiting.
    end = num_steps if stuck else max(ticks, default=-1) + 1
    return [started.get(step, _WAITING if step < end else "") for step in range(num_steps)] + stuck


def _cell(action: Action) -> str:
    boundary = "targets" if action.index == TARGETS else str(action.index)
    details = {
        Kind.LOAD: f"{action.rows}",
        Kind.RECV: f"{boundary} {action.rows} <{action.peer}",
        Kind.SEND: f"{boundary} {action.rows} >{action.peer}",
        Kind.TEACH: f"{action.index} {action.rows}",
        Kind.LEARN: f"{action.index} {action.rows}",
        Kind.REDUCE: f"{action.index} with {','.join(map(str, action.ranks))}",
        Kind.UPDATE: f"{action.index}",
    }
    return f"{action.kind.value} {details[action.kind]}" + (" next" if action.is_next else "")
