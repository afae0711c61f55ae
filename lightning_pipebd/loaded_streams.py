"""From a loaded batch, and the one after it, to the streams that the programs of a whole student start from."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning_pipebd.data_position import RandomMoment
from lightning_pipebd.loaded_boundaries import check_rows
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.planning.pipeline_program import Stream
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.layouts import without_gaps
from lightning_pipebd.runtime.row_trees import RowTree, leading_row_leaves
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["LoadedStreams"]


class LoadedStreams:
    """What the loading rank's programs start from: the student's inputs, the teacher's, and the targets.

    Each batch is unpacked once, even if that draws random numbers: the teacher may have seen it a step ahead.

    Args:
        module: Unpacks batches.
        to_device: Brings a batch to this rank's device.
        step_context: The context of a training step under the trainer's precision.

    Attributes:
        before_next: The random states before the next batch was unpacked; ``None`` if it was not.
    """

    def __init__(
        self,
        module: TeacherStudentModule,
        to_device: Callable[[Any], Any],
        step_context: Callable[[], AbstractContextManager[None]],
    ) -> None:
        self._module = module
        self._to_device = to_device
        self._step_context = step_context
        self._unpacked: tuple[Any, Any] | None = None
        self.before_next: RandomMoment | None = None

    def present(self, batch: Any, num_rows: int, *, is_taught: bool) -> dict[Stream, RowTree]:
        """Give the streams of the batch that is trained on.

        Args:
            batch: On this rank's device.
            num_rows: Rows that were loaded.
            is_taught: Whether the teacher has seen the batch already: it is the last that :meth:`following` was given.

        Raises:
            ValueError: The batch has another number of rows than were loaded.
        """
        unpacked = self._unpacked if is_taught and self._unpacked else self._unpack(batch)
        self._unpacked = None
        return self._streams(unpacked, num_rows, is_taught=is_taught)

    def following(self, batch: AheadBatch | None) -> dict[Stream, RowTree]:
        """Give the streams of the batch after it, if that is known already.

        Raises:
            ValueError: The batch has another number of rows than were loaded.
        """
        self.before_next = None
        if batch is None:
            return {}
        self.before_next = RandomMoment.now(())
        self._unpacked = self._unpack(self._to_device(batch))
        return self._streams(self._unpacked, batch.num_rows, is_taught=False)

    def _unpack(self, batch: Any) -> tuple[Any, Any]:
        with self._step_context():
            return self._module.take_apart(batch)

    def _streams(self, unpacked: tuple[Any, Any], num_rows: int, *, is_taught: bool) -> dict[Stream, RowTree]:
        (inputs, targets), rows = unpacked, Rows(0, num_rows)
        streams = {Stream.HIDDEN: check_rows(inputs, rows)}
        if not is_taught:
            with self._step_context():
                taught = without_gaps(self._module.teacher_inputs(inputs))
            streams[Stream.BOUNDARY] = check_rows(taught, rows)
        streams[Stream.TARGETS] = RowTree(rows, targets, leading_row_leaves(targets, num_rows))
        return streams
