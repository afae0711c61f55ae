"""What a configuration describes, made but not run."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from lightning.pytorch.cli import LightningCLI

__all__ = ["load_configuration"]


def load_configuration(config: str, others: Sequence[str] = ()) -> LightningCLI:
    """Make the trainer, the module and the data of a configuration of ``pipebd fit``; starts nothing.

    Args:
        config: Path of the YAML file.
        others: Further arguments of ``pipebd fit``.
    """
    before = sys.argv
    # Lightning warns of arguments that are given to it while the process has others.
    sys.argv = [before[0], "--config", config, *others]
    try:
        return LightningCLI(run=False, save_config_callback=None)
    finally:
        sys.argv = before
