"""`pipebd trace`: what did every rank do, and when did it wait?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pipebd.commands.short_fit import FitError, add_fit_options, pipebd_arguments, short_fit
from lightning_pipebd.commands.text import format_columns
from lightning_pipebd.trace_summary import kinds_of, summarise

__all__ = ["make_parser", "run"]

_DESCRIPTION = """\
Train some steps under the plan, record what every rank does in the last of them, and write it as a file for
chrome://tracing or https://ui.perfetto.dev, and as a picture and a report of one page if asked. Prints how the ranks
spent their time.

exit codes: 0 written, 2 the run failed
"""
_EPILOG = """\
examples:
  pipebd trace --config examples/digits.yaml
  pipebd trace --config config.yaml --devices 4 --plan "0-1|2|3-4|5" --output timeline.json --plot timeline.svg
  pipebd trace --config examples/digits.yaml --steps 60 --report run.html
"""
_MAX_RECORDED = 8


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd trace",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fit_options(parser, steps=24)
    parser.add_argument("--output", type=Path, default=Path("timeline.json"), help="default timeline.json")
    parser.add_argument("--plot", type=Path, help="draw a picture as well (.svg or .png)")
    parser.add_argument("--report", type=Path, help="write a report of one page as well (.html or .md)")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    options = make_parser().parse_args(list(arguments))
    recorded = min(_MAX_RECORDED, max(1, options.steps // 3))
    callback = {
        "class_path": "lightning_pipebd.timeline.Timeline",
        "init_args": {
            "path": str(options.output.resolve()),
            "first_step": options.steps - recorded,
            "num_steps": recorded,
            "plot": None if options.plot is None else str(options.plot.resolve()),
            "report": None if options.report is None else str(options.report.resolve()),
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


def _describe(summary: dict[str, Any], options: argparse.Namespace) -> str:
    kinds = [kind.lower() for kind in kinds_of(summary)]
    rows = [["ms per step", *kinds, "other", "busy"]]
    step_ms = summary["step_time_ms"]
    for found in summary["ranks"]:
        times = [found[kind] for kind in kinds]
        cells = [f"{time:.2f}" for time in (*times, max(0.0, step_ms - sum(times)))]
        rows.append([f"rank {found['rank']}", *cells, f"{found['utilisation']:.0%}"])
    lines = [
        f"{step_ms:.2f} ms per step over {summary['steps']} steps; the slowest block is {summary['slowest_block']}",
        format_columns(rows),
        f"{options.output}: open it in chrome://tracing or https://ui.perfetto.dev",
        *([f"{options.report}: the run on one page"] if options.report else []),
    ]
    return "\n".join(lines) + "\n"
