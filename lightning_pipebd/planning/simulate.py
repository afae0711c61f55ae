"""The simulator: how long a plan's programs take, from measured costs, without any device."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from lightning_pipebd.planning.ahead import steady_programs
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.event_loop import Recording, run_timetable
from lightning_pipebd.planning.memory import MemoryUse, rank_memory
from lightning_pipebd.planning.operations import make_timetable
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineProgram
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Action, Program

__all__ = [
    "Simulation",
    "TimelineSpan",
    "check_fit",
    "check_max_in_flight",
    "make_timeline",
    "simulate",
    "steady_step_ms",
]


class TimelineSpan(NamedTuple):
    """When a rank did an action.

    Args:
        rank: Rank that did it.
        step: Step it belongs to.
        action: What was done.
        start_ms: When the rank turned to it.
        stop_ms: When the rank's thread was done with it. A SEND or REDUCE may still be under way.
        wait_ms: How much of the time between was waiting: for a message, for the loader, for a way out, or before the
            first UPDATE for reductions.
    """

    rank: int
    step: int
    action: Action | PipelineAction
    start_ms: float
    stop_ms: float
    wait_ms: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulation:
    """What a simulation found.

    Args:
        step_time_ms: Time of a step once the pipeline is full: that of the rank whose steps follow each other slowest,
            over the second half of the simulated steps.
        fill_ms: What the whole run took longer than its number of steps times `step_time_ms`; paid once.
        busy_ms: For every rank the time per step for which its thread is busy.
        memory: For every rank what it holds at its peak.
        traffic_bytes: For every (sender, receiver) what a step moves.
        timeline: Every action of every step, rank by rank.
    """

    step_time_ms: float
    fill_ms: float
    busy_ms: tuple[float, ...]
    memory: tuple[MemoryUse, ...]
    traffic_bytes: dict[tuple[int, int], int]
    timeline: tuple[TimelineSpan, ...]

    @property
    def utilisation(self) -> tuple[float, ...]:
        """For every rank the fraction of a step for which its thread is busy."""
        if not self.step_time_ms:
            return (0.0,) * len(self.busy_ms)
        return tuple(busy_ms / self.step_time_ms for busy_ms in self.busy_ms)

    @property
    def bubble_fraction(self) -> float:
        """Fraction of all ranks' time for which they are idle."""
        return 1 - sum(self.utilisation) / len(self.busy_ms)


def simulate(
    plan: Plan,
    costs: CostTable,
    cluster: Cluster,
    *,
    num_rows: int,
    num_steps: int = 32,
    max_in_flight: int = 2,
    target_blocks: Collection[int] = (),
    has_momentum: bool = False,
) -> Simulation:
    """Run a plan's programs on a clock.

    A rank's thread does one action after another. SEND hands over and goes on, unless the messages of `max_in_flight`
    steps ago have not been delivered to that peer; a message is taken once its receiver works on a step less than
    `max_in_flight` behind. A rank sends, and receives, one transfer at a time. A bucket's sum runs beside the thread
    from when its last rank is to be expected, and is waited for before the rank's first UPDATE. A loader works ahead.
    The fractions of transfers, reductions and loading that occupy the thread are those of the costs. Where teacher
    blocks work one batch ahead, every step is one from the middle of an epoch.

    Args:
        plan: Who computes what.
        costs: Measured times and sizes.
        cluster: Devices, nodes and memory limits; a rank for every rank of the plan.
        num_rows: Rows of a batch.
        num_steps: Steps to simulate, at least 2.
        max_in_flight: Steps by which a sender may be ahead of its receiver before it waits, at least 1.
        target_blocks: Student blocks whose loss reads the labels.
        has_momentum: Whether each teacher block follows its student block, and so never works ahead of it.

    Raises:
        CostError: Costs, cluster and plan do not fit together.
        ValueError: A number is too small.

    Example:
        >>> from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, Curve, DeviceTimes
        >>> times = BlockTimes(teach_ms=Curve([(8, 1.0)]), learn_ms=Curve([(8, 3.0)]))
        >>> blocks = [BlockSizes(name=name) for name in "ab"]
        >>> device = DeviceTimes(device_class="default", blocks=[times] * 2)
        >>> costs = CostTable(blocks=blocks, devices=[device], boundary_bytes_per_row=[1, 1, 1])
        >>> found = simulate(Plan.straight([1, 1]), costs, Cluster.uniform(2), num_rows=8)
        >>> found.step_time_ms, found.fill_ms, found.utilisation
        (4.0, 1.0, (1.0, 1.0))
    """
    check_fit(plan, costs, cluster)
    _check_num_steps(num_steps)
    check_max_in_flight(max_in_flight)
    programs = steady_programs(plan, num_rows, target_blocks=target_blocks, has_momentum=has_momentum)
    timetable = make_timetable(programs, costs, cluster)
    recording = run_timetable(timetable, num_steps, max_in_flight, with_spans=True)
    options: dict[str, Any] = {"max_in_flight": max_in_flight, "target_blocks": target_blocks}
    return Simulation(
        step_time_ms=steady_step_ms(recording),
        fill_ms=_fill_ms(recording, num_steps),
        busy_ms=tuple(map(timetable.busy_ms, range(plan.num_ranks))),
        memory=tuple(rank_memory(plan, program, costs, **options) for program in programs),
        traffic_bytes={(channel.sender, channel.receiver): channel.num_bytes for channel in timetable.channels},
        timeline=make_timeline(programs, recording),
    )


def _fill_ms(recording: Recording, num_steps: int) -> float:
    last = max(finish[-1] for finish in recording.finish_ms if finish)
    return max(0.0, last - num_steps * steady_step_ms(recording))


def check_fit(plan: Plan, costs: CostTable, cluster: Cluster) -> None:
    """Refuse costs or a cluster of another plan.

    Raises:
        CostError: Numbers of blocks or ranks differ, or a class of devices was not measured.
    """
    if plan.num_blocks != costs.num_blocks:
        raise CostError(
            f"`costs` must describe the plan's {plan.num_blocks} blocks, but describe {costs.num_blocks}. "
            "Measure the blocks of this plan."
        )
    if plan.num_ranks != cluster.num_ranks:
        raise CostError(
            f"`cluster` must have the plan's {plan.num_ranks} ranks, but has {cluster.num_ranks}. "
            "Describe the ranks of this plan."
        )
    for device_class in cluster.device_class:
        costs.times(device_class)


def steady_step_ms(recording: Recording) -> float:
    """Give the slowest rank's time from step to step over the second half of the steps."""
    # Each rank's own pace, not the end of the whole step: the slowest rank keeps its pace from its first step on, while
    # the end of the whole step follows some other rank until the slowest one has fallen behind it.
    steps = max(map(len, recording.finish_ms))
    half = steps // 2
    return max((finish[-1] - finish[half - 1]) / (steps - half) for finish in recording.finish_ms if finish)


def check_max_in_flight(max_in_flight: int) -> None:
    """Refuse queues without room.

    Raises:
        ValueError: `max_in_flight` is below 1.
    """
    if max_in_flight < 1:
        raise ValueError(f"`max_in_flight` must be at least 1, but is {max_in_flight}. A rank must be able to send.")


def _check_num_steps(num_steps: int) -> None:
    if num_steps < 2:
        raise ValueError(f"`num_steps` must be at least 2, but is {num_steps}. The pace shows from step to step.")


def make_timeline(programs: Sequence[Program | PipelineProgram], recording: Recording) -> tuple[TimelineSpan, ...]:
    """Give every action of every step of a recording with spans, rank by rank."""
    return tuple(
        span
        for program, steps in zip(programs, recording.spans, strict=True)
        for span in _rank_timeline(program.rank, program.actions, steps)
    )


def _rank_timeline(
    rank: int, actions: Sequence[Action | PipelineAction], steps: Sequence[Sequence[tuple[float, float, float]]]
) -> Iterator[TimelineSpan]:
    for step, spans in enumerate(steps):
        for action, (start, wait, stop) in zip(actions, spans, strict=True):
            yield TimelineSpan(rank, step, action, start, stop, wait)
