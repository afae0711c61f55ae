"""From what was recorded of a run to its report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_pipebd.pipeline_measuring import coupled_blocks, name_block
from lightning_pipebd.pipeline_report import PipelineReport
from lightning_pipebd.pipeline_session import PipelineSession
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind
from lightning_pipebd.planning.program import Action, Kind
from lightning_pipebd.plots import DrawnSpan
from lightning_pipebd.run_report import RunReport
from lightning_pipebd.session import TrainingSession
from lightning_pipebd.trace_summary import summarise

__all__ = ["make_report"]


def make_report(
    session: TrainingSession | PipelineSession,
    outlook: Outlook | PipelineOutlook | None,
    trace: Mapping[str, Any],
    timelines: Mapping[str, Sequence[DrawnSpan]],
    losses: Mapping[Any, Sequence[tuple[int, float]]],
) -> RunReport | PipelineReport:
    """Report on a run.

    Args:
        session: What trained on this rank.
        outlook: What was foreseen; ``None`` if nothing was measured before.
        trace: What all ranks did.
        timelines: Titles and spans, the predicted timeline first.
        losses: For each block, or each term of a whole student's loss, steps and values.
    """
    if isinstance(session, PipelineSession):
        assert not isinstance(outlook, Outlook)
        return _report_whole(session, outlook, trace, timelines, losses)
    assert not isinstance(outlook, PipelineOutlook)
    return _report_blocks(session, outlook, trace, timelines, losses)


def _report_blocks(
    session: TrainingSession,
    outlook: Outlook | None,
    trace: Mapping[str, Any],
    timelines: Mapping[str, Sequence[DrawnSpan]],
    losses: Mapping[int, Sequence[tuple[int, float]]],
) -> RunReport:
    module = session.module
    if outlook is not None:
        traits, input_bytes = outlook.measurement.traits, outlook.measurement.costs.boundary_bytes_per_row[0]
    else:
        example, is_synchronised = module.example_input_array, session.synchronises_batch_norm
        traits, input_bytes = tuple(module.block_pairs.traits(example, is_synchronised=is_synchronised)), None
    jobs = _names(trace, (Kind.TEACH.value, Kind.LEARN.value))
    return RunReport(
        plan=session.plan,
        traits=traits,
        num_rows=max((Action.parse(name).rows.stop for name in jobs), default=0),
        summary=summarise(trace),
        timelines=timelines,
        losses=losses,
        outlook=outlook,
        input_bytes_per_row=input_bytes,
        target_blocks=tuple(module.target_blocks),
        has_momentum=module.block_momentum is not None,
    )


def _report_whole(
    session: PipelineSession,
    outlook: PipelineOutlook | None,
    trace: Mapping[str, Any],
    timelines: Mapping[str, Sequence[DrawnSpan]],
    losses: Mapping[str, Sequence[tuple[int, float]]],
) -> PipelineReport:
    module, plan, options = session.module, session.plan, session.options
    forwards = _names(trace, (PipelineKind.FORWARD.value,))
    return PipelineReport(
        plan=plan,
        teacher_names=[name_block(module.cuts.teacher, block) for block in range(module.num_teacher_blocks)],
        student_names=[name_block(module.cuts.student, block) for block in range(module.num_student_blocks)],
        num_rows=max((PipelineAction.parse(name).rows.stop for name in forwards), default=0),
        num_micro_batches=options.micro_batches(module, plan.ranks_per_replica),
        schedule=str(options.settled(module, plan.ranks_per_replica).schedule),
        explanation=options.explain(plan, module),
        coupled_blocks=coupled_blocks(module),
        summary=summarise(trace),
        timelines=timelines,
        losses=losses,
        outlook=outlook,
    )


def _names(trace: Mapping[str, Any], kinds: Sequence[str]) -> list[str]:
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") in kinds]
