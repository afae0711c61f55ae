"""How all ranks follow a request after one and the same step, though each trains at its own pace.

A request comes from outside, at any moment and perhaps on one rank only: end, or save. Every rank that hears of it
makes a *bid*: the number of steps that it has been let into, and so will complete whatever the others do. It goes no
further before it knows all bids. The largest is the step after which all follow: every rank can reach it, for none that
is behind waits for one that has stopped earlier. Bids travel with the heartbeats, from a thread of their own, so that
a rank that waits in a step bids as well.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from typing import NamedTuple

__all__ = ["END", "SAVE", "Due", "StepAgreement"]

END, SAVE = "end", "save"
_PATIENCE_S = 20.0


class Due(NamedTuple):
    """A request to follow now: on all ranks after the same step, or by this one alone because others cannot be asked.

    Args:
        kind: What was asked for.
        is_agreed: Whether all ranks follow.
    """

    kind: str
    is_agreed: bool


class StepAgreement:
    """What one rank was asked for, and what all ranks bid.

    The main thread calls :meth:`request` (also from a signal handler: nothing there waits), :meth:`step_done` and
    :meth:`is_open`; the thread of the heartbeats calls :meth:`hear` and :meth:`bids`.

    Example:
        >>> agreement = StepAgreement()
        >>> agreement.step_done(), agreement.step_done()
        ([], [])
        >>> agreement.request(END)
        >>> agreement.bids()  # two steps are done, and the third has begun
        {'end': [3]}
        >>> agreement.hear({1: {END: [5]}}, is_over=False, has_failed=False)
        >>> agreement.step_done(), agreement.step_done(), agreement.step_done()
        ([], [], [Due(kind='end', is_agreed=True)])
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._num_done = 0
        self._num_requested: dict[str, int] = {}
        self._num_followed: dict[str, int] = {}
        self._own: dict[str, list[int]] = {}
        self._others: list[Mapping[str, Sequence[int]]] | None = None
        self._is_over = False
        self._has_failed = False

    def request(self, kind: str) -> None:
        """Ask all ranks for something, after a step that they agree upon."""
        # No lock: a signal handler interrupts the main thread, which may hold it.
        self._num_requested[kind] = self._num_followed.get(kind, 0) + 1

    def is_open(self, kind: str) -> bool:
        """Tell whether some rank was asked for something that has not been followed yet."""
        num_asked = max(self._num_requested.get(kind, 0), len(self._own.get(kind, ())))
        return self._num_followed.get(kind, 0) < num_asked

    def bids(self) -> dict[str, list[int]]:
        """Bid where that is due; give all bids of this rank, for every kind in the order of the requests."""
        with self._changed:
            self._bid_requested()
            return {kind: list(bids) for kind, bids in self._own.items()}

    def hear(self, others: Mapping[int, Mapping[str, Sequence[int]]], *, is_over: bool, has_failed: bool) -> None:
        """Take in the bids of all other ranks, and bid where these have begun to.

        Args:
            others: The bids of every other rank.
            is_over: Whether one of them has done its part: then the others finish theirs, and nobody stops any more.
            has_failed: Whether one of them has failed: then nobody is waited for.
        """
        with self._changed:
            for bids in others.values():
                for kind, own in bids.items():
                    self._bid(kind, len(own))
            self._others = list(others.values())
            self._is_over, self._has_failed = is_over, has_failed
            self._changed.notify_all()

    def step_done(self, *, can_stop: bool = True, patience_s: float = _PATIENCE_S) -> list[Due]:
        """Say that a step is done; give what is to be followed now.

        Args:
            can_stop: Whether this is a step to stop after, alike on all ranks; otherwise the next such step is taken.
            patience_s: How long to wait for the bids of others.
        """
        deadline = time.monotonic() + patience_s
        with self._changed:
            self._num_done += 1
            # Not only with the next heartbeat: steps may be so short that the run would be over by then.
            self._bid_requested()
            due = [self._wait(kind, deadline) for kind in sorted(self._own)] if can_stop else []
            found = [each for each in due if each is not None]
            for each in found:
                self._num_followed[each.kind] = self._num_followed.get(each.kind, 0) + 1
            return found

    def _wait(self, kind: str, deadline: float) -> Due | None:
        index, own = self._num_followed.get(kind, 0), self._own[kind]
        if index >= len(own) or own[index] > self._num_done:
            return None
        while (agreed := self._agreed(kind, index)) is None:
            if self._is_over:
                return None
            left_s = deadline - time.monotonic()
            if self._has_failed or left_s <= 0:
                return Due(kind, is_agreed=False)
            self._changed.wait(left_s)
        return Due(kind, is_agreed=True) if self._num_done >= agreed else None

    def _agreed(self, kind: str, index: int) -> int | None:
        if self._others is None:
            return None
        bids = [self._own[kind], *(others.get(kind, ()) for others in self._others)]
        return max(each[index] for each in bids) if all(len(each) > index for each in bids) else None

    def _bid_requested(self) -> None:
        for kind, num_requested in list(self._num_requested.items()):
            self._bid(kind, num_requested)

    def _bid(self, kind: str, num_rounds: int) -> None:
        bids = self._own.setdefault(kind, [])
        while len(bids) < num_rounds:
            bids.append(self._num_done + 1)
