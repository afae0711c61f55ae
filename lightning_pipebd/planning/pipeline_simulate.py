"""The simulator of end-to-end training: how long programs take, from the blocks' times, without any device."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from lightning_pipebd.planning.buckets import find_buckets
from lightning_pipebd.planning.costs import LinkCost
from lightning_pipebd.planning.event_loop import run_timetable
from lightning_pipebd.planning.operations import Channel, Gathering, Operation, OperationKind, Timetable
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, write_programs
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.pipeline_schedule import Phase, Task
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.planning.simulate import TimelineSpan, make_timeline, steady_step_ms

__all__ = ["PipelineCosts", "PipelineSimulation", "half_batch_programs", "simulate_pipeline"]


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineCosts:
    """What the blocks take for a whole batch; a micro-batch takes its part of the rows.

    Args:
        teach_ms: For every teacher block.
        forward_ms: For every student block.
        backward_ms: For every student block; half of it are the gradients of the weights, where they are split off.
        loss_ms: The loss and its gradient by the student's output.
        update_ms: For every student block, the optimizer step; nothing where nothing is said.
        follow_ms: For every block of a momentum teacher, its following; nothing where nothing is said.
        step_ms: What every rank takes between two steps.
        send_ms: What a message takes of the sender's own time, however small it is.
        recv_ms: What it takes of the receiver's.
        load_ms: Loading, as far as it occupies the loading rank's own thread.
        background_load_ms: Loading beside it.
        gradient_bytes: For every student block, its gradients, which replicas sum; nothing where nothing is said.
        stream_bytes: What each stream has at each place (block or boundary) for a whole batch; the rest is free.
        links: What messages cost within a node, and between nodes.
        node: Number of each rank's node; empty for one node.
    """

    teach_ms: tuple[float, ...]
    forward_ms: tuple[float, ...]
    backward_ms: tuple[float, ...]
    loss_ms: float = 0.0
    update_ms: tuple[float, ...] = ()
    follow_ms: tuple[float, ...] = ()
    step_ms: float = 0.0
    send_ms: float = 0.0
    recv_ms: float = 0.0
    load_ms: float = 0.0
    background_load_ms: float = 0.0
    gradient_bytes: tuple[float, ...] = ()
    stream_bytes: Mapping[Stream, Sequence[float]] = field(default_factory=dict)
    links: tuple[LinkCost, LinkCost] = (LinkCost(), LinkCost())
    node: tuple[int, ...] = ()

    @classmethod
    def equal(cls, num_blocks: int, teacher_ratio: float) -> PipelineCosts:
        """Blocks of one length: forward 1 ms, backward 2 ms, and the teacher's forward `teacher_ratio` ms."""
        ones = (1.0,) * num_blocks
        return cls(teach_ms=(teacher_ratio,) * num_blocks, forward_ms=ones, backward_ms=(2.0,) * num_blocks)

    def link(self, *ranks: int) -> LinkCost:
        """Give the cost of the link between ranks: the slower one, if they are of different nodes."""
        is_near = not self.node or len({self.node[rank] for rank in ranks}) == 1
        return self.links[0 if is_near else 1]

    def message_bytes(self, program: PipelineProgram, action: PipelineAction) -> float:
        """Give the bytes of a message."""
        if action.stream is Stream.INPUTS:
            streams = (Stream.HIDDEN, Stream.BOUNDARY, Stream.TARGETS)
            return sum(self.stream_bytes.get(stream, (0.0,))[0] for stream in streams) * _share(program, action)
        sizes = self.stream_bytes.get(action.stream)
        if sizes is None:
            return 0.0
        return sizes[action.index] if action.stream is Stream.WEIGHTS else sizes[action.index] * _share(program, action)


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineSimulation:
    """What a simulation found.

    Args:
        step_time_ms: Time of a step in the steady state.
        busy_ms: For every rank the time per step for which it computes.
        max_micro_batches: For every rank, how many of its blocks' micro-batches wait for their backward at once.
        timeline: Every action of every step, rank by rank; empty unless it was asked for.
    """

    step_time_ms: float
    busy_ms: tuple[float, ...]
    max_micro_batches: tuple[int, ...]
    timeline: tuple[TimelineSpan, ...] = ()

    @property
    def utilisation(self) -> float:
        """Fraction of all ranks' time for which they compute."""
        return sum(self.busy_ms) / len(self.busy_ms) / self.step_time_ms


def simulate_pipeline(
    programs: Sequence[PipelineProgram],
    costs: PipelineCosts,
    *,
    num_steps: int = 24,
    max_in_flight: int = 2,
    with_timeline: bool = False,
) -> PipelineSimulation:
    """Run the same lawful programs step after step on a clock.

    Args:
        programs: One program per rank, of a step in the steady state.
        costs: What actions take.
        num_steps: Steps to simulate, at least 2.
        max_in_flight: Steps by which a rank may run ahead.
        with_timeline: Whether to note when each action ran.

    Example:
        >>> plan = PipelinePlan.parse("0")
        >>> step = PipelineStep(num_rows=4, teaches_own=False, num_next_rows=4)
        >>> from lightning_pipebd.planning.pipeline_compiler import compile_pipeline
        >>> simulate_pipeline(compile_pipeline(plan, step), PipelineCosts.equal(1, 1.0)).step_time_ms
        4.0
    """
    timetable = _make_timetable(programs, costs)
    recording = run_timetable(timetable, num_steps, max_in_flight, with_spans=with_timeline)
    return PipelineSimulation(
        step_time_ms=steady_step_ms(recording),
        busy_ms=tuple(timetable.busy_ms(program.rank) for program in programs),
        max_micro_batches=tuple(map(_max_micro_batches, programs)),
        timeline=make_timeline(programs, recording) if with_timeline else (),
    )


def half_batch_programs(num_ranks: int) -> tuple[PipelineProgram, ...]:
    """Write the steady-state programs of TSPipe's released code for distillation, to compare with.

    As many micro-batches as ranks less one; forwards go on in whole micro-batches, backwards in halves, last one first;
    the loss waits for the whole batch. Rank ``d`` teaches ``num_ranks - 1 - 2 * d`` micro-batches of the next batch
    before it goes backward, the others after.

    Source: Lim et al., "TSPipe: Learn from Teacher Faster with Pipelines" (ICML 2022), and the order that its released
    code generates: that of two views, from which the tasks of one view are left out.
    """
    num_halves = 2 * (num_ranks - 1)
    plan = PipelinePlan(num_ranks=num_ranks, teacher=tuple(range(num_ranks)), student=tuple(range(num_ranks)))
    step = PipelineStep(
        num_rows=num_halves,
        num_micro_batches=num_halves,
        teaches_own=False,
        num_next_rows=num_halves,
        is_full_batch=True,
    )
    orders = []
    for rank in range(num_ranks):
        num_before = 2 * max(0, num_ranks - 1 - 2 * rank)
        teach = [Task(Phase.TEACH, rank, unit, is_next=True) for unit in range(num_halves)]
        forward = [Task(Phase.FORWARD, rank, unit) for unit in range(num_halves)]
        backward = [Task(Phase.BACKWARD, rank, unit) for unit in reversed(range(num_halves))]
        orders.append([*forward, *teach[:num_before], *backward, *teach[num_before:]])
    programs = write_programs(plan, step, orders)
    return tuple(program._replace(actions=_in_whole_micro_batches(program.actions)) for program in programs)


def _in_whole_micro_batches(actions: Sequence[PipelineAction]) -> tuple[PipelineAction, ...]:
    """Hold what a half forward would send until the other half is done, and receive both before the first."""
    ordered = list(actions)
    for action in actions:
        is_first_half = action.rows.start % 2 == 0 and action.rows.num_rows == 1
        if action.kind is PipelineKind.SEND and is_first_half and action.stream is not Stream.GRADIENT:
            place = _find(ordered, action)
            ordered.remove(action)
            ordered.insert(place - 1, action)
        if action.kind is PipelineKind.RECV and is_first_half and action.stream is not Stream.GRADIENT:
            second = ordered.pop(_find(ordered, action))
            ordered.insert(ordered.index(action) + 1, second)
    return tuple(ordered)


def _find(actions: list[PipelineAction], first: PipelineAction) -> int:
    """Find the same action of the other half."""
    return actions.index(first._replace(rows=Rows(first.rows.start + 1, first.rows.stop + 1)))


def _make_timetable(programs: Sequence[PipelineProgram], costs: PipelineCosts) -> Timetable:
    exchanges = _Exchanges(programs, costs)
    return Timetable(
        tuple(tuple(exchanges.operation(program, action) for action in program.actions) for program in programs),
        costs.step_ms,
        (costs.background_load_ms,) * len(programs),
        tuple(exchanges.channels.values()),
        tuple(exchanges.channel_of),
        tuple(exchanges.wire_ms),
        tuple(exchanges.gatherings.values()),
    )


class _Exchanges:
    """What ranks send each other and sum together in a step, numbered as a timetable wants it.

    Args:
        programs: All ranks' programs.
        costs: What they cost.

    Attributes:
        channels: By sender and receiver, in the order of their first message.
        channel_of: For each message the number of its channel.
        wire_ms: For each message its time on the way.
        gatherings: By last block and ranks.
    """

    def __init__(self, programs: Sequence[PipelineProgram], costs: PipelineCosts) -> None:
        self._costs = costs
        self._messages: dict[tuple[int, PipelineAction], int] = {}
        self.channels: dict[tuple[int, int], Channel] = {}
        self.channel_of: list[int] = []
        self.wire_ms: list[float] = []
        self.gatherings: dict[tuple[int, tuple[int, ...]], Gathering] = {}
        sizes = dict(enumerate(costs.gradient_bytes or [0.0] * len(costs.forward_ms)))
        for program in programs:
            buckets = find_buckets(program, sizes)
            for action in program.actions:
                if action.kind is PipelineKind.SEND:
                    self._add_message(program, action)
                elif action.kind is PipelineKind.REDUCE and action.index in buckets:
                    self._add_gathering(action, sum(sizes[block] for block in buckets[action.index]))

    def _add_message(self, program: PipelineProgram, action: PipelineAction) -> None:
        number = self._messages[program.rank, action] = len(self._messages)
        ends = (program.rank, action.peer)
        link = self._costs.link(*ends)
        self.channels.setdefault(ends, Channel(*ends, [], 0, link.latency_ms)).messages.append(number)
        self.channel_of.append(list(self.channels).index(ends))
        self.wire_ms.append(self._costs.message_bytes(program, action) / link.bytes_per_ms)

    def _add_gathering(self, action: PipelineAction, num_bytes: float) -> None:
        reduce_ms = self._costs.link(*action.ranks).reduce_ms(num_bytes, len(action.ranks))
        steady = (0.0,) * len(action.ranks)
        self.gatherings[action.index, action.ranks] = Gathering(action.index, action.ranks, reduce_ms, steady)

    def operation(self, program: PipelineProgram, action: PipelineAction) -> Operation:
        """Give what an action is in the timetable."""
        costs = self._costs
        if action.kind in (PipelineKind.SEND, PipelineKind.RECV):
            return self._exchange(program, action)
        if action.kind is PipelineKind.LOAD and not action.is_next:
            return Operation(OperationKind.LOAD, costs.load_ms)
        if action.kind is PipelineKind.REDUCE:
            key = (action.index, action.ranks)
            if key not in self.gatherings:
                # Its gradients are kept for those of a later block.
                return Operation(OperationKind.COMPUTE, 0.0)
            occupied_ms = costs.link(*action.ranks).reduce_occupation * self.gatherings[key].duration_ms
            return Operation(OperationKind.REDUCE, occupied_ms, list(self.gatherings).index(key))
        if action.kind is PipelineKind.UPDATE:
            # The first one has to wait for all sums; after it, none is due.
            return Operation(OperationKind.FIRST_UPDATE, _compute_ms(program, action, costs))
        return Operation(OperationKind.COMPUTE, _compute_ms(program, action, costs))

    def _exchange(self, program: PipelineProgram, action: PipelineAction) -> Operation:
        costs, is_send = self._costs, action.kind is PipelineKind.SEND
        sent = action if is_send else action._replace(kind=PipelineKind.SEND, peer=program.rank)
        number = self._messages[program.rank if is_send else action.peer, sent]
        link = costs.link(program.rank, action.peer)
        occupation = link.send_occupation if is_send else link.receive_occupation
        kind = OperationKind.SEND if is_send else OperationKind.RECV
        overhead = costs.send_ms if is_send else costs.recv_ms
        return Operation(kind, overhead + occupation * (link.latency_ms + self.wire_ms[number]), number)


def _share(program: PipelineProgram, action: PipelineAction) -> float:
    return action.rows.num_rows / (program.num_next_rows if action.is_next else program.num_rows)


def _compute_ms(program: PipelineProgram, action: PipelineAction, costs: PipelineCosts) -> float:
    kind = action.kind
    if kind is PipelineKind.UPDATE:
        return costs.update_ms[action.index] if costs.update_ms else 0.0
    if kind is PipelineKind.EMA:
        return costs.follow_ms[action.index] if costs.follow_ms else 0.0
    if kind is PipelineKind.TEACH:
        return costs.teach_ms[action.index] * _share(program, action)
    if kind is PipelineKind.FORWARD:
        return costs.forward_ms[action.index] * _share(program, action)
    if kind is PipelineKind.BACKWARD:
        return costs.backward_ms[action.index] * _share(program, action)
    if kind in (PipelineKind.BACKWARD_INPUT, PipelineKind.BACKWARD_WEIGHT):
        return costs.backward_ms[action.index] * _share(program, action) / 2
    return costs.loss_ms * _share(program, action) if kind is PipelineKind.LOSS else 0.0


def _max_micro_batches(program: PipelineProgram) -> int:
    alive = peak = 0
    last = {PipelineKind.BACKWARD}
    if any(action.kind is PipelineKind.BACKWARD_WEIGHT for action in program.actions):
        last = {PipelineKind.BACKWARD_WEIGHT}
    for action in program.actions:
        alive += (action.kind is PipelineKind.FORWARD) - (action.kind in last)
        peak = max(peak, alive)
    return peak
