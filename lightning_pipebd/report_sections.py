"""What the report of every run has, whatever was trained: timeline, ranks, relay, losses, and the step's time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.quantities import format_bytes
from lightning_pipebd.plots import DrawnSpan, draw_losses, draw_timelines
from lightning_pipebd.report_page import Section, write_page
from lightning_pipebd.trace_summary import kinds_of

__all__ = [
    "UNKNOWN",
    "Link",
    "losses_section",
    "ranks_section",
    "relay_section",
    "step_time_rows",
    "timeline_section",
    "write_report",
]

UNKNOWN = "unknown"
"""Stands for what nobody has measured."""

_TIMELINE, _LOSSES = "timeline.svg", "losses.svg"


class Link(NamedTuple):
    """What one rank sends another in a step.

    Args:
        sender: The one.
        receiver: The other.
        what: Names it.
        rows: Number of its rows, as it is shown.
        num_bytes: Its size, if known.
    """

    sender: int
    receiver: int
    what: str
    rows: str
    num_bytes: float | None


def write_report(
    path: str | Path,
    title: str,
    sections: Sequence[Section],
    *,
    timelines: Mapping[str, Sequence[DrawnSpan]],
    curves: Mapping[str, Sequence[tuple[int, float]]],
) -> None:
    """Write a page with the pictures that :func:`timeline_section` and :func:`losses_section` show.

    Args:
        path: File to write; its ending, ``.md`` or ``.html``, chooses.
        title: Of the page.
        sections: Its parts.
        timelines: Titles and spans, the predicted timeline first.
        curves: Names and losses by step.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pictures = {_TIMELINE: partial(draw_timelines, timelines=timelines), _LOSSES: partial(draw_losses, curves=curves)}
    write_page(path, title, sections, pictures)


def step_time_rows(
    num_rows: int, summary: Mapping[str, Any], outlook: Outlook | PipelineOutlook | None
) -> list[tuple[str, str]]:
    """Give the rows that tell a step's time, foreseen and measured, and how much of it was work."""
    measured = summary["step_time_ms"]
    return [
        ("rows of a batch", str(num_rows)),
        ("predicted step", _describe_prediction(outlook, measured)),
        ("measured step", f"{measured:.4g} ms, over {summary['steps']} steps"),
        ("bubble share", f"{summary['bubble_fraction']:.0%} of the ranks' time is not work"),
    ]


def timeline_section(timelines: Mapping[str, object], legend: str) -> Section:
    """Give the section with the timelines; the legend says what is drawn how."""
    text = f"Predicted above measured, on one scale; {legend}." if len(timelines) > 1 else "Measured."
    return Section("Timeline", text, picture=_TIMELINE)


def ranks_section(summary: Mapping[str, Any], outlook: Outlook | PipelineOutlook | None) -> Section:
    """Give the section that says what each rank spent a step with, and how much of it was foreseen to be work."""
    kinds = kinds_of(summary)
    table = [["rank", *kinds, "at work", "predicted"]]
    for found in summary["ranks"]:
        rank, foreseen = found["rank"], "-"
        if outlook is not None and outlook.step_time_ms:
            foreseen = f"{outlook.judgement.busy_ms[rank] / outlook.step_time_ms:.0%}"
        times = [f"{found[kind.lower()]:.2f}" for kind in kinds]
        table.append([str(rank), *times, f"{found['utilisation']:.0%}", foreseen])
    return Section("Ranks", "Milliseconds per step; RECV, SEND and REDUCE are no work.", table)


def relay_section(text: str, links: Iterable[Link]) -> Section:
    """Give the section that says what travels between ranks."""
    table = [["from", "to", "what", "rows", "bytes per step"]]
    for sender, receiver, what, rows, num_bytes in links:
        size = UNKNOWN if num_bytes is None else format_bytes(round(num_bytes))
        table.append([str(sender), str(receiver), what, rows, size])
    return Section("Relay", text, table)


def losses_section(text: str) -> Section:
    """Give the section with the losses."""
    return Section("Losses", text, picture=_LOSSES)


def _describe_prediction(outlook: Outlook | PipelineOutlook | None, measured_ms: float) -> str:
    if outlook is None:
        return "none: the plan was given, and nothing was measured"
    predicted = outlook.step_time_ms
    off = f", the measured one is {measured_ms / predicted - 1:+.0%} off" if predicted else ""
    return f"{predicted:.4g} ms{off}"
