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


def test_a_run_goes_on_under_another_plan_in_the_middle_of_an_epoch(reference: Reference, tmp_path: Path) -> None:
    run = replace(_run("byol", shuffle=False), num_rows=24)
    trainer: dict[str, Any] = {"max_epochs": 4, "gradient_clip_val": 0.05}
    whole = replace(run, trainer=trainer)
    # Three batches an epoch: the fourth step ends in the middle of the second, with the teacher one step late.
    first = replace(
        whole, plan="0-1|2-3", num_ranks=2, options={"num_micro_batches": 1}, trainer={**trainer, "max_steps": 4}
    )
    train_whole(first, tmp_path / "first.ckpt")
    alone = replace(whole, resume=str(tmp_path / "first.ckpt"))
    second = replace(alone, plan="3|0-2", num_ranks=2, options={"num_micro_batches": 1})
    ours, _ = train_whole(second, tmp_path / "second.ckpt")
    expected, _ = train_whole(alone, tmp_path / "alone.ckpt")
    assert_same_checkpoint(ours["state_dict"], expected["state_dict"])
    assert ours["teacher_updates"] == expected["teacher_updates"]
    assert ours["global_step"] > 4


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
