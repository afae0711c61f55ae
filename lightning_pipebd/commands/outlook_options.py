"""Options that `pipebd plan` and `pipebd simulate` share: the ranks, their links, and what to do with the answer."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.costs import CostTable, LinkCost
from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.planning.plan_text import format_plan, has_text_form
from lightning_pipebd.planning.quantities import parse_bytes
from lightning_pipebd.plans import save_plan
from lightning_pipebd.plots import draw_timelines, predicted_spans

__all__ = [
    "add_options",
    "describe",
    "draw_outlook",
    "find_outlook",
    "make_cluster",
    "report",
    "with_links",
    "with_options",
]

CostsT = TypeVar("CostsT", CostTable, PipelineMeasurement)
_NUM_DRAWN_STEPS = 6


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options."""
    cluster = parser.add_argument_group("ranks and links")
    cluster.add_argument("--devices", type=int, required=True, help="ranks, one device each")
    cluster.add_argument("--memory", help="memory that each rank may use, for example 16GiB")
    cluster.add_argument("--ranks-per-node", type=int, help="ranks on one node; all by default")
    for where, name in (("", "of a node"), ("node-", "between nodes")):
        cluster.add_argument(f"--{where}link-latency-ms", type=float, help=f"time of an empty message {name}")
        cluster.add_argument(f"--{where}link-bytes-per-ms", type=float, help=f"bandwidth of a link {name}")
    parser.add_argument("--exactness", choices=[Exactness.BITWISE.value, Exactness.SUMMATION.value])
    parser.add_argument("--teach-ahead", action="store_true", help="the teacher may work one batch ahead")
    parser.add_argument("--max-in-flight", type=int, default=2, help="steps by which a rank may run ahead")
    whole = parser.add_argument_group("whole students", "chosen with the plan, unless they are given")
    whole.add_argument("--num-micro-batches", type=int, help="parts of a batch along time")
    whole.add_argument("--schedule", choices=[schedule.value for schedule in Schedule], help="order of the work")
    whole.add_argument("--split-backward", action="store_true", help="gradients of weights wait for a gap")
    output = parser.add_argument_group("output")
    output.add_argument("--save", type=Path, help="write the plan to this YAML file")
    output.add_argument("--json", action="store_true", help="print JSON")
    output.add_argument("--plot", type=Path, help="draw the predicted timeline: a .svg, .png or .pdf file")


def make_cluster(options: argparse.Namespace, device_class: str) -> Cluster:
    """Make the ranks that the options describe, all of one class of devices."""
    if options.devices < 1:
        raise ValueError(f"`--devices` must be at least 1, but is {options.devices}.")
    return Cluster.uniform(
        options.devices,
        device_class=device_class,
        ranks_per_node=options.ranks_per_node,
        memory_limit_bytes=None if options.memory is None else parse_bytes(options.memory, "--memory"),
    )


def find_outlook(measurement: Measurement, cluster: Cluster, options: argparse.Namespace) -> Outlook:
    """Find the plan that the options ask for.

    Raises:
        PlanError: Nothing fits the memory.
    """
    return Outlook.find(
        measurement,
        cluster,
        exactness=options.exactness,
        max_in_flight=options.max_in_flight,
        may_teach_ahead=options.teach_ahead,
    )


def with_options(measurement: Measurement, options: argparse.Namespace, num_rows: int | None = None) -> Measurement:
    """Give the measurement with the links that the options describe, for another number of rows if one is given.

    Raises:
        ValueError: An option is only for whole students.
    """
    for name in ("num_micro_batches", "schedule", "split_backward"):
        given = getattr(options, name)
        if given is not None and given is not False:
            raise ValueError(
                f"`--{name.replace('_', '-')}` must be left out for blocks that learn by themselves: they share no "
                "gradient, so no batch is cut along time. It is for whole students."
            )
    costs = with_links(measurement.costs, options)
    return replace(measurement, costs=costs, num_rows=measurement.num_rows if num_rows is None else num_rows)


def report(options: argparse.Namespace, outlook: Outlook) -> None:
    """Print, save and draw what was found."""
    if options.save:
        save_plan(outlook.plan, options.save)
    if options.plot:
        draw_outlook(options.plot, outlook)
    sys.stdout.write((json.dumps(describe(outlook), indent=1) if options.json else str(outlook)) + "\n")


def draw_outlook(path: Path, outlook: Outlook | PipelineOutlook) -> None:
    """Draw the predicted timeline of some steps.

    Raises:
        ImportError: matplotlib is not installed.
    """
    spans = predicted_spans(outlook.simulate(_NUM_DRAWN_STEPS).timeline)
    draw_timelines(path, {f"predicted: {outlook.step_time_ms:.4g} ms per step": spans})


def describe(outlook: Outlook) -> dict[str, Any]:
    """Give the outlook as JSON can hold it."""
    plan, judgement, bounds = outlook.plan, outlook.judgement, outlook.bounds
    return {
        "plan": plan.to_dict(),
        "text": format_plan(plan) if has_text_form(plan) else None,
        "family": str(outlook.choice.family) if outlook.choice else None,
        "step_time_ms": outlook.step_time_ms,
        "bounds_ms": bounds._asdict(),
        "utilisation": [busy / outlook.step_time_ms if outlook.step_time_ms else 0.0 for busy in judgement.busy_ms],
        "memory_bytes": [use.total_bytes for use in judgement.memory],
        "exactness": str(outlook.exactness),
        "limits": list(judgement.limits),
        "alternatives_ms": {
            str(candidate.family): candidate.step_time_ms
            for candidate in (outlook.choice.alternatives if outlook.choice else ())
        },
        "reason": outlook.choice.reason if outlook.choice else None,
    }


def _link(link: LinkCost, latency_ms: float | None, bytes_per_ms: float | None) -> LinkCost:
    if latency_ms is None and bytes_per_ms is None:
        return link
    # Reductions were measured over the other link.
    return replace(
        link,
        latency_ms=link.latency_ms if latency_ms is None else latency_ms,
        bytes_per_ms=link.bytes_per_ms if bytes_per_ms is None else bytes_per_ms,
        reduces=(),
    )


def with_links(costs: CostsT, options: argparse.Namespace) -> CostsT:
    """Give costs with the links that the options describe."""
    return replace(
        costs,
        same_node=_link(costs.same_node, options.link_latency_ms, options.link_bytes_per_ms),
        other_node=_link(costs.other_node, options.node_link_latency_ms, options.node_link_bytes_per_ms),
    )
