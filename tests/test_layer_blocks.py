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

PLANS = {"straight": "0-1|2-3", "joint": "joint"}


def fit(make_trainer: MakeTrainer, name: str, folder: str) -> str:
    is_alone = make_trainer().world_size == 1

    def run(max_epochs: int, resume: str | None = None) -> str:
        changes: Any = {} if is_alone else {"strategy": PipeBDStrategy(plan=PLANS[name])}
        trainer = make_trainer(max_epochs=max_epochs, **changes)
        generator = torch.Generator().manual_seed(1)
        tokens = torch.randint(11, (22, 5), generator=generator)
        mask = (torch.rand(22, 5, generator=generator) > 0.2).float()
        mask[:, -1] = 1
        data = TensorDataset(tokens, mask)
        module = DistilledDecoder(dropout=0.1 if name == "straight" else 0.0)
        trainer.fit(module, DataLoader(data, batch_size=4), DataLoader(data, batch_size=8), ckpt_path=resume)
        path = f"{folder}/{name}-{is_alone}-{max_epochs}.ckpt"
        trainer.save_checkpoint(path)
        return path

    return run(2, run(1) if name == "straight" else None)


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    return on_both(fit, list(PLANS), str(tmp_path_factory.mktemp("fits")))


def test_whole_layers_train_the_student_of_one_process_also_after_a_stop(fits: dict[str, Both]) -> None:
    one, ranks = fits["straight"]
    assert_same_checkpoint(load(one), load(ranks[0]))


def test_divided_rows_train_it_up_to_the_order_of_sums(fits: dict[str, Both]) -> None:
    one, ranks = fits["joint"]
    for name, value in load(one)["state_dict"].items():
        torch.testing.assert_close(load(ranks[0])["state_dict"][name], value, rtol=2e-3, atol=2e-4, msg=name)
