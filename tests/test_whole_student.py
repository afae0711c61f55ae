"""A whole student under a plan is the one that plain Lightning trains; in real processes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.training import assert_same_checkpoint, max_difference
from tests.helpers.whole_students import WholeRun, train_whole

pytestmark = pytest.mark.spawn

# Six batches an epoch, the last of two rows; clipping by the norm over all ranks, two batches per optimizer step.
TRAINER = {"max_steps": 8, "max_epochs": 8, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}
Reference = Callable[[WholeRun], tuple[dict[str, Any], list[dict[str, float]]]]


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Reference:
    """Train each module once under plain Lightning."""
    found: dict[str, tuple[dict[str, Any], list[dict[str, float]]]] = {}

    def train_once(run: WholeRun) -> tuple[dict[str, Any], list[dict[str, float]]]:
        if repr(run) not in found:
            found[repr(run)] = train_whole(run, tmp_path_factory.mktemp("reference") / "reference.ckpt")
        return found[repr(run)]

    return train_once


def _run(module: str, **changes: Any) -> WholeRun:
    return replace(WholeRun(module=module, trainer=TRAINER), **changes)


@pytest.mark.parametrize(
    ("module", "plan", "num_ranks"),
    [
        pytest.param("distil", "0-1|2 / 0-1|2-3", 2, id="frozen"),
        pytest.param("byol", "0-1|2-3", 2, id="views-schedule-centre"),
        pytest.param("contrast", "2-3|0-1 / 0-1|2-3", 2, id="full-batch-weights-relayed"),
        pytest.param("convolutional", "0|1|2", 3, id="batch-norm-dropout"),
        pytest.param("byol", "2-3|0-1", 2, id="loaded-by-another-rank-than-the-first"),
    ],
)
def test_whole_batches_give_the_checkpoint_of_one_process_bit_by_bit(
    module: str, plan: str, num_ranks: int, reference: Reference, tmp_path: Path
) -> None:
    run = _run(module, double=module != "convolutional")
    ours, _ = train_whole(
        replace(run, plan=plan, num_ranks=num_ranks, options={"num_micro_batches": 1}), tmp_path / "ours.ckpt"
    )
    assert_same_checkpoint(ours, reference(run)[0])


@pytest.mark.parametrize(
    ("module", "plan", "num_ranks", "options"),
    [
        pytest.param("distil", "0|1|2 / 0-1|2|3", 3, {"num_micro_batches": 3}, id="frozen-1f1b"),
        pytest.param("byol", "0-1|2-3", 2, {"num_micro_batches": 4, "split_backward": True}, id="delayed-split"),
        pytest.param("byol-no-delay", "0|1|2|3", 4, {"schedule": "gpipe"}, id="momentum-gpipe"),
        pytest.param("contrast", "0-1|2-3", 2, {"num_micro_batches": 3}, id="full-batch"),
        pytest.param("byol", "0-3", 1, {"num_micro_batches": 2}, id="one-rank"),
    ],
)
def test_micro_batches_change_nothing_but_the_last_bits(
    module: str, plan: str, num_ranks: int, options: dict[str, Any], reference: Reference, tmp_path: Path
) -> None:
    run = _run(module)
    ours, metrics = train_whole(replace(run, plan=plan, num_ranks=num_ranks, options=options), tmp_path / "ours.ckpt")
    expected, (expected_metrics,) = reference(run)
    assert max_difference(ours["state_dict"], expected["state_dict"]) <= 1e-12
    assert max_difference(ours["optimizer_states"], expected["optimizer_states"]) <= 1e-12
    assert list(ours) == list(expected)
    for found in metrics:
        assert found == pytest.approx(expected_metrics, abs=1e-12)


@pytest.mark.parametrize(
    ("module", "plan", "other", "noise"),
    [
        pytest.param("byol", "0-1|2-3", "0|1-3", False, id="delayed-teacher"),
        pytest.param("noisy", "0-1|2 / 0-1|2-3", "0|1-2 / 0,3|1-2", False, id="random-unpacking"),
    ],
)
def test_a_run_goes_on_under_another_plan_in_the_middle_of_an_epoch(
    module: str, plan: str, other: str, noise: bool, tmp_path: Path
) -> None:
    # Three batches an epoch: the fourth step lies in the middle of the second, with the teacher one step late.
    run = replace(_run(module), num_rows=24, noise=noise, trainer={"max_epochs": 3, "gradient_clip_val": 0.05})
    under_plan = replace(run, num_ranks=2, options={"num_micro_batches": 1})
    path = str(tmp_path / "middle.ckpt")
    expected, _ = train_whole(replace(under_plan, plan=plan, save_at=(4, path)), tmp_path / "whole.ckpt")
    ours, _ = train_whole(replace(under_plan, plan=other, resume=path), tmp_path / "ours.ckpt")
    assert_same_checkpoint(ours["state_dict"], expected["state_dict"])
    assert_same_checkpoint(ours["optimizer_states"], expected["optimizer_states"])
    assert ours["teacher_updates"] == expected["teacher_updates"]
    assert ours["global_step"] == 9


def test_a_step_that_is_not_finite_is_skipped_on_all_ranks_as_in_one_process(
    reference: Reference, tmp_path: Path
) -> None:
    run = _run("poisoned", double=False, trainer={"max_steps": 5, "gradient_clip_val": 0.05})
    ours, _ = train_whole(
        replace(run, plan="0|1-2", num_ranks=2, options={"num_micro_batches": 1}), tmp_path / "ours.ckpt"
    )
    assert_same_checkpoint(ours, reference(run)[0])
    assert ours["teacher_updates"] == 4


def test_stopping_at_the_end_of_an_epoch_and_going_on_is_training_in_one_go(
    reference: Reference, tmp_path: Path
) -> None:
    whole = replace(_run("byol", shuffle=False), trainer={"max_epochs": 4, "gradient_clip_val": 0.05})
    half = {"plan": "0-1|2-3", "num_ranks": 2, "options": {"num_micro_batches": 1}}
    train_whole(replace(whole, **half, trainer={**whole.trainer, "max_epochs": 2}), tmp_path / "half.ckpt")
    ours, _ = train_whole(replace(whole, **half, resume=str(tmp_path / "half.ckpt")), tmp_path / "ours.ckpt")
    assert_same_checkpoint(ours["state_dict"], reference(whole)[0]["state_dict"])


def test_in_bfloat16_the_student_is_that_of_one_process(reference: Reference, tmp_path: Path) -> None:
    run = _run("distil", double=False, trainer={**TRAINER, "precision": "bf16-mixed"})
    ours, _ = train_whole(
        replace(run, plan="0-1|2 / 0-1|2-3", num_ranks=2, options={"num_micro_batches": 1}), tmp_path / "ours.ckpt"
    )
    assert_same_checkpoint(ours["state_dict"], reference(run)[0]["state_dict"])


def test_lightnings_ddp_trains_the_same_student(reference: Reference, tmp_path: Path) -> None:
    run = replace(
        _run("byol-no-centre", shuffle=False), num_rows=40, trainer={"max_epochs": 2, "use_distributed_sampler": False}
    )
    ours, _ = train_whole(replace(run, strategy="ddp", num_ranks=2, batch_size=4), tmp_path / "ours.ckpt")
    assert max_difference(ours["state_dict"], reference(run)[0]["state_dict"]) <= 1e-12
