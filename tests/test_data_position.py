"""A place in the data goes into a checkpoint and comes back."""

from __future__ import annotations

import random
from pathlib import Path

import numpy as np
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


def test_an_epoch_that_has_not_begun_has_no_present() -> None:
    position = DataPosition(0, RandomMoment.now([]), None)
    assert DataPosition.from_plain(position.to_plain()).now is None
