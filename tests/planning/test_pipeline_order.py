"""Orders of end-to-end training: as good as the best manner of working, and as good as arithmetic allows."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.pipeline_clock import Manner, Orders, PipelineClock
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, write_programs
from lightning_pipebd.planning.pipeline_order import schedule_tasks
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Durations, Phase, Schedule, StepKind
from lightning_pipebd.planning.pipeline_simulate import PipelineCosts, PipelineSimulation, simulate_pipeline

STEADY = StepKind(teaches_own=False, teaches_next=True)
LENGTHS = st.lists(st.sampled_from([1.0, 2.0, 3.0]), min_size=2, max_size=4)


def make_clock(
    teacher: list[float], student: list[float], schedule: Schedule, *, splits: bool = False
) -> PipelineClock:
    plan = PipelinePlan(num_ranks=len(student), teacher=range(len(teacher)), student=range(len(student)))
    durations = Durations(teacher=tuple(teacher), student=tuple(student))
    return PipelineClock(plan, durations, schedule, is_full_batch=False, splits_backward=splits)


def best_orders(clock: PipelineClock, num_units: int) -> Orders:
    return schedule_tasks(
        clock.plan,
        clock.durations,
        num_units=num_units,
        num_next_units=num_units,
        step=STEADY,
        schedule=clock.schedule,
        is_full_batch=clock.is_full_batch,
        splits_backward=clock.splits_backward,
    )


def simulate(clock: PipelineClock, orders: Orders, num_units: int) -> PipelineSimulation:
    step = PipelineStep(
        num_rows=num_units,
        num_micro_batches=num_units,
        teaches_own=False,
        num_next_rows=num_units,
        splits_backward=clock.splits_backward,
    )
    costs = PipelineCosts(
        teach_ms=clock.durations.teacher,
        forward_ms=clock.durations.student,
        backward_ms=tuple(2 * forward for forward in clock.durations.student),
    )
    return simulate_pipeline(write_programs(clock.plan, step, orders), costs)


# With as many stages as ranks, more is not to be had: either a rank always works, or the first stage waits only for the
# way of a micro-batch to the last stage and back.
@pytest.mark.parametrize("num_ranks", [3, 8])
@pytest.mark.parametrize("per_rank", [1, 2, 4])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_equal_stages_reach_what_arithmetic_allows(num_ranks: int, per_rank: int, ratio: float) -> None:
    clock = make_clock([ratio] * num_ranks, [1.0] * num_ranks, Schedule.ONE_FORWARD_ONE_BACKWARD)
    num_units = per_rank * num_ranks
    found = simulate(clock, best_orders(clock, num_units), num_units)
    assert clock.bound_ms(num_units) - 1e-9 <= found.step_time_ms <= 1.015 * clock.bound_ms(num_units)
    # One micro-batch per stage to come is what it takes to fill the stages at all.
    assert max(found.max_micro_batches) <= 2 * num_ranks


@pytest.mark.parametrize("num_ranks", [4, 8])
@pytest.mark.parametrize("per_rank", [2, 3])
@pytest.mark.parametrize(("ratio", "least"), [(2.0, 0.98), (4.0, 0.94)])
def test_a_slow_teacher_fills_the_gaps(num_ranks: int, per_rank: int, ratio: float, least: float) -> None:
    clock = make_clock([ratio] * num_ranks, [1.0] * num_ranks, Schedule.ONE_FORWARD_ONE_BACKWARD)
    num_units = per_rank * num_ranks
    assert simulate(clock, best_orders(clock, num_units), num_units).utilisation >= least


@settings(max_examples=15)
@given(LENGTHS, st.data(), st.integers(1, 8), st.booleans(), st.sampled_from([Manner(2, 0.0), Manner(0, 0.5)]))
def test_no_manner_is_better_than_what_is_chosen(
    student: list[float], data: st.DataObject, num_units: int, splits: bool, manner: Manner
) -> None:
    teacher = data.draw(st.lists(st.sampled_from([0.5, 1.0, 4.0]), min_size=len(student), max_size=len(student)))
    clock = make_clock(teacher, student, Schedule.ONE_FORWARD_ONE_BACKWARD, splits=splits)
    kinds = [StepKind(teaches_own=True, teaches_next=True), *[STEADY] * 7]
    other = clock.run(kinds, [num_units] * 8, manner).orders[5]
    chosen = simulate(clock, best_orders(clock, num_units), num_units).step_time_ms
    assert chosen <= 1.006 * simulate(clock, other, num_units).step_time_ms + 1e-9
    assert chosen >= clock.bound_ms(num_units) - 1e-9


def test_the_clock_times_orders_as_the_simulator_does() -> None:
    clock = make_clock([2.0, 1.0, 3.0], [1.0, 2.0, 1.0], Schedule.ONE_FORWARD_ONE_BACKWARD)
    kinds = [StepKind(teaches_own=True, teaches_next=True), *[STEADY] * 11]
    orders = clock.run(kinds, [6] * 12, Manner(1, 0.0)).orders[5]
    ends_ms = clock.run(kinds, [6] * 12, Manner(1, 0.0), keep=orders).ends_ms
    assert (ends_ms[-1] - ends_ms[5]) / 6 == pytest.approx(simulate(clock, orders, 6).step_time_ms)


def test_teacher_first_and_one_stage_leave_no_choice() -> None:
    first = make_clock([1.0] * 3, [1.0] * 3, Schedule.TEACHER_FIRST)
    step = StepKind(teaches_own=True, teaches_next=False)
    orders = schedule_tasks(
        first.plan,
        first.durations,
        num_units=3,
        num_next_units=0,
        step=step,
        schedule=first.schedule,
        is_full_batch=False,
        splits_backward=False,
    )
    assert [[task.phase for task in order[:4]] for order in orders] == [[Phase.TEACH] * 3 + [Phase.FORWARD]] * 3
    alone = make_clock([1.0], [1.0], Schedule.ONE_FORWARD_ONE_BACKWARD)
    assert simulate(alone, best_orders(alone, 4), 4).step_time_ms == pytest.approx(4.0)
