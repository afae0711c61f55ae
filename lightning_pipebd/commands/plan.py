"""`pipebd plan`: measure a module, and find the plan with the smallest step time."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence

from lightning_pipebd.commands.measured import measure_configured
from lightning_pipebd.commands.outlook_options import add_options, find_outlook, make_cluster, report, with_options
from lightning_pipebd.commands.pipeline_answer import plan_pipeline
from lightning_pipebd.commands.waiting import waiting
from lightning_pipebd.cost_tables import load_measurement, save_measurement
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement

__all__ = ["make_parser", "run"]

_DESCRIPTION = """\
Measure the blocks of a configured module in this process, and find the plan with the smallest step time for some
devices like this one. With --costs nothing is measured. Links between devices cannot be measured by one process: they
take no time unless --link-latency-ms and --link-bytes-per-ms say so. All other options are those of `pipebd fit`.

exit codes: 0 found, 1 there is no plan, 2 a wrong option
"""
_EPILOG = """\
examples:
  pipebd plan --config examples/digits.yaml --devices 4 --link-latency-ms 0.05 --link-bytes-per-ms 2e6
  pipebd plan --config examples/digits.yaml --devices 4 --save plan.yaml --save-costs costs.yaml
  pipebd plan --costs costs.yaml --devices 8 --memory 16GiB --json
"""


def make_parser() -> argparse.ArgumentParser:
    """Give what reads the command's arguments."""
    parser = argparse.ArgumentParser(
        prog="pipebd plan",
        description=_DESCRIPTION,
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("--costs", help="file of costs to use instead of measuring")
    parser.add_argument("--save-costs", help="write the costs to this YAML or JSON file")
    parser.add_argument("--no-cache", action="store_true", help="measure even if that was done before")
    add_options(parser)
    return parser


def run(arguments: Sequence[str]) -> int:
    """Run the command; give its exit code."""
    parser = make_parser()
    options, others = parser.parse_known_args(list(arguments))
    if options.costs and others:
        parser.error(f"with --costs nothing is configured, but {' '.join(others)} is given")
    try:
        if options.costs:
            measured = load_measurement(options.costs)
        else:
            with waiting("measuring the blocks"):
                measured = measure_configured(others, num_ranks=options.devices, uses_cache=not options.no_cache)
        if isinstance(measured, PipelineMeasurement):
            plan_pipeline(options, measured)
            return 0
        measurement = with_options(measured, options)
        cluster = make_cluster(options, measurement.costs.devices[0].device_class)
        if options.save_costs:
            save_measurement(measurement, options.save_costs)
        outlook = find_outlook(measurement, cluster, options)
        report(options, outlook)
    except (ValueError, OSError, ImportError) as error:
        sys.stderr.write(f"{error}\n")
        return 1
    return 0
