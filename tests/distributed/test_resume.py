"""A run that is killed anywhere goes on from its last checkpoint to the student that one process trains at one go."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.resuming import Leg, run_leg
from tests.helpers.training import assert_same_checkpoint

pytestmark = pytest.mark.spawn

#: Eleven batches an epoch, three epochs, a checkpoint every three steps.
PLANS = {"0-1|2-3": 2, "0|1|2-3": 3, "0-3": 1}
Reference = Callable[[str, str], Any]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    found: dict[tuple[str, str], Any] = {}

    def train_once(module: str, loader: str) -> Any:
        if (module, loader) not in found:
            leg = Leg(plan=None, num_ranks=1, module=module, loader=loader)
            found[module, loader] = run_leg(leg, tmp_path_factory.mktemp("reference"))
        return found[module, loader]

    return train_once


@pytest.mark.parametrize(
    ("module", "loader", "kills"),
    [
        pytest.param("linear", "plain", [("0-1|2-3", 5, 1), ("0|1|2-3", 17, 0), ("0-3", None, 0)], id="two-kills"),
        pytest.param("dropout", "workers", [("0|1|2-3", 8, 2), ("0-1|2-3", None, 0)], id="workers-and-dropout"),
        pytest.param("linear", "noisy", [("0-1|2-3", 7, 0), ("0-1|2-3", None, 0)], id="augmentation"),
        pytest.param("linear", "generator", [("0-3", 14, 0), ("0-1|2-3", None, 0)], id="own-generator"),
        pytest.param("linear", "stream", [("0-1|2-3", 7, 0), ("0-3", None, 0)], id="stream"),
    ],
)
def test_a_killed_run_ends_with_the_student_of_one_process(
    module: str, loader: str, kills: list[tuple[str, int | None, int]], reference: Reference, tmp_path: Path
) -> None:
    states = None
    for plan, kill_at, kill_rank in kills:
        leg = Leg(plan=plan, num_ranks=PLANS[plan], module=module, loader=loader, kill_at=kill_at, kill_rank=kill_rank)
        states = run_leg(leg, tmp_path)
        assert (tmp_path / "last.ckpt").exists()
    assert_same_checkpoint(reference(module, loader), states)


@pytest.mark.parametrize("kill_at", [9, 11, 12], ids=["in-an-epoch", "at-its-end", "after-its-end"])
def test_a_checkpoint_of_the_last_batch_of_an_epoch_continues_with_the_next(
    kill_at: int, reference: Reference, tmp_path: Path
) -> None:
    # With a checkpoint after every step, the kill follows right behind one.
    run_leg(Leg(plan="0-1|2-3", num_ranks=2, every=1, kill_at=kill_at), tmp_path)
    states = run_leg(Leg(plan="0-1|2-3", num_ranks=2, every=1), tmp_path)
    assert_same_checkpoint(reference("linear", "plain"), states)


def test_a_run_that_goes_on_after_the_end_of_an_epoch_may_be_killed_at_the_end_of_the_next(
    reference: Reference, tmp_path: Path
) -> None:
    for kill_at in (12, 23):
        run_leg(Leg(plan="0-3", num_ranks=1, every=1, kill_at=kill_at), tmp_path)
    states = run_leg(Leg(plan="0-1|2-3", num_ranks=2, every=1), tmp_path)
    assert_same_checkpoint(reference("linear", "plain"), states)
