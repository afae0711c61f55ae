"""`pipebd verify`: does the plan train the student that one process trains?"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_pipebd.commands.compare import BITWISE, DIFFERS, BlockComparison, compare_runs
from lightning_pipebd.commands.text import format_columns

__all__ = ["run"]

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
_LINES_OF_FAILURE = 30


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    parser = argparse.ArgumentParser(
        prog="pipebd verify",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, help="configuration of `pipebd fit`")
    parser.add_argument("--steps", type=int, default=20, help="optimizer steps to train (default 20)")
    parser.add_argument("--devices", type=int, default=2, help="ranks of the second run (default 2)")
    parser.add_argument("--plan", help="plan of the second run; default that of the configuration")
    parser.add_argument("--tolerance", type=float, default=0.01, help="share of the way trained (default 0.01)")
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    parser.add_argument("others", nargs="*", metavar="-- ARGUMENTS", help="further arguments of `pipebd fit`")
    options = parser.parse_args(list(arguments))
    try:
        found = _verify(options)
    except (_RunError, ValueError) as error:
        sys.stderr.write(f"{error}\n")
        return 2
    sys.stdout.write(_describe(found, options))
    return int(any(block.verdict == DIFFERS for block in found))


class _RunError(Exception):
    """One of the two runs ended with an error."""


def _verify(options: argparse.Namespace) -> list[BlockComparison]:
    with tempfile.TemporaryDirectory(prefix="pipebd-verify-") as folder:
        one, many = Path(folder, "one"), Path(folder, "many")
        _train("one process", options, one, ["--trainer.strategy=auto", "--trainer.devices=1"])
        strategy = json.dumps(_strategy(options))
        _train(
            f"{options.devices} ranks",
            options,
            many,
            [f"--trainer.strategy={strategy}", f"--trainer.devices={options.devices}"],
        )
        return compare_runs(one, many, tolerance=options.tolerance)


def _strategy(options: argparse.Namespace) -> dict[str, Any]:
    """Give the strategy of the configuration, if it is ours, with the plan of the command line."""
    given = (yaml.safe_load(Path(options.config).read_text()) or {}).get("trainer", {}).get("strategy")
    strategy: dict[str, Any] = {"class_path": "lightning_pipebd.PipeBDStrategy"}
    if isinstance(given, dict) and str(given.get("class_path", "")).endswith("PipeBDStrategy"):
        strategy = given
    if options.plan is None:
        return strategy
    return {**strategy, "init_args": {**strategy.get("init_args", {}), "plan": options.plan}}


def _train(title: str, options: argparse.Namespace, folder: Path, arguments: list[str]) -> None:
    save = [{"class_path": "lightning_pipebd.commands.compare.SaveRun", "init_args": {"folder": str(folder)}}]
    command = [
        *(sys.executable, "-m", "lightning_pipebd", "fit", "--config", options.config),
        f"--trainer.max_steps={options.steps}",
        *("--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks={json.dumps(save)}",
        *options.others,
        *arguments,
    ]
    # Kernels may add in another order with another number of threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    sys.stderr.write(f"training {options.steps} steps with {title} ...\n")
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_LINES_OF_FAILURE:])
        raise _RunError(f"{tail}\nThe run with {title} failed (exit code {done.returncode}); see its output above.")


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
