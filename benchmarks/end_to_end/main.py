"""Utilisation of the real runtime when blocks only sleep: how well do schedules of a whole student fill the ranks?

    python -m benchmarks.end_to_end.main --ranks 4 8
    python -m benchmarks.end_to_end.main --ranks 4 8 --ratio 2 --micro-batches-per-rank 2
    python -m benchmarks.end_to_end.main --ranks 4 8 --foresee

Every rank has one block of each model. The student's forward of a batch sleeps ``--forward-ms``, its backward twice
that, the teacher's forward ``--ratio`` times that; a micro-batch sleeps its part. Compute needs no core, so eight ranks
run on two. Processes, gloo, relay and executor are real; Lightning is left out, so that only the order of the work
differs.

    1f1b           the teacher works on the next batch in the gaps
    teacher-first  the teacher's pass of the batch, then the student in 1f1b order
    released       the order of TSPipe's released code: micro-batches one fewer than ranks, backwards in halves
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

from benchmarks.shared.sleeping import Sleep, sleep
from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineProgram, Stream
from lightning_pipebd.planning.pipeline_schedule import Durations, Schedule
from lightning_pipebd.planning.pipeline_simulate import (
    PipelineCosts,
    PipelineSimulation,
    half_batch_programs,
    simulate_pipeline,
)
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.pipeline_executor import PipelineExecutor
from lightning_pipebd.runtime.relay import Relay
from lightning_pipebd.runtime.row_trees import RowTree
from lightning_pipebd.runtime.transport import ProcessGroupTransport

NUM_STEPS = 10
WIDTH = 1024
VARIANTS = ("1f1b", "teacher-first", "released")


class SleepingJobs:
    """Blocks that compute next to nothing, slowly."""

    def __init__(self, ratio: float, forward_s: float) -> None:
        self.ratio = ratio
        self.forward_s = forward_s
        self.num_rows = 1
        self.scale = nn.Parameter(torch.ones(1))

    def teach(self, block: int, boundary: Tensor) -> Tensor:
        sleep(self.ratio * self.forward_s * len(boundary) / self.num_rows)
        return boundary

    def forward(self, block: int, boundary: Tensor, rows: Rows) -> Any:
        return Sleep.apply(boundary, self.scale, self.forward_s * rows.num_rows / self.num_rows)

    def loss(self, student_output: Any, teacher_output: Any, targets: Any, rows: Rows, num_rows: int) -> Any:
        loss = (student_output - teacher_output).square().mean()
        loss.backward()
        return {"loss": loss.detach()}

    def parameters(self, block: int) -> list[nn.Parameter]:
        return [self.scale]

    def weights(self, block: int) -> list[Tensor]:
        return [self.scale]

    def promote(self, block: int) -> None:
        pass

    def follow(self, block: int) -> None:
        pass

    def stay(self, block: int) -> None:
        pass


def programs_of(variant: str, num_ranks: int, ratio: float, per_rank: int) -> list[tuple[PipelineProgram, ...]]:
    """Give the programs of the first step and of every other; a batch has some micro-batches for each rank."""
    plan = PipelinePlan(num_ranks=num_ranks, teacher=tuple(range(num_ranks)), student=tuple(range(num_ranks)))
    durations = Durations(teacher=(ratio,) * num_ranks, student=(1.0,) * num_ranks)
    if variant == "released":
        steady = half_batch_programs(num_ranks)
        num_rows = steady[0].num_rows
        first = PipelineStep(num_rows=num_rows, num_micro_batches=num_rows, num_next_rows=num_rows, is_full_batch=True)
        return [compile_pipeline(plan, first, durations), steady]
    num_rows = per_rank * num_ranks
    if variant == "teacher-first":
        only = PipelineStep(num_rows=num_rows, num_micro_batches=num_rows, schedule=Schedule.TEACHER_FIRST)
        return [compile_pipeline(plan, only, durations)] * 2
    first = PipelineStep(num_rows=num_rows, num_micro_batches=num_rows, num_next_rows=num_rows)
    other = PipelineStep(num_rows=num_rows, num_micro_batches=num_rows, num_next_rows=num_rows, teaches_own=False)
    return [compile_pipeline(plan, first, durations), compile_pipeline(plan, other, durations)]


def run_rank(
    rank: int, num_ranks: int, ratio: float, forward_s: float, per_rank: int, repeats: int, folder: str
) -> None:
    """Run all variants in turn; every rank writes its pace."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=num_ranks)
    transport = ProcessGroupTransport(torch.device("cpu"))
    neighbours = [(other, other + 1) for other in range(num_ranks - 1)]
    transport.connect([*neighbours, *((second, first) for first, second in neighbours)], [])
    lines = []
    for _ in range(repeats):
        for variant in VARIANTS:
            transport.all_gather_object(None)
            programs = programs_of(variant, num_ranks, ratio, per_rank)
            lines.append(f"{variant} {step_time_ms(rank, programs, SleepingJobs(ratio, forward_s), transport)}")
    Path(folder, f"{rank}.txt").write_text("\n".join(lines))
    transport.all_gather_object(None)
    dist.destroy_process_group()


def step_time_ms(
    rank: int, programs: list[tuple[PipelineProgram, ...]], jobs: SleepingJobs, transport: ProcessGroupTransport
) -> float:
    """Train a few steps and give the time of one."""
    (first, other), num_ranks = (own[rank] for own in programs), transport.num_ranks
    around = [other for other in (rank - 1, rank + 1) if 0 <= other < num_ranks]
    relay = Relay(transport, sources=around, destinations=around)
    executor = PipelineExecutor(jobs, relay, num_teacher_blocks=num_ranks, num_student_blocks=num_ranks)
    jobs.num_rows = first.num_rows
    batch = RowTree(Rows(0, first.num_rows), torch.randn(first.num_rows, WIDTH), (True,))
    loaded = {Stream.HIDDEN: batch, Stream.BOUNDARY: batch} if rank == 0 else {}
    stamps = []
    for step in range(NUM_STEPS):
        ahead = {Stream.BOUNDARY: batch} if rank == 0 else None
        executor.run(other if step else first, step, loaded, ahead)
        executor.finish()
        stamps.append(time.perf_counter())
    relay.close()
    skipped = NUM_STEPS // 3
    return (stamps[-1] - stamps[skipped]) / (NUM_STEPS - 1 - skipped) * 1000


def measure(num_ranks: int, ratio: float, forward_s: float, per_rank: int, repeats: int) -> None:
    """Print a line for each variant."""
    with tempfile.TemporaryDirectory() as folder:
        arguments = (num_ranks, ratio, forward_s, per_rank, repeats, folder)
        mp.spawn(run_rank, arguments, nprocs=num_ranks)  # type: ignore[attr-defined,no-untyped-call]  # torch's own
        texts = [Path(folder, f"{rank}.txt").read_text().splitlines() for rank in range(num_ranks)]
    # In the steady state all ranks have one pace; over few steps the slowest tells it.
    runs = [(lines[0].split()[0], max(float(line.split()[1]) for line in lines)) for lines in zip(*texts, strict=True)]
    work_ms = (3 + ratio) * forward_s * 1000
    medians = {variant: statistics.median(ms for name, ms in runs if name == variant) for variant in VARIANTS}
    for variant, median_ms in medians.items():
        foreseen = foresee(variant, num_ranks, ratio, per_rank).utilisation
        sys.stdout.write(
            f"{num_ranks} ranks  {variant:14} {median_ms:7.1f} ms/step   utilisation {work_ms / median_ms:5.1%}"
            f"   simulated {foreseen:5.1%}   1f1b is {median_ms / medians['1f1b']:.2f}x as fast\n"
        )


def foresee(variant: str, num_ranks: int, ratio: float, per_rank: int) -> PipelineSimulation:
    """Simulate a variant in the steady state."""
    programs = programs_of(variant, num_ranks, ratio, per_rank)[1]
    return simulate_pipeline(programs, PipelineCosts.equal(num_ranks, ratio))


def print_foreseen(num_ranks: int) -> None:
    """Print what is foreseen of some ratios and numbers of micro-batches: how busy 1f1b is, and how much faster."""
    for per_rank in (1, 2, 3, 4):
        cells = []
        for ratio in (0.5, 1.0, 2.0, 4.0):
            ours, first = (foresee(variant, num_ranks, ratio, per_rank) for variant in ("1f1b", "teacher-first"))
            cells.append(f"{ours.utilisation:.0%}, {first.step_time_ms / ours.step_time_ms:.2f}")
        sys.stdout.write(f"| {num_ranks} | {per_rank} | {' | '.join(cells)} |\n")


def main() -> None:
    """Read the arguments and measure."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, nargs="+", default=[4])
    parser.add_argument("--ratio", type=float, default=1.0, help="the teacher's forward, in forwards of the student")
    parser.add_argument("--forward-ms", type=float, default=240.0, help="the student's forward of a batch on each rank")
    parser.add_argument("--micro-batches-per-rank", type=int, default=4, help="of a batch; not of the released order")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--foresee", action="store_true", help="measure nothing: print what the simulator foresees")
    arguments = parser.parse_args()
    for num_ranks in arguments.ranks:
        if arguments.foresee:
            print_foreseen(num_ranks)
        else:
            forward_s, per_rank = arguments.forward_ms / 1000, arguments.micro_batches_per_rank
            measure(num_ranks, arguments.ratio, forward_s, per_rank, arguments.repeats)


if __name__ == "__main__":
    main()
