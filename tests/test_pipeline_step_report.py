"""What is said when a whole student's steps take other times than were foreseen."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from torch.utils.data import DataLoader

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.pipeline_step_report import PipelineStepReport
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.pipeline_executor import PipelineSpan
from tests.helpers.hearing import heard
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import ToyData
from tests.helpers.whole_students import Distil
from tests.planning.test_pipeline_drift import measurement

NOTHING: Any = None


@pytest.fixture
def lines() -> Iterator[list[str]]:
    with heard() as found:
        yield found


class Actions:
    """Tells of actions that took as long as is said."""

    def __init__(self) -> None:
        self.listener: Callable[[PipelineSpan], None] | None = None

    def listen(self, listener: Callable[[PipelineSpan], None]) -> Callable[[], None]:
        self.listener = listener
        return self.end

    def end(self) -> None:
        self.listener = None

    def tell(self, kind: PipelineKind, block: int, ms: float) -> None:
        assert self.listener is not None
        self.listener(PipelineSpan(PipelineAction(kind, block, Rows(0, 4)), 0.0, ms / 1000))


def found() -> PipelineOutlook:
    return PipelineOutlook.find(measurement(), Cluster.uniform(2), num_micro_batches=2)


def given() -> PipelineOutlook:
    way = PipelineCandidate(PipelinePlan.parse("0-1|2-3"), 2, Schedule.ONE_FORWARD_ONE_BACKWARD)
    return PipelineOutlook(candidate=way, measurement=measurement(), cluster=Cluster.uniform(2))


def run_epoch(report: PipelineStepReport, num_steps: int) -> None:
    for _ in range(num_steps):
        report.on_train_batch_end(NOTHING, NOTHING, NOTHING, NOTHING, 0)
    report.on_train_epoch_end(NOTHING, NOTHING)


def test_the_pace_is_compared_once_after_the_first_epoch_that_is_long_enough(lines: list[str]) -> None:
    actions = Actions()
    report = PipelineStepReport(given(), LocalWorld(1).transports[0], actions.listen)
    run_epoch(report, 7)
    assert (report.step_time_ms, lines) == (None, [])
    run_epoch(report, 8)
    run_epoch(report, 8)
    assert report.step_time_ms is not None
    assert actions.listener is None
    (line,) = lines
    assert line.startswith(f"measured: {report.step_time_ms:.4g} ms per step, predicted: {given().step_time_ms:.4g} ms")


@pytest.mark.parametrize("outlook", [found, given])
def test_a_better_plan_is_offered_where_the_present_one_was_found(
    outlook: Callable[[], PipelineOutlook], lines: list[str]
) -> None:
    actions = Actions()
    report = PipelineStepReport(outlook(), LocalWorld(1).transports[0], actions.listen)
    for kind, ms in ((PipelineKind.FORWARD, 2.5), (PipelineKind.BACKWARD, 5.0)):
        actions.tell(kind, 0, ms)
    run_epoch(report, 8)
    offers = [line for line in lines if line.startswith("With the times of this epoch, another plan would take")]
    # These batches end at once: far from what was foreseen.
    assert "That is more than 25 % off" in lines[0]
    assert bool(offers) == (outlook is found)
    if offers:
        assert '`plan="' in offers[0]
        assert "`num_micro_batches=2`" in offers[0]


def with_costs() -> PipeBDStrategy:
    measured = measurement()
    costs = replace(measured, teacher=measured.teacher[:3], whole_reason="the test says so")
    return PipeBDStrategy(costs=costs)


def paced(make_trainer: MakeTrainer) -> tuple[float | None, list[str]]:
    with heard() as lines:
        trainer = make_trainer(max_epochs=1)
        trainer.fit(Distil(), DataLoader(ToyData(80, Distil.shape), batch_size=8))
    return trainer.strategy.session.step_time_ms, lines


@pytest.mark.spawn
def test_a_run_tells_its_pace_beside_the_prediction() -> None:
    (zero_ms, told), (one_ms, silence) = under_plan(paced, plan=with_costs)
    assert zero_ms is not None
    assert zero_ms == one_ms
    assert len([line for line in told if line.startswith(f"measured: {zero_ms:.4g} ms per step, predicted: ")]) == 1
    assert silence == []
