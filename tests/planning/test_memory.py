from __future__ import annotations

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.cut_points import Stage, border_points, fraction_points, stages_to_plan
from lightning_pipebd.planning.memory import MemoryUse, rank_memory
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.stage_costs import StageCosts
from tests.planning.cost_tables import random_costs


def costs_of_two_blocks() -> CostTable:
    times = BlockTimes(teach_ms=Curve([(1, 1)]), learn_ms=Curve([(1, 1)]))
    sizes = {"teacher_parameter_bytes": 1000, "student_parameter_bytes": 500, "gradient_bytes": 200}
    return CostTable(
        blocks=(
            BlockSizes(name="a", optimizer_bytes=50, teach_bytes_per_row=5, learn_bytes_per_row=30, **sizes),
            BlockSizes(name="b", learn_bytes_per_row=20, **sizes),
        ),
        devices=(DeviceTimes(device_class="default", blocks=(times, times)),),
        boundary_bytes_per_row=(1, 10, 4),
        target_bytes_per_row=2,
    )


def uses(text: str, *, num_rows: int = 10, **options: object) -> list[MemoryUse]:
    plan = parse_plan(text)
    programs = compile_programs(plan, num_rows, target_blocks=options.get("target_blocks", ()))  # type: ignore[arg-type]
    return [rank_memory(plan, program, costs_of_two_blocks(), **options) for program in programs]  # type: ignore[arg-type]


def test_one_rank_holds_all_weights_and_a_blocks_own_boundaries_while_it_learns() -> None:
    (use,) = uses("0-1")
    # Boundaries 0 and 1 are 10 and 100 bytes; learning block 0 needs 300 more than they.
    assert use == MemoryUse(weight_bytes=2 * (1000 + 500 + 200) + 50, working_bytes=110 + 300, queue_bytes=0)


def test_queues_are_as_deep_as_steps_may_be_in_flight() -> None:
    assert [use.queue_bytes for use in uses("0|1", max_in_flight=3)] == [300, 300]


def test_labels_stay_where_they_are_loaded_and_travel_to_who_reads_them() -> None:
    first, second = uses("0|1", target_blocks=(1,))
    assert (first.working_bytes, second.working_bytes) == (10 + 100 + 300 + 20, 100 + 40 + 200 + 20)
    assert (first.queue_bytes, second.queue_bytes) == (2 * (100 + 20), 2 * (100 + 20))


def test_shared_student_holds_its_gradients_twice() -> None:
    apart, shared = uses("0-1")[0], uses("0-1*2")[0]
    assert shared.weight_bytes - apart.weight_bytes == 2 * 200


def test_rank_without_student_holds_no_student() -> None:
    teacher, student = uses("T0-1|S0-1")
    assert (teacher.weight_bytes, student.weight_bytes) == (2 * 1000, 2 * 700 + 50)


def test_rank_without_job_holds_nothing() -> None:
    assert uses("0-1|-")[1].total_bytes == 0


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6), num_stages=st.integers(1, 4), replicas=st.integers(1, 3))
def test_stage_model_of_whole_blocks_is_the_memory_of_their_programs(seed: int, num_stages: int, replicas: int) -> None:
    rng = Random(seed)
    num_rows = 6 * replicas
    costs = random_costs(rng, num_stages)
    # Equal stages: rows need not be dealt anew, so the messages are what the stage model counts.
    stages = StageCosts(costs, border_points(num_stages), num_rows)
    plan = Plan.hybrid([(1, replicas)] * num_stages)
    programs = compile_programs(plan, num_rows)
    needs = [
        next(use.num_bytes for use in stages.column(block, replicas, "default") if use.stop == block + 1)
        for block in range(num_stages)
        for _ in range(replicas)
    ]
    assert [rank_memory(plan, program, costs).total_bytes for program in programs] == needs


@settings(max_examples=60)
@given(seed=st.integers(0, 10**6))
def test_stage_model_between_points_inside_blocks_is_no_less_than_the_memory_of_their_programs(seed: int) -> None:
    rng = Random(seed)
    costs = random_costs(rng, 3)
    points = fraction_points(3, 8, 4)
    middle = rng.randrange(1, len(points) - 1)
    stages = StageCosts(costs, points, 8)
    plan = stages_to_plan(
        [Stage(points[0], points[middle], (0,)), Stage(points[middle], points[-1], (1,))], 3, 8, num_ranks=2
    )
    programs = compile_programs(plan, 8)
    model = [
        next(use.num_bytes for use in stages.column(start, 1, "default") if use.stop == stop)
        for start, stop in ((0, middle), (middle, len(points) - 1))
    ]
    found = [rank_memory(plan, program, costs).total_bytes for program in programs]
    assert [min(pair) for pair in zip(model, found, strict=True)] == found


@pytest.mark.parametrize("text", ["0-1", "0|1", "0*2|1", "T0|S0,1"])
def test_total_is_the_sum(text: str) -> None:
    assert all(sum(use) == use.total_bytes for use in uses(text))
