"""The command line: LightningCLI's ``fit``, ``validate``, ``test`` and ``predict`` with the strategy registered."""

from __future__ import annotations

import os
import sys

from lightning.pytorch.cli import LightningCLI

__all__ = ["main"]


def main() -> None:
    """Run LightningCLI; modules and data modules are given as class paths, most simply in a YAML file.

    Example:
        .. code-block:: bash

            python -m lightning_pipebd fit --config examples/digits.yaml --trainer.devices 2
    """
    # As `python -m` does: class paths in a config are mostly those of the user's own files, beside the config.
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    LightningCLI(parser_kwargs={"prog": "pipebd"})
