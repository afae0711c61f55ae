"""A recorded timeline in numbers: how long a step took, what each rank and each block spent of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

__all__ = ["BUSY_KINDS", "KINDS", "summarise"]

KINDS = ("LOAD", "RECV", "TEACH", "LEARN", "SEND", "REDUCE", "UPDATE")
BUSY_KINDS = ("LOAD", "TEACH", "LEARN", "UPDATE")
"""Work; the others are mostly waiting for another rank."""


def summarise(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Say how long a step took, and what each rank and each block spent in it, in ms.

    Args:
        trace: What :class:`~lightning_pipebd.timeline.Timeline` wrote.

    Returns:
        Steps, step time, ranks (time with each kind of action, share of the step at work), the share of all ranks' time
        without work, blocks (time of all ranks with the teacher's and the student's), and the slowest of them.
    """
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    steps: defaultdict[int, set[int]] = defaultdict(set)
    totals: defaultdict[tuple[int, str], float] = defaultdict(float)
    for span in spans:
        steps[span["pid"]].add(span["args"]["step"])
        totals[span["pid"], span["cat"]] += span["dur"] / 1000
    num_steps = max((len(own) for own in steps.values()), default=1)
    paces = {rank: _pace([span for span in spans if span["pid"] == rank]) for rank in sorted(steps)}
    step_time_ms = max(paces.values(), default=0.0)
    ranks = []
    for rank in sorted(steps):
        times = {kind.lower(): totals[rank, kind] / num_steps for kind in KINDS}
        busy_ms = sum(times[kind.lower()] for kind in BUSY_KINDS)
        ranks.append({"rank": rank, **times, "utilisation": busy_ms / step_time_ms if step_time_ms else 0.0})
    blocks = _block_times(spans, num_steps)
    return {
        "steps": num_steps,
        "step_time_ms": step_time_ms,
        "ranks": ranks,
        "bubble_fraction": 1 - sum(rank["utilisation"] for rank in ranks) / len(ranks) if ranks else 0.0,
        "blocks": blocks,
        "slowest_block": max(blocks, key=lambda block: block["teach"] + block["learn"])["block"] if blocks else None,
    }


def _block_times(spans: Sequence[Mapping[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    times: defaultdict[int, dict[str, float]] = defaultdict(lambda: {"teach": 0.0, "learn": 0.0})
    for span in spans:
        if span["cat"] in ("TEACH", "LEARN"):
            block = int(span["name"].split()[1].partition("=")[2])
            times[block][span["cat"].lower()] += span["dur"] / 1000 / num_steps
    return [{"block": block, **times[block]} for block in sorted(times)]


def _pace(spans: Sequence[Mapping[str, Any]]) -> float:
    """Give the time from a step's first action to the next step's, in ms."""
    starts: dict[int, float] = {}
    for span in spans:
        step = span["args"]["step"]
        starts[step] = min(span["ts"], starts.get(step, span["ts"]))
    if len(starts) < 2:
        stop: float = max(span["ts"] + span["dur"] for span in spans)
        return (stop - min(starts.values())) / 1000
    return (max(starts.values()) - min(starts.values())) / (len(starts) - 1) / 1000
