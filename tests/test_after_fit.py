"""What a process does after its training: an error there is raised as any other error is."""

from __future__ import annotations

import os
from typing import Any

import pytest
from lightning.pytorch import Callback

from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import LinearModule, make_loader

pytestmark = pytest.mark.spawn


class FailingModule(LinearModule):
    """Fails in the validation of `trainer.validate`, but not in that of a fit."""

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        if self.trainer.state.fn == "validate":
            raise ArithmeticError("of the validation")


class FailingCallback(Callback):
    def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
        raise ArithmeticError("of the callback")


def fail_after_fit(make_trainer: MakeTrainer) -> int:
    module = FailingModule()
    loader = make_loader(module, 8, 4)
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, loader, loader)
    with pytest.raises(ArithmeticError, match="of the validation"):
        trainer.validate(module, loader, verbose=False)
    module.train()
    with pytest.raises(ArithmeticError, match="of the callback"):
        make_trainer(max_steps=2, callbacks=[FailingCallback()]).fit(module, loader)
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, loader)
    return trainer.global_step


def validate_again_and_again(make_trainer: MakeTrainer) -> list[int]:
    module = LinearModule()
    loader = make_loader(module, 8, 4)
    trainer = make_trainer(max_steps=2)
    trainer.fit(module, loader)
    counts = []
    for _ in range(3):
        trainer.validate(module, loader, verbose=False)
        counts.append(len(os.listdir("/proc/self/fd")))
    return counts


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the system does not list open files")
def test_an_evaluation_opens_no_connections_that_the_training_had() -> None:
    for first, *others in under_plan(validate_again_and_again, plan="0-1|2-3"):
        assert others == [first, first]


def test_an_error_after_the_training_is_raised_and_another_training_is_possible() -> None:
    assert under_plan(fail_after_fit, plan="0-1|2-3") == [2, 2]
