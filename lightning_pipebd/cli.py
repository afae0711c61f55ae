"""The command line: LightningCLI's ``fit``, ``validate``, ``test`` and ``predict`` with the strategy registered."""

from __future__ import annotations

from lightning.pytorch.cli import LightningCLI

__all__ = ["main"]


def main() -> None:
    """Run LightningCLI; modules and data modules are given as class paths, most simply in a YAML file.

    Example:
        .. code-block:: bash

            python -m lightning_pipebd fit --config examples/digits.yaml --trainer.devices 2
    """
    LightningCLI(parser_kwargs={"prog": "pipebd"})
