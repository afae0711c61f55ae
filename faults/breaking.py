"""What goes wrong in the runs of the fault table: modules, data and file systems that fail at one moment."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from torch import Tensor
from torch.utils.data import IterableDataset

from tests.helpers.toy import LinearModule, ToyData

__all__ = ["SAVING_FAULTS", "FaultyData", "FaultyModule", "FaultyStream", "break_saving", "note_moment"]

SAVING_FAULTS = ("kill in save", "full", "full, goes on")
SIGNALS = {
    "kill": signal.SIGKILL,
    "kill with workers": signal.SIGKILL,
    "stop": signal.SIGSTOP,
    "terminate": signal.SIGTERM,
}


def note_moment(path: Path) -> None:
    """Write down when the fault came."""
    path.write_text(str(time.time()))


class FaultyModule(LinearModule):
    """Fails in one step on one rank; says when.

    Attributes:
        disturb: Called in that step, where it is not the module that fails.
    """

    def __init__(self, fault: str, rank: int, moment: Path, step: int) -> None:
        super().__init__()
        self.fault = fault
        self.rank = rank
        self.moment = moment
        self.step = step
        self.disturb: Callable[[], None] = lambda: None

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        """Give the loss, or fail."""
        loss = super().block_loss(block, student_output, teacher_output, targets)
        if self.global_rank != self.rank or self.trainer.global_step != self.step:
            return loss
        if self.fault not in ("loader", "batches"):
            note_moment(self.moment)
        self.disturb()
        if self.fault == "sleep":
            time.sleep(1000)
        if self.fault == "raise":
            raise ArithmeticError("does not converge")
        if self.fault in SIGNALS:
            os.kill(os.getpid(), SIGNALS[self.fault])
        return loss * float("nan") if self.fault == "nan" else loss


class FaultyData(ToyData):
    """Blocks at one row."""

    def __init__(self, num_rows: int, shape: tuple[int, ...], moment: Path, row: int) -> None:
        super().__init__(num_rows, shape)
        self.moment = moment
        self.row = row

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if index == self.row:
            note_moment(self.moment)
            time.sleep(1000)
        return super().__getitem__(index)


class FaultyStream(IterableDataset[Any]):
    """Ends after some rows, all if none is said; says when."""

    def __init__(self, data: ToyData, moment: Path, num_rows: int | None) -> None:
        self.data = data
        self.moment = moment
        self.num_rows = num_rows

    def __iter__(self) -> Iterator[Any]:
        for index in range(len(self.data)):
            if index == self.num_rows:
                note_moment(self.moment)
                return
            yield self.data[index]


def break_saving(fault: str) -> None:
    """Have every further checkpoint of this process fail when its bytes go to the disk, or kill the process then."""

    def fail(fd: Any) -> None:
        # All bytes are written by then, but the file has not its name yet.
        if fault == "kill in save":
            os.kill(os.getpid(), signal.SIGKILL)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    os.fsync = fail
