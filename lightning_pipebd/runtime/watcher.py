"""The watcher: a thread beside the training that ends the process when the run does not move any more.

The main thread may wait in code that nothing can interrupt: for a peer that is stopped, for a network that is cut, in a
loader. The watcher hears the heartbeats of all ranks, knows how long steps have taken, and judges (the rules are
:func:`~lightning_pipebd.planning.standing.find_culprit`'s). When a rank holds up the run, every rank says which, where
it stands and who waits for whom, and ends with a status other than 0.
"""

from __future__ import annotations

import os
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Protocol

from lightning_pipebd.planning.program import Program
from lightning_pipebd.planning.standing import Culprit, Standing, find_culprit, format_standings
from lightning_pipebd.planning.table import format_table
from lightning_pipebd.runtime.heartbeats import Heartbeats
from lightning_pipebd.runtime.progress import NUM_WARM_UP_STEPS, Progress
from lightning_pipebd.runtime.relay import RelayError
from lightning_pipebd.runtime.transport import Transport, TransportError

__all__ = ["Bounds", "Runner", "Watcher"]

_TICK_S = 0.5
_NUM_REPEATS = 3
_LATE_NEWS_S = 0.5
_NUM_MISSED = 3
_GONE = "has closed its connections without a word; was it killed?"
_WARM_UP_FACTOR = 5
_SLOWEST_FACTOR = 10


class Runner(Protocol):
    """What runs programs on a rank, as far as the watcher looks at it.

    Attributes:
        current: The program under way, of whatever kind, and the position of its present action; ``None`` between.
        num_done: Grows with every action that is over.
    """

    current: tuple[Any, int] | None
    num_done: int


class Bounds:
    """How long a rank may go without progress.

    Args:
        stall_s: Least bound in steps, in seconds; it grows with the slowest of the last steps.
        other_s: Bound in hooks, evaluation and saving.
        grace_s: How long the main thread may take to end by itself after another rank has failed.

    Example:
        >>> Bounds(stall_s=60.0, other_s=1800.0).while_training(num_steps=50, slowest_s=9.0)
        90.0
    """

    def __init__(self, stall_s: float, other_s: float, grace_s: float = 10.0) -> None:
        self.stall_s = stall_s
        self.other_s = max(other_s, stall_s)
        self.grace_s = grace_s

    def while_training(self, num_steps: int, slowest_s: float) -> float:
        """Give the bound while loading or running a program, after some steps of which the slowest is given."""
        warm_up = _WARM_UP_FACTOR if num_steps < NUM_WARM_UP_STEPS else 1
        return max(self.stall_s * warm_up, _SLOWEST_FACTOR * slowest_s)


class Watcher:
    """Watch over one rank's progress, and hear of the others'.

    **Collective** over all ranks: the constructor exchanges addresses. Construct it and call :meth:`close` in the main
    thread: that is the one it watches.

    Args:
        transport: Exchanges the addresses.
        progress: Written by the main thread.
        runner: Runs the programs.
        bounds: How long is too long.
        blocks: This rank's blocks, as text.
        programs: Gives all ranks' programs for a batch, for the report; none if they cannot be told again.
        towards: Address by which the machines reach each other.
        end: Ends the process; called once, after the report, with the rank that is to blame.
    """

    def __init__(
        self,
        transport: Transport,
        progress: Progress,
        runner: Runner,
        bounds: Bounds,
        *,
        blocks: str,
        programs: Callable[[int, bool], Sequence[Program]],
        towards: str,
        end: Callable[[int], None],
    ) -> None:
        self._rank = transport.rank
        self._progress = progress
        self._runner = runner
        self._bounds = bounds
        self._programs = programs
        self._end = end
        self._own = Standing(self._rank, socket.gethostname(), os.getpid(), blocks)
        self._heartbeats = Heartbeats(self._rank, towards)
        # Everyone is known from the start: a rank that stops before its first heartbeat is missed, too.
        everyone = transport.all_gather_object((self._heartbeats.introduce(), self._own))
        self._heartbeats.connect([introduction for introduction, _ in everyone])
        self._standings: dict[int, Standing] = {standing.rank: standing for _, standing in everyone}
        self._lock = threading.Lock()
        self._clock_s = 0.0
        self._heard_at: dict[int, float] = {}
        self._moved_at, self._marks = 0.0, (-1, -1)
        self._failed_at: float | None = None
        self._main = threading.get_ident()
        self._closing = threading.Event()
        self._has_left = False
        self._thread = threading.Thread(target=self._watch, name="watcher", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Say goodbye: this rank has done its part."""
        self._leave(replace(self._stand(), is_done=True))

    def fail(self, error: BaseException) -> str:
        """Tell the others why this rank ends; give the report of what is known of the run.

        If another rank has failed before, that rank is the one that the others are told of. After :meth:`close` there
        is nobody to tell, and nothing is known.
        """
        if self._has_left:
            return ""
        culprit = self._blame(error)
        self._leave(self._last_words(culprit))
        return self._report(culprit)

    def _blame(self, error: BaseException) -> Culprit:
        # What another rank said before it closed its connections may be a little later than the closing.
        is_wire = isinstance(error, (RelayError, TransportError))
        patience_s = 2 * _NUM_MISSED * _TICK_S if is_wire else _LATE_NEWS_S if isinstance(error, RuntimeError) else 0.0
        deadline = time.monotonic() + patience_s
        while True:
            with self._lock:
                self._hear()
                culprit = self._find_culprit()
            if culprit is not None and culprit.rank != self._rank:
                return culprit
            # A rank that was killed is the one that says nothing any more.
            silent = [rank for rank, silent_s in self._silent_s().items() if silent_s > _NUM_MISSED * _TICK_S]
            if is_wire and silent:
                return Culprit(silent[0], _GONE, is_stall=False)
            if time.monotonic() > deadline:
                break
            time.sleep(_TICK_S / 10)
        own = self._standings[self._rank]
        if is_wire and own.waits_for:
            return Culprit(own.waits_for[0], _GONE, is_stall=False)
        lines = [line for line in str(error).splitlines() if line]
        return Culprit(self._rank, f"failed: {type(error).__name__}: {lines[0] if lines else ''}", is_stall=False)

    def _leave(self, standing: Standing) -> None:
        self._has_left = True
        is_first = not self._closing.is_set()
        self._closing.set()
        self._thread.join()
        for _ in range(_NUM_REPEATS if is_first else 0):
            self._heartbeats.send(standing)
        self._heartbeats.close()

    def _watch(self) -> None:
        last = time.monotonic()
        while not self._closing.wait(_TICK_S):
            now = time.monotonic()
            # While this process was stopped, nothing was heard, and nobody is to blame for it.
            self._clock_s += min(now - last, 3 * _TICK_S)
            last = now
            with self._lock:
                self._hear()
                self._heartbeats.send(self._stand())
                culprit = self._find_culprit()
            if culprit is not None and self._is_due(culprit):
                self._give_up(culprit)
                return

    def _hear(self) -> None:
        for standing in self._heartbeats.receive():
            known = self._standings.get(standing.rank)
            # Datagrams may overtake each other: what ended a rank stays true.
            if known is None or not (known.failure or known.is_done):
                self._standings[standing.rank] = standing
            self._heard_at[standing.rank] = self._clock_s
        others = {rank: standing for rank, standing in self._standings.items() if rank != self._rank}
        self._progress.agreement.hear(
            {rank: standing.bids for rank, standing in others.items()},
            is_over=any(standing.is_done for standing in others.values()),
            has_failed=any(standing.failure for standing in others.values()),
        )

    def _find_culprit(self) -> Culprit | None:
        self._standings[self._rank] = self._stand()
        return find_culprit(self._rank, self._standings, self._silent_s(), self._training_bound())

    def _silent_s(self) -> dict[int, float]:
        # A network may drop all heartbeats: then nobody is missed as long as this rank itself gets on.
        idle_s = self._standings[self._rank].idle_s
        return {
            rank: self._clock_s - self._heard_at[rank] if rank in self._heard_at else idle_s
            for rank in self._standings
            if rank != self._rank and not self._standings[rank].is_done
        }

    def _training_bound(self) -> float:
        return self._bounds.while_training(self._progress.num_steps, self._progress.slowest_s)

    def _is_due(self, culprit: Culprit) -> bool:
        if culprit.is_stall:
            return True
        # Somebody has said why the run ends. The main thread will notice, and end with its own traceback; if it can.
        self._failed_at = self._clock_s if self._failed_at is None else self._failed_at
        return self._clock_s - self._failed_at > self._bounds.grace_s

    def _stand(self) -> Standing:
        progress, current = self._progress, self._runner.current
        marks = (progress.num_marks, self._runner.num_done)
        if marks != self._marks:
            self._marks, self._moved_at = marks, self._clock_s
        place, position, waits_for = progress.place, -1, progress.waits_for
        if current is not None and progress.is_training:
            program, position = current
            place, waits_for = str(program.actions[position]), _peers_of(program, position)
        return replace(
            self._own,
            step=progress.step,
            place=place,
            position=position,
            num_rows=progress.num_rows,
            is_update=progress.is_update,
            waits_for=waits_for,
            idle_s=self._clock_s - self._moved_at,
            bound_s=self._training_bound() if progress.is_training else self._bounds.other_s,
            bids=progress.agreement.bids(),
        )

    def _give_up(self, culprit: Culprit) -> None:
        self._closing.set()
        try:
            for _ in range(_NUM_REPEATS):
                self._heartbeats.send(self._last_words(culprit))
            report = self._report(culprit)
            if culprit.rank == self._rank:
                frame = sys._current_frames().get(self._main)
                stack = "".join(traceback.format_stack(frame)) if frame is not None else ""
                report = f"Rank {self._rank} is stuck here (most recent call last):\n{stack}{report}"
            sys.stderr.write(f"{report}\n")
            sys.stderr.flush()
        finally:
            # Even if nobody reads what is written there any more: nothing else will end the process.
            self._end(culprit.rank)

    def _last_words(self, culprit: Culprit) -> Standing:
        return replace(self._stand(), failure=culprit.reason, blames=culprit.rank, is_stall=culprit.is_stall)

    def _report(self, culprit: Culprit) -> str:
        standing = self._standings.get(culprit.rank, Standing(culprit.rank))
        is_stall = "has made no progress" in culprit.reason
        advice = "\nIf this is no fault, raise `stall_timeout` of PipeBDStrategy." if is_stall else ""
        return (
            f"Rank {self._rank} on {self._own.host} ends, because rank {culprit.rank} {culprit.reason.rstrip('.?')}.\n"
            f"{format_standings(self._standings, self._silent_s(), culprit.rank)}{self._table(standing)}{advice}"
        )

    def _table(self, standing: Standing) -> str:
        if standing.position < 0:
            return ""
        programs = self._programs(standing.num_rows, standing.is_update)
        return "\n" + format_table(programs, marker=(standing.rank, standing.position)) if programs else ""


def _peers_of(program: Any, position: int) -> tuple[int, ...]:
    # Programs of blocks and of whole students name their kinds alike.
    action = program.actions[position]
    if action.kind.value in ("RECV", "SEND"):
        return (action.peer,)
    if action.kind.value in ("REDUCE", "UPDATE"):
        # Sums are waited for when the program has ended, whose last action is an update.
        shared = {rank for each in program.actions if each.kind.value == "REDUCE" for rank in each.ranks}
        return tuple(sorted(shared - {program.rank}))
    return ()
