"""What is said, and done, when steps or blocks are not what was foreseen."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import Action, Kind
from lightning_pipebd.runtime.executor import Span
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.step_report import StepReport
from tests.helpers.hearing import heard
from tests.planning.cost_tables import constant_costs

NOTHING: Any = None


class Blocks:
    """A module as far as the report looks at it."""

    def __init__(self) -> None:
        self.frozen_blocks: frozenset[int] = frozenset()


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with heard() as found:
        yield found


def make_report(module: Any, **options: Any) -> StepReport:
    measurement = Measurement(costs=constant_costs([(1, 3)] * 4), num_rows=8)
    outlook = Outlook.find(measurement, Cluster.uniform(2), exactness="bitwise")
    assert outlook.plan == Plan.straight([2, 2])
    return StepReport(outlook, LocalWorld(1).transports[0], module, **options)


def run_epoch(report: StepReport, num_steps: int) -> None:
    for _ in range(num_steps):
        report.on_train_batch_end(NOTHING, NOTHING, NOTHING, NOTHING, 0)
    report.on_train_epoch_end(NOTHING, NOTHING)


def test_a_frozen_block_is_told_with_the_plan_that_is_better_then(lines: list[str]) -> None:
    module = Blocks()
    report = make_report(module)
    run_epoch(report, 2)
    assert (lines, report.step_time_ms) == ([], None)
    module.frozen_blocks = frozenset({0, 1})
    run_epoch(report, 2)
    run_epoch(report, 2)
    assert len(lines) == 1
    assert lines[0].startswith(
        "Since block 0, 1 is trained no longer, another plan is predicted to take 6 ms instead of 8 ms."
    )
    assert "To use it, stop and go on from a checkpoint with `plan=" in lines[0]
    assert report.better is None


def test_a_plan_that_may_change_is_handed_on(lines: list[str]) -> None:
    module = Blocks()
    report = make_report(module, replans=True)
    module.frozen_blocks = frozenset({0, 1})
    run_epoch(report, 2)
    assert report.better is not None
    assert report.better.step_time_ms == 6.0
    assert "The next epoch goes on with `plan=" in lines[0]


def test_blocks_that_were_frozen_from_the_start_are_no_news(lines: list[str]) -> None:
    module = Blocks()
    module.frozen_blocks = frozenset({0, 1})
    report = make_report(module, replans=True)
    run_epoch(report, 2)
    assert (report.better, lines) == (None, [])


def test_the_pace_is_compared_once(lines: list[str]) -> None:
    report = make_report(Blocks(), replans=True)
    run_epoch(report, 9)
    run_epoch(report, 9)
    assert report.step_time_ms is not None
    assert len([line for line in lines if line.startswith("measured: ")]) == 1


@pytest.mark.parametrize(("times_ms", "is_offered"), [([30.0] * 5 + [3.0] * 5, False), ([3.0] * 5 + [30.0] * 5, True)])
def test_a_plan_is_offered_for_the_times_of_the_half_that_the_pace_is_of(
    times_ms: list[float], is_offered: bool, lines: list[str]
) -> None:
    told: list[Any] = []
    report = make_report(Blocks(), listen=lambda listener: (told.append(listener), lambda: None)[1])
    for ms in times_ms:
        told[0](Span(Action(Kind.LEARN, 0, Rows(0, 8)), 0.0, ms / 1000))
    run_epoch(report, len(times_ms))
    assert [line.startswith("With the blocks' times of this epoch, another plan") for line in lines[1:]] == (
        [True] * is_offered
    )


def test_a_given_plan_is_commented_only_if_it_may_change(lines: list[str]) -> None:
    given = Outlook(
        plan=parse_plan("0|1-3"),
        measurement=Measurement(costs=constant_costs([(1, 3)] * 4), num_rows=8),
        cluster=Cluster.uniform(2),
    )
    module = Blocks()
    reports = [
        StepReport(given, LocalWorld(1).transports[0], module, replans=replans)  # type: ignore[arg-type]  # see Blocks
        for replans in (False, True)
    ]
    module.frozen_blocks = frozenset({0})
    for report in reports:
        run_epoch(report, 1)
    assert [report.better is not None for report in reports] == [False, True]
    assert len(lines) == 1
