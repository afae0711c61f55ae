"""A recorded timeline in numbers: how long a step took, what each rank and each block spent of it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_pipebd.planning.pipeline_program import PipelineAction

__all__ = ["BUSY_KINDS", "kinds_of", "summarise"]

_KINDS = ("LOAD", "RECV", "TEACH", "LEARN", "SEND", "REDUCE", "UPDATE")
_WHOLE_KINDS = ("LOAD", "RECV", "TEACH", "FORWARD", "LOSS", "BACKWARD", "SEND", "REDUCE", "UPDATE", "EMA")
#: Both halves of a backward that is split are backward.
_SAME = {"BACKWARD_INPUT": "BACKWARD", "BACKWARD_WEIGHT": "BACKWARD"}
#: Whose model the block of an action is.
_JOBS = {"TEACH": "teacher", "FORWARD": "student", "BACKWARD": "student"}
BUSY_KINDS = ("LOAD", "TEACH", "LEARN", "FORWARD", "LOSS", "BACKWARD", "UPDATE", "EMA")
"""Work; the others are mostly waiting for another rank."""


def kinds_of(summary: Mapping[str, Any]) -> list[str]:
    """Give the kinds of actions that a summary tells the times of, in their order, as programs spell them.

    Example:
        >>> kinds_of({"ranks": [{"rank": 0, "load": 0.0, "learn": 1.0, "utilisation": 1.0}]})
        ['LOAD', 'LEARN']
    """
    known = dict.fromkeys((*_WHOLE_KINDS[:3], "LEARN", *_WHOLE_KINDS[3:]))
    return [kind for kind in known if any(kind.lower() in rank for rank in summary["ranks"])]


def summarise(trace: Mapping[str, Any]) -> dict[str, Any]:
    """Say how long a step took, and what each rank and each block spent in it, in ms.

    Args:
        trace: What :class:`~lightning_pipebd.timeline.Timeline` wrote.

    Returns:
        Steps, step time, ranks (time with each kind of action, share of the step at work), the share of all ranks' time
        without work, blocks (time of all ranks with the teacher's and the student's), and the slowest of them. Of a
        whole student: blocks of both models by name (``"student 0"``), and what the ranks sent.
    """
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    is_whole = any(_kind(span) in ("FORWARD", "BACKWARD", "LOSS", "EMA") for span in spans)
    steps: defaultdict[int, set[int]] = defaultdict(set)
    totals: defaultdict[tuple[int, str], float] = defaultdict(float)
    for span in spans:
        steps[span["pid"]].add(span["args"]["step"])
        totals[span["pid"], _kind(span)] += span["dur"] / 1000
    num_steps = max((len(own) for own in steps.values()), default=1)
    paces = {rank: _pace([span for span in spans if span["pid"] == rank]) for rank in sorted(steps)}
    step_time_ms = max(paces.values(), default=0.0)
    ranks = []
    for rank in sorted(steps):
        times = {kind.lower(): totals[rank, kind] / num_steps for kind in (_WHOLE_KINDS if is_whole else _KINDS)}
        busy_ms = sum(times.get(kind.lower(), 0.0) for kind in BUSY_KINDS)
        ranks.append({"rank": rank, **times, "utilisation": busy_ms / step_time_ms if step_time_ms else 0.0})
    blocks = _whole_block_times(spans, num_steps) if is_whole else _block_times(spans, num_steps)
    relay = {"relay": _sent(spans, num_steps)} if is_whole else {}
    return {
        "steps": num_steps,
        "step_time_ms": step_time_ms,
        "ranks": ranks,
        "bubble_fraction": 1 - sum(rank["utilisation"] for rank in ranks) / len(ranks) if ranks else 0.0,
        "blocks": blocks,
        "slowest_block": max(blocks, key=_work_ms)["block"] if blocks else None,
        **relay,
    }


def _kind(span: Mapping[str, Any]) -> str:
    kind: str = span["cat"]
    return _SAME.get(kind, kind)


def _work_ms(block: Mapping[str, Any]) -> float:
    return sum(float(ms) for name, ms in block.items() if name != "block")


def _block_times(spans: Sequence[Mapping[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    times: defaultdict[int, dict[str, float]] = defaultdict(lambda: {"teach": 0.0, "learn": 0.0})
    for span in spans:
        if span["cat"] in ("TEACH", "LEARN"):
            times[_block(span)][span["cat"].lower()] += span["dur"] / 1000 / num_steps
    return [{"block": block, **times[block]} for block in sorted(times)]


def _whole_block_times(spans: Sequence[Mapping[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    times: dict[tuple[str, int], dict[str, float]] = {}
    for span in spans:
        model = _JOBS.get(_kind(span))
        if model is not None:
            kinds = [kind for kind, side in _JOBS.items() if side == model]
            own = times.setdefault((model, _block(span)), {kind.lower(): 0.0 for kind in kinds})
            own[_kind(span).lower()] += span["dur"] / 1000 / num_steps
    ordered = sorted(times, key=lambda key: (key[0] == "student", key[1]))
    return [{"block": f"{model} {block}", **times[model, block]} for model, block in ordered]


def _sent(spans: Sequence[Mapping[str, Any]], num_steps: int) -> list[dict[str, Any]]:
    """Add up the messages of a step by what they are about."""
    sent: defaultdict[tuple[int, int, str, int], list[float]] = defaultdict(lambda: [0.0, 0.0])
    for span in spans:
        if span["cat"] == "SEND":
            action = PipelineAction.parse(span["name"])
            own = sent[span["pid"], action.peer, action.stream.word, action.index]
            own[0] += action.rows.num_rows / num_steps
            own[1] += span["args"].get("bytes", 0) / num_steps
    return [
        {"from": sender, "to": receiver, "what": f"{what} {index}", "rows": rows, "bytes": num_bytes}
        for (sender, receiver, what, index), (rows, num_bytes) in sorted(sent.items())
    ]


def _block(span: Mapping[str, Any]) -> int:
    return int(span["name"].split()[1].partition("=")[2])


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
