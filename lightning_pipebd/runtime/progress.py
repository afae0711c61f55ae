"""Where a rank's main thread stands: written by that thread, read by the watcher."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

from lightning_pipebd.runtime.step_agreement import StepAgreement

__all__ = ["NUM_WARM_UP_STEPS", "Progress"]

_T = TypeVar("_T")
_NUM_STEPS = 100
NUM_WARM_UP_STEPS = 3
"""The first steps compile kernels, start workers and fill the pipeline: they say nothing about the next ones."""
_END: Any = object()


class Progress:
    """Marks of progress, and how long the last steps took.

    Attributes:
        num_marks: Grows with every mark.
        place: What the thread does outside of a program, as text.
        is_training: Whether it is at a place whose time is known from earlier steps: loading a batch, or in a program.
            Hooks, evaluation and saving take as long as the user's code wants.
        waits_for: Ranks that loading, or a meeting of all ranks, waits for.
        step: The step it works on, -1 before the first.
        num_rows: Rows of its batch.
        is_update: Whether its program ends with an update.
        num_steps: Programs that were run to their end.
        agreement: What signals ask for, and the step after which all ranks follow.
    """

    def __init__(self) -> None:
        self.num_marks = 0
        self.place = "starting"
        self.is_training = False
        self.waits_for: tuple[int, ...] = ()
        self.step = -1
        self.num_rows = 0
        self.is_update = True
        self.num_steps = 0
        self.agreement = StepAgreement()
        self._durations: deque[float] = deque(maxlen=_NUM_STEPS)

    @property
    def slowest_s(self) -> float:
        """Seconds of the slowest of the last hundred steps, loading included; the first few are no measure."""
        return max(list(self._durations), default=0.0)

    def loading(self, batches: Iterator[_T], waits_for: tuple[int, ...] = ()) -> Iterator[_T]:
        """Iterate over batches, with a mark before and after each."""
        while True:
            with self._timed("loading a batch", waits_for):
                batch = next(batches, _END)
            if batch is _END:
                return
            yield batch

    @contextmanager
    def program(self, step: int, num_rows: int, *, is_update: bool) -> Iterator[None]:
        """Say that a program is run inside the context."""
        self.step, self.num_rows, self.is_update = step, num_rows, is_update
        with self._timed("running its program"):
            yield
        self.num_steps += 1

    def mark(self, place: str) -> None:
        """Say what the thread does now, for a time that nobody knows beforehand."""
        self.place = place
        self.num_marks += 1

    @contextmanager
    def meeting(self, others: tuple[int, ...]) -> Iterator[None]:
        """Say that other ranks are waited for inside the context; one that waits for this rank will never come."""
        before = self.place, self.waits_for
        self.place, self.waits_for = "meeting all ranks", others
        self.num_marks += 1
        yield
        # Not after an error, as below.
        self.place, self.waits_for = before
        self.num_marks += 1

    @contextmanager
    def _timed(self, place: str, waits_for: tuple[int, ...] = ()) -> Iterator[None]:
        start = time.monotonic()
        self.place, self.waits_for, self.is_training = place, waits_for, True
        self.num_marks += 1
        yield
        # Not after an error: the report shall name the place where it happened.
        self.place, self.waits_for, self.is_training = "between steps (hooks, loggers)", (), False
        self.num_marks += 1
        if self.num_steps >= NUM_WARM_UP_STEPS:
            self._durations.append(time.monotonic() - start)
