"""Ways to distil the same blocks on two cores: what is run in which process, and what arithmetic says of it."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Any, NamedTuple

import torch.distributed as dist
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from benchmarks.baselines.models import WORKLOADS, Distil, Rows, SomeBlocks
from benchmarks.shared.ranks import run_ranks, run_side_by_side
from benchmarks.shared.training import PeakMemory, StepClock, plain_trainer, present_memory_bytes
from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.plan import Plan

__all__ = ["AUTOMATIC", "VARIANTS", "Chores", "Result", "Steps", "Variant"]

AUTOMATIC = "pipebd, automatic"
_NUM_RANKS = 2
Blocks = tuple[int, ...]


class Steps(NamedTuple):
    """How long each fit lasts.

    Args:
        num_skipped: Steps that warm up and fill queues.
        num_measured: Steps whose time counts.
        num_after: Steps in which a rank that is ahead may end without giving the others more of the machine.
    """

    num_skipped: int
    num_measured: int
    num_after: int

    @property
    def total(self) -> int:
        """All steps of a fit."""
        return sum(self)


class Result(NamedTuple):
    """One run.

    Args:
        ms: Time per batch, on the slowest rank.
        own_bytes: Per rank, most memory that was held beyond what the process had before there was a model.
        outlook: What was foreseen, if the run measured its blocks.
    """

    ms: float
    own_bytes: tuple[int, ...]
    outlook: Outlook | None


@dataclass(frozen=True)
class Chores:
    """The times of a workload's blocks, on the whole batch in one process, as the automatic run measured them."""

    teach_ms: tuple[float, ...]
    learn_ms: tuple[float, ...]
    load_ms: float

    @classmethod
    def read(cls, outlook: Outlook) -> Chores:
        """Take the times from a measurement."""
        measurement = outlook.measurement
        rows, times = measurement.num_rows, measurement.costs.devices[0].blocks
        return cls(
            tuple(block.teach_ms.at(rows) for block in times),
            tuple(block.learn_ms.at(rows) + block.update_ms for block in times),
            measurement.costs.loader.load_ms(rows),
        )

    @property
    def all_blocks(self) -> Blocks:
        """The blocks."""
        return tuple(range(len(self.teach_ms)))

    def task_ms(self, blocks: Blocks) -> float:
        """Give the time of training some blocks in one process: with loading, and the teacher up to the last."""
        if not blocks:
            return 0.0
        return self.load_ms + sum(self.teach_ms[: max(blocks) + 1]) + sum(self.learn_ms[block] for block in blocks)

    def in_turn_ms(self, blocks: Blocks) -> float:
        """Give the time of training some blocks one after another, each with its own teacher."""
        return sum(self.task_ms((block,)) for block in blocks)

    def pack(self, cost_ms: Callable[[Blocks], float]) -> tuple[Blocks, Blocks]:
        """Divide the blocks over two processes, so that the slower one is as fast as possible."""
        halves = [half for size in self.all_blocks for half in combinations(self.all_blocks[1:], size)]
        divided = [(tuple(sorted(set(self.all_blocks) - set(half))), half) for half in halves]
        return min(divided, key=lambda pair: max(map(cost_ms, pair)))

    @property
    def cut(self) -> int:
        """Where the chain is to be cut in two, so that the slower rank is as fast as possible."""
        return min(self.all_blocks[1:], key=lambda cut: max(self.task_ms(self.all_blocks[:cut]), self.second_ms(cut)))

    def second_ms(self, cut: int) -> float:
        """Give the time of the blocks behind a cut, without their prefix."""
        return sum(self.teach_ms[cut:]) + sum(self.learn_ms[cut:])

    @property
    def straight_plan(self) -> Plan:
        """The best of two ranks with consecutive whole blocks."""
        return Plan.straight([self.cut, len(self.all_blocks) - self.cut])


class Barrier(Callback):
    """Lets all ranks wait for each other before every update, as a relay does whose updates are not decoupled."""

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._group: Any = dist.new_group(backend="gloo")

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer) -> None:
        dist.barrier(self._group)


class _RankResult(NamedTuple):
    ms: float
    own_bytes: int
    outlook: Outlook | None


def _fit(
    workload: str, strategy: Any, num_ranks: int, tasks: Sequence[Blocks | None], rows: int, steps: Steps, barrier: bool
) -> _RankResult:
    """Train some sets of blocks one after another in this process, ``None`` being all; add up their times."""
    before = present_memory_bytes()
    found = []
    for blocks in tasks:
        found.append(_fit_blocks(workload, strategy, num_ranks, blocks, rows, steps, barrier))
        # Trainer and module hold each other: without this, the next module would be added to this one's memory.
        gc.collect()
    return _RankResult(
        sum(each.ms for each in found), max(each.own_bytes for each in found) - before, found[-1].outlook
    )


def _fit_blocks(
    workload: str, strategy: Any, num_ranks: int, blocks: Blocks | None, rows: int, steps: Steps, barrier: bool
) -> _RankResult:
    seed_everything(0, verbose=False)
    clock, memory = StepClock(), PeakMemory()
    trainer = plain_trainer(strategy, num_ranks, [clock, memory, *([Barrier()] if barrier else [])])
    module = Distil(workload) if blocks is None else SomeBlocks(workload, blocks)
    data = Rows(WORKLOADS[workload].example(), steps.total * rows * (num_ranks if strategy == "ddp" else 1))
    trainer.fit(module, DataLoader(data, batch_size=rows))
    outlook = strategy.outlook if isinstance(strategy, PipeBDStrategy) else None
    assert not isinstance(outlook, PipelineOutlook)
    return _RankResult(clock.pace_ms(steps.num_skipped, steps.num_measured), memory.peak_bytes, outlook)


def _fit_pipebd(workload: str, plan: Plan | str | None, rows: int, steps: Steps, barrier: bool) -> _RankResult:
    # Each run measures anew, as the first of a user does.
    os.environ["PIPEBD_CACHE"] = ""
    return _fit(workload, PipeBDStrategy(plan=plan), _NUM_RANKS, [None], rows, steps, barrier)


def _merge(results: Sequence[_RankResult]) -> Result:
    ms = max(result.ms for result in results)
    return Result(ms, tuple(result.own_bytes for result in results), results[0].outlook)


@dataclass(frozen=True)
class Variant:
    """A way to train.

    Args:
        run: Trains a workload, given the times of its blocks, which nobody knows yet if the variant measures them.
        expected_ms: Its time by arithmetic.
        divides_rows: Whether each process sees a part of the batch only.
    """

    run: Callable[[str, Chores, Steps], Result]
    expected_ms: Callable[[Chores], float]
    divides_rows: bool = False


def _one_process(workload: str, chores: Chores, steps: Steps) -> Result:
    rows = WORKLOADS[workload].batch_size
    return _merge(run_side_by_side(_fit, [(workload, "auto", 1, [None], rows, steps, False)]))


def _ceiling(workload: str, chores: Chores, steps: Steps) -> Result:
    rows = WORKLOADS[workload].batch_size
    both = _merge(run_side_by_side(_fit, [(workload, "auto", 1, [None], rows, steps, False)] * _NUM_RANKS))
    return both._replace(ms=both.ms / _NUM_RANKS)


def _ddp(workload: str, tasks: Sequence[Blocks | None], steps: Steps) -> Result:
    rows = WORKLOADS[workload].batch_size // _NUM_RANKS
    return _merge(run_ranks(_fit, _NUM_RANKS, workload, "ddp", _NUM_RANKS, tasks, rows, steps, False))


def _apart(workload: str, tasks: Sequence[Sequence[Blocks]], steps: Steps) -> Result:
    rows = WORKLOADS[workload].batch_size
    return _merge(run_side_by_side(_fit, [(workload, "auto", 1, own, rows, steps, False) for own in tasks]))


def _pipebd(workload: str, plan: Plan | str | None, steps: Steps, barrier: bool = False) -> Result:
    rows = WORKLOADS[workload].batch_size
    return _merge(run_ranks(_fit_pipebd, _NUM_RANKS, workload, plan, rows, steps, barrier))


def _half(chores: Chores) -> float:
    return chores.task_ms(chores.all_blocks) / _NUM_RANKS


def _straight_ms(chores: Chores) -> float:
    return max(chores.task_ms(chores.all_blocks[: chores.cut]), chores.second_ms(chores.cut))


def _barrier_ms(chores: Chores) -> float:
    # Behind a barrier the second rank begins when the first one's teacher is done, in every step anew.
    prefix = chores.load_ms + sum(chores.teach_ms[: chores.cut])
    return prefix + max(sum(chores.learn_ms[: chores.cut]), chores.second_ms(chores.cut))


VARIANTS = {
    AUTOMATIC: Variant(lambda name, _, steps: _pipebd(name, None, steps), _half),
    "one process": Variant(_one_process, lambda chores: chores.task_ms(chores.all_blocks)),
    "joint DDP": Variant(lambda name, _, steps: _ddp(name, [None], steps), _half, divides_rows=True),
    "block after block, DDP": Variant(
        lambda name, chores, steps: _ddp(name, [(block,) for block in chores.all_blocks], steps),
        lambda chores: chores.in_turn_ms(chores.all_blocks) / _NUM_RANKS,
        divides_rows=True,
    ),
    "blocks apart": Variant(
        lambda name, chores, steps: _apart(
            name, [[(block,) for block in own] for own in chores.pack(chores.in_turn_ms)], steps
        ),
        lambda chores: max(map(chores.in_turn_ms, chores.pack(chores.in_turn_ms))),
    ),
    "blocks apart, one teacher per process": Variant(
        lambda name, chores, steps: _apart(name, [[own] for own in chores.pack(chores.task_ms)], steps),
        lambda chores: max(map(chores.task_ms, chores.pack(chores.task_ms))),
    ),
    "relay with barrier": Variant(
        lambda name, chores, steps: _pipebd(name, chores.straight_plan, steps, barrier=True), _barrier_ms
    ),
    "pipebd, straight": Variant(lambda name, chores, steps: _pipebd(name, chores.straight_plan, steps), _straight_ms),
    "pipebd, joint": Variant(lambda name, _, steps: _pipebd(name, "joint", steps), _half, divides_rows=True),
    "ceiling": Variant(_ceiling, _half),
}
"""By name; the first measures the blocks for those that divide them."""
