"""A whole student in float16: one loss scale for all ranks, which is that of one process; in real processes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision

from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.scaling import scale_loss, step_scale
from tests.helpers.training import assert_same_checkpoint
from tests.helpers.whole_students import WholeRun, train_whole

WHOLE = {"num_micro_batches": 1}


def test_after_a_fit_the_users_scaler_goes_on_where_the_run_has_ended() -> None:
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    weight = torch.nn.Parameter(torch.ones(()))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    with step_scale(plugin, torch.device("cpu"), LocalWorld(1).transports[0]):
        assert plugin.scaler is not None
        torch.autograd.backward(scale_loss(plugin, weight * float("inf")))
        plugin.scaler.step(optimizer)
        plugin.scaler.update()
    assert plugin.scaler is scaler
    assert (scaler.get_scale(), weight.item()) == (4.0, 1.0)


def _run(module: str, scale: float, **trainer: Any) -> WholeRun:
    # Scales that overflow at first, and grow until they do so again. What Lightning takes for "16-mixed" on a CPU is
    # bfloat16, which has no scale.
    scaler = torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)
    plugin = MixedPrecision("16-mixed", "cpu", scaler=scaler)
    trainer = {"max_epochs": 3, "gradient_clip_val": 0.05, "plugins": [plugin], **trainer}
    return WholeRun(module=module, double=False, num_rows=24, trainer=trainer)


@pytest.mark.spawn
@pytest.mark.parametrize(
    ("module", "plan", "num_ranks", "scale", "has_momentum", "trainer"),
    [
        pytest.param(
            "distil", "0-1|2 / 0-1|2-3", 2, 2.0**22, False, {"accumulate_grad_batches": 2}, id="frozen-accumulated"
        ),
        pytest.param("byol", "0-1|2-3|-", 3, 2.0**26, True, {}, id="delayed-idle-rank"),
        pytest.param("convolutional", "0|1-2", 2, 2.0**22, True, {}, id="batch-norm-dropout"),
    ],
)
def test_steps_scales_and_the_teacher_are_those_of_one_process(
    module: str,
    plan: str,
    num_ranks: int,
    scale: float,
    has_momentum: bool,
    trainer: dict[str, Any],
    tmp_path: Path,
) -> None:
    run = _run(module, scale, **trainer)
    expected, _ = train_whole(run, tmp_path / "one.ckpt")
    ours, _ = train_whole(replace(run, plan=plan, num_ranks=num_ranks, options=WHOLE), tmp_path / "ours.ckpt")
    assert_same_checkpoint(ours, expected)
    # Some steps were skipped, by the momentum teacher as well, and some were taken.
    taken = max(int(state["step"]) for state in expected["optimizer_states"][0]["state"].values())
    assert 0 < taken < expected["global_step"]
    assert expected["MixedPrecision"]["scale"] < scale
    assert expected["teacher_updates"] == taken * has_momentum


@pytest.mark.spawn
def test_a_run_goes_on_in_one_process_and_again_under_a_plan(tmp_path: Path) -> None:
    run = replace(_run("byol-no-centre", 2.0**26), shuffle=False)
    plan = {"plan": "0-1|2-3", "num_ranks": 2, "options": WHOLE}
    last = None
    for max_epochs, way in ((1, plan), (2, {}), (3, {**plan, "plan": "0|1-3"})):
        path = tmp_path / f"{max_epochs}.ckpt"
        own = replace(run, resume=last, trainer={**run.trainer, "max_epochs": max_epochs}, **way)
        ours, _ = train_whole(own, path)
        last = str(path)
    expected, _ = train_whole(run, tmp_path / "whole.ckpt")
    for key in ("state_dict", "optimizer_states", "MixedPrecision", "teacher_updates", "global_step"):
        assert_same_checkpoint(ours[key], expected[key], key)
