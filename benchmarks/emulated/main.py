"""Many ranks whose blocks sleep as long as a cost table says: what of the work bound does the real runtime reach?

    python -m benchmarks.emulated.main

Emulated is the compute of the blocks, and the loading where the table has a time for it. Processes, Lightning's loop,
relay, queues, logging, checkpoints and optimizers are real. For each cost table the automatic plan is found from that
very table, and its teacher may work a batch ahead; the best plans of the other families are run beside it, all in one
set of processes. Times are scaled so
that the work of a step, spread evenly over the ranks, takes ``--work-ms``: this is the work bound.

Utilisation is work bound / step time. The work bound takes every job at the best rate that it has at any number of
rows. Where fewer rows run at a worse rate, no plan may reach it; the column "foreseen" has what the planner says of the
plan, so that measured / foreseen is the runtime's part of what is missing. Processor time is that of the busiest rank
in a step, all threads together: no part of the emulated work, it shows what loop, loss, optimizer and relay cost.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from lightning.pytorch import seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.emulated.cost_tables import TABLES, Table, scaled, work_bound_ms
from benchmarks.shared.ranks import run_ranks
from benchmarks.shared.sleeping import SleepingModule, sleep
from benchmarks.shared.tables import markdown_table, spread
from benchmarks.shared.training import StepClock, plain_trainer
from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.planning.costs import LoaderCost
from lightning_pipebd.planning.families import Family
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.planner import PlanChoice

_MEASURED = "measured by itself"
_NUM_SKIPPED, _NUM_AFTER = 3, 1


class SlowRows(Dataset[Tensor]):
    """Rows that are there already, but loading them takes as long as a cost table says."""

    def __init__(self, num_rows: int, width: int, cost: LoaderCost) -> None:
        self._rows = torch.randn(num_rows, width)
        self._cost = cost

    def __len__(self) -> int:
        return len(self._rows)

    def __getitems__(self, indices: list[int]) -> list[Tensor]:
        """Give a batch's rows at once, as DataLoader asks for them."""
        sleep(self._cost.load_ms(len(indices)) / 1000)
        return [self._rows[index] for index in indices]


class Fit(NamedTuple):
    """What one rank has of one fit.

    Args:
        pace_ms: Time of a step on this rank.
        processor_ms: Processor time of a step on this rank: sleeping takes none.
        choice: What the planner said, if it was asked.
    """

    pace_ms: float
    processor_ms: float
    choice: PlanChoice | None


def fit(table: Table, num_ranks: int, strategy: PipeBDStrategy, num_measured: int, folder: str) -> Fit:
    """Train on this rank, with a logger and a checkpoint, as users do."""
    seed_everything(0, verbose=False)
    times = table.costs.devices[0].blocks
    module = SleepingModule([block.teach_ms for block in times], [block.learn_ms for block in times])
    width = table.costs.boundary_bytes_per_row[0] // torch.float32.itemsize
    num_steps = _NUM_SKIPPED + num_measured + _NUM_AFTER
    loader = DataLoader(
        SlowRows(table.num_rows, width, table.costs.loader),
        batch_sampler=[list(range(table.num_rows))] * num_steps,
    )
    clock = StepClock()
    trainer = plain_trainer(
        strategy,
        num_ranks,
        [clock, ModelCheckpoint(folder)],
        logger=CSVLogger(folder),
        log_every_n_steps=5,
        enable_checkpointing=True,
    )
    trainer.fit(module, loader)
    outlook = strategy.outlook
    choice = outlook.choice if isinstance(outlook, Outlook) else None
    steps = (_NUM_SKIPPED, num_measured)
    return Fit(clock.pace_ms(*steps), clock.processor_ms(*steps), choice)


def run_rank(
    tables: dict[str, Table],
    num_ranks: int,
    repeats: int,
    num_measured: int,
    measures: bool,
    only_automatic: bool,
    folder: str,
) -> dict[str, tuple[PlanChoice, list[tuple[str, Fit]]]]:
    """Run all plans of all tables on this rank; give per table the choice, and names and fits in order."""
    os.environ["PIPEBD_CACHE"] = ""
    found = {}
    for name, table in tables.items():
        fits: list[tuple[str, Fit]] = []

        def train(plan_name: str | None, **options: Any) -> Fit:
            result = fit(table, num_ranks, PipeBDStrategy(**options), num_measured, folder)  # noqa: B023
            plan_name = plan_name or str(result.choice.family if result.choice else "")
            fits.append((plan_name, result._replace(choice=None)))  # noqa: B023
            return result

        choice = train(None, costs=table.costs, teach_ahead=True).choice
        assert choice is not None, "costs were given, and no plan"
        for repeat in range(repeats):
            if measures:
                train(_MEASURED, teach_ahead=True)
            if only_automatic:
                if repeat:
                    train(str(choice.family), plan=choice.plan)
                continue
            for candidate in choice.alternatives:
                # One rank has all the work: that takes long and tells nothing. The chosen plan was just run.
                if candidate.family is not Family.SINGLE and (repeat or candidate.family is not choice.family):
                    train(str(candidate.family), plan=candidate.plan)
        found[name] = (choice, fits)
    return found


def measure(
    tables: dict[str, Table], num_ranks: int, repeats: int, num_measured: int, measures: bool, only_automatic: bool
) -> list[dict[str, str]]:
    """Run everything on so many ranks, and give the rows of the report."""
    with tempfile.TemporaryDirectory() as folder:
        options = (repeats, num_measured, measures, only_automatic, folder)
        ranks = run_ranks(run_rank, num_ranks, tables, num_ranks, *options)
    rows = []
    for name in tables:
        choice = ranks[0][name][0]
        steps: dict[str, list[tuple[float, float]]] = {}
        # A rank that is ahead of the slowest one seems faster for a while: the slowest tells everybody's pace.
        for runs in zip(*(found[name][1] for found in ranks), strict=True):
            pace_ms = max(fit.pace_ms for _, fit in runs)
            steps.setdefault(runs[0][0], []).append((pace_ms, max(fit.processor_ms for _, fit in runs)))
        rows += _rows(f"{num_ranks} ranks, {name}", choice, work_bound_ms(tables[name], num_ranks), steps)
    return rows


def _rows(
    title: str, choice: PlanChoice, work_ms: float, steps: dict[str, list[tuple[float, float]]]
) -> list[dict[str, str]]:
    foreseen = {str(candidate.family): candidate.step_time_ms for candidate in choice.alternatives}
    foreseen[_MEASURED] = choice.step_time_ms
    rows = []
    for plan, values in steps.items():
        times, processor = zip(*values, strict=True)
        is_chosen = plan == str(choice.family)
        rows.append(
            {
                "emulated": title,
                "plan": f"**automatic: {plan}**" if is_chosen else plan,
                "ms per step": f"{spread(times):.1f}",
                "utilisation": f"{spread([work_ms / ms for ms in times]):.3f}",
                "foreseen": f"{work_ms / foreseen[plan]:.3f}",
                "measured / foreseen ms": f"{spread([ms / foreseen[plan] for ms in times]):.3f}",
                "processor ms": f"{spread(processor):.1f}",
            }
        )
    return rows


def main(words: Sequence[str] | None = None) -> None:
    """Measure for each number of ranks, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 8, 16])
    parser.add_argument("--tables", nargs="+", default=list(TABLES), choices=list(TABLES))
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--steps", type=int, default=6, help="measured steps of each run")
    parser.add_argument("--work-ms", type=float, default=300.0, help="work of a step, per rank")
    parser.add_argument("--measure", action="store_true", help="also let the profiler measure the sleeping blocks")
    parser.add_argument("--only-automatic", action="store_true", help="leave out the other families' best plans")
    arguments = parser.parse_args(words)
    for num_ranks in arguments.ranks:
        tables = {name: scaled(TABLES[name], num_ranks, arguments.work_ms) for name in arguments.tables}
        options = (arguments.repeats, arguments.steps, arguments.measure, arguments.only_automatic)
        rows = measure(tables, num_ranks, *options)
        sys.stdout.write(f"\n{markdown_table(list(rows[0]), rows)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
