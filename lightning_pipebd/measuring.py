"""Measuring a module under a trainer: what the profiler needs of both, and one table of the findings of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from math import hypot
from statistics import fmean
from typing import Any, NamedTuple

from torch import nn
from torch.optim import Optimizer

from lightning_pipebd.bench import (
    Bench,
    TimedNews,
    bring_first_batch,
    limited_noise,
    measure_all_links,
    recall_or_measure,
    refuse_iterator,
)
from lightning_pipebd.block_jobs import BlockJobs
from lightning_pipebd.cost_tables import MeasurementCache
from lightning_pipebd.first_batch import FirstBatch
from lightning_pipebd.loop_costs import measure_loop
from lightning_pipebd.machines import Machine
from lightning_pipebd.measurement_key import measurement_key
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.nonfinite import FiniteGuard
from lightning_pipebd.planning.costs import BlockSizes, BlockTimes, CostTable, DeviceTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.explain import BlockTraits
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.runtime.agreement import done_by_all, done_by_rank_zero
from lightning_pipebd.runtime.link_probe import Links
from lightning_pipebd.runtime.optimizer_costs import measure_follow, measure_updates
from lightning_pipebd.runtime.partition import has_batch_statistics, is_stochastic
from lightning_pipebd.runtime.profiler import BlockParts, BlockProfile, measured_row_counts, profile_blocks
from lightning_pipebd.runtime.row_trees import count_rows, tree_bytes
from lightning_pipebd.runtime.side_effects import untouched

__all__ = ["block_traits", "count_batch_rows", "first_batch", "measure_module"]

# Beside all noise, predicted step times of different plans have been found this much off against each other.
_MODEL_ERROR = 0.05


def block_traits(module: BlockwiseDistillationModule, *, is_synchronised: bool) -> list[BlockTraits]:
    """Say of each block, its adapters included, what decides how exactly a plan repeats one process."""
    return [
        replace(
            trait,
            has_batch_statistics=trait.has_batch_statistics or any(map(has_batch_statistics, adapters)),
            is_stochastic=trait.is_stochastic or any(map(is_stochastic, adapters)),
        )
        for trait, adapters in zip(
            module.block_pairs.traits(is_synchronised=is_synchronised), _adapters(module), strict=True
        )
    ]


def measure_module(
    bench: Bench[BlockwiseDistillationModule],
    optimizers: Sequence[Optimizer],
    machines: Sequence[Machine],
    *,
    num_ranks: int,
    cache: MeasurementCache | None = None,
) -> Measurement | None:
    """**Collective** over all ranks: measure everything a plan is judged by, or find it in the cache.

    Args:
        bench: What to measure with.
        optimizers: The user's, over all parameters.
        machines: Of every rank.
        num_ranks: Ranks for which plans will be sought: their equal part of a batch is measured, too.
        cache: Where measurements are kept; `None` keeps none.

    Returns:
        The same on every rank; `None` if there is no batch to train on.

    Raises:
        ValueError: The loader can be iterated only once, and the module has no example input.
    """
    found = bring_first_batch(bench, lambda: _example(bench))
    if found is None:
        return None
    first, batch = found
    key = measurement_key(
        bench.module,
        batch,
        optimizers,
        bench.plugin,
        machines=list(machines),
        num_ranks=num_ranks,
        is_synchronised=bench.is_synchronised,
    )
    measurement = recall_or_measure(
        bench,
        cache,
        key,
        Measurement,
        f"{bench.module.num_blocks} blocks on a batch of {count_rows(batch[0])} rows",
        lambda: _measure(bench, optimizers, machines, batch, first, num_ranks),
    )
    # Loading is the one thing that no key can name.
    return replace(measurement, costs=replace(measurement.costs, loader=first.loader))


def count_batch_rows(bench: Bench[BlockwiseDistillationModule]) -> int | None:
    """**Collective** over all ranks: count the rows of the first batch; `None` if there is none."""
    batch = first_batch(bench)
    return None if batch is None else count_rows(batch[0])


def first_batch(bench: Bench[BlockwiseDistillationModule]) -> tuple[Any, Any] | None:
    """**Collective** over all ranks: give input and labels of the first batch, on the device; `None` without one."""
    found = bring_first_batch(bench, lambda: _example(bench))
    return None if found is None else found[1]


def _example(bench: Bench[BlockwiseDistillationModule]) -> FirstBatch:
    example = bench.module.example_input_array
    if example is None or bench.module.target_blocks:
        refuse_iterator(
            "a loader that can be iterated again, "
            "or (without `target_blocks`) an `example_input_array` of a whole batch"
        )
    return FirstBatch(example)


# The measuring.


class _Findings(NamedTuple):
    """What one rank measured."""

    profile: BlockProfile
    update_ms: dict[int, float]
    optimizer_bytes: dict[int, int]
    step_ms: float


def _measure(
    bench: Bench[BlockwiseDistillationModule],
    optimizers: Sequence[Optimizer],
    machines: Sequence[Machine],
    batch: tuple[Any, Any],
    first: FirstBatch,
    num_ranks: int,
) -> Measurement:
    transport = bench.transport
    links = measure_all_links(bench, machines)
    peers = [rank for rank, other in enumerate(machines) if other.device_class == machines[transport.rank].device_class]
    # Every block by two ranks: if one of them is disturbed, that must not look like a slow block.
    place, num_blocks = peers.index(transport.rank), bench.module.num_blocks
    own = sorted({*range(place, num_blocks, len(peers)), *range((place + 1) % len(peers), num_blocks, len(peers))})
    findings = done_by_all(transport, lambda: _measure_own(bench, optimizers, batch, own, num_ranks))
    return done_by_rank_zero(transport, lambda: _put_together(bench, machines, batch, first, links, findings))


def _measure_own(
    bench: Bench[BlockwiseDistillationModule],
    optimizers: Sequence[Optimizer],
    batch: tuple[Any, Any],
    own: list[int],
    num_ranks: int,
) -> _Findings:
    module = bench.module
    num_rows = count_rows(batch[0])
    others = [child for name, child in module.named_children() if name not in ("student", "adapters")]
    with untouched(others, alone=[module]), module.not_logging():
        profile = profile_blocks(
            BlockJobs(module, bench.plugin),
            _block_parts(module, is_synchronised=bench.is_synchronised),
            *batch,
            num_rows=num_rows,
            row_counts=measured_row_counts(num_rows, num_ranks),
            own=own,
            device=bench.device,
            tell=TimedNews(bench.tell),
        )
    guard = FiniteGuard("raise")
    updates = measure_updates(
        optimizers,
        [module.block_parameters(block) for block in own],
        bench.device,
        check=lambda parameters: guard.check(0, "", parameters, (), 0),
    )
    guard.flush()
    return _Findings(
        profile,
        {block: ms + _follow_ms(bench, block) for block, ms in zip(own, updates.update_ms, strict=True)},
        dict(zip(own, updates.optimizer_bytes, strict=True)),
        updates.step_ms + measure_loop(),
    )


def _follow_ms(bench: Bench[BlockwiseDistillationModule], block: int) -> float:
    """Time what a momentum teacher's block does after each update; nothing for a frozen one."""
    momentum = bench.module.block_momentum
    return 0.0 if momentum is None else measure_follow(momentum.tensors(block), bench.device)


def _block_parts(module: BlockwiseDistillationModule, *, is_synchronised: bool) -> list[BlockParts]:
    pairs = module.block_pairs
    traits = block_traits(module, is_synchronised=is_synchronised)
    return [
        BlockParts(
            name=trait.name,
            teacher=pairs.teacher.blocks[block],
            student=(pairs.student.blocks[block], *adapters),
            parameters=tuple(module.block_parameters(block)),
            is_divisible=not trait.is_stochastic and (not trait.has_batch_statistics or trait.is_synchronised),
        )
        for block, (trait, adapters) in enumerate(zip(traits, _adapters(module), strict=True))
    ]


def _adapters(module: BlockwiseDistillationModule) -> list[list[nn.Module]]:
    sides = ("input", "output")
    return [
        [module.adapters[f"{side}_{block}"] for side in sides if f"{side}_{block}" in module.adapters]
        for block in range(module.num_blocks)
    ]


def _put_together(
    bench: Bench[BlockwiseDistillationModule],
    machines: Sequence[Machine],
    batch: tuple[Any, Any],
    first: FirstBatch,
    links: Links,
    findings: Sequence[_Findings],
) -> Measurement:
    num_rows, module = count_rows(batch[0]), bench.module
    costs = _cost_table(module.num_blocks, machines, first, links, findings)
    if module.target_blocks:
        costs = replace(costs, target_bytes_per_row=tree_bytes(batch[1]) // num_rows)
    traits = block_traits(module, is_synchronised=bench.is_synchronised)
    coupled = {block for found in findings for block in found.profile.coupled}
    return Measurement(
        costs=costs,
        num_rows=num_rows,
        traits=tuple(
            replace(trait, boundary_bytes_per_row=num_bytes, couples_rows=block in coupled)
            for block, (trait, num_bytes) in enumerate(zip(traits, costs.boundary_bytes_per_row[1:], strict=True))
        ),
        target_blocks=tuple(module.target_blocks),
        whole_reason=next((found.profile.whole_reason for found in findings if found.profile.whole_reason), ""),
        has_momentum=module.block_momentum is not None,
    )


def _cost_table(
    num_blocks: int,
    machines: Sequence[Machine],
    first: FirstBatch,
    links: Links,
    findings: Sequence[_Findings],
) -> CostTable:
    classes: dict[str, dict[int, list[BlockTimes]]] = {}
    sizes: dict[int, BlockSizes] = {}
    for machine, found in zip(machines, findings, strict=True):
        times = classes.setdefault(machine.device_class, {})
        for block, own in found.profile.blocks.items():
            times.setdefault(block, []).append(replace(own.times, update_ms=found.update_ms[block]))
            sizes[block] = replace(own.sizes, optimizer_bytes=found.optimizer_bytes[block])
    return CostTable(
        blocks=tuple(sizes[block] for block in range(num_blocks)),
        devices=tuple(
            DeviceTimes(device_class=name, blocks=tuple(_mean(times[block]) for block in range(num_blocks)))
            for name, times in classes.items()
        ),
        boundary_bytes_per_row=findings[0].profile.boundary_bytes_per_row,
        loader=first.loader,
        same_node=links.same_node,
        other_node=links.other_node,
        overheads=replace(links.overheads, step_ms=max(found.step_ms for found in findings)),
        noise=_noise(findings, [own for times in classes.values() for own in times.values()]),
        model_error=_MODEL_ERROR,
        # A rank without blocks has measured nothing.
        jitter_ms=fmean(found.profile.jitter_ms for found in findings if found.profile.blocks),
    )


def _noise(findings: Sequence[_Findings], measured: Sequence[Sequence[BlockTimes]]) -> float:
    """Give the relative uncertainty of a single time: from repeats on one rank, or from ranks that disagree."""
    pairs = [
        (first.at(rows), second.at(rows))
        for times in measured
        for one, other in pairwise(times)
        for first, second in ((one.teach_ms, other.teach_ms), (one.learn_ms, other.learn_ms))
        for rows in first.amounts
    ]
    total = hypot(*(first + second for first, second in pairs))
    disagreement = hypot(*(first - second for first, second in pairs)) / total if total else 0.0
    return limited_noise(disagreement, *(found.profile.noise for found in findings))


def _mean(times: Sequence[BlockTimes]) -> BlockTimes:
    def merge(curves: Sequence[Curve]) -> Curve:
        return Curve((rows, fmean(curve.at(rows) for curve in curves)) for rows in curves[0].amounts)

    return BlockTimes(
        teach_ms=merge([own.teach_ms for own in times]),
        learn_ms=merge([own.learn_ms for own in times]),
        update_ms=fmean(own.update_ms for own in times),
    )
