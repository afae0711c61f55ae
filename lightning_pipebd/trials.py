"""Trials: the plans between which predictions cannot decide run some steps, and the fastest one is taken."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_info
from torch import nn

from lightning_pipebd.bench import Bench
from lightning_pipebd.block_jobs import BlockJobs
from lightning_pipebd.measuring import first_batch
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.ahead import compile_ahead, teaches_ahead
from lightning_pipebd.planning.families import Candidate
from lightning_pipebd.planning.outlook import Outlook
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.program import TARGETS, Program
from lightning_pipebd.runtime.executor import Executor
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.relay import Relay
from lightning_pipebd.runtime.row_trees import RowTree, count_rows, leading_row_leaves, take_rows
from lightning_pipebd.runtime.side_effects import on_device, preserved_random_states, untouched
from lightning_pipebd.session import plan_edges

__all__ = ["try_plans"]

_NUM_WARM_STEPS, _NUM_STEPS = 3, 8


def try_plans(bench: Bench[BlockwiseDistillationModule], outlook: Outlook, num_trials: int) -> Outlook:
    """**Collective** over all ranks: run the contenders for some steps, and give the outlook on the fastest.

    Every step runs the plan's programs on the first batch, through the relay and the reductions of training. Updates,
    the loader and Lightning's loop, whose times the costs have, are slept. Afterwards everything is as before.

    Args:
        bench: What to run with.
        outlook: Of the chosen plan; the same on all ranks.
        num_trials: Most plans to try.
    """
    choice = outlook.choice
    if choice is None or len(choice.contenders) < 2 or num_trials < 2:
        return outlook
    batch = first_batch(bench)
    assert batch is not None, "costs were measured on it"
    fastest_first = sorted(choice.contenders, key=lambda candidate: candidate.step_time_ms)
    # The simplest one is what would be taken without a trial.
    tried = [choice.contenders[0], *(one for one in fastest_first if one != choice.contenders[0])][:num_trials]
    times = [_Trial(bench, outlook, candidate.plan, batch).run() for candidate in tried]
    results = ", ".join(f"{one.family} {ms:.4g} ms" for one, ms in zip(tried, times, strict=True))
    best: Candidate = min(zip(times, range(len(tried)), tried, strict=True))[2]
    reason = f"Predictions cannot decide, so these were tried for {_NUM_STEPS} steps each: {results}."
    rank_zero_info(reason)
    chosen = replace(choice, plan=best.plan, family=best.family, step_time_ms=best.step_time_ms, reason=reason)
    return replace(outlook, plan=best.plan, choice=chosen)


class _Trial:
    def __init__(
        self, bench: Bench[BlockwiseDistillationModule], outlook: Outlook, plan: Plan, batch: tuple[Any, Any]
    ) -> None:
        self._bench = bench
        self._plan = plan
        self._rank = bench.transport.rank
        self._num_rows = count_rows(batch[0])
        self._is_ahead = teaches_ahead(plan, has_momentum=bench.module.block_momentum is not None)
        self._learned = [block for block in range(plan.num_blocks) if self._rank in plan.student_ranks(block)]
        self._rest_s = self._besides(outlook) / 1000
        self._loaded = self._load(batch)

    def run(self) -> float:
        """**Collective** over all ranks: give the time of a step, that of the slowest rank."""
        module, transport = self._bench.module, self._bench.transport
        edges = plan_edges(self._plan, module.target_blocks)
        transport.connect(edges, [self._plan.student_ranks(block) for block in range(self._plan.num_blocks)])
        relay = Relay(
            transport,
            sources=[sender for sender, receiver in edges if receiver == self._rank],
            destinations=[receiver for sender, receiver in edges if sender == self._rank],
        )
        parameters = {block: module.block_parameters(block) for block in self._learned}
        executor = Executor(
            BlockJobs(module, self._bench.plugin),
            relay,
            GradientReducer(transport, parameters),
            cuts_rows=self._plan.has_split_students or self._plan.has_split_teachers,
        )
        children = [child for _, child in module.named_children()]
        try:
            with preserved_random_states(), on_device(self._modules(), self._bench.device), module.not_logging():
                with untouched([module.teacher, *children], alone=[module]):
                    pace_ms = self._measure(executor)
                relay.close()
        except BaseException:
            relay.abandon()
            raise
        return float(max(transport.all_gather_object(pace_ms)))

    def _measure(self, executor: Executor) -> float:
        module, device = self._bench.module, self._bench.device
        start = 0.0
        for step in range(_NUM_WARM_STEPS + _NUM_STEPS):
            if step == _NUM_WARM_STEPS:
                start = time.perf_counter()
            for block in self._learned:
                for parameter in module.block_parameters(block):
                    parameter.grad = None
            executor.run(self._program(is_taught=self._is_ahead and step > 0), step, dict(self._loaded), self._loaded)
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            time.sleep(self._rest_s)
        return (time.perf_counter() - start) / _NUM_STEPS * 1000

    def _program(self, *, is_taught: bool) -> Program:
        return compile_ahead(
            self._plan,
            self._num_rows,
            num_next_rows=self._num_rows if self._is_ahead else 0,
            is_taught=is_taught,
            target_blocks=self._bench.module.target_blocks,
        )[self._rank]

    def _besides(self, outlook: Outlook) -> float:
        """Give the ms of a step that its program does not take: updates, the loop, and loading in the rank's thread."""
        costs = outlook.measurement.costs
        times = costs.times(outlook.cluster.device_class[self._rank])
        rows = self._plan.teacher_rows(0, self._num_rows).get(self._rank)
        load_ms = costs.loader.occupation * costs.loader.load_ms(rows.num_rows) if rows is not None else 0.0
        return costs.overheads.step_ms + sum(times[block].update_ms for block in self._learned) + load_ms

    def _load(self, batch: tuple[Any, Any]) -> dict[int, RowTree]:
        rows = self._plan.teacher_rows(0, self._num_rows).get(self._rank)
        if rows is None or rows.is_empty:
            return {}
        module = self._bench.module
        trees = {0: batch[0]} | ({TARGETS: batch[1]} if module.target_blocks else {})
        everything = Rows(0, self._num_rows)
        wholes = {
            key: RowTree(everything, tree, leading_row_leaves(tree, self._num_rows)) for key, tree in trees.items()
        }
        return {boundary: take_rows(whole, rows) for boundary, whole in wholes.items()}

    def _modules(self) -> list[nn.Module]:
        """Give the blocks of this rank, with their adapters."""
        pairs, adapters = self._bench.module.block_pairs, self._bench.module.adapters
        taught = [block for block in range(self._plan.num_blocks) if self._rank in self._plan.teacher_ranks(block)]
        names = [f"{side}_{block}" for side in ("input", "output") for block in self._learned]
        return [
            *(pairs.teacher.blocks[block] for block in taught),
            *(pairs.student.blocks[block] for block in self._learned),
            *(adapters[name] for name in names if name in adapters),
        ]
