"""A whole student whose gradient is not finite: the run ends, or the step is not taken at all."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_pipebd.nonfinite import finite_flags_by_norm
from lightning_pipebd.runtime.momentum import MomentumBlock, MomentumTeacher
from lightning_pipebd.step_guard import StepGuard
from tests.helpers.toy import make_loader
from tests.helpers.whole_students import Poisoned

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]


class States(Callback):
    """Keep all states after each step."""

    def __init__(self) -> None:
        self.states: list[dict[str, list[float]]] = []

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        self.states.append({key: value.double().flatten().tolist() for key, value in pl_module.state_dict().items()})


def fit(module: Any, *callbacks: Callback) -> None:
    trainer = Trainer(
        accelerator="cpu",
        max_steps=4,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, make_loader(module, 24, 4))


def test_by_default_the_run_ends_with_the_parameter_and_the_step() -> None:
    with pytest.raises(FloatingPointError, match=r"that of student\.0\.1\.weight and of \d+ more is not, at step 2"):
        fit(Poisoned("raise"))


def test_a_skipped_step_leaves_no_trace_in_weights_statistics_and_average() -> None:
    seen, module = States(), Poisoned()
    with pytest.warns(UserWarning, match="The student's gradient is not finite at step 2. The step is skipped."):
        fit(module, seen)
    before, after, later = seen.states[1:4]
    followers = ("student.", "average.")
    assert {key: value for key, value in before.items() if key.startswith(followers)} == {
        key: value for key, value in after.items() if key.startswith(followers)
    }
    # The delayed teacher has caught up with the average, because no step came after it.
    assert {key[8:]: value for key, value in after.items() if key.startswith("teacher.")} == {
        key[8:]: value for key, value in after.items() if key.startswith("average.")
    }
    assert later["student.3.weight"] != after["student.3.weight"]
    assert module.num_teacher_updates == 3


def test_names_are_those_of_the_wrong_gradients_however_they_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_pipebd.step_guard.finite_flags", finite_flags_by_norm)
    gradients = [torch.ones(2), torch.tensor([1.0, float("nan")]).half(), torch.empty(0), torch.tensor([float("inf")])]
    parameters = {f"layer.{number}": nn.Parameter(torch.zeros_like(own)) for number, own in enumerate(gradients)}
    for parameter, gradient in zip(parameters.values(), gradients, strict=True):
        parameter.grad = gradient
    with pytest.raises(FloatingPointError, match=r"that of layer\.1 and of 1 more is not, at step 3"):
        StepGuard("raise").allows(parameters, lambda block: [], 3)


def test_one_rank_s_no_is_everyone_s_no() -> None:
    weight = nn.Parameter(torch.ones(2))
    guard = StepGuard("skip")
    guard.agree = lambda is_good: False
    weight.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="The step is skipped"):
        assert not guard.allows({"weight": weight}, lambda block: [], 0)
    assert weight.grad is None


def test_buffers_are_put_back_as_they_were_before_the_first_batch_of_the_step() -> None:
    buffer, guard = torch.zeros(2), StepGuard("skip")
    guard.before_block(0, lambda: [buffer])
    buffer += 1
    guard.before_block(0, lambda: [buffer])
    weight = nn.Parameter(torch.ones(1))
    weight.grad = torch.tensor([float("inf")])
    with pytest.warns(UserWarning, match="not finite"):
        assert not guard.allows({"weight": weight}, lambda block: [buffer], 0)
    assert buffer.tolist() == [0, 0]
    weight.grad = torch.ones(1)
    assert guard.allows({"weight": weight}, lambda block: [buffer], 1)


def test_another_policy_is_refused() -> None:
    with pytest.raises(ValueError, match="`on_nonfinite` must be 'raise' or 'skip', but is 'stop_block'"):
        Poisoned("stop_block")


def test_a_teacher_without_delay_stays_where_it_is() -> None:
    student, teacher = torch.ones(2), torch.zeros(2)
    momentum = MomentumTeacher([MomentumBlock([student], [teacher])])
    momentum.stay(0)
    assert teacher.tolist() == [0, 0]
