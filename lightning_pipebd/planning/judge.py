"""The judge: what a plan takes, by simulation of its programs, and whether it fits the memory."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lightning_pipebd.planning.ahead import steady_programs
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.event_loop import Recording, run_timetable
from lightning_pipebd.planning.memory import MemoryUse, rank_memory
from lightning_pipebd.planning.operations import OperationKind, Timetable, make_timetable
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.simulate import steady_step_ms

__all__ = ["Judge", "Judgement"]

_NUM_STEPS = 16
_MAX_ACTIONS = 60_000
_MAX_STEPS_OF_ACTIONS = 400_000


class Judgement(NamedTuple):
    """What the judge found.

    Args:
        step_time_ms: Steady step time by simulation.
        busy_ms: For every rank the time per step for which its thread is busy.
        memory: For every rank what it holds at its peak.
        limits: What takes the whole of the step time, in words; if nothing does, what the busiest rank waits for.
        num_actions: Actions of all programs: what judging the plan cost.
    """

    step_time_ms: float
    busy_ms: tuple[float, ...]
    memory: tuple[MemoryUse, ...]
    limits: tuple[str, ...]
    num_actions: int

    @property
    def score(self) -> tuple[float, float]:
        """The step time, and among equal ones how much of it the busiest ranks need; less is better."""
        # Where several ranks are slowest, moving work helps only one of them: such moves must count as gains.
        busy = sum((busy_ms / self.step_time_ms) ** 8 for busy_ms in self.busy_ms) if self.step_time_ms else 0.0
        # Rounded, so that nobody goes after the last bits of sums.
        return float(f"{self.step_time_ms:.9g}"), float(f"{busy:.9g}")


@dataclass(frozen=True, slots=True, kw_only=True)
class Judge:
    """Judges plans for one batch size on one cluster.

    Args:
        costs: Measurements.
        cluster: Ranks.
        num_rows: Rows of the batch.
        target_blocks: Student blocks whose loss reads the labels.
        max_in_flight: Steps by which a sender may be ahead of its receiver.
        has_momentum: Whether each teacher block follows its student block.
        may_teach_ahead: Whether plans that teach one batch ahead may be looked for.
    """

    costs: CostTable
    cluster: Cluster
    num_rows: int
    target_blocks: Collection[int] = ()
    max_in_flight: int = 2
    has_momentum: bool = False
    may_teach_ahead: bool = False

    @staticmethod
    def can_simulate(plan: Plan) -> bool:
        """Tell whether the plan's programs are short enough to be simulated within seconds."""
        teacher, student = (sum(map(len, jobs)) for jobs in (plan.teacher, plan.student))
        return teacher + 3 * student <= _MAX_ACTIONS

    def judge(self, plan: Plan) -> Judgement:
        """Compile and simulate a plan."""
        programs = steady_programs(
            plan, self.num_rows, target_blocks=self.target_blocks, has_momentum=self.has_momentum
        )
        timetable = make_timetable(programs, self.costs, self.cluster)
        num_actions = sum(len(program.actions) for program in programs)
        num_steps = max(4, min(_NUM_STEPS, _MAX_STEPS_OF_ACTIONS // max(num_actions, 1)))
        recording = run_timetable(timetable, num_steps, self.max_in_flight)
        step_time_ms = steady_step_ms(recording)
        return Judgement(
            step_time_ms,
            tuple(timetable.busy_ms(rank) for rank in range(plan.num_ranks)),
            tuple(
                rank_memory(
                    plan, program, self.costs, max_in_flight=self.max_in_flight, target_blocks=self.target_blocks
                )
                for program in programs
            ),
            _limits(timetable, recording, step_time_ms),
            num_actions,
        )

    def fits(self, memory: tuple[MemoryUse, ...]) -> bool:
        """Tell whether every rank has the memory it needs."""
        limits = self.cluster.memory_limit_bytes
        return all(limit is None or use.total_bytes <= limit for use, limit in zip(memory, limits, strict=True))

    def describe_memory(self, memory: tuple[MemoryUse, ...]) -> str:
        """Say what every rank with a limit needs and may use."""
        return ", ".join(
            f"rank {rank} needs {use.total_bytes:,} of {limit:,} bytes"
            for rank, (use, limit) in enumerate(zip(memory, self.cluster.memory_limit_bytes, strict=True))
            if limit is not None
        )


def _limits(timetable: Timetable, recording: Recording, step_time_ms: float) -> tuple[str, ...]:
    found = tuple(text for ms, text in _pressures(timetable) if ms >= (1 - 1e-6) * step_time_ms)
    if found or not step_time_ms:
        return found
    # Nothing is busy all the time: say what the busiest rank waits for most.
    rank = max(range(len(timetable.operations)), key=timetable.busy_ms)
    kind = max(OperationKind, key=lambda kind: recording.wait_ms[rank][kind])
    busy = timetable.busy_ms(rank) / step_time_ms
    return (f"the busiest rank, {rank}, is busy for {busy:.0%} of a step and then waits for {_AWAITED[kind]}",)


_AWAITED = {
    OperationKind.COMPUTE: "nothing",
    OperationKind.LOAD: "its loader",
    OperationKind.SEND: "room in the queue of a rank it sends to",
    OperationKind.RECV: "rows of another rank",
    OperationKind.RECV_FROM_LAST: "rows of another rank",
    OperationKind.REDUCE: "nothing",
    OperationKind.FIRST_UPDATE: "gradients that it shares",
}


def _pressures(timetable: Timetable) -> Iterator[tuple[float, str]]:
    """List what one step asks of everything that does one thing at a time."""
    num_ranks = len(timetable.operations)
    wire_ms: dict[str, list[float]] = {"sending": [0.0] * num_ranks, "receiving": [0.0] * num_ranks}
    for channel in timetable.channels:
        channel_ms = sum(timetable.wire_ms[message] for message in channel.messages)
        wire_ms["sending"][channel.sender] += channel_ms
        wire_ms["receiving"][channel.receiver] += channel_ms
        latency_ms = channel.latency_ms * len(channel.messages)
        yield channel_ms + latency_ms, f"link from rank {channel.sender} to rank {channel.receiver}"
    groups: dict[tuple[int, ...], float] = {}
    for gathering in timetable.gatherings:
        groups[gathering.ranks] = groups.get(gathering.ranks, 0.0) + gathering.duration_ms
    for ranks, reduce_ms in groups.items():
        yield reduce_ms, f"reductions of ranks {', '.join(map(str, ranks))}"
    for rank in range(num_ranks):
        if timetable.operations[rank]:
            yield timetable.busy_ms(rank), f"thread of rank {rank}"
            yield timetable.background_load_ms[rank], f"loader of rank {rank}"
            for word, ms in wire_ms.items():
                yield ms[rank], f"{word} of rank {rank}"
