"""How much faster a plan must be before it is believed to be."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from random import Random

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.families import Families, Family
from lightning_pipebd.planning.judge import Judge
from lightning_pipebd.planning.margin import margin_ms
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.planner import find_plan
from tests.planning.cost_tables import constant_costs

ROWS = 16


def margin(costs: CostTable, simple: str, other: str) -> float:
    plans = parse_plan(simple), parse_plan(other)
    judge = Judge(costs=costs, cluster=Cluster.uniform(plans[0].num_ranks), num_rows=ROWS)
    families = Families(judge, whole_students=(), divides_rows=True)
    for family, plan in zip((Family.STRAIGHT, Family.HALF_CUT), plans, strict=True):
        families.add(family, plan)
    return margin_ms(*families.found, judge)


def test_exact_costs_need_no_margin() -> None:
    assert margin(constant_costs([(1, 3), (2, 5)]), "0|1", "0,T1|S1") == 0


def test_times_of_both_busiest_ranks_cancel() -> None:
    # Rank 1 has 2 + 30 and then 30 alone; rank 0 is too far below to matter.
    costs = constant_costs([(1, 3), (2, 30)], noise=0.1)
    assert margin(costs, "0|1", "0,T1|S1") == pytest.approx(0.1 * 2)


def test_a_rank_that_is_nearly_as_busy_counts_with_its_own_times() -> None:
    # Rank 1 had 2 + 4, now rank 0 has 1 + 3 + 2: only the 2 is in both.
    costs = constant_costs([(1, 3), (2, 4)], noise=0.1)
    assert margin(costs, "0|1", "0,T1|S1") == pytest.approx(0.1 * (4**2 + 1**2 + 3**2) ** 0.5)


def test_the_error_of_the_model_is_a_part_of_the_step() -> None:
    costs = replace(constant_costs([(1, 3), (2, 30)]), model_error=0.05)
    assert margin(costs, "0|1", "0,T1|S1") == pytest.approx(0.05 * 32)


def test_plans_too_large_to_simulate_are_compared_by_the_whole_step() -> None:
    judge = Judge(costs=constant_costs([(1, 1)] * 100, noise=0.1), cluster=Cluster.uniform(201), num_rows=ROWS)
    families = Families(judge, whole_students=(), divides_rows=True)
    families.add(Family.JOINT, parse_plan("0-99*201"), (), 200.0)
    assert margin_ms(families.found[0], families.found[0], judge) == pytest.approx(20)


def disturbed(costs: CostTable, rng: Random, noise: float) -> CostTable:
    def times(curve: Curve) -> Curve:
        return Curve((rows, ms * max(0.1, rng.gauss(1, noise / 1.96))) for rows, ms in curve)

    (device,) = costs.devices
    blocks = tuple(replace(own, teach_ms=times(own.teach_ms), learn_ms=times(own.learn_ms)) for own in device.blocks)
    return replace(costs, devices=(replace(device, blocks=blocks),), noise=noise)


def test_the_choice_does_not_follow_the_noise() -> None:
    # Two equal halves; finer plans could gain 2 %.
    times = [(10, 20), (5, 15), (10, 19), (5, 14)]
    data = constant_costs(times).to_dict()
    blocks = [{"teach_ms": [[8, t / 2], [16, t]], "learn_ms": [[8, s / 2], [16, s]]} for t, s in times]
    data["devices"] = [{"device_class": "default", "blocks": blocks}]
    exact = replace(CostTable.from_dict(data), model_error=0.05)
    rng = Random(3)
    found = [
        find_plan(disturbed(exact, rng, 0.08), Cluster.uniform(2), num_rows=ROWS).plan == parse_plan("0-1|2-3")
        for _ in range(7)
    ]
    assert Counter(found)[True] >= 6
