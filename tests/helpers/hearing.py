"""What the trainer's user would read."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["heard"]


@contextmanager
def heard() -> Iterator[list[str]]:
    """Hear what rank 0 says inside the context."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    logger.addHandler(handler)
    logging.getLogger("lightning.pytorch").setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
