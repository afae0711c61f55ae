"""What the commands say of a whole student: its plan, its blocks, and which entry of a checkpoint is whose."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import yaml
from torch import Tensor, nn

from lightning_pipebd.commands.outlook_options import draw_outlook, make_cluster, with_links
from lightning_pipebd.cost_tables import save_measurement
from lightning_pipebd.pipeline_measuring import coupled_blocks
from lightning_pipebd.pipeline_options import PipelineOptions, default_micro_batches, resolve_pipeline_plan
from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_explain import check_pipeline_exactness
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.plan import PlanError
from lightning_pipebd.runtime.partition import Partition
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["describe_models", "foresee_pipeline", "pipeline_entries", "plan_pipeline"]


def plan_pipeline(options: argparse.Namespace, measured: PipelineMeasurement) -> None:
    """Find the best plan for measured costs, and print and save what `pipebd plan` was asked for.

    Raises:
        PlanError: Nothing fits the memory.
        ValueError: An option is for blocks that learn by themselves.
        ImportError: A picture is wanted, but matplotlib is not installed.
    """
    measurement = _with_links(measured, options)
    if options.save_costs:
        save_measurement(measurement, options.save_costs)
    _report(options, _find(options, measurement))


def foresee_pipeline(options: argparse.Namespace, measured: PipelineMeasurement) -> None:
    """Predict the plan that `pipebd simulate` was given, or the best one, and print and save what was asked for.

    Without micro-batches and schedule a given plan gets those that the strategy would give it.

    Raises:
        PlanError: The plan is none, is for other blocks or ranks, is less exact than it must be, or does not fit.
        ValueError: An option is for blocks that learn by themselves.
        ImportError: A picture is wanted, but matplotlib is not installed.
    """
    num_rows = measured.num_rows if options.rows is None else options.rows
    measurement = replace(_with_links(measured, options), num_rows=num_rows)
    outlook = _find(options, measurement) if options.plan is None else _given(options, measurement)
    _report(options, outlook)


def _with_links(measured: PipelineMeasurement, options: argparse.Namespace) -> PipelineMeasurement:
    if options.teach_ahead:
        raise ValueError(
            "`--teach-ahead` must be left out for a whole student: its teacher works on the next batch wherever a rank "
            "would wait. Say with `--max-in-flight` how far ranks may be apart."
        )
    return with_links(measured, options)


def _find(options: argparse.Namespace, measurement: PipelineMeasurement) -> PipelineOutlook:
    chosen = _options(options)
    if chosen.num_micro_batches is not None:
        _check_exactness(options, chosen.num_micro_batches, measurement)
    return PipelineOutlook.find(
        measurement,
        make_cluster(options, measurement.device_class),
        exactness=options.exactness,
        num_micro_batches=chosen.num_micro_batches,
        schedule=chosen.schedule,
        splits_backward=chosen.split_backward,
        max_in_flight=options.max_in_flight,
    )


def _given(options: argparse.Namespace, measurement: PipelineMeasurement) -> PipelineOutlook:
    numbers = (len(measurement.teacher), len(measurement.student))
    cluster = make_cluster(options, measurement.device_class)
    chosen = _options(options)
    plan = resolve_pipeline_plan(options.plan, numbers, cluster.num_ranks)
    if plan.replicas > 1 and measurement.one_replica_reason:
        raise PlanError(
            f"`plan` must have one replica, because {measurement.one_replica_reason}, but {plan} has {plan.replicas}. "
            "Let one pipeline have all ranks."
        )
    number = chosen.num_micro_batches
    if number is None:
        is_whole = bool(measurement.coupled_blocks) or options.exactness == Exactness.BITWISE
        number = default_micro_batches(plan.ranks_per_replica, is_whole=is_whole)
    _check_exactness(options, number, measurement, plan.replicas)
    schedule = Schedule(chosen.schedule or Schedule.ONE_FORWARD_ONE_BACKWARD)
    outlook = PipelineOutlook(
        candidate=PipelineCandidate(plan, min(number, measurement.num_rows), schedule),
        measurement=measurement,
        cluster=cluster,
        splits_backward=chosen.split_backward,
        max_in_flight=options.max_in_flight,
    )
    outlook.check_memory()
    return outlook


def _options(options: argparse.Namespace) -> PipelineOptions:
    return PipelineOptions(options.num_micro_batches, options.schedule, options.split_backward)


def _check_exactness(
    options: argparse.Namespace, number: int, measurement: PipelineMeasurement, replicas: int = 1
) -> None:
    if options.exactness is not None:
        level = Exactness(options.exactness)
        check_pipeline_exactness(number, measurement.coupled_blocks, level, replicas=replicas)


def _report(options: argparse.Namespace, outlook: PipelineOutlook) -> None:
    if options.save:
        options.save.write_text(yaml.safe_dump(outlook.plan.to_dict(), sort_keys=False, default_flow_style=None))
    if options.plot:
        draw_outlook(options.plot, outlook)
    sys.stdout.write((json.dumps(outlook.to_dict(), indent=1) if options.json else str(outlook)) + "\n")


def describe_models(module: TeacherStudentModule) -> list[dict[str, Any]]:
    """Describe the blocks of both models, as `pipebd check` prints them."""
    coupled = coupled_blocks(module)
    described = [
        {"block": f"teacher {block}", "parameters": _count(module.cuts.teacher, module.teacher, block), "cutting": ""}
        for block in range(module.num_teacher_blocks)
    ]
    for block in range(module.num_student_blocks):
        number = sum(parameter.numel() for parameter in module.student_parameters(block))
        cutting = "changes what is learned" if block in coupled else "changes the order of sums"
        described.append({"block": f"student {block}", "parameters": number, "cutting": cutting})
    return described


def _count(partition: Partition, model: nn.Module, block: int) -> int:
    return sum(parameter.numel() for parameter in partition.parameters(model, block))


def pipeline_entries(module: TeacherStudentModule) -> Iterator[tuple[str, list[nn.Parameter], list[Tensor]]]:
    """Give for every student block, every block of a momentum teacher and the loss its name, parameters and buffers."""
    known: set[int] = set()
    groups = [(f"student {block}", module.student_tensors(block)) for block in range(module.num_student_blocks)]
    if module.momentum is not None:
        groups += [(f"teacher {block}", module.teacher_tensors(block)) for block in range(module.num_teacher_blocks)]
    for name, tensors in groups:
        known |= set(map(id, tensors))
        yield name, [own for own in tensors if isinstance(own, nn.Parameter)], _buffers(tensors)
    others = [own for own in (*module.parameters(), *module.buffers()) if id(own) not in known]
    if others:
        yield "loss", [own for own in others if isinstance(own, nn.Parameter)], _buffers(others)


def _buffers(tensors: list[Tensor]) -> list[Tensor]:
    return [own for own in tensors if not isinstance(own, nn.Parameter)]
