"""Processes of one run that were started differently: an error on all of them, before they wait for each other."""

from __future__ import annotations

import os
from typing import Any

import pytest

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.same_settings import compare_settings
from tests.helpers.ranks import RankError, run_threads
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import LinearModule, make_loader


def test_every_rank_raises_for_the_setting_that_differs_on_one() -> None:
    world = LocalWorld(3)

    def compare(rank: int) -> str:
        with pytest.raises(ValueError, match="`steps` must be the same") as caught:
            compare_settings(world.transports[rank], {"epochs": "3", "steps": "7" if rank == 2 else "5"})
        return str(caught.value)

    (message,) = set(run_threads(3, compare))
    assert "is 5 on rank 0 and 7 on rank 2" in message


def test_ranks_that_agree_go_on() -> None:
    world = LocalWorld(2)
    run_threads(2, lambda rank: compare_settings(world.transports[rank], {"epochs": "3"}))


def fit_differently(make_trainer: MakeTrainer, changes: dict[str, Any]) -> None:
    mine = changes if os.environ["RANK"] == "1" else {}
    module = LinearModule()
    make_trainer(**mine).fit(module, make_loader(module, 8, 4))


@pytest.mark.spawn
def test_a_fit_whose_ranks_have_other_plans_is_refused() -> None:
    changes = {"strategy": PipeBDStrategy(plan="0|1-3")}
    with pytest.raises(RankError, match=r"`plan` must be the same in all processes, but is Plan[^$]* on rank 1"):
        under_plan(fit_differently, changes, plan="0-1|2-3")
