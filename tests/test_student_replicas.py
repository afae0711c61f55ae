"""A whole student in replicas of a pipeline is the one that plain Lightning trains; in real processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement, StudentBlockCosts, TeacherBlockCosts
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from tests.helpers.ranks import RankError
from tests.helpers.training import max_difference
from tests.helpers.whole_students import WholeRun, train_whole

pytestmark = pytest.mark.spawn

# Six batches an epoch; of the last, of two rows, not every replica has one.
TRAINER = {"max_steps": 8, "max_epochs": 8, "accumulate_grad_batches": 2, "gradient_clip_val": 0.05}


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert list(found) == list(expected)
    assert max_difference(found["state_dict"], expected["state_dict"]) <= 1e-12
    assert max_difference(found["optimizer_states"], expected["optimizer_states"]) <= 1e-12
    assert found["teacher_updates"] == expected["teacher_updates"]


@pytest.mark.parametrize(
    ("module", "plan", "num_ranks", "options"),
    [
        pytest.param("distil", "2 x 0-1|2 / 0-1|2-3", 4, {"num_micro_batches": 2}, id="frozen-pipelines"),
        pytest.param("bootstrap", "3 x 0-3", 3, {}, id="delayed-views-plain-data-parallelism"),
        pytest.param("crowd", "3 x 0-3", 3, {}, id="full-batch-loss-with-random-numbers-and-buffers"),
    ],
)
def test_the_checkpoint_and_what_is_logged_are_those_of_one_process(
    module: str, plan: str, num_ranks: int, options: dict[str, Any], tmp_path: Path
) -> None:
    run = WholeRun(module=module, trainer=TRAINER)
    expected, (expected_metrics,) = train_whole(run, tmp_path / "one.ckpt")
    ours, metrics = train_whole(replace(run, plan=plan, num_ranks=num_ranks, options=options), tmp_path / "ours.ckpt")
    assert_close(ours, expected)
    for found in metrics:
        assert found == pytest.approx(expected_metrics, abs=1e-12)


def test_replicas_are_found_from_costs_and_train(tmp_path: Path) -> None:
    costs = PipelineMeasurement(
        teacher=tuple(TeacherBlockCosts(name="t", teach_ms=Curve.affine(0.1, 0.1)) for _ in range(3)),
        student=tuple(
            StudentBlockCosts(name="s", forward_ms=Curve.affine(0.1, 0.1), backward_ms=Curve.affine(0.1, 0.2))
            for _ in range(4)
        ),
        num_rows=8,
        loss_ms=Curve([(8, 0.1)]),
    )
    assert str(PipelineOutlook.find(costs, Cluster.uniform(2)).plan) == "2 x 0-2 / 0-3"
    run = WholeRun(trainer={"max_epochs": 1, "gradient_clip_val": 0.05})
    expected, _ = train_whole(run, tmp_path / "one.ckpt")
    ours, _ = train_whole(replace(run, plan="", num_ranks=2, options={"costs": costs}), tmp_path / "ours.ckpt")
    assert_close(ours, expected)


def test_a_run_goes_on_with_another_number_of_replicas_in_the_middle_of_an_epoch(tmp_path: Path) -> None:
    run = WholeRun(module="bootstrap", num_rows=24, trainer={"max_epochs": 3, "gradient_clip_val": 0.05})
    expected, _ = train_whole(run, tmp_path / "one.ckpt")
    # Three batches an epoch: the fourth step lies in the middle of the second, the seventh in the middle of the third.
    paths = [str(tmp_path / name) for name in ("first.ckpt", "second.ckpt")]
    for way in (
        {"plan": "2 x 0-3", "num_ranks": 2, "save_at": (4, paths[0])},
        {"plan": "0-1|2-3", "num_ranks": 2, "resume": paths[0], "save_at": (7, paths[1])},
        {"plan": "3 x 0-3", "num_ranks": 3, "resume": paths[1]},
    ):
        ours, _ = train_whole(replace(run, **way), tmp_path / "ours.ckpt")
        assert max_difference(ours["state_dict"], expected["state_dict"]) <= 1e-12
        assert max_difference(ours["optimizer_states"], expected["optimizer_states"]) <= 1e-12
        assert ours["global_step"] == 9


def test_a_run_with_a_loss_of_the_full_batch_goes_on_under_another_plan_in_the_middle_of_an_epoch(
    tmp_path: Path,
) -> None:
    run = WholeRun(module="crowd-delayed", num_rows=23, trainer={"max_epochs": 3, "gradient_clip_val": 0.05})
    expected, (expected_metrics,) = train_whole(run, tmp_path / "one.ckpt")
    path = str(tmp_path / "middle.ckpt")
    for way in (
        # The loss is on rank 1, which also has what it leaves in buffers.
        {"plan": "2 x 0-1|2-3", "num_ranks": 4, "options": {"num_micro_batches": 2}, "save_at": (4, path)},
        {"plan": "2 x 0-3", "num_ranks": 2, "resume": path},
    ):
        ours, metrics = train_whole(replace(run, **way), tmp_path / "ours.ckpt")
        assert_close(ours, expected)
        for found in metrics:
            assert found["train/loss"] == pytest.approx(expected_metrics["train/loss"], abs=1e-12)


def test_running_statistics_are_those_of_all_rows_and_a_bad_step_is_skipped_by_all(tmp_path: Path) -> None:
    run = WholeRun(module="poisoned", double=False, num_rows=7, trainer={"max_steps": 1})
    plan = {"plan": "2 x 0-2", "num_ranks": 2}
    expected, _ = train_whole(run, tmp_path / "one.ckpt")
    ours, _ = train_whole(replace(run, **plan), tmp_path / "ours.ckpt")
    for name in ("running_mean", "running_var", "num_batches_tracked"):
        # Of the first layer of that kind: what comes to the next is normalised by replica.
        key = f"student.0.2.{name}"
        torch.testing.assert_close(ours["state_dict"][key], expected["state_dict"][key])
    longer, _ = train_whole(replace(run, **plan, trainer={"max_steps": 5, "max_epochs": 5}), tmp_path / "longer.ckpt")
    assert longer["teacher_updates"] == 4
    assert longer["state_dict"]["student.0.2.num_batches_tracked"] == 4
    assert all(torch.isfinite(value).all() for value in longer["state_dict"].values())


def test_in_float16_all_replicas_skip_the_steps_that_one_process_skips(tmp_path: Path) -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**22, growth_interval=2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    run = WholeRun(module="distil", double=False, num_rows=24, trainer={"max_epochs": 3, "plugins": [plugin]})
    expected, _ = train_whole(run, tmp_path / "one.ckpt")
    ours, _ = train_whole(replace(run, plan="2 x 0-2 / 0-3", num_ranks=2), tmp_path / "ours.ckpt")
    assert ours["MixedPrecision"] == expected["MixedPrecision"]
    for one, other in zip(*(each["optimizer_states"][0]["state"].values() for each in (ours, expected)), strict=True):
        assert one["step"] == other["step"] < expected["global_step"]
    assert max_difference(ours["state_dict"], expected["state_dict"]) <= 1e-2


def test_a_rank_that_fails_ends_all_replicas(tmp_path: Path) -> None:
    run = WholeRun(module="failing", plan="2 x 0-2 / 0-3", num_ranks=2)
    with pytest.raises(RankError, match=r"Rank 1 of 2 failed(.|\n)*the loss of rank 1 failed"):
        train_whole(run, tmp_path / "none.ckpt", timeout=60)
