"""`pipebd verify`: does the plan train the student that one process trains?"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lightning_pipebd.commands.compare import BITWISE, DIFFERS, BlockComparison, compare_runs
from lightning_pipebd.commands.short_fit import FitError, add_fit_options, pipebd_arguments, short_fit
from lightning_pipebd.commands.text import format_columns

__all__ = ["make_parser", "run"]

_DESCRIPTION = """\
Train the first steps of a configuration twice, in one process and under the plan, and compare the students block by
block: parameters, buffers and optimizer state. Callbacks, loggers and validation of the configuration are left out.

verdicts:
  bitwise   equal in every bit
  within    differs by rounding: by less than --tolerance of the way that the block was trained
  differs   something else was trained

exit codes: 0 all blocks bitwise or within, 1 a block differs, 2 a run failed
"""
_EPILOG = """\
examples:
  pipebd verify --config examples/digits.yaml
  pipebd verify --config config.yaml --devices 4 --plan "0-1|2|3-4|5" --steps 50
  pipebd verify --config config.yaml -- --trainer.precision bf16-mixed --data.batch_size 32
"""


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd verify",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_fit_options(parser, steps=20)
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of the way trained (default 0.01)")
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    options = make_parser().parse_args(list(arguments))
    try:
        found = _verify(options)
    except (FitError, OSError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(_describe(found, options))
    return int(any(block.verdict == DIFFERS for block in found))


def _verify(options: argparse.Namespace) -> list[BlockComparison]:
    with tempfile.TemporaryDirectory(prefix="pipebd-verify-") as folder:
        one, many = Path(folder, "one"), Path(folder, "many")
        alone = ["--trainer.strategy=auto", "--trainer.devices=1"]
        short_fit("one process", options, _saving(one), one, alone)
        short_fit(f"{options.devices} ranks", options, _saving(many), many, pipebd_arguments(options))
        return compare_runs(one, many, tolerance=options.tolerance)


def _saving(folder: Path) -> dict[str, Any]:
    return {"class_path": "lightning_pipebd.commands.compare.SaveRun", "init_args": {"folder": str(folder)}}


def _describe(found: list[BlockComparison], options: argparse.Namespace) -> str:
    if options.json:
        return json.dumps({"steps": options.steps, "blocks": [block.to_dict() for block in found]}, indent=2) + "\n"
    rows = [["block", "verdict", "parameters", "buffers", "optimizer", "of the way"]]
    for block in found:
        numbers = (block.parameters, block.buffers, block.optimizer)
        greatest = ["0" if not number else f"{number:.2g}" for number in numbers]
        rows.append([block.block, block.verdict, *greatest, f"{block.share_of_way:.2%}"])
    table = format_columns(rows)
    return f"{table}\n{_sum_up(found, options)}\n"


def _sum_up(found: list[BlockComparison], options: argparse.Namespace) -> str:
    odd = [block.block for block in found if block.verdict == DIFFERS]
    after = f"after {options.steps} steps with {options.devices} ranks"
    if odd:
        return (
            f"{', '.join(odd)}: not the student of one process {after}. `explain` names the plan's exactness; "
            "a loss that is no mean over rows, or unseeded random numbers, also make a difference."
        )
    if all(block.verdict == BITWISE for block in found):
        return f"The same student as one process, bit for bit, {after}."
    return f"The student of one process up to rounding, {after}."
