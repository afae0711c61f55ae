"""Pictures of timelines, predicted and measured, and of losses."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from lightning_pipebd.planning.simulate import TimelineSpan

__all__ = ["DrawnSpan", "check_plots", "draw_losses", "draw_timelines", "make_label", "predicted_spans"]

_COLOURS = {
    "LOAD": "#bab0ac",
    "RECV": "#76b7b2",
    "TEACH": "#4e79a7",
    "SEND": "#59a14f",
    "LEARN": "#f28e2b",
    "FORWARD": "#f28e2b",
    "LOSS": "#ff9da7",
    "BACKWARD": "#edc948",
    "BACKWARD_INPUT": "#edc948",
    "BACKWARD_WEIGHT": "#d4a72c",
    "REDUCE": "#e15759",
    "UPDATE": "#b07aa1",
    "EMA": "#9c755f",
}
# What comes often and is short says nothing but its kind.
_WITHOUT_NUMBER = ("LOAD", "LOSS", "UPDATE")
_LEAST_LABELLED = 0.02
# How programs of whole students and of blocks say that an action is for the next batch.
_OF_NEXT = (" batch=next", " next")


class DrawnSpan(NamedTuple):
    """A rank's thread at one action.

    Args:
        rank: The rank.
        kind: What it did, as programs spell it.
        label: What is written on it.
        start_ms: When it turned to the action.
        stop_ms: When it was done.
        wait_ms: How much of that, from the start, was waiting; drawn hatched.
    """

    rank: int
    kind: str
    label: str
    start_ms: float
    stop_ms: float
    wait_ms: float = 0.0


def check_plots() -> None:
    """Raise unless pictures can be drawn.

    Raises:
        ImportError: matplotlib is not installed.
    """
    _pyplot()


def predicted_spans(timeline: Iterable[TimelineSpan]) -> list[DrawnSpan]:
    """Give a simulation's timeline to be drawn."""
    return [
        DrawnSpan(
            span.rank,
            span.action.kind.value,
            make_label(str(span.action)),
            span.start_ms,
            span.stop_ms,
            span.wait_ms,
        )
        for span in timeline
    ]


def draw_timelines(path: str | Path, timelines: Mapping[str, Sequence[DrawnSpan]]) -> None:
    """Draw timelines one above the other, a row for each rank, on one scale of time.

    Args:
        path: Picture to write; its ending chooses the kind.
        timelines: Titles and spans, the uppermost first.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    num_ranks = max((span.rank + 1 for spans in timelines.values() for span in spans), default=1)
    length = max(map(_length, timelines.values()), default=1.0)
    size = (14, len(timelines) * (0.9 + 0.5 * num_ranks) + 0.6)
    figure, axes = pyplot.subplots(len(timelines), 1, figsize=size, sharex=True, squeeze=False, layout="constrained")
    for axis, (title, spans) in zip(axes[:, 0], timelines.items(), strict=True):
        _draw(axis, spans, num_ranks, _LEAST_LABELLED * length)
        axis.set_title(title, loc="left")
    axes[-1, 0].set_xlabel("ms")
    drawn = {span.kind for spans in timelines.values() for span in spans}
    colours = {kind: colour for kind, colour in _COLOURS.items() if kind in drawn}
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colour) for colour in colours.values()]
    if handles:
        figure.legend(handles, list(colours), ncols=len(colours), loc="outside lower center")
    try:
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def draw_losses(path: str | Path, curves: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw the losses of blocks by training step, on a logarithmic scale where all are above 0.

    Args:
        path: Picture to write; its ending chooses the kind.
        curves: Names, steps and losses.

    Raises:
        ImportError: matplotlib is not installed.
    """
    pyplot = _pyplot()
    figure, axis = pyplot.subplots(figsize=(14, 4.5), layout="constrained")
    for number, (name, curve) in enumerate(curves.items()):
        steps, losses = zip(*curve, strict=True) if curve else ((), ())
        # Ten colours; then they come again with other strokes.
        axis.plot(steps, losses, label=name, color=f"C{number % 10}", linestyle=("-", "--", ":")[number // 10 % 3])
    values = [loss for curve in curves.values() for _, loss in curve]
    if values and all(0 < loss < float("inf") for loss in values):
        axis.set_yscale("log")
    axis.set_xlabel("step")
    axis.set_ylabel("loss")
    axis.spines[["top", "right"]].set_visible(False)
    if curves:
        figure.legend(loc="outside right upper")
    try:
        figure.savefig(path)
    finally:
        pyplot.close(figure)


def _length(spans: Sequence[DrawnSpan]) -> float:
    return max((span.stop_ms for span in spans), default=1.0) - min((span.start_ms for span in spans), default=0.0)


def _draw(axis: Any, spans: Sequence[DrawnSpan], num_ranks: int, least_labelled_ms: float) -> None:
    start = min((span.start_ms for span in spans), default=0.0)
    for span in spans:
        colour = _COLOURS[span.kind]
        busy_start, busy_ms = span.start_ms + span.wait_ms - start, span.stop_ms - span.start_ms - span.wait_ms
        if span.wait_ms > 0:
            waiting = {"facecolor": "none", "edgecolor": colour, "hatch": "////", "linewidth": 0}
            axis.barh(span.rank, span.wait_ms, left=span.start_ms - start, height=0.7, **waiting)
        axis.barh(span.rank, busy_ms, left=busy_start, height=0.8, color=colour, edgecolor="white", linewidth=0.3)
        if busy_ms > least_labelled_ms:
            axis.text(busy_start + busy_ms / 2, span.rank, span.label, ha="center", va="center", fontsize=7)
    axis.set_yticks(range(num_ranks), [f"rank {rank}" for rank in range(num_ranks)])
    axis.set_ylim(num_ranks - 0.5, -0.5)
    axis.spines[["top", "right"]].set_visible(False)


def make_label(action: str) -> str:
    """Give what is written on an action: its kind's letter and number, and a dash if it is of the next batch.

    Example:
        >>> actions = ("TEACH block=2 rows=0:4 batch=next", "SEND gradient=1 rows=0:4 to=0", "LOSS rows=0:4", "UPDATE")
        >>> [make_label(action) for action in actions]
        ["T2'", 'S1', 'L', 'U']
        >>> [make_label(action) for action in ("TEACH block=2 rows=0:4 next", "RECV boundary=1 rows=0:4 from=0")]
        ["T2'", 'R1']
    """
    kind, _, words = action.partition(" ")
    number = "" if kind in _WITHOUT_NUMBER else words.partition("=")[2].split(" ")[0]
    return f"{kind[0]}{number}" + ("'" if words.endswith(_OF_NEXT) else "")


def _pyplot() -> Any:
    try:
        from matplotlib import use

        # Pictures go to files: no window system is needed.
        use("Agg")
        from matplotlib import pyplot
    except ImportError as error:
        raise ImportError(
            "Pictures need the package matplotlib. Install it: `pip install lightning-pipebd[plot]`."
        ) from error
    return pyplot
