"""`pipebd completion`: a script with which a shell completes commands, options and file names."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from lightning_pipebd.cli import COMMANDS

__all__ = ["make_parser", "run"]

_DESCRIPTION = """\
Print a script with which the shell completes this package's commands and their options, and the most used options of
LightningCLI's commands. Needs the package shtab. The script is static: completing starts no Python.

exit codes: 0 printed, 1 shtab is not installed
"""
_EPILOG = """\
examples:
  pipebd completion bash > ~/.local/share/bash-completion/completions/pipebd
  pipebd completion zsh > ~/.zfunc/_pipebd
"""
_FILES = {"config", "costs", "save_costs", "checkpoint", "save", "plot", "output", "report", "ckpt_path"}
_LIGHTNING = {
    "fit": "train",
    "validate": "rate on validation data",
    "test": "rate on test data",
    "predict": "run on prediction data",
}
_LIGHTNING_OPTIONS = ("--config", "--ckpt_path", "--print_config", "--help", "--seed_everything", "--trainer.devices")


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd completion",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("shell", choices=["bash", "zsh", "tcsh"])
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    options = make_parser().parse_args(list(arguments))
    try:
        import shtab
    except ImportError:
        sys.stderr.write("Completion needs the package shtab. Install it: `pip install shtab`.\n")
        return 1
    parser = _all_commands()
    for command in parser._subparsers._group_actions[0].choices.values():  # type: ignore[union-attr]  # no other way
        for action in command._actions:
            if action.dest in _FILES:
                action.complete = shtab.FILE
    sys.stdout.write(shtab.complete(parser, options.shell) + "\n")
    return 0


def _all_commands() -> argparse.ArgumentParser:
    root = argparse.ArgumentParser(prog="pipebd")
    commands = root.add_subparsers()
    for name, what in _LIGHTNING.items():
        parser = commands.add_parser(name, help=what, add_help=False)
        for option in _LIGHTNING_OPTIONS:
            parser.add_argument(option)
    for name, what in COMMANDS.items():
        parent = import_module(f"lightning_pipebd.commands.{name}").make_parser()
        commands.add_parser(name, help=what, parents=[parent], add_help=False)
    return root
