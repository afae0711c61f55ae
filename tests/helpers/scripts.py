"""Run the repository's scripts as ranks that are forked where torch and Lightning are imported already.

A process that imports them anew costs seconds, most of what a short script takes. What this leaves out, Lightning's own
start of a script's other processes, has tests of its own.
"""

from __future__ import annotations

import contextlib
import io
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from tests.helpers.ranks import run_processes

__all__ = ["ROOT", "run_forked", "run_script"]

ROOT = Path(__file__).parents[2]


def run_script(
    arguments: Sequence[str],
    environment: Mapping[str, str],
    *,
    num_ranks: int = 1,
    folder: Path = ROOT,
    timeout: float = 180.0,
) -> str:
    """Run ``python ARGUMENTS`` in one process per rank and give what rank 0 printed.

    Args:
        arguments: A script and what follows it, or `-m` and a module.
        environment: Variables to set.
        num_ranks: Processes; the script finds the environment that an external launcher leaves.
        folder: Where it runs; the repository's root by default.
        timeout: Seconds after which a missing end is an error.
    """
    output: str = run_processes(num_ranks, _run, list(arguments), dict(environment), folder, timeout=timeout)[0]
    return output


def run_forked(command: list[str], env: dict[str, str], **captured: Any) -> subprocess.CompletedProcess[str]:
    """As `subprocess.run` of a `pipebd fit`, with all its ranks."""
    devices = [argument.partition("=")[2] for argument in command if argument.startswith("--trainer.devices=")]
    return subprocess.CompletedProcess(command, 0, run_script(command[1:], env, num_ranks=int(devices[-1])))


def _run(rank: int, arguments: list[str], environment: dict[str, str], folder: Path) -> str:
    os.environ.update(environment)
    os.chdir(folder)
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        try:
            _run_main(arguments)
        except SystemExit as end:
            if end.code:
                raise RuntimeError(f"{arguments} ended with exit code {end.code}: {output.getvalue()}") from end
    return output.getvalue()


def _run_main(arguments: list[str]) -> None:
    if arguments[0] == "-m":
        sys.argv = arguments[1:]
        sys.path.insert(0, os.getcwd())
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).resolve().parent))
        runpy.run_path(arguments[0], run_name="__main__")
