"""The first batch of a training loader, and what loading costs, without the loader noticing."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator
from itertools import islice
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from torch.utils.data import DataLoader, IterableDataset

from lightning_pipebd.planning.costs import LoaderCost
from lightning_pipebd.row_loader import has_batches_of_indices
from lightning_pipebd.runtime.row_trees import count_rows
from lightning_pipebd.runtime.side_effects import preserved_random_states

__all__ = ["FirstBatch", "only_loader", "peek"]

_NUM_LOADS = 3


class FirstBatch(NamedTuple):
    """What was found.

    Args:
        batch: The batch; `None` if there is none.
        loader: What loading costs.
        is_known: Whether it could be known: an iterator that runs once only would lose its first batch.
    """

    batch: Any = None
    loader: LoaderCost = LoaderCost()
    is_known: bool = True


def only_loader(loaders: Any) -> Any:
    """Give the one training loader.

    Raises:
        ValueError: There are several.
    """
    flat = loaders.flattened if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders).flattened
    if len(flat) != 1:
        msg = (
            f"`train_dataloader` must be one loader, but {len(flat)} were given. Combine them in one dataset "
            "(torch.utils.data.ConcatDataset or StackDataset)."
        )
        raise ValueError(msg)
    return flat[0]


def peek(loader: Any) -> FirstBatch:
    """Load the first batch as the loader would, and time it; generators and samplers are as before afterwards.

    A loader's own workers are not started: rows are fetched in this process. The dataset is asked for some rows more
    than once; what it keeps of that is its own.
    """
    if isinstance(loader, Iterator):
        return FirstBatch(is_known=False)
    with preserved_random_states(), torch.no_grad():
        if isinstance(loader, DataLoader) and type(loader).__iter__ is DataLoader.__iter__:
            return _peek_at_dataset(loader)
        batches, times = _timed(iter(_shallow(loader)))
        return FirstBatch(batches[0], LoaderCost(fixed_ms=min(times), occupation=1.0)) if batches else FirstBatch()


def _peek_at_dataset(loader: DataLoader[Any]) -> FirstBatch:
    if isinstance(loader.dataset, IterableDataset):
        batches, times = _timed(_stream(loader))
        return FirstBatch(batches[0], _shared(loader, min(times), 0.0)) if batches else FirstBatch()
    draws: Any = loader.sampler if loader.batch_sampler is None else loader.batch_sampler
    try:
        draws = _detached(draws, loader)
    except Exception:
        # A sampler that cannot be copied would lose its first batch.
        return FirstBatch(is_known=False)
    indices = next(iter(draws), None)
    if indices is None:
        return FirstBatch()
    batch, whole_ms = _fetch(loader, indices)
    if not has_batches_of_indices(loader) or len(indices) < 2:
        return FirstBatch(batch, _shared(loader, whole_ms, 0.0))
    half = list(indices)[: len(indices) // 2]
    _, half_ms = _fetch(loader, half)
    per_row_ms = max(0.0, whole_ms - half_ms) / (len(indices) - len(half))
    fixed_ms = max(0.0, whole_ms - per_row_ms * len(indices))
    return FirstBatch(batch, _shared(loader, fixed_ms, per_row_ms))


def _shared(loader: DataLoader[Any], fixed_ms: float, per_row_ms: float) -> LoaderCost:
    # Workers load several batches at the same time, beside the rank's own thread.
    num_workers = max(1, loader.num_workers)
    occupation = 0.0 if loader.num_workers else 1.0
    return LoaderCost(fixed_ms=fixed_ms / num_workers, per_row_ms=per_row_ms / num_workers, occupation=occupation)


def _fetch(loader: DataLoader[Any], indices: Any) -> tuple[Any, float]:
    dataset: Any = loader.dataset
    batch, times = None, []
    for _ in range(_NUM_LOADS):
        start = time.perf_counter()
        if loader.batch_sampler is None:
            rows = dataset[indices]
        elif callable(getattr(dataset, "__getitems__", None)):
            rows = dataset.__getitems__(list(indices))
        else:
            rows = [dataset[index] for index in indices]
        batch = loader.collate_fn(rows)
        times.append((time.perf_counter() - start) * 1000)
    return batch, min(times)


def _stream(loader: DataLoader[Any]) -> Iterator[Any]:
    rows = iter(_shallow(loader.dataset))
    if loader.batch_size is None:
        yield from map(loader.collate_fn, rows)
    else:
        while (taken := list(islice(rows, loader.batch_size))) and (
            len(taken) == loader.batch_size or not loader.drop_last
        ):
            yield loader.collate_fn(taken)


def _timed(batches: Iterator[Any]) -> tuple[list[Any], list[float]]:
    first: list[Any] = []
    times = []
    start = time.perf_counter()
    for batch in islice(batches, _NUM_LOADS):
        times.append((time.perf_counter() - start) * 1000)
        first = first or [batch]
        # A short last batch is faster than those that count.
        if count_rows(batch) < count_rows(first[0]):
            times.pop()
        start = time.perf_counter()
    return first, times


def _detached(draws: Iterable[Any], loader: DataLoader[Any]) -> Iterable[Any]:
    """Copy a sampler with its generators, but not the dataset that it refers to."""
    memo: dict[int, Any] = {id(loader.dataset): loader.dataset}
    for holder in (loader, draws, getattr(draws, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            copied = torch.Generator(generator.device)
            copied.set_state(generator.get_state())
            memo[id(generator)] = copied
    return copy.deepcopy(draws, memo)


def _shallow(value: Any) -> Any:
    # So that a counter that a dataset keeps of itself is where it was.
    try:
        return copy.copy(value)
    except Exception:
        return value
