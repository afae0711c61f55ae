"""Routing: which rows of which boundary have to travel from which rank to which.

A boundary's rows are made where they are taught (boundary 0 and the labels: where they are loaded) and needed where
they are taught on, learned from, or imitated. The difference travels.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS

__all__ = ["Link", "Message", "merge_rows", "moved_rows", "route", "subtract_rows"]


class Message(NamedTuple):
    """Rows of one boundary that one rank sends to another; the fields sort a rank's messages."""

    boundary: int
    rows: Rows
    sender: int
    receiver: int


class Link(NamedTuple):
    """A boundary on its way between two ranks; the fields sort what travels."""

    sender: int
    receiver: int
    boundary: int


def merge_rows(parts: Iterable[Rows]) -> tuple[Rows, ...]:
    """Unite intervals into the fewest disjoint ones, in row order.

    Example:
        >>> [str(rows) for rows in merge_rows([Rows(4, 6), Rows(0, 2), Rows(2, 3), Rows(5, 5)])]
        ['0:3', '4:6']
    """
    merged: list[Rows] = []
    for rows in sorted(part for part in parts if not part.is_empty):
        if merged and rows.start <= merged[-1].stop:
            merged[-1] = Rows(merged[-1].start, max(merged[-1].stop, rows.stop))
        else:
            merged.append(rows)
    return tuple(merged)


def subtract_rows(rows: Rows, taken: Rows) -> tuple[Rows, ...]:
    """Give the non-empty intervals of `rows` that are not in `taken`.

    Example:
        >>> [str(rest) for rest in subtract_rows(Rows(0, 8), Rows(2, 3))]
        ['0:2', '3:8']
    """
    if rows.intersect(taken).is_empty:
        return () if rows.is_empty else (rows,)
    rests = (Rows(rows.start, taken.start), Rows(taken.stop, rows.stop))
    return tuple(rest for rest in rests if not rest.is_empty)


def route(plan: Plan, num_rows: int, *, target_blocks: Collection[int] = ()) -> tuple[Message, ...]:
    """List every message of one batch, ascending by boundary, rows, sender and receiver.

    Args:
        plan: Who computes what.
        num_rows: Rows of the batch.
        target_blocks: Student blocks whose loss reads the labels.

    Returns:
        One message per boundary, sender, receiver and contiguous interval; no row of a boundary reaches a rank twice,
        and none reaches the rank that makes it.
    """
    messages = []
    for boundary in (TARGETS, *range(plan.num_blocks + 1)):
        made = plan.teacher_rows(max(boundary - 1, 0), num_rows)
        for receiver, needed in _needed_rows(plan, num_rows, boundary, target_blocks).items():
            own = made.get(receiver, Rows(0, 0))
            missing = [rest for rows in merge_rows(needed) for rest in subtract_rows(rows, own)]
            if not missing:
                continue
            messages += [
                Message(boundary, part, sender, receiver)
                for sender, rows in made.items()
                for part in (rows.intersect(rest) for rest in missing)
                if not part.is_empty
            ]
    return tuple(sorted(messages))


def moved_rows(plan: Plan, num_rows: int, *, target_blocks: Collection[int] = ()) -> dict[Link, int]:
    """Count the rows of each boundary that travel between two ranks with a batch, in order of the links.

    Example:
        >>> moved_rows(Plan.straight([1, 1, 1]), 8)
        {Link(sender=0, receiver=1, boundary=1): 8, Link(sender=1, receiver=2, boundary=2): 8}
    """
    moved: dict[Link, int] = {}
    for message in route(plan, num_rows, target_blocks=target_blocks):
        link = Link(message.sender, message.receiver, message.boundary)
        moved[link] = moved.get(link, 0) + message.rows.num_rows
    return dict(sorted(moved.items()))


def _needed_rows(plan: Plan, num_rows: int, boundary: int, target_blocks: Collection[int]) -> dict[int, list[Rows]]:
    """Map each rank to the intervals of the boundary it works with."""
    if boundary == TARGETS:
        jobs = [plan.student_rows(block, num_rows) for block in sorted(target_blocks)]
    else:
        jobs = []
        if boundary < plan.num_blocks:
            jobs += [plan.teacher_rows(boundary, num_rows), plan.student_rows(boundary, num_rows)]
        if boundary > 0:
            jobs.append(plan.student_rows(boundary - 1, num_rows))
    needed: dict[int, list[Rows]] = {}
    for job in jobs:
        for rank, rows in job.items():
            needed.setdefault(rank, []).append(rows)
    return needed
