"""When a whole student's blocks take other times than were measured: what would be better now."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement, StudentBlockCosts, TeacherBlockCosts
from lightning_pipebd.planning.pipeline_drift import adjust_pipeline_costs, find_better_pipeline
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_program import PipelineKind
from lightning_pipebd.planning.pipeline_schedule import Schedule


def measurement() -> PipelineMeasurement:
    """Four equal blocks each: forward 1 ms for 8 rows, backward 2 ms, the teacher 1 ms; a loss without rows' cost."""
    one = Curve([(4, 0.5), (8, 1.0)])
    return PipelineMeasurement(
        teacher=tuple(TeacherBlockCosts(name=f"t{block}", teach_ms=one) for block in range(4)),
        student=tuple(
            StudentBlockCosts(name=f"s{block}", forward_ms=one, backward_ms=Curve([(4, 1.0), (8, 2.0)]))
            for block in range(4)
        ),
        one_replica_reason="the test says so",
        num_rows=8,
        loss_ms=Curve([(8, 0.5)]),
    )


def outlook() -> PipelineOutlook:
    found = PipelineOutlook.find(measurement(), Cluster.uniform(2), num_micro_batches=2, schedule="1f1b")
    assert str(found.plan) == "0-1|2-3"
    return found


def test_observed_times_scale_the_curves_of_their_block() -> None:
    observed = {
        (PipelineKind.TEACH, 1, 4): 1.5,
        (PipelineKind.FORWARD, 0, 4): 1.0,
        (PipelineKind.BACKWARD, 3, 8): 1.0,
        (PipelineKind.LOSS, 0, 8): 1.0,
    }
    found = adjust_pipeline_costs(measurement(), observed)
    assert [block.teach_ms.at(8) for block in found.teacher] == [1, 3, 1, 1]
    assert [block.forward_ms.at(8) for block in found.student] == [2, 1, 1, 1]
    assert [block.backward_ms.at(8) for block in found.student] == [2, 2, 2, 1]
    assert found.loss_ms.at(8) == 1.0


def test_halves_of_a_backward_count_together() -> None:
    observed = {(PipelineKind.BACKWARD_INPUT, 0, 8): 3.0, (PipelineKind.BACKWARD_WEIGHT, 0, 8): 1.0}
    assert adjust_pipeline_costs(measurement(), observed).student[0].backward_ms.at(8) == pytest.approx(4.0)


def test_a_better_plan_keeps_to_what_could_be_chosen_before() -> None:
    observed = {(PipelineKind.FORWARD, 0, 4): 2.5, (PipelineKind.BACKWARD, 0, 4): 5.0}
    found = find_better_pipeline(outlook(), observed)
    assert found is not None
    present, better = found
    assert str(present.plan) == "0-1|2-3"
    assert better.step_time_ms < 0.95 * present.step_time_ms
    assert better.plan.student[1] == 1
    assert (better.candidate.num_micro_batches, better.candidate.schedule) == (2, Schedule.ONE_FORWARD_ONE_BACKWARD)


def test_nothing_is_offered_where_nothing_is_better_or_nothing_fits() -> None:
    present = outlook()
    everything = {
        (kind, block, 8): 20.0 * ms
        for block in range(4)
        for kind, ms in ((PipelineKind.TEACH, 1), (PipelineKind.FORWARD, 1), (PipelineKind.BACKWARD, 2))
    }
    assert find_better_pipeline(present, everything) is None
    heavy = replace(
        present.measurement, student=[replace(own, parameter_bytes=10**9) for own in present.measurement.student]
    )
    crowded = replace(present, measurement=heavy, cluster=Cluster.uniform(2, memory_limit_bytes=10**6))
    assert find_better_pipeline(crowded, {(PipelineKind.FORWARD, 0, 4): 2.5}) is None
