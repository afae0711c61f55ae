"""Operations: programs with a time for everything, which is what the event loop works off.

Programs are those of a steady step: where teacher blocks work one batch ahead, a message about the present batch was
sent in the step before.
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import NamedTuple

from lightning_pipebd.planning.buckets import find_buckets
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.memory import boundary_bytes
from lightning_pipebd.planning.program import Action, Kind, Program

__all__ = ["Channel", "Gathering", "Operation", "OperationKind", "Timetable", "make_timetable"]


class OperationKind(IntEnum):
    """What an operation may have to wait for before its rank's thread is busy with it."""

    COMPUTE = 0
    LOAD = 1
    SEND = 2
    RECV = 3
    REDUCE = 4
    FIRST_UPDATE = 5
    RECV_FROM_LAST = 6


class Operation(NamedTuple):
    """One action of one rank.

    Args:
        kind: What it may wait for.
        busy_ms: Time of the rank's own thread.
        target: Number of the message of SEND and RECV (for RECV_FROM_LAST that of the step before), of the gathering
            that begins with a REDUCE.
    """

    kind: OperationKind
    busy_ms: float
    target: int = -1


class Channel(NamedTuple):
    """All messages from one rank to another, in the order in which they are sent.

    Args:
        sender: Rank that sends.
        receiver: Rank that receives.
        messages: Their numbers.
        num_bytes: What a step moves over the channel.
        latency_ms: Time between the end of a transfer and the arrival.
    """

    sender: int
    receiver: int
    messages: list[int]
    num_bytes: int
    latency_ms: float


class Gathering(NamedTuple):
    """The sum of one bucket: it starts when its last rank is to be expected and the ranks' sum before it is over.

    Args:
        block: The bucket's last block.
        ranks: Ranks that reduce together.
        duration_ms: Time of the sum.
        variances: For each of the ranks the variance of its time of arrival, from the begin of its step on.
    """

    block: int
    ranks: tuple[int, ...]
    duration_ms: float
    variances: tuple[float, ...]


class Timetable(NamedTuple):
    """One step of all ranks.

    Args:
        operations: For every rank its operations, in the order of its program.
        step_ms: Time of the thread between two programs.
        background_load_ms: For every rank the time its loader needs beside the thread.
        channels: Who sends to whom.
        channel_of: Channel of each message.
        wire_ms: Time for which each message occupies the sender's way out and the receiver's way in.
        gatherings: The REDUCEs.
    """

    operations: tuple[tuple[Operation, ...], ...]
    step_ms: float
    background_load_ms: tuple[float, ...]
    channels: tuple[Channel, ...]
    channel_of: tuple[int, ...]
    wire_ms: tuple[float, ...]
    gatherings: tuple[Gathering, ...]

    def busy_ms(self, rank: int) -> float:
        """Give the time for which a rank's thread is busy in a step."""
        operations = self.operations[rank]
        return sum((operation.busy_ms for operation in operations), self.step_ms if operations else 0.0)


def make_timetable(programs: Sequence[Program], costs: CostTable, cluster: Cluster) -> Timetable:
    """Look up the time of every action.

    Raises:
        CostError: A rank's class of devices was not measured.
    """
    return _Maker(programs, costs, cluster).make()


class _Maker:
    """Looks up times; equal actions on equal devices are looked up once."""

    def __init__(self, programs: Sequence[Program], costs: CostTable, cluster: Cluster) -> None:
        self.programs = programs
        self.is_taught = any(program.is_taught for program in programs)
        self.costs = costs
        self.cluster = cluster
        self.times = {name: costs.times(name) for name in set(cluster.device_class)}
        self.known: dict[tuple[str, Kind, int, int], float] = {}
        self.messages: dict[tuple[int, int, Action], int] = {}
        self.channel_numbers: dict[tuple[int, int], int] = {}
        self.channels: list[Channel] = []
        self.channel_of: list[int] = []
        self.wire_ms: list[float] = []
        self.gatherings: dict[int, int] = {}
        self.gathered: list[Gathering] = []
        self.variances: dict[tuple[int, int], float] = {}
        self.background_load_ms = [0.0] * len(programs)
        self.gradient_bytes = {block: sizes.gradient_bytes for block, sizes in enumerate(costs.blocks)}
        self.buckets: dict[int, tuple[int, ...]] = {}

    def make(self) -> Timetable:
        for program in self.programs:
            for action in program.actions:
                if action.kind is Kind.SEND:
                    self._add_message(program.rank, action)
        operations = tuple(self._operations(program) for program in self.programs)
        return Timetable(
            operations,
            self.costs.overheads.step_ms,
            tuple(self.background_load_ms),
            tuple(self.channels),
            tuple(self.channel_of),
            tuple(self.wire_ms),
            tuple(
                gathering._replace(variances=tuple(self.variances[number, rank] for rank in gathering.ranks))
                for number, gathering in enumerate(self.gathered)
            ),
        )

    def _add_message(self, sender: int, action: Action) -> None:
        receiver, number = action.peer, len(self.messages)
        link = self.cluster.link(self.costs, (sender, receiver))
        size = boundary_bytes(self.costs, action.index) * action.rows.num_rows
        index = self.channel_numbers.setdefault((sender, receiver), len(self.channels))
        if index == len(self.channels):
            self.channels.append(Channel(sender, receiver, [], 0, link.latency_ms))
        channel = self.channels[index]
        channel.messages.append(number)
        self.channels[index] = channel._replace(num_bytes=channel.num_bytes + size)
        self.messages[sender, receiver, action._replace(peer=-1)] = number
        self.channel_of.append(index)
        self.wire_ms.append(size / link.bytes_per_ms)

    def _operations(self, program: Program) -> tuple[Operation, ...]:
        operations = []
        has_waited = False
        self.buckets = find_buckets(program, self.gradient_bytes)
        busy_ms = self.costs.overheads.step_ms
        for action in program.actions:
            operation = self._operation(program.rank, action)
            if operation.kind is OperationKind.REDUCE:
                self.variances[operation.target, program.rank] = self.costs.jitter_ms * busy_ms
            busy_ms += operation.busy_ms
            if action.kind is Kind.UPDATE and not has_waited:
                operation = operation._replace(kind=OperationKind.FIRST_UPDATE)
                has_waited = True
            operations.append(operation)
        return tuple(operations)

    def _operation(self, rank: int, action: Action) -> Operation:
        overhead = getattr(self.costs.overheads, f"{action.kind.value.lower()}_ms")
        if action.kind in (Kind.SEND, Kind.RECV):
            return self._message_operation(rank, action, overhead)
        if action.kind is Kind.REDUCE:
            return self._reduce_operation(action, overhead)
        if action.kind is Kind.LOAD:
            loader = self.costs.loader
            load_ms = loader.load_ms(action.rows.num_rows)
            self.background_load_ms[rank] = (1 - loader.occupation) * load_ms
            return Operation(OperationKind.LOAD, overhead + loader.occupation * load_ms)
        return Operation(OperationKind.COMPUTE, overhead + self._compute_ms(rank, action))

    def _compute_ms(self, rank: int, action: Action) -> float:
        device_class = self.cluster.device_class[rank]
        key = (device_class, action.kind, action.index, action.rows.num_rows)
        if key not in self.known:
            times = self.times[device_class][action.index]
            if action.kind is Kind.UPDATE:
                self.known[key] = times.update_ms
            else:
                curve = times.teach_ms if action.kind is Kind.TEACH else times.learn_ms
                self.known[key] = curve.at(action.rows.num_rows)
        return self.known[key]

    def _message_operation(self, rank: int, action: Action, overhead: float) -> Operation:
        is_send = action.kind is Kind.SEND
        sender, receiver = (rank, action.peer) if is_send else (action.peer, rank)
        link = self.cluster.link(self.costs, (sender, receiver))
        is_from_last = self.is_taught and not action.is_next
        number = self.messages[sender, receiver, action._replace(kind=Kind.SEND, peer=-1, is_next=self.is_taught)]
        occupation = link.send_occupation if is_send else link.receive_occupation
        busy_ms = overhead + occupation * (link.latency_ms + self.wire_ms[number])
        received = OperationKind.RECV_FROM_LAST if is_from_last else OperationKind.RECV
        return Operation(OperationKind.SEND if is_send else received, busy_ms, number)

    def _reduce_operation(self, action: Action, overhead: float) -> Operation:
        bucket = self.buckets.get(action.index)
        if bucket is None:
            # Its gradients are kept for those of a later block.
            return Operation(OperationKind.COMPUTE, 0.0)
        link = self.cluster.link(self.costs, action.ranks)
        duration = link.reduce_ms(sum(self.gradient_bytes[block] for block in bucket), len(action.ranks))
        if action.index not in self.gatherings:
            self.gatherings[action.index] = len(self.gathered)
            self.gathered.append(Gathering(action.index, action.ranks, duration, ()))
        busy_ms = overhead + link.reduce_occupation * duration
        return Operation(OperationKind.REDUCE, busy_ms, self.gatherings[action.index])
