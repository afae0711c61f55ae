"""One fit on one rank under a plan whose teacher blocks work one batch ahead."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_pipebd.ahead_data import AheadTrainLoader
from lightning_pipebd.data import TrainLoader, sized_length
from lightning_pipebd.lightning_internals.trainer import may_end_or_validate_after
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.planning.ahead import compile_ahead, teaches_ahead
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import Program
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.row_trees import RowTree
from lightning_pipebd.session import TrainingSession

__all__ = ["AheadSession", "session_kind"]


def session_kind(plan: Plan, module: BlockwiseDistillationModule) -> type[TrainingSession]:
    """Give the kind of session that trains a module's blocks under a plan."""
    is_ahead = teaches_ahead(plan, has_momentum=module.block_momentum is not None)
    return AheadSession if is_ahead else TrainingSession


class AheadSession(TrainingSession):
    """A session whose teacher blocks work on the next batch while the student blocks learn from the present one.

    Where the next batch may not be looked at, its steps are those of any other session.
    """

    tells_programs = False

    _num_next_rows = 0

    @override
    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self._ahead_programs: dict[tuple[int, int, bool, bool], Program] = {}

    @override
    def _make_loader(self, rows: RowLoader, loader: Any) -> TrainLoader:
        # Lightning itself looks one batch ahead in a loader without a length, and the state of a stateful loader would
        # be a batch ahead of the training.
        looks = sized_length(loader) is not None and not rows.keeps_its_own_position
        return AheadTrainLoader(
            rows,
            outbox=self._outbox,
            prepare=self._prepare,
            may_look=lambda index: looks and not may_end_or_validate_after(self._trainer, index),
        )

    def _prepare(self, batch: AheadBatch) -> None:
        """Bring a batch to the device, and unpack it."""
        moved = batch.moved(self._module, self._strategy.batch_to_device)
        batch.boundaries = self._jobs.load(moved, Rows(0, batch.num_rows))

    @override
    def _work_off(self, loaded: Loaded, batch: Any, *, update: bool) -> dict[int, Tensor]:
        if loaded.is_first and self._num_next_rows:
            self._executor.forget(self._program(self._num_next_rows, 0, is_taught=True, update=True))
            self._num_next_rows = 0
        is_taught = bool(self._num_next_rows)
        program = self._program(loaded.num_rows, loaded.num_next_rows, is_taught=is_taught, update=update)
        own: dict[int, RowTree] = {}
        if not loaded.rows.is_empty and not is_taught:
            is_ready = isinstance(loaded.batch, AheadBatch)
            own = loaded.batch.boundaries if is_ready else self._jobs.load(batch, loaded.rows)
        following = loaded.following.boundaries if loaded.following is not None else None
        self._num_next_rows = loaded.num_next_rows
        return self._executor.run(program, self.num_steps, own, following)

    def _program(self, num_rows: int, num_next_rows: int, *, is_taught: bool, update: bool) -> Program:
        key = (num_rows, num_next_rows, is_taught, update)
        if key not in self._ahead_programs:
            programs = compile_ahead(
                self._plan,
                num_rows,
                num_next_rows=num_next_rows,
                is_taught=is_taught,
                target_blocks=self._module.target_blocks,
                update=update,
            )
            self._ahead_programs[key] = programs[self._rank]
        return self._ahead_programs[key]
