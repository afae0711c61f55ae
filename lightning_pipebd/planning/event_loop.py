"""The event loop: all ranks work off several steps at once, as far as messages and bounded queues let them.

    rank        does one operation after another; is stopped by what has not arrived, by a full way out, and before its
                updates by reductions
    channel     brings one message after another from one rank to another. A message waits for the sender's way out and
                the receiver's way in, then for its latency, and then, if it is `max_in_flight` steps early, until the
                receiver begins a later step; only then comes the next one
    gathering   a sum of gradients: starts when its last rank is to be expected, and ends beside what the ranks go on
                doing

Only transfers compete, for ways out and in, so only they are taken in the order of time, from a heap; everything else
follows from the times of what it waits for.
"""

from __future__ import annotations

from collections import deque
from heapq import heappop, heappush
from typing import NamedTuple

from lightning_pipebd.planning.jitter import expected_latest_ms
from lightning_pipebd.planning.operations import OperationKind, Timetable

__all__ = ["Recording", "run_timetable"]

_UNKNOWN = -1.0


class Recording(NamedTuple):
    """When everything happened, in ms.

    Args:
        finish_ms: For every rank the end of each step.
        wait_ms: For every rank and kind of operation the waiting in the second half of the steps.
        spans: For every rank and step the (start, wait, stop) of each operation; empty if spans were not wanted.
    """

    finish_ms: list[list[float]]
    wait_ms: list[list[float]]
    spans: list[list[list[tuple[float, float, float]]]]


def run_timetable(timetable: Timetable, num_steps: int, max_in_flight: int, *, with_spans: bool = False) -> Recording:
    """Let all ranks work off `num_steps` steps.

    Args:
        timetable: One step of all ranks, from lawful programs.
        num_steps: Steps, at least 1.
        max_in_flight: Steps by which a sender may be ahead of its receiver before it waits, at least 1.
        with_spans: Whether to note when each operation ran.
    """
    loop = _Loop(timetable, num_steps, max_in_flight, with_spans=with_spans)
    loop.run()
    ranks = loop.ranks
    return Recording(
        [rank.finish_ms for rank in ranks], [rank.wait_ms for rank in ranks], [rank.spans for rank in ranks]
    )


class _Rank:
    """A rank's place in its work."""

    def __init__(self, number: int, num_steps: int) -> None:
        self.number = number
        self.step = -1
        self.place = 0
        self.now = 0.0
        self.begin_ms = [_UNKNOWN] * num_steps
        self.finish_ms: list[float] = []
        self.wait_ms = [0.0] * len(OperationKind)
        self.due_reduces: list[tuple[int, int]] = []
        self.waiting_channels: list[tuple[int, _Channel, float]] = []
        self.spans: list[list[tuple[float, float, float]]] = []


class _Channel:
    """What is on its way from one rank to another."""

    def __init__(self, number: int) -> None:
        self.number = number
        self.posted: deque[tuple[int, int, float]] = deque()  # step, message, time
        self.free_ms = 0.0
        self.is_busy = False


class _Loop:
    def __init__(self, timetable: Timetable, num_steps: int, max_in_flight: int, *, with_spans: bool) -> None:
        num_ranks, num_messages = len(timetable.operations), len(timetable.channel_of)
        self.timetable = timetable
        self.num_steps = num_steps
        self.max_in_flight = max_in_flight
        self.with_spans = with_spans
        self.ranks = [_Rank(number, num_steps) for number in range(num_ranks)]
        self.channels = [_Channel(number) for number in range(len(timetable.channels))]
        self.way_out_ms = [0.0] * num_ranks
        self.way_in_ms = [0.0] * num_ranks
        self.delivered_ms = [[_UNKNOWN] * num_messages for _ in range(num_steps)]
        self.shelved_ms = [[_UNKNOWN] * num_messages for _ in range(num_steps)]
        self.last_message = [channel.messages[-1] for channel in timetable.channels]
        self.arrivals: list[list[list[tuple[float, float]]]] = [
            [[] for _ in timetable.gatherings] for _ in range(num_steps)
        ]
        self.reduced_ms = [[_UNKNOWN] * len(timetable.gatherings) for _ in range(num_steps)]
        self.group_free_ms = {gathering.ranks: 0.0 for gathering in timetable.gatherings}
        self.events: list[tuple[float, int]] = []
        self.runnable = [rank for rank in self.ranks if timetable.operations[rank.number]]

    def run(self) -> None:
        for rank in self.runnable:
            self._begin_step(rank)
        while True:
            while self.runnable:
                self._advance(self.runnable.pop())
            if not self.events:
                break
            time, channel = heappop(self.events)
            self._transfer(self.channels[channel], time)
        unfinished = [rank.number for rank in self.ranks if 0 <= rank.step < self.num_steps]
        assert not unfinished, f"ranks {unfinished} wait for ever"

    def _begin_step(self, rank: _Rank) -> None:
        rank.step += 1
        if rank.step == self.num_steps:
            return
        rank.place = 0
        rank.now += self.timetable.step_ms
        rank.begin_ms[rank.step] = rank.now
        if self.with_spans:
            rank.spans.append([])
        freed = [entry for entry in rank.waiting_channels if entry[0] <= rank.step]
        if freed:
            rank.waiting_channels = [entry for entry in rank.waiting_channels if entry[0] > rank.step]
            for _, channel, delivered in freed:
                self._shelve(channel, max(delivered, rank.now))

    def _advance(self, rank: _Rank) -> None:
        """Go on with a rank's work until it has to wait for something whose time is not known yet."""
        operations, half = self.timetable.operations[rank.number], self.num_steps // 2
        while rank.step < self.num_steps:
            if rank.place == len(operations):
                rank.finish_ms.append(rank.now)
                self._begin_step(rank)
                continue
            kind, busy_ms, target = operations[rank.place]
            start = ready = rank.now
            if kind:
                ready = self._ready_ms(rank, kind, target)
                if ready == _UNKNOWN:
                    return
                if ready < start:
                    ready = start
                elif rank.step >= half:
                    rank.wait_ms[kind] += ready - start
                if kind is OperationKind.SEND:
                    self._post(rank.step, target, ready)
                elif kind is OperationKind.REDUCE:
                    self._join(rank, target, ready)
            rank.now = ready + busy_ms
            rank.place += 1
            if self.with_spans:
                rank.spans[-1].append((start, ready - start, rank.now))

    def _ready_ms(self, rank: _Rank, kind: OperationKind, target: int) -> float:
        """Give when what the operation waits for is there, or `_UNKNOWN`."""
        if kind is OperationKind.RECV:
            return self.shelved_ms[rank.step][target]
        if kind is OperationKind.RECV_FROM_LAST:
            return self.shelved_ms[rank.step - 1][target] if rank.step else 0.0
        if kind is OperationKind.SEND:
            early = rank.step - self.max_in_flight
            return self.delivered_ms[early][self.last_message[self.timetable.channel_of[target]]] if early >= 0 else 0.0
        if kind is OperationKind.LOAD:
            return (rank.step + 1) * self.timetable.background_load_ms[rank.number]
        if kind is OperationKind.FIRST_UPDATE and rank.due_reduces:
            ends = [self.reduced_ms[step][target] for step, target in rank.due_reduces]
            if _UNKNOWN in ends:
                return _UNKNOWN
            rank.due_reduces.clear()
            return max(ends)
        return 0.0

    def _post(self, step: int, message: int, time: float) -> None:
        channel = self.channels[self.timetable.channel_of[message]]
        channel.posted.append((step, message, time))
        if not channel.is_busy:
            self._schedule(channel)

    def _schedule(self, channel: _Channel) -> None:
        channel.is_busy = bool(channel.posted)
        if channel.posted:
            heappush(self.events, (max(channel.posted[0][2], channel.free_ms), channel.number))

    def _transfer(self, channel: _Channel, time: float) -> None:
        step, message, _ = channel.posted[0]
        ends = self.timetable.channels[channel.number]
        start = max(time, self.way_out_ms[ends.sender], self.way_in_ms[ends.receiver])
        stop = start + self.timetable.wire_ms[message]
        self.way_out_ms[ends.sender] = self.way_in_ms[ends.receiver] = stop
        delivered = stop + ends.latency_ms
        self.delivered_ms[step][message] = delivered
        self.runnable.append(self.ranks[ends.sender])
        # The receiver takes a message once it works on a step that is less than `max_in_flight` behind.
        receiver, needed = self.ranks[ends.receiver], step - self.max_in_flight + 1
        if needed < 0 or receiver.begin_ms[needed] != _UNKNOWN:
            self._shelve(channel, delivered if needed < 0 else max(delivered, receiver.begin_ms[needed]))
        else:
            receiver.waiting_channels.append((needed, channel, delivered))

    def _shelve(self, channel: _Channel, time: float) -> None:
        step, message, _ = channel.posted.popleft()
        self.shelved_ms[step][message] = channel.free_ms = time
        self._schedule(channel)
        self.runnable.append(self.ranks[self.timetable.channels[channel.number].receiver])

    def _join(self, rank: _Rank, target: int, time: float) -> None:
        step, gathering = rank.step, self.timetable.gatherings[target]
        rank.due_reduces.append((step, target))
        arrivals = self.arrivals[step][target]
        arrivals.append((time, gathering.variances[gathering.ranks.index(rank.number)]))
        if len(arrivals) == len(gathering.ranks):
            start = max(expected_latest_ms(arrivals), self.group_free_ms[gathering.ranks])
            self.group_free_ms[gathering.ranks] = self.reduced_ms[step][target] = start + gathering.duration_ms
            self.runnable += [self.ranks[member] for member in gathering.ranks]
