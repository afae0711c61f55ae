"""A decoder whose layers are blocks, trained under plans and under plain Lightning."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import PipeBDStrategy
from tests.helpers.keyword_decoder import DistilledDecoder
from tests.helpers.scenarios import Both, MakeTrainer, on_both
from tests.helpers.training import assert_same_checkpoint, load

pytestmark = pytest.mark.spawn

PLANS = {
    "straight": "0-1|2-3",
    "joint": "joint",
    "straight without masks": "0-1|2-3",
    "joint without masks": "joint",
    # Each rank loads two rows of a batch, and all four meet in block 1.
    "half of block 0 without masks": "0:1/2|0:1/2,1-3",
}


def fit(make_trainer: MakeTrainer, name: str, folder: str) -> str:
    is_alone = make_trainer().world_size == 1
    is_straight, leaves_out = name.startswith("straight"), "without" in name

    def run(max_epochs: int, resume: str | None = None) -> str:
        changes: Any = {} if is_alone else {"strategy": PipeBDStrategy(plan=PLANS[name])}
        if leaves_out:
            changes["precision"] = "64-true"
        trainer = make_trainer(max_epochs=max_epochs, **changes)
        module = DistilledDecoder(dropout=0.1 if is_straight else 0.0, leaves_out=leaves_out)
        data = make_data(leaves_out)
        trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=8), ckpt_path=resume)
        path = f"{folder}/{name}-{is_alone}-{max_epochs}.ckpt"
        trainer.save_checkpoint(path)
        return path

    return run(2, run(1) if is_straight or leaves_out else None)


def make_data(has_full_batches: bool) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(11, (22, 5), generator=generator)
    mask = (torch.rand(22, 5, generator=generator) > 0.2).float()
    mask[:, -1] = 1
    if has_full_batches:
        # No padding in the first batch and in one more, nor in the first two rows of a third.
        mask[:4] = mask[8:12] = mask[16:18] = 1
        assert not mask[18:20].all()
    return TensorDataset(tokens, mask)


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    return on_both(fit, list(PLANS), str(tmp_path_factory.mktemp("fits")))


@pytest.mark.parametrize("name", ["straight", "straight without masks"])
def test_whole_layers_train_the_student_of_one_process_also_after_a_stop(fits: dict[str, Both], name: str) -> None:
    one, ranks = fits[name]
    assert_same_checkpoint(load(one), load(ranks[0]))


def test_divided_rows_train_it_up_to_the_order_of_sums(fits: dict[str, Both]) -> None:
    one, ranks = fits["joint"]
    for name, value in load(one)["state_dict"].items():
        torch.testing.assert_close(load(ranks[0])["state_dict"][name], value, rtol=2e-3, atol=2e-4, msg=name)


@pytest.mark.parametrize("plan", ["joint without masks", "half of block 0 without masks"])
def test_so_do_rows_of_batches_that_are_padded_for_one_rank_alone(fits: dict[str, Both], plan: str) -> None:
    one, ranks = fits[plan]
    for name, value in load(one)["state_dict"].items():
        torch.testing.assert_close(load(ranks[0])["state_dict"][name], value, rtol=1e-12, atol=1e-12, msg=name)
