"""One fit on one rank under a plan whose teacher blocks work one batch ahead."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from functools import cached_property, lru_cache
from typing import Any

from torch import Tensor
from typing_extensions import override

from lightning_pipebd.ahead_data import AheadTrainLoader
from lightning_pipebd.ahead_watch import HookWatch, WatchedJobs, check_may_teach_ahead, see_batch
from lightning_pipebd.data import TrainLoader, sized_length
from lightning_pipebd.lightning_internals.trainer import batch_number, has_bare_loader, may_end_or_validate_after
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.planning.ahead import compile_ahead, teaches_ahead
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import Program
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.executor import LEAVE_OUT
from lightning_pipebd.runtime.row_trees import RowTree
from lightning_pipebd.session import TrainingSession

__all__ = ["AheadSession", "session_kind"]


def session_kind(plan: Plan, module: BlockwiseDistillationModule) -> type[TrainingSession]:
    """Give the kind of session that trains a module's blocks under a plan.

    Raises:
        ValueError: The teacher blocks shall work one batch ahead, but the teacher has forward hooks.
    """
    if not teaches_ahead(plan, has_momentum=module.block_momentum is not None):
        return TrainingSession
    check_may_teach_ahead(module)
    return AheadSession


class AheadSession(TrainingSession):
    """A session whose teacher blocks work on the next batch while the student blocks learn from the present one.

    Where the next batch may not be looked at, its steps are those of any other session. What user code does between the
    two steps of a batch, and would do before both in one process, must not concern it: see
    :mod:`~lightning_pipebd.ahead_watch`.
    """

    tells_programs = False

    _jobs: WatchedJobs
    _jobs_kind = WatchedJobs
    _num_next_rows = 0
    _leaves_nothing = True

    @override
    def begin(self, *args: Any) -> None:
        super().begin(*args)
        self._hooks = HookWatch(self._module, getattr(self._trainer, "datamodule", None))

    @override
    def _make_loader(self, rows: RowLoader, loader: Any) -> TrainLoader:
        # Lightning itself looks one batch ahead in a loader without a length, and the state of a stateful loader would
        # be a batch ahead of the training.
        looks = sized_length(loader) is not None and not rows.keeps_its_own_position
        return AheadTrainLoader(
            rows,
            outbox=self._outbox,
            prepare=self._prepare,
            number=lambda: batch_number(self._trainer),
            may_look=lambda number: looks and self._may_look(number),
        )

    def _may_look(self, number: int) -> bool:
        if not self._leaves_nothing or not has_bare_loader(self._trainer):
            return False
        return not may_end_or_validate_after(self._trainer, number)

    def _prepare(self, batch: AheadBatch, *, is_early: bool) -> None:
        """Bring a batch to the device, and unpack it; early if the one before it was not trained on."""
        before = self._hooks.look()
        moved = batch.moved(self._module, self._strategy.batch_to_device)
        with self._module.putting_off_logs() as batch.put_off:
            batch.boundaries = self._jobs.load(moved, Rows(0, batch.num_rows))
        for piece in batch.boundaries.values():
            piece.note_versions()
        batch.seen = see_batch(moved)
        if changes := self._hooks.changes_since(before):
            self._refuse_to_look(changes, is_early=is_early)

    def _refuse_to_look(self, changes: list[str], *, is_early: bool) -> None:
        what = f"`{'`, `'.join(changes[:3])}`"
        if is_early:
            raise RuntimeError(
                "`unpack_batch` and batch hooks must leave nothing behind where the teacher works one batch ahead, "
                "because they are called for the next batch before the present one is trained, but have changed "
                f"{what} for this batch, and not for the first. Keep it in the batch, or {LEAVE_OUT}."
            )
        self._leaves_nothing = False
        warnings.warn(
            f"`unpack_batch` or a batch hook has changed {what}: so the teacher does not work one batch ahead, which "
            f"takes longer. Keep in the batch what belongs to it, or {LEAVE_OUT}.",
            stacklevel=2,
        )

    @override
    def _work_off(self, loaded: Loaded, batch: Any, *, update: bool) -> dict[int, Tensor]:
        if loaded.is_first:
            # Callbacks may have come to the teacher after set-up.
            check_may_teach_ahead(self._module)
            if self._num_next_rows:
                self._executor.forget(self._program(self._num_next_rows, 0, is_taught=True, update=True))
                self._num_next_rows = 0
        is_taught = bool(self._num_next_rows)
        if is_taught:
            self._jobs.check_teacher()
        program = self._program(loaded.num_rows, loaded.num_next_rows, is_taught=is_taught, update=update)
        own: dict[int, RowTree] = {}
        if isinstance(loaded.batch, AheadBatch):
            self._take_prepared(loaded.batch, batch)
            own = {} if is_taught else loaded.batch.boundaries
        elif not loaded.rows.is_empty:
            own = self._jobs.load(batch, loaded.rows)
        following = loaded.following.boundaries if loaded.following is not None else None
        self._num_next_rows = loaded.num_next_rows
        return self._executor.run(program, self.num_steps, own, following)

    def _take_prepared(self, prepared: AheadBatch, batch: Any) -> None:
        """Check that a batch is what was unpacked, and log what was logged then: now is the time."""
        if prepared.seen is not None and not prepared.seen.is_same(see_batch(batch)):
            raise RuntimeError(
                "A batch must stay as it is from the moment at which it is unpacked, because the teacher works one "
                "batch ahead, but it was changed before it was trained on: by `on_train_batch_start`, another hook, or "
                "a loader that uses the same memory for each batch. Change it in `on_after_batch_transfer`, let the "
                f"loader give new tensors, or {LEAVE_OUT}."
            )
        for name, value, args, kwargs in prepared.put_off:
            self._module.log(name, value, *args, **kwargs)

    @cached_property
    def _program(self) -> Callable[..., Program]:
        # Not all are kept: batches of ever other sizes have programs without end.
        return lru_cache(maxsize=64)(self._compile)

    def _compile(self, num_rows: int, num_next_rows: int, *, is_taught: bool, update: bool) -> Program:
        return compile_ahead(
            self._plan,
            num_rows,
            num_next_rows=num_next_rows,
            is_taught=is_taught,
            target_blocks=self._module.target_blocks,
            update=update,
        )[self._rank]
