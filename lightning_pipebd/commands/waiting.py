"""What a person at a terminal sees while something takes long."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

__all__ = ["waiting"]


@contextmanager
def waiting(what: str) -> Iterator[None]:
    """Say on stderr what is being done: with a moving sign and the time at a terminal, in one line elsewhere.

    The sign is drawn by rich, and left out where that is not installed.
    """
    progress = _make_progress() if sys.stderr.isatty() else None
    if progress is None:
        sys.stderr.write(f"{what} ...\n")
        yield
        return
    with progress:
        task = progress.add_task(what, total=None)
        yield
        progress.update(task, total=1, completed=1)


def _make_progress() -> Any:
    try:
        from rich.console import Console
        from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
    except ImportError:
        return None
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    return Progress(*columns, console=Console(stderr=True))
