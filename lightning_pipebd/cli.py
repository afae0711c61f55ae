"""The command line: LightningCLI's ``fit``, ``validate``, ``test``, ``predict``, and this package's own commands."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning.pytorch.cli import LightningCLI

__all__ = ["COMMANDS", "main"]

#: Each has a module of its own in `lightning_pipebd.commands` with a function `run`.
COMMANDS = {
    "check": "look at a configuration without training, or suggest a block map for two models",
    "plan": "measure a module, and find the plan with the smallest step time",
    "simulate": "predict what a plan takes on devices that one does not have",
    "trace": "record what every rank does, for trace viewers and as a picture",
    "verify": "train a few steps in one process and under the plan, and compare block by block",
    "rate": "rate the candidates of every place, and choose within a number of parameters",
    "export": "write the plain student of a checkpoint",
    "completion": "print a script with which the shell completes all these",
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a command; modules and data modules are given as class paths, most simply in a YAML file.

    Args:
        arguments: What follows the program's name; those of the process by default.

    Returns:
        The exit code: 0 if all is well.

    Example:
        .. code-block:: bash

            pipebd fit --config examples/digits.yaml --trainer.devices 2
            pipebd verify --config examples/digits.yaml
    """
    given = sys.argv[1:] if arguments is None else list(arguments)
    # As `python -m` does: class paths in a config are mostly those of the user's own files, beside the config.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    if given and given[0] in COMMANDS:
        code: int = import_module(f"lightning_pipebd.commands.{given[0]}").run(given[1:])
        return code
    LightningCLI(
        args=arguments if arguments is None else given, parser_kwargs={"prog": "pipebd", "epilog": _list_commands()}
    )
    return 0


def _list_commands() -> str:
    commands = "; ".join(f"{name}: {what}" for name, what in COMMANDS.items())
    return f"More commands, each with --help: {commands}."
