"""Looking at the first batch: it is the one that training will see, and the loader does not notice."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, RandomSampler, Sampler

from lightning_pipebd.first_batch import only_loader, peek
from tests.helpers.loaders import LOADERS, Numbers, shuffled


def batches_of(loader: Any) -> list[list[int]]:
    torch.manual_seed(5)
    random.seed(5)
    np.random.seed(5)
    return [batch.tolist() for batch in loader]


@pytest.mark.parametrize("name", LOADERS)
def test_the_batch_is_the_first_and_the_loader_goes_on_as_if_nobody_had_looked(name: str) -> None:
    expected = batches_of(LOADERS[name]())
    loader = LOADERS[name]()
    first = peek(loader)
    assert batches_of(loader) == expected
    assert first.is_known
    if "shuffled" not in name and name not in ("replacement", "moody batch sampler"):
        assert first.batch.tolist() == expected[0]
    assert first.batch.dtype == torch.int64


def test_looking_twice_shows_the_same_batch() -> None:
    loader = shuffled()
    assert peek(loader).batch.tolist() == peek(loader).batch.tolist()


def test_global_generators_go_on_as_if_nobody_had_looked() -> None:
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()
    peek(LOADERS["moody batch sampler"]())
    assert torch.equal(torch.get_rng_state(), states[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == states[1:]


class Remembering(Sampler[int]):
    """Keeps count of its epochs, as samplers that shuffle by epoch do."""

    def __init__(self) -> None:
        self.num_epochs = 0

    def __iter__(self) -> Any:
        self.num_epochs += 1
        return iter(range(8))

    def __len__(self) -> int:
        return 8


def test_a_sampler_does_not_count_the_look() -> None:
    sampler = Remembering()
    assert peek(DataLoader(Numbers(), batch_size=4, sampler=sampler)).batch.tolist() == [0, 1, 2, 3]
    assert sampler.num_epochs == 0


class Uncopyable(Remembering):
    def __deepcopy__(self, memo: Any) -> Any:
        raise TypeError("cannot be copied")


@pytest.mark.parametrize(
    "loader",
    [
        (batch for batch in [torch.zeros(2)]),
        DataLoader(Numbers(), batch_size=4, sampler=Uncopyable()),
    ],
)
def test_a_batch_that_looking_would_take_away_stays_unknown(loader: Any) -> None:
    assert not peek(loader).is_known


@pytest.mark.parametrize("loader", [[], DataLoader([], batch_size=2)])
def test_an_empty_loader_has_no_batch(loader: Any) -> None:
    first = peek(loader)
    assert first.is_known
    assert first.batch is None


def test_workers_load_beside_the_computation_and_several_at_a_time() -> None:
    alone, with_workers = peek(shuffled()).loader, peek(shuffled(num_workers=2)).loader
    assert (alone.occupation, with_workers.occupation) == (1.0, 0.0)
    assert alone.load_ms(4) > 0


def test_a_loader_that_is_read_whole_costs_the_same_for_few_rows() -> None:
    costs = peek(LOADERS["stream"]()).loader
    assert costs.per_row_ms == 0
    assert costs.load_ms(1) == costs.load_ms(4) > 0


def test_several_loaders_are_refused() -> None:
    with pytest.raises(ValueError, match=r"`train_dataloader` must be one loader, but 2 were given\. Combine them"):
        only_loader([shuffled(), shuffled()])
    loader = DataLoader(Numbers(), sampler=RandomSampler(range(3)))
    assert only_loader(loader) is only_loader([loader]) is loader
