"""A loader of torchdata that keeps its own state: killed in the middle of an epoch, it goes on by itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.resuming import Leg, run_leg
from tests.helpers.training import assert_same_checkpoint

pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata is not installed")
pytestmark = pytest.mark.spawn


@pytest.mark.parametrize(
    ("loader", "plan", "num_ranks"), [("stateful", "0*2|1-3", 3), ("stateful-workers", "0-1|2-3", 2)]
)
def test_a_stateful_loader_goes_on_exactly(loader: str, plan: str, num_ranks: int, tmp_path: Path) -> None:
    leg = Leg(plan=plan, num_ranks=num_ranks, loader=loader)
    run_leg(replace(leg, kill_at=17), tmp_path)
    assert (tmp_path / "last.ckpt").exists()
    states = run_leg(leg, tmp_path)
    # Where rows are divided, sums are in another order than in one process.
    uninterrupted = leg if "*" in plan else Leg(plan=None, num_ranks=1, loader=loader)
    assert_same_checkpoint(run_leg(uninterrupted, tmp_path / "uninterrupted"), states)
