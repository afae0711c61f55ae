"""A place in the data goes into a checkpoint and comes back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_pipebd.data_position import DataPosition, RandomMoment


def draw(generator: torch.Generator) -> list[float]:
    return [torch.rand(()).item(), random.random(), float(np.random.rand()), torch.rand((), generator=generator).item()]


def test_all_generators_go_on_from_a_file_that_is_loaded_without_trust(tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(5)
    np.random.randn()  # leaves a half-used pair, which is part of the state
    moment = RandomMoment.now([generator])
    torch.save(DataPosition(7, moment, moment).to_plain(), tmp_path / "position")
    drawn, normal = draw(generator), np.random.randn()
    plain = torch.load(tmp_path / "position", weights_only=True)
    position = DataPosition.from_plain(plain)
    assert position.num_batches == 7
    assert position.now is not None
    position.now.restore([generator])
    assert draw(generator) == drawn
    assert np.random.randn() == normal


def test_generators_that_were_drawn_from_are_named_and_their_states_can_be_mixed_with_others() -> None:
    generator = torch.Generator().manual_seed(5)
    before = RandomMoment.now([generator])
    first = draw(generator)
    after = RandomMoment.now([generator])
    assert before.drawn_until(before) == set()
    assert before.drawn_until(after) == {"torch", "python", "numpy", "generator 0 of the loader"}
    second = draw(generator)
    before.for_generators({"numpy", "generator 0 of the loader"}, after).restore([generator])
    assert draw(generator) == [*second[:2], *first[2:]]


def test_an_epoch_that_has_not_begun_has_no_present() -> None:
    position = DataPosition(0, RandomMoment.now([]), None)
    assert DataPosition.from_plain(position.to_plain()).now is None


def test_the_generator_of_a_gpu_goes_on_as_well(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = torch.Generator().manual_seed(7)
    for name, stand_in in (
        ("is_initialized", lambda: True),
        ("is_available", lambda: True),
        ("get_rng_state", gpu.get_state),
        ("set_rng_state", gpu.set_state),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    moment = RandomMoment.now([])
    torch.save(DataPosition(7, moment, moment).to_plain(), tmp_path / "position")
    drawn = torch.rand(3, generator=gpu)
    position = DataPosition.from_plain(torch.load(tmp_path / "position", weights_only=True))
    position.at_start.restore([])
    assert torch.equal(torch.rand(3, generator=gpu), drawn)
    # A run on a GPU may go on without one.
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    position.at_start.restore([])
    assert not torch.equal(torch.rand(3, generator=gpu), drawn)


def test_without_a_gpu_there_is_no_state_of_one() -> None:
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch's own function
        assert "cuda" not in RandomMoment.now([]).states
