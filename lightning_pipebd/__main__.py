"""``python -m lightning_pipebd``: the command line."""

import sys

from lightning_pipebd.cli import main

__all__: list[str] = []

if __name__ == "__main__":
    sys.exit(main())
