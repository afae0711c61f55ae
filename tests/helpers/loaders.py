"""Loaders whose rows are numbers, and what ranks loaded of them, put together."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import BatchSampler, DataLoader, Dataset, IterableDataset, WeightedRandomSampler

from lightning_pipebd.data import BatchHeader
from lightning_pipebd.planning.plan import Rows

__all__ = ["LOADERS", "NUM_ROWS", "MakeLoader", "Moody", "Numbers", "Part", "parts_of", "put_together", "shuffled"]

NUM_ROWS = 23
MakeLoader = Callable[[], Any]


class Numbers(Dataset[Tensor]):
    """Row `i` is the number `i`; remembers which rows were asked for."""

    def __init__(self, num_rows: int = NUM_ROWS) -> None:
        self.num_rows = num_rows
        self.asked: list[int] = []

    def __len__(self) -> int:
        return self.num_rows

    def __getitem__(self, index: int) -> Tensor:
        self.asked.append(index)
        return torch.tensor(index)


class Stream(IterableDataset[Tensor]):
    """The same rows without a length."""

    def __iter__(self) -> Iterator[Tensor]:
        return iter(torch.arange(NUM_ROWS))


class Moody:
    """A batch sampler that draws the rows of every batch from all generators there are, just when it is asked."""

    def __iter__(self) -> Iterator[list[int]]:
        for _ in range(6):
            first = [random.randrange(NUM_ROWS), int(np.random.randint(NUM_ROWS))]
            yield first + torch.randint(NUM_ROWS, (random.randrange(5),)).tolist()


class Whole(Dataset[Tensor]):
    """Gives batches instead of rows."""

    def __len__(self) -> int:
        return 3

    def __getitem__(self, index: int) -> Tensor:
        return torch.arange(10 * index, 10 * index + 4 + index)


def shuffled(**options: Any) -> DataLoader[Tensor]:
    """A loader whose order does not depend on the generators that threads share."""
    return DataLoader(Numbers(), batch_size=4, shuffle=True, generator=torch.Generator().manual_seed(3), **options)


LOADERS: dict[str, MakeLoader] = {
    "in order": lambda: DataLoader(Numbers(), batch_size=4),
    "one row short": lambda: DataLoader(Numbers(), batch_size=11),
    "shuffled": lambda: DataLoader(Numbers(), batch_size=4, shuffle=True),
    "shuffled by a generator": shuffled,
    "drop_last": lambda: DataLoader(Numbers(), batch_size=5, drop_last=True),
    "replacement": lambda: DataLoader(Numbers(), 7, sampler=WeightedRandomSampler(torch.arange(1.0, 24).tolist(), 40)),
    "batch sampler": lambda: DataLoader(Numbers(), batch_sampler=[[3], [1, 1, 2, 9], [0], [5, 4, 3]]),
    "batch sampler of a sampler": lambda: DataLoader(Numbers(), batch_sampler=BatchSampler(range(23, 0, -1), 6, False)),
    "moody batch sampler": lambda: DataLoader(Numbers(), batch_sampler=Moody()),
    "stream": lambda: DataLoader(Stream(), batch_size=4),
    "whole batches": lambda: DataLoader(Whole(), batch_size=None),
    "list of batches": lambda: [torch.arange(6), torch.arange(6, 7), torch.arange(7, 20)],
}


class Part(NamedTuple):
    """What a rank has of a batch."""

    num_rows: int
    rows: Rows
    values: list[int]


def parts_of(loader: Any, batches: Iterable[Any]) -> list[Part]:
    """Iterate as the trainer does, and pick up what the loader noted beside each batch."""
    parts = []
    for batch in batches:
        loaded = loader.loaded.popleft()
        is_header = isinstance(batch, BatchHeader)
        assert is_header == loaded.rows.is_empty
        assert not is_header or batch.num_rows == loaded.num_rows
        parts.append(Part(loaded.num_rows, loaded.rows, [] if is_header else batch.tolist()))
    return parts


def put_together(ranks: Sequence[Sequence[Part]]) -> list[list[int]]:
    """The batches that the ranks have together, each in row order."""
    batches = []
    for parts in zip(*ranks, strict=True):
        assert len({part.num_rows for part in parts}) == 1
        rows = sorted(part for part in ((part.rows, part.values) for part in parts) if not part[0].is_empty)
        assert [row for part, _ in rows for row in range(part.start, part.stop)] == list(range(parts[0].num_rows))
        batches.append([value for _, values in rows for value in values])
    return batches
