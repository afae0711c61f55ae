"""A whole student's blocks take other times than were measured before, and perhaps another plan would do better."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import replace

from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_program import PipelineKind
from lightning_pipebd.planning.plan import PlanError

__all__ = ["PipelineTimes", "adjust_pipeline_costs", "find_better_pipeline"]

#: Per kind of action, block and rows: the time that it took, in ms.
PipelineTimes = Mapping[tuple[PipelineKind, int, int], float]

_WORTH = 0.05
_MOST_NOISE = 0.1
_HALVES = (PipelineKind.BACKWARD_INPUT, PipelineKind.BACKWARD_WEIGHT)


def adjust_pipeline_costs(measurement: PipelineMeasurement, observed: PipelineTimes) -> PipelineMeasurement:
    """Give the measurement with every observed time's curve scaled to what was observed.

    A curve keeps its shape: few numbers of rows were observed, and all others scale with them. Each half of a backward
    that was split was foreseen to take half of it.

    Args:
        measurement: What was foreseen of.
        observed: What was seen instead.
    """
    factors: defaultdict[tuple[PipelineKind, int], list[float]] = defaultdict(list)
    for (kind, block, rows), ms in observed.items():
        foreseen = _curve(measurement, kind, block).at(rows) / (2 if kind in _HALVES else 1)
        if foreseen > 0:
            factors[PipelineKind.BACKWARD if kind in _HALVES else kind, block].append(ms / foreseen)

    def scaled(kind: PipelineKind, block: int) -> Curve:
        found = factors.get((kind, block), [1.0])
        factor = sum(found) / len(found)
        return Curve((rows, ms * factor) for rows, ms in _curve(measurement, kind, block))

    return replace(
        measurement,
        teacher=tuple(
            replace(own, teach_ms=scaled(PipelineKind.TEACH, block)) for block, own in enumerate(measurement.teacher)
        ),
        student=tuple(
            replace(
                own,
                forward_ms=scaled(PipelineKind.FORWARD, block),
                backward_ms=scaled(PipelineKind.BACKWARD, block),
            )
            for block, own in enumerate(measurement.student)
        ),
        loss_ms=scaled(PipelineKind.LOSS, 0),
    )


def find_better_pipeline(
    outlook: PipelineOutlook, observed: PipelineTimes
) -> tuple[PipelineOutlook, PipelineOutlook] | None:
    """Look for a way to train that would be faster if blocks go on taking the observed times.

    Args:
        outlook: What was foreseen of a way that the planner has found.
        observed: What was seen instead.

    Returns:
        What is now foreseen of the present way, and of the better one; `None` if none is better by more than the noise
        and a twentieth.
    """
    measurement = adjust_pipeline_costs(outlook.measurement, observed)
    present = replace(outlook, measurement=measurement)
    try:
        better = outlook.found_anew(measurement)
    except PlanError:
        return None
    # An epoch's medians are surer than the few rounds that the noise was measured in.
    worth = max(_WORTH, min(measurement.noise, _MOST_NOISE))
    is_worth_it = better.candidate != present.candidate and better.step_time_ms < (1 - worth) * present.step_time_ms
    return (present, better) if is_worth_it else None


def _curve(measurement: PipelineMeasurement, kind: PipelineKind, block: int) -> Curve:
    if kind is PipelineKind.TEACH:
        return measurement.teacher[block].teach_ms
    if kind is PipelineKind.LOSS:
        return measurement.loss_ms
    student = measurement.student[block]
    return student.forward_ms if kind is PipelineKind.FORWARD else student.backward_ms
