"""`pipebd simulate`: what a plan would take on devices that one does not have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_pipebd.commands.outlook_options import add_options, find_outlook, make_cluster, report, with_options
from lightning_pipebd.commands.pipeline_answer import foresee_pipeline
from lightning_pipebd.cost_tables import load_measurement
from lightning_pipebd.planning.explain import Exactness
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.outlook import Outlook, check_exactness
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.simulate import check_fit
from lightning_pipebd.plans import load_plan

__all__ = ["make_parser", "run"]

_DESCRIPTION = """\
Predict the step time, the use of every rank and its memory, from costs that `pipebd plan --save-costs` has written, of
blocks that learn by themselves or of a whole student. With --plan for that plan, otherwise for the best one. Costs are
a YAML file: edit it, and ask what would be.

exit codes: 0 simulated, 1 the plan does not fit, or a file cannot be read, 2 a wrong option
"""
_EPILOG = """\
examples:
  pipebd simulate --costs costs.yaml --devices 8
  pipebd simulate --costs costs.yaml --devices 4 --plan "0-1|2|3|4" --plot timeline.svg
  pipebd simulate --costs costs.yaml --devices 8 --ranks-per-node 4 --node-link-bytes-per-ms 1e6 --memory 16GiB
  pipebd simulate --costs student.yaml --devices 2 --plan "0-3|4-7 / 0|1-2" --num-micro-batches 8 --schedule gpipe
"""


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd simulate",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--costs", required=True, help="file of costs")
    parser.add_argument("--plan", help="a plan's text, or a YAML file; the best plan by default")
    parser.add_argument("--rows", type=int, help="rows of the batch; those that were measured by default")
    add_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    options = make_parser().parse_args(list(arguments))
    try:
        measurement = load_measurement(options.costs)
        if isinstance(measurement, PipelineMeasurement):
            foresee_pipeline(options, measurement)
        else:
            report(options, _foresee(options, measurement))
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0


def _foresee(options: argparse.Namespace, measurement: Measurement) -> Outlook:
    measurement = with_options(measurement, options, num_rows=options.rows)
    cluster = make_cluster(options, measurement.costs.devices[0].device_class)
    if options.plan is None:
        return find_outlook(measurement, cluster, options)
    if options.teach_ahead:
        raise ValueError(
            "`--teach-ahead` must be left out where `--plan` is given, because a plan says so itself. Write it there: "
            "`ahead 0,2|1,3`."
        )
    outlook = Outlook(
        plan=_read_plan(options.plan, measurement.costs.num_blocks, options.devices),
        measurement=measurement,
        cluster=cluster,
        max_in_flight=options.max_in_flight,
    )
    check_fit(outlook.plan, measurement.costs, cluster)
    if options.exactness is not None:
        check_exactness(outlook.plan, measurement.traits, Exactness(options.exactness))
    outlook.check_memory()
    return outlook


def _read_plan(text: str, num_blocks: int, num_ranks: int) -> Plan:
    if text == "joint":
        return Plan.joint(num_blocks, num_ranks)
    return load_plan(text) if text.endswith((".yaml", ".yml")) else parse_plan(text, num_blocks=num_blocks)
