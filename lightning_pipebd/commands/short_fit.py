"""A few steps of a configuration in processes of their own, as a user would start them."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from lightning_pipebd.commands.waiting import waiting

__all__ = ["FitError", "add_fit_options", "pipebd_arguments", "short_fit"]

_LINES_OF_FAILURE = 30


class FitError(Exception):
    """A short fit ended with an error; the message has the end of its output."""


def add_fit_options(parser: argparse.ArgumentParser, *, steps: int) -> None:
    """Add what all commands that train a few steps ask for."""
    parser.add_argument("--config", required=True, help="configuration of `pipebd fit`")
    parser.add_argument("--steps", type=int, default=steps, help=f"optimizer steps to train (default {steps})")
    parser.add_argument("--devices", type=int, default=2, help="ranks under the plan (default 2)")
    parser.add_argument("--plan", help="the plan; default that of the configuration")
    parser.add_argument("--json", action="store_true", help="print the result for machines")
    parser.add_argument("others", nargs="*", metavar="-- ARGUMENTS", help="further arguments of `pipebd fit`")


def pipebd_arguments(options: argparse.Namespace) -> list[str]:
    """Give the arguments that run the configuration under the plan of the command line."""
    given = (yaml.safe_load(Path(options.config).read_text()) or {}).get("trainer", {}).get("strategy")
    strategy: dict[str, Any] = {"class_path": "lightning_pipebd.PipeBDStrategy"}
    if isinstance(given, dict) and str(given.get("class_path", "")).endswith("PipeBDStrategy"):
        strategy = given
    if options.plan is not None:
        strategy = {**strategy, "init_args": {**strategy.get("init_args", {}), "plan": options.plan}}
    return [f"--trainer.strategy={json.dumps(strategy)}", f"--trainer.devices={options.devices}"]


def short_fit(
    title: str, options: argparse.Namespace, callback: dict[str, Any], folder: Path, arguments: Sequence[str]
) -> str:
    """Train some steps with one callback, without the configuration's callbacks, loggers and validation.

    Args:
        title: What is trained, in words.
        options: Those of :func:`add_fit_options`.
        callback: Class path and arguments of the callback.
        folder: Where whatever the run writes by default goes.
        arguments: Further arguments of ``pipebd fit``, which count last.

    Returns:
        The run's output.

    Raises:
        FitError: The run ended with an error.
    """
    command = [
        *(sys.executable, "-m", "lightning_pipebd", "fit", "--config", options.config),
        f"--trainer.max_steps={options.steps}",
        *("--trainer.limit_val_batches=0", "--trainer.logger=false", "--trainer.enable_checkpointing=false"),
        *("--trainer.enable_progress_bar=false", "--trainer.enable_model_summary=false"),
        f"--trainer.default_root_dir={folder}",
        f"--trainer.callbacks={json.dumps([callback])}",
        *options.others,
        *arguments,
    ]
    # Kernels may add in another order with another number of threads.
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    with waiting(f"training {options.steps} steps with {title}"):
        done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        tail = "\n".join(done.stdout.splitlines()[-_LINES_OF_FAILURE:])
        raise FitError(f"{tail}\nThe run with {title} failed (exit code {done.returncode}); see its output above.")
    return done.stdout
