"""The half cut that `docs/planning.md` works by hand, run by two processes: what its picture shows as measured.

    python -m benchmarks.sleeping_blocks.timeline docs/measured/half_cut.json

The blocks sleep ten times as long as on the page, so that what the runtime needs beside them stays small, and two ranks
do not wait for one another's core. The file is what the callback `Timeline` writes of four steps.
"""

from __future__ import annotations

import argparse

import torch
from torch.utils.data import DataLoader

from benchmarks.shared.sleeping import SleepingModule
from benchmarks.shared.training import plain_trainer
from lightning_pipebd import PipeBDStrategy, Timeline
from lightning_pipebd.planning.curve import Curve

PLAN = "0-1,T2|S2,3"
TEACH_MS, LEARN_MS = (10, 20, 40, 10), (30, 30, 60, 30)
NUM_ROWS, NUM_STEPS = 64, 16


def main() -> None:
    """Train some steps, and write the timeline."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("output", help="JSON file to write")
    output = parser.parse_args().output
    module = SleepingModule(*([Curve([(NUM_ROWS, ms)]) for ms in times] for times in (TEACH_MS, LEARN_MS)))
    batches = [torch.randn(NUM_ROWS, 256)] * NUM_STEPS
    timeline = Timeline(output, num_steps=4)
    trainer = plain_trainer(PipeBDStrategy(plan=PLAN), 2, [timeline])
    trainer.fit(module, DataLoader(batches, batch_size=None))  # type: ignore[arg-type]


if __name__ == "__main__":
    main()
