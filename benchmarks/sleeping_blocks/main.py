"""Step time of the real runtime when blocks only sleep: is anything but the slowest rank on the critical path?

    python -m benchmarks.sleeping_blocks.main --ranks 4

Teacher blocks sleep 10 ms, student blocks 30 ms; activations of 256 KB are relayed. Compute needs no core, so four
ranks run on two. Everything else is real: processes, gloo, Lightning's loop, logging. A rank's
work is also measured: what one of the blocks takes alone in one process, where plain Lightning's loop, the loss and the
optimizer have their share.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch.utils.data import DataLoader

from benchmarks.shared.sleeping import SleepingModule
from benchmarks.shared.training import StepClock, plain_trainer
from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.planning.curve import Curve

TEACHER_S, STUDENT_S = 0.010, 0.030
NUM_STEPS = 60
NUM_ROWS, WIDTH = 64, 1024  # 256 KB


def train(num_ranks: int, strategy: str, report: str) -> None:
    """One run, as a user would start it."""
    num_blocks = 1 if strategy == "alone" else 4
    module = SleepingModule(
        *([Curve([(NUM_ROWS, seconds * 1000)]) for _ in range(num_blocks)] for seconds in (TEACHER_S, STUDENT_S))
    )
    clock = StepClock()
    # Batches that are there already: what loading costs is not the question here.
    batches = [torch.randn(NUM_ROWS, WIDTH)] * NUM_STEPS
    plan = "|".join(str(block) for block in range(4))
    trainer = plain_trainer(PipeBDStrategy(plan=plan) if strategy == "pipebd" else "auto", num_ranks, [clock])
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]
    if trainer.is_global_zero:
        # The last rank's pace is everybody's pace once the queues are full: skip the fill.
        skipped = NUM_STEPS // 3
        Path(report).write_text(json.dumps(clock.pace_ms(skipped, NUM_STEPS - skipped)))


def main() -> None:
    """Interleave runs of one process and four ranks, print medians."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--run", nargs=3, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.run:
        train(int(arguments.run[0]), arguments.run[1], arguments.run[2])
        return
    results: dict[str, list[float]] = {"auto": [], "alone": [], "pipebd": []}
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(arguments.repeats):
            for strategy, ranks in (("auto", 1), ("alone", 1), ("pipebd", arguments.ranks)):
                report = f"{folder}/report.json"
                command = [
                    sys.executable,
                    "-m",
                    "benchmarks.sleeping_blocks.main",
                    "--run",
                    str(ranks),
                    strategy,
                    report,
                ]
                environment = {**os.environ, "OMP_NUM_THREADS": "1"}
                subprocess.run(
                    command, check=True, env=environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
                )
                results[strategy].append(json.loads(Path(report).read_text()))
    work_ms = (TEACHER_S + STUDENT_S) * 1000
    one, alone, many = (statistics.median(results[name]) for name in ("auto", "alone", "pipebd"))
    sys.stdout.write(f"one process  {one:7.1f} ms/step   (work {4 * work_ms:.0f} ms)   runs {results['auto']}\n")
    sys.stdout.write(f"one block    {alone:7.1f} ms/step   (work {work_ms:.0f} ms)   runs {results['alone']}\n")
    sys.stdout.write(
        f"{arguments.ranks} ranks      {many:7.1f} ms/step   (work {work_ms:.0f} ms)   runs {results['pipebd']}\n"
    )
    sys.stdout.write(f"ranks / one block {many / alone:.3f}; ranks / sleep {many / work_ms:.3f}; ")
    sys.stdout.write(f"speed-up {one / many:.2f}\n")


if __name__ == "__main__":
    main()
