"""What the commands say of a whole student: its plan, its blocks, and which entry of a checkpoint is whose."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from typing import Any

import yaml
from torch import Tensor, nn

from lightning_pipebd.commands.outlook_options import make_cluster, with_links
from lightning_pipebd.cost_tables import save_measurement
from lightning_pipebd.pipeline_measuring import coupled_blocks
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.runtime.partition import Partition
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["describe_models", "pipeline_entries", "plan_pipeline"]


def plan_pipeline(options: argparse.Namespace, measured: PipelineMeasurement) -> None:
    """Find the best plan for measured costs, and print and save what `pipebd plan` was asked for.

    Raises:
        PlanError: Nothing fits the memory.
        ValueError: A picture is asked for.
    """
    if options.plot:
        raise ValueError(
            "`--plot` must be left out for a TeacherStudentModule: it draws plans of separate blocks only."
        )
    measurement = with_links(measured, options)
    if options.save_costs:
        save_measurement(measurement, options.save_costs)
    outlook = PipelineOutlook.find(
        measurement,
        make_cluster(options, measurement.device_class),
        exactness=options.exactness,
        max_in_flight=options.max_in_flight,
    )
    if options.save:
        options.save.write_text(yaml.safe_dump(outlook.plan.to_dict(), sort_keys=False, default_flow_style=None))
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
    return sum(model.get_parameter(name).numel() for name in partition.parameter_names[block])


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
