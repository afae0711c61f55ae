from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import pairwise
from random import Random

import pytest

from lightning_pipebd.planning.buckets import BUCKET_BYTES
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.cut_points import (
    CutPoint,
    Stage,
    are_in_order,
    border_points,
    fraction_points,
    half_cut_points,
    stages_to_plan,
)
from lightning_pipebd.planning.plan import Plan, Share
from lightning_pipebd.planning.plan_text import format_plan
from lightning_pipebd.planning.simulate import simulate
from lightning_pipebd.planning.stage_costs import StageCosts, StageMemory
from lightning_pipebd.planning.stage_parts import Crossing
from tests.planning.cost_tables import constant_costs, random_costs
from tests.planning.stage_reference import Question, need_of_stage


def differences(seed: int) -> Iterator[tuple[object, ...]]:
    """Compare every stage of one random chain with the reference."""
    rng = Random(seed)
    num_blocks, num_rows, num_ranks = rng.randint(1, 4), rng.randint(1, 16), rng.randint(1, 4)
    costs = replace(random_costs(rng, num_blocks), jitter_ms=rng.choice([0, 0.5]))
    if rng.random() < 0.5:
        # Gradients that fill a bucket alone, or two by two.
        large = [rng.choice([0, BUCKET_BYTES // 2, BUCKET_BYTES]) for _ in costs.blocks]
        blocks = [replace(own, gradient_bytes=size) for own, size in zip(costs.blocks, large, strict=True)]
        near, far = (replace(link, bytes_per_ms=float(BUCKET_BYTES)) for link in (costs.same_node, costs.other_node))
        costs = replace(costs, blocks=tuple(blocks), same_node=near, other_node=far)
    targets = [block for block in range(num_blocks) if rng.random() < 0.3]
    crossing = Crossing(*(rng.random() < 0.5 for _ in range(3)))
    points = fraction_points(num_blocks, num_rows, 3)
    stages = StageCosts(costs, points, num_rows, target_blocks=targets)
    for start, begin in enumerate(points[:-1]):
        found = {
            use.stop: (round(use.cost_ms, 9), use.num_bytes)
            for use in stages.column(start, num_ranks, "default", crossing=crossing)
        }
        needs = {
            stop: need_of_stage(Question(costs, num_rows, begin, end, num_ranks, "default", crossing, targets))
            for stop, end in enumerate(points)
            if stop > start and are_in_order([begin, end])
        }
        expected = {stop: (round(need.cost_ms, 9), need.num_bytes) for stop, need in needs.items()}
        if expected != found:
            yield seed, begin, expected, found


def test_every_stage_costs_what_its_definition_says() -> None:
    assert [list(differences(seed)) for seed in range(60)] == [[]] * 60


def test_stages_above_a_ceiling_or_a_limit_are_left_out_and_no_others() -> None:
    stages = StageCosts(random_costs(Random(5), 4), fraction_points(4, 8, 4), 8)
    everything = list(stages.column(3, 2, "default"))
    ceiling, limit = sorted(use.cost_ms for use in everything)[20], sorted(use.num_bytes for use in everything)[20]
    kept = list(stages.column(3, 2, "default", ceiling_ms=ceiling, limit_bytes=limit))
    assert kept == [use for use in everything if use.cost_ms <= ceiling and use.num_bytes <= limit]


def test_stage_of_several_ranks_ends_before_a_student_that_must_stay_whole() -> None:
    costs = constant_costs([(1, 1)] * 3)
    stages = StageCosts(costs, half_cut_points(3, 8), 8, whole_students=[1])
    assert [stages.points[use.stop] for use in stages.column(0, 2, "default")] == [(0, 8, 0), (1, 0, 0), (1, 8, 0)]
    assert [stages.points[use.stop] for use in stages.column(0, 1, "default")][-1] == (3, 0, 0)


def test_memory_in_the_place_of_time_is_a_fraction_of_the_limit() -> None:
    costs, points = random_costs(Random(2), 2), border_points(2)
    sizes = [use.num_bytes / 1000 for use in StageCosts(costs, points, 8).column(0, 1, "default")]
    memory = StageMemory(costs, points, 8).column(0, 1, "default", limit_bytes=1000)
    assert [use.cost_ms for use in memory] == sizes


def test_least_work_before_and_behind_a_cut_is_the_whole_work() -> None:
    costs = constant_costs([(1, 2), (3, 4)])
    parts = StageCosts(costs, border_points(2), 8).parts
    assert [parts.least_work(point) for point in half_cut_points(2, 8)] == [(0, 10), (1, 9), (3, 7), (6, 4), (10, 0)]
    assert parts.least_work(CutPoint(1, 4, 2)) == (3 + 1.5 + 1, 10 - 5.5)


@pytest.mark.parametrize("sizes", [[(1, 1), (2, 1)], [(2, 2), (1, 3)], [(3, 5)], [(1, 2), (1, 2), (1, 2)]])
def test_slowest_stage_is_the_simulated_step_where_links_are_free(sizes: list[tuple[int, int]]) -> None:
    plan, costs = Plan.hybrid(sizes), constant_costs([(1, 5), (2, 3), (1, 4)], update_ms=0.5)
    points = border_points(3)
    stages = StageCosts(costs, points, 30)
    borders = [sum(num_blocks for num_blocks, _ in sizes[:index]) for index in range(len(sizes) + 1)]
    slowest = max(
        next(use.cost_ms for use in stages.column(start, num_ranks, "default") if use.stop == stop)
        for start, stop, (_, num_ranks) in zip(borders, borders[1:], sizes, strict=False)
    )
    found = simulate(plan, costs, Cluster.uniform(plan.num_ranks), num_rows=30)
    assert found.step_time_ms == pytest.approx(slowest)


def test_points_inside_jobs_become_shares_of_neighbours() -> None:
    cuts = [CutPoint(0), CutPoint(0, 8, 2), CutPoint(1, 4, 4), CutPoint(2, 6, 0), CutPoint(3)]
    stages = [Stage(start, stop, (rank,)) for rank, (start, stop) in enumerate(pairwise(cuts))]
    plan = stages_to_plan(stages, 3, 8, num_ranks=5)
    assert format_plan(plan) == "T0,S0:1/4|S0:3/4,1:1/2|1:1/2,T2:3/4|T2:1/4,S2|-"


def test_ranks_of_a_stage_divide_its_rows_evenly_in_their_order() -> None:
    stages = [Stage(CutPoint(0), CutPoint(0, 2, 2), (3,)), Stage(CutPoint(0, 2, 2), CutPoint(1), (1, 0))]
    plan = stages_to_plan(stages, 1, 8, num_ranks=4)
    assert plan.student[0] == (Share(3, Fraction(1, 4)), Share(1, Fraction(3, 8)), Share(0, Fraction(3, 8)))


def test_points_are_divided_into_equal_parts_and_whole_students_are_not() -> None:
    assert fraction_points(1, 8, 2) == [(0, 0, 0), (0, 4, 0), (0, 4, 4), (0, 8, 0), (0, 8, 4), (1, 0, 0)]
    assert fraction_points(1, 8, 2, whole_students=[0]) == [(0, 0, 0), (0, 4, 0), (0, 8, 0), (1, 0, 0)]
    assert fraction_points(1, 1, 4) == half_cut_points(1, 1)
    assert are_in_order(fraction_points(1, 8, 2)) is False
    assert are_in_order(half_cut_points(3, 8)) is True
