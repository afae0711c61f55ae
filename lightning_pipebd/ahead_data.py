"""Batches for plans whose teacher blocks work one batch ahead: the next batch is loaded, and unpacked, a step early.

What draws random numbers (loading, the batch transfer hooks, unpacking) draws in the order of one process, batch after
batch: a batch is brought to the device and unpacked before the next one is loaded. And none is loaded early where one
process would draw something else before it: where validation may follow the step, or the training may end.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, Protocol

from typing_extensions import override

from lightning_pipebd.data import BATCH, END, TrainLoader
from lightning_pipebd.data_position import DataPosition, RandomMoment
from lightning_pipebd.pipeline_data import AheadBatch
from lightning_pipebd.row_loader import Loaded, RowLoader
from lightning_pipebd.runtime.executor import LEAVE_OUT
from lightning_pipebd.runtime.mailbox import Outbox

__all__ = ["AheadTrainLoader"]


class Prepare(Protocol):
    """Brings a batch to the device, and unpacks it."""

    def __call__(self, batch: AheadBatch, *, is_early: bool) -> None:
        """Prepare a batch; early if the one before it is not trained on yet."""


class AheadTrainLoader(TrainLoader):
    """The loading rank's training loader: whole batches, each announced with the number of rows of the next.

    Args:
        row_loader: Loads whole batches.
        outbox: Where headers go; ``None`` without other ranks.
        prepare: Unpacks a batch that the next one is loaded before; told whether the one before it is not trained yet.
        number: Gives the number in the epoch of the batch that is asked for. Whoever trains counts: a run that goes on
            may begin with the first batch of the loader in the middle of an epoch.
        may_look: Tells of a batch, by its number, whether the next may be loaded before it is trained on.
    """

    def __init__(
        self,
        row_loader: RowLoader,
        *,
        outbox: Outbox | None,
        prepare: Prepare,
        number: Callable[[], int],
        may_look: Callable[[int], bool],
    ) -> None:
        super().__init__(row_loader, outbox=outbox)
        self._prepare = prepare
        self._number = number
        self._may_look = may_look
        self._early: _Early | None = None

    @override
    def _take_resumed(self) -> DataPosition | None:
        self._early = None
        return super()._take_resumed()

    @override
    def _announce(self, batches: Iterator[Loaded]) -> Iterator[Any]:
        is_first = True
        loaded, is_ready = next(batches, None), False
        now: RandomMoment | None = None
        while loaded is not None:
            number, following = self._number(), None
            if (looks := self._may_look(number)) and not is_ready:
                loaded = self._readied(loaded, is_early=False)
                # Unpacking may have shown that nobody may.
                looks = self._may_look(number)
            if looks:
                before = now or self._now()
                following = next(batches, None)
                following = following and self._readied(following, is_early=True)
                self._early = _Early(number + 1, before, self._now())
            self._post(BATCH, loaded.num_rows, following.num_rows if following is not None else 0)
            self.loaded.append(
                loaded._replace(
                    is_first=is_first,
                    num_next_rows=following.num_rows if following is not None else 0,
                    following=following.batch if following is not None else None,
                )
            )
            yield loaded.batch
            now = self._checked_now() if looks else None
            loaded, is_ready = (following, True) if looks else (next(batches, None), False)
            is_first = False
        self._post(END)

    def _readied(self, loaded: Loaded, *, is_early: bool) -> Loaded:
        batch = AheadBatch(loaded.batch)
        self._prepare(batch, is_early=is_early)
        return loaded._replace(batch=batch)

    @override
    def position(self, num_batches: int | None) -> DataPosition | None:
        """Say where the run stands after some batches of the epoch, ``None`` for all; nothing before its first one."""
        found = super().position(num_batches)
        early = self._early
        if found is None or found.now is None or early is None or early.number != num_batches:
            return found
        # What was drawn for a batch that is not trained on yet will be drawn again.
        return found._replace(now=early.before.for_generators(early.drawn, found.now))

    def _now(self) -> RandomMoment:
        return RandomMoment.now(self._row_loader.generators)

    def _checked_now(self) -> RandomMoment:
        """Give the present states, or raise if the step drew from a generator that the next batch was drawn from."""
        early, now = self._early, self._now()
        if early is not None and (both := early.drawn and early.drawn & early.after.drawn_until(now)):
            raise RuntimeError(
                "Hooks, callbacks and the teacher must not draw random numbers where the data set or batch hooks draw "
                "from the same generator, because the teacher works one batch ahead, and the next batch is drawn "
                f"before they have their turn, but they have drawn from {' and '.join(sorted(both))}. Let them draw "
                f"from a generator of their own, have the loader's workers draw, or {LEAVE_OUT}."
            )
        return now


class _Early(NamedTuple):
    """The random states before and after a batch was loaded, and unpacked, a step early."""

    number: int
    before: RandomMoment
    after: RandomMoment

    @property
    def drawn(self) -> set[str]:
        return self.before.drawn_until(self.after)
