"""The bench: what a module is measured with, and what measuring begins with, whatever the module."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, NoReturn, TypeVar

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import Precision

from lightning_pipebd.checkpoint import share_from_zero
from lightning_pipebd.cost_tables import MeasurementCache
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.first_batch import FirstBatch, only_loader, peek
from lightning_pipebd.lightning_internals.trainer import request_train_loader
from lightning_pipebd.machines import Machine
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.runtime.agreement import done_by_rank_zero
from lightning_pipebd.runtime.link_probe import Links, measure_links, probe_edges, probe_groups
from lightning_pipebd.runtime.side_effects import preserved_random_states
from lightning_pipebd.runtime.transport import Transport

__all__ = [
    "Bench",
    "TimedNews",
    "bring_first_batch",
    "limited_noise",
    "measure_all_links",
    "recall_or_measure",
    "refuse_iterator",
]

_SECONDS_BETWEEN_NEWS = 2.0
_LEAST_NOISE, _MOST_NOISE = 0.01, 0.5
ModuleT = TypeVar("ModuleT", bound=DistillationModule)
MeasurementT = TypeVar("MeasurementT", Measurement, PipelineMeasurement)


@dataclass(frozen=True, kw_only=True)
class Bench(Generic[ModuleT]):
    """What a module is measured with.

    Args:
        trainer: Its trainer.
        module: The module, attached to the trainer.
        transport: Reaches the other ranks.
        plugin: The trainer's precision plugin.
        device: Where this rank computes.
        to_device: Brings a batch to the device, as the strategy does in training.
        is_synchronised: Whether shared blocks take their batch statistics over all rows.
        tell: Called with the progress in words, on rank 0.
    """

    trainer: Trainer
    module: ModuleT
    transport: Transport
    plugin: Precision
    device: torch.device
    to_device: Callable[[Any], Any]
    is_synchronised: bool
    tell: Callable[[str], None]


class TimedNews:
    """Passes progress on every few seconds."""

    def __init__(self, tell: Callable[[str], None]) -> None:
        self._tell = tell
        self._last = time.perf_counter()

    def __call__(self, text: str) -> None:
        """Pass it on, unless something was passed on just now."""
        now = time.perf_counter()
        if now - self._last >= _SECONDS_BETWEEN_NEWS:
            self._last = now
            self._tell(f"Measuring: {text}.")


def bring_first_batch(
    bench: Bench[ModuleT], example: Callable[[], FirstBatch]
) -> tuple[FirstBatch, tuple[Any, Any]] | None:
    """**Collective** over all ranks: give every rank the first batch that rank 0 loads, and its inputs and labels.

    Args:
        bench: Reaches the loader and the ranks.
        example: Gives a batch where the loader may not be asked for its first one.

    Returns:
        The batch, and its inputs and labels on the device; `None` if there is no batch.
    """
    with preserved_random_states():
        first = _share_first_batch(bench, example)
        if first.batch is None:
            return None
        converted = bench.to_device(bench.plugin.convert_input(first.batch))
        return first, bench.module.unpack_batch(converted)


def refuse_iterator(ways_out: str) -> NoReturn:
    """Refuse training data that can be iterated only once."""
    msg = (
        "`plan` must be given if the training data is an iterator that runs only once: looking at its first batch "
        f"would take that batch away. Give a plan, {ways_out}."
    )
    raise ValueError(msg)


def recall_or_measure(
    bench: Bench[ModuleT],
    cache: MeasurementCache | None,
    key: Mapping[str, Any],
    kind: type[MeasurementT],
    task: str,
    measure: Callable[[], MeasurementT],
) -> MeasurementT:
    """**Collective** over all ranks: find a measurement in the cache, or make it and keep it there.

    Args:
        bench: Reaches the ranks.
        cache: Where measurements are kept; `None` keeps none.
        key: Names what is measured.
        kind: What a measurement of it is.
        task: Says what will be measured.
        measure: Measures, on all ranks.
    """
    known = done_by_rank_zero(bench.transport, lambda: cache.find(key) if cache else None)
    if isinstance(known, kind):
        bench.tell(f"Costs measured before are in {cache.path(key) if cache else ''}.")
        return known
    bench.tell(f"Measuring {task}.")
    start = time.perf_counter()
    measurement = measure()
    bench.tell(f"Measured in {time.perf_counter() - start:.1f} s.")
    if cache is not None and bench.transport.rank == 0:
        cache.keep(key, measurement)
    return measurement


def measure_all_links(bench: Bench[ModuleT], machines: Sequence[Machine]) -> Links:
    """**Collective** over all ranks: measure the links between them.

    Args:
        bench: Reaches the ranks.
        machines: Of every rank.
    """
    nodes = [machine.node for machine in machines]
    bench.transport.connect(probe_edges(nodes), probe_groups(len(nodes)))
    return measure_links(bench.transport, nodes, bench.device, num_threads=machines[0].num_threads)


def limited_noise(*noises: float) -> float:
    """Give the greatest of some relative uncertainties, within what is believed of any."""
    return min(max(_LEAST_NOISE, *noises), _MOST_NOISE)


def _share_first_batch(bench: Bench[ModuleT], example: Callable[[], FirstBatch]) -> FirstBatch:
    transport = bench.transport
    # On every rank: a hook of the user's may wait for the other ranks.
    loader = only_loader(request_train_loader(bench.trainer))

    def look() -> FirstBatch:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            first = peek(loader)
        return first if first.is_known else example()

    batches: list[Any] = []

    def look_and_keep() -> FirstBatch:
        found = look()
        batches.append(found.batch)
        # The batch itself is too large for an exchange of objects.
        return found._replace(batch=None)

    found = done_by_rank_zero(transport, look_and_keep)
    return found._replace(batch=share_from_zero(transport, batches[0] if batches else None))
