"""A loader's rows of every batch, in the order in which one process would load them, from any batch on."""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterable, Iterator
from fractions import Fraction
from math import ceil
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, IterableDataset, default_collate

from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.row_trees import count_rows

__all__ = ["Loaded", "RowLoader", "has_batches_of_indices"]

Interval = tuple[Fraction, Fraction]


class Loaded(NamedTuple):
    """A batch, or this rank's rows of it.

    Args:
        batch: What was loaded.
        num_rows: Rows of the batch.
        rows: Those that were loaded.
        is_first: Whether it is the first that is trained on in this epoch, or since the run went on; as far as somebody
            works ahead.
        num_next_rows: Rows of the batch after it, if that was loaded before this one is trained on; otherwise 0.
        following: That batch, on the rank that loads.
    """

    batch: Any
    num_rows: int
    rows: Rows
    is_first: bool = True
    num_next_rows: int = 0
    following: Any = None


class RowLoader:
    """Load an interval of the rows of every batch, in the order in which one process would.

    A map-style dataset is asked for these rows only. Anything else (an iterable dataset, a list of batches, a loader
    with a collate function of the user's) is iterated whole, and the other rows are dropped.

    Args:
        loader: Any iterable of batches.
        interval: Exact share of the rows: a cut ``c`` lies at row ``ceil(c * num_rows)``.
        min_rows: A loader whose first batch has fewer rows is not divided at all; see :attr:`is_whole`.
    """

    def __init__(
        self,
        loader: Any,
        interval: Interval,
        *,
        min_rows: int = 1,
    ) -> None:
        self._loader = loader
        self._interval = interval
        self._min_rows = min_rows
        self.is_whole = interval == (Fraction(0), Fraction(1))

    def __len__(self) -> int:
        return len(self._loader)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_loader":
            raise AttributeError(name)
        return getattr(self._loader, name)

    def load(self, num_skipped: int = 0) -> Iterator[Loaded]:
        """Iterate over batches with their row counts; rows may be empty, then the batch is ``None``.

        The user's loader starts at once, not at the first batch: it draws its seeds when one process would.

        Args:
            num_skipped: Batches at the start that are left out. Those of a map-style dataset are drawn by the sampler,
                but not loaded.
        """
        is_cut = not self.is_whole and has_batches_of_indices(self._loader)
        if not is_cut and not (num_skipped and _draws_batches(self._loader)):
            batches = iter(self._loader)
            for _ in range(num_skipped):
                next(batches, None)
            return self._load_whole(batches)
        skipping = _SkippingSampler(self._loader.batch_sampler, num_skipped)
        sampler = _RowSampler(skipping, self)
        batches = iter(_with_batch_sampler(self._loader, sampler if is_cut else skipping))
        # Now, and not at the first batch: samplers draw from the random states of the epoch's start.
        skipping.skip()
        return self._load_rows(batches, sampler) if is_cut else self._load_whole(batches)

    @property
    def keeps_its_own_position(self) -> bool:
        """Whether the user's loader is stateful: Lightning keeps its state in checkpoints, and it goes on by itself."""
        return _has_state(self._loader)

    @property
    def generators(self) -> list[torch.Generator]:
        """The random generators that the user gave the loader and its samplers."""
        batch_sampler = getattr(self._loader, "batch_sampler", None)
        owners = (self._loader, getattr(self._loader, "sampler", None), getattr(batch_sampler, "sampler", None))
        found = [getattr(owner, "generator", None) for owner in owners]
        return list({id(generator): generator for generator in found if generator is not None}.values())

    def rows(self, num_rows: int) -> Rows:
        """Give this loader's rows of a batch."""
        start, stop = (Fraction(0), Fraction(1)) if self.is_whole else self._interval
        return Rows(ceil(start * num_rows), ceil(stop * num_rows))

    def _load_whole(self, batches: Iterator[Any]) -> Iterator[Loaded]:
        for index, batch in enumerate(batches):
            num_rows = count_rows(batch)
            self._decide(index, num_rows)
            rows = self.rows(num_rows)
            yield Loaded(_slice_batch(batch, num_rows, rows), num_rows, rows)

    @staticmethod
    def _load_rows(batches: Iterator[Any], sampler: _RowSampler) -> Iterator[Loaded]:
        for batch in batches:
            yield from sampler.take_empty()
            yield Loaded(batch, *sampler.dealt.popleft())
        yield from sampler.take_empty()

    def _decide(self, index: int, num_rows: int) -> None:
        if index == 0 and num_rows < self._min_rows:
            self.is_whole = True


class _SkippingSampler:
    """A batch sampler's batches without the first ones."""

    def __init__(self, batch_sampler: Iterable[list[int]], num_skipped: int) -> None:
        self._batch_sampler = batch_sampler
        self._num_skipped = num_skipped
        self._batches: Iterator[list[int]] = iter(())
        self._num_left = 0

    def __iter__(self) -> Iterator[list[int]]:
        self._batches, self._num_left = iter(self._batch_sampler), self._num_skipped
        return self

    def __next__(self) -> list[int]:
        self.skip()
        return next(self._batches)

    def skip(self) -> None:
        while self._num_left:
            self._num_left -= 1
            next(self._batches, None)


class _RowSampler:
    """A batch sampler's batches, cut to some rows; remembers what it dealt, in order."""

    def __init__(self, batch_sampler: Iterable[list[int]], loader: RowLoader) -> None:
        self._batch_sampler = batch_sampler
        self._loader = loader
        self.dealt: deque[tuple[int, Rows]] = deque()

    def __iter__(self) -> Iterator[list[int]]:
        for index, indices in enumerate(self._batch_sampler):
            indices = list(indices)
            self._loader._decide(index, len(indices))
            rows = self._loader.rows(len(indices))
            self.dealt.append((len(indices), rows))
            if not rows.is_empty:
                yield indices[rows.start : rows.stop]

    def take_empty(self) -> Iterator[Loaded]:
        while self.dealt and self.dealt[0][1].is_empty:
            yield Loaded(None, *self.dealt.popleft())


def has_batches_of_indices(loader: object) -> bool:
    """Tell whether a rank can ask the loader's dataset for its rows alone."""
    # Another collate function may look at the whole batch (padding to its longest row): it gets whole batches. So does
    # a loader with a state, which counts what it has given.
    is_plain = isinstance(loader, DataLoader) and loader.collate_fn is default_collate
    return is_plain and _draws_batches(loader) and not _has_state(loader)


def _has_state(loader: object) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def _draws_batches(loader: object) -> bool:
    return (
        isinstance(loader, DataLoader)
        and not isinstance(loader.dataset, IterableDataset)
        and loader.batch_sampler is not None
    )


def _with_batch_sampler(loader: Any, sampler: Iterable[list[int]]) -> Any:
    clone = copy.copy(loader)
    # DataLoader forbids to set its sampler: a copy with the user's settings and another sampler is what we want.
    clone.__dict__["batch_sampler"] = sampler
    clone.__dict__["_iterator"] = None
    return clone


def _slice_batch(batch: Any, num_rows: int, rows: Rows) -> Any:
    if rows == Rows(0, num_rows):
        return batch
    if rows.is_empty:
        return None

    def cut(leaf: Any) -> Any:
        is_per_row = isinstance(leaf, Tensor) and leaf.dim() > 0 and leaf.shape[0] == num_rows
        return leaf[rows.start : rows.stop] if is_per_row else leaf

    return pytree.tree_map(cut, batch)
