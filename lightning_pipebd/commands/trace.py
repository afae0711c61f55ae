"""`pipebd trace`: what did every rank do, and when did it wait?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning_pipebd.commands.short_fit import FitError, add_fit_options, pipebd_arguments, short_fit
from lightning_pipebd.commands.text import format_columns

__all__ = ["run", "summarise"]

_DESCRIPTION = """\
Train some steps under the plan, record what every rank does in the last of them, and write it as a file for
chrome://tracing or https://ui.perfetto.dev, and as a picture if asked. Prints how the ranks spent their time.

exit codes: 0 written, 2 the run failed
"""
_EPILOG = """\
examples:
  pipebd trace --config examples/digits.yaml
  pipebd trace --config config.yaml --devices 4 --plan "0-1|2|3-4|5" --output timeline.json --plot timeline.svg
"""
_KINDS = ("LOAD", "RECV", "TEACH", "LEARN", "SEND", "REDUCE", "UPDATE")
_MAX_RECORDED = 8


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    parser = argparse.ArgumentParser(
        prog="pipebd trace",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fit_options(parser, steps=24)
    parser.add_argument("--output", type=Path, default=Path("timeline.json"), help="default timeline.json")
    parser.add_argument("--plot", type=Path, help="draw a picture as well (.svg or .png)")
    options = parser.parse_args(list(arguments))
    recorded = min(_MAX_RECORDED, max(1, options.steps // 3))
    callback = {
        "class_path": "lightning_pipebd.timeline.Timeline",
        "init_args": {
            "path": str(options.output.resolve()),
            "first_step": options.steps - recorded,
            "num_steps": recorded,
            "plot": None if options.plot is None else str(options.plot.resolve()),
        },
    }
    try:
        with tempfile.TemporaryDirectory(prefix="pipebd-trace-") as folder:
            short_fit(f"{options.devices} ranks", options, callback, Path(folder), pipebd_arguments(options))
    except (FitError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    summary = summarise(json.loads(options.output.read_text()))
    sys.stdout.write(json.dumps(summary, indent=2) + "\n" if options.json else _describe(summary, options))
    return 0


def summarise(trace: dict[str, Any]) -> dict[str, Any]:
    """Say how long a step took, and how long each rank spent with each kind of action in it, in ms.

    Args:
        trace: What :class:`~lightning_pipebd.timeline.Timeline` wrote.
    """
    spans = [event for event in trace["traceEvents"] if event["ph"] == "X"]
    steps: defaultdict[int, set[int]] = defaultdict(set)
    totals: defaultdict[tuple[int, str], float] = defaultdict(float)
    blocks: defaultdict[str, float] = defaultdict(float)
    for span in spans:
        steps[span["pid"]].add(span["args"]["step"])
        totals[span["pid"], span["cat"]] += span["dur"] / 1000
        if span["cat"] in ("TEACH", "LEARN"):
            blocks[" ".join(span["name"].split()[:2])] += span["dur"] / 1000
    num_steps = max((len(own) for own in steps.values()), default=1)
    paces = {rank: _pace([span for span in spans if span["pid"] == rank]) for rank in sorted(steps)}
    return {
        "steps": num_steps,
        "step_time_ms": max(paces.values(), default=0.0),
        "ranks": [
            {"rank": rank} | {kind.lower(): totals[rank, kind] / num_steps for kind in _KINDS} for rank in sorted(steps)
        ],
        "slowest_job": max(blocks, key=lambda name: blocks[name], default=""),
    }


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


def _describe(summary: dict[str, Any], options: argparse.Namespace) -> str:
    rows = [["ms per step", *(kind.lower() for kind in _KINDS), "other", "busy"]]
    step_ms = summary["step_time_ms"]
    for found in summary["ranks"]:
        times = [found[kind.lower()] for kind in _KINDS]
        busy = found["teach"] + found["learn"] + found["update"] + found["load"]
        other = max(0.0, step_ms - sum(times))
        cells = [f"{time:.2f}" for time in (*times, other)]
        rows.append([f"rank {found['rank']}", *cells, f"{busy / step_ms:.0%}" if step_ms else "-"])
    lines = [
        f"{step_ms:.2f} ms per step over {summary['steps']} steps; the job with most time is {summary['slowest_job']}",
        format_columns(rows),
        f"{options.output}: open it in chrome://tracing or https://ui.perfetto.dev",
    ]
    return "\n".join(lines) + "\n"
