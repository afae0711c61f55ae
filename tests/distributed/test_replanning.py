"""A plan that changes between epochs: nothing of that is seen in the student, also when the run is stopped."""

from __future__ import annotations

import time
import warnings
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, format_plan
from lightning_pipebd.planning.measurement import Measurement
from tests.helpers.scenarios import Both, MakeTrainer, on_both
from tests.helpers.toy import ToyData
from tests.helpers.training import assert_same_checkpoint, load
from tests.planning.cost_tables import constant_costs

pytestmark = pytest.mark.spawn

SHAPE = (6,)


class Pause(torch.autograd.Function):
    """Takes its time in the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, ms: float) -> Tensor:
        ctx.ms = ms
        return x.clone()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        time.sleep(ctx.ms / 1000)
        return gradients[0], None


class Sleeper(nn.Module):
    """Takes its time, and draws, and keeps statistics."""

    def __init__(self, forward_ms: float, backward_ms: float) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Dropout(0.2))
        self.ms = forward_ms, backward_ms

    def forward(self, x: Tensor) -> Tensor:
        time.sleep(self.ms[0] / 1000)
        return Pause.apply(self.layers(x), self.ms[1])  # type: ignore[no-any-return, no-untyped-call]  # torch's own


class Sleeping(BlockwiseDistillationModule):
    """Three blocks; the first is the fastest one."""

    def __init__(self, speed: float, momentum: float | None) -> None:
        torch.manual_seed(7)
        teacher = nn.Sequential(*(Sleeper(1 / speed, 0) for _ in range(3)))
        student = nn.Sequential(*(Sleeper(2 / speed, ms / speed) for ms in (2, 10, 10)))
        super().__init__(teacher, student, {str(index): str(index) for index in range(3)}, momentum=momentum)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trainable_parameters(), lr=0.01)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 50)
        return [optimizer], [{"scheduler": schedule, "interval": "step"}]

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self(batch[0]).mean(), batch_size=len(batch[0]))


class Freezing(Callback):
    """Freezes a block when an epoch begins."""

    def __init__(self, block: int, epoch: int) -> None:
        self.block, self.epoch = block, epoch

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.current_epoch == self.epoch:
            assert isinstance(pl_module, Sleeping)
            pl_module.freeze_block(self.block)


class Plans(Callback):
    """Notes with which plan each epoch was trained."""

    def __init__(self) -> None:
        self.plans: list[str] = []

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, PipeBDStrategy):
            self.plans.append(format_plan(trainer.strategy.plan))  # type: ignore[arg-type]  # blocks alone


# Costs that are wrong on purpose, so that steps take other times than was foreseen; and right ones.
WRONG = constant_costs([(1, 800), (2, 4), (2, 4)])
RIGHT = constant_costs([(1, 4), (1, 12), (1, 12)])
CASES: dict[str, tuple[Any, str | None, list[Callback]]] = {
    "a found plan": (WRONG, None, []),
    "a given plan": (WRONG, "-|0-2", []),
    "a frozen block": (RIGHT, "0|1-2", [Freezing(1, 1)]),
    "a momentum teacher": (WRONG, None, []),
}


def fit(make_trainer: MakeTrainer, name: str, folder: str) -> dict[str, Any]:
    costs, plan, callbacks = CASES[name]
    warnings.filterwarnings("ignore", message=r"Found \d+ module\(s\) in eval mode")
    is_alone = make_trainer().world_size == 1
    plans = Plans()
    momentum = 0.75 if name == "a momentum teacher" else None

    def run(max_epochs: int, resume: str | None = None) -> str:
        strategy: Any = PipeBDStrategy(
            plan, costs=Measurement(costs=costs, num_rows=4), exactness="bitwise", replan="epoch"
        )
        changes = {} if is_alone else {"strategy": strategy}
        trainer = make_trainer(max_epochs=max_epochs, callbacks=[*callbacks, plans], **changes)
        generator = torch.Generator().manual_seed(2)
        data = DataLoader(ToyData(36, SHAPE), batch_size=4, shuffle=True, generator=generator)
        validation = DataLoader(ToyData(8, SHAPE), batch_size=4)
        trainer.fit(Sleeping(100.0 if is_alone else 1.0, momentum), data, validation, ckpt_path=resume)
        path = f"{folder}/{name}-{is_alone}-{max_epochs}.ckpt"
        trainer.save_checkpoint(path)
        return path

    path = run(3)
    return {"paths": [path, run(4, None if is_alone else path)], "plans": plans.plans}


@pytest.fixture(scope="module")
def fits(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Both]:
    return on_both(fit, list(CASES), str(tmp_path_factory.mktemp("fits")))


@pytest.mark.parametrize("name", CASES)
def test_the_student_is_that_of_one_process_whenever_the_plan_changes(name: str, fits: dict[str, Both]) -> None:
    one, ranks = fits[name]
    plans = [rank["plans"] for rank in ranks]
    assert plans[0] == plans[1]
    assert len(set(plans[0][:3])) > 1
    assert_same_checkpoint(load(one["paths"][0]), load(ranks[0]["paths"][0]))


@pytest.mark.parametrize("name", CASES)
def test_a_run_resumed_after_a_change_ends_as_one_that_never_stopped(name: str, fits: dict[str, Both]) -> None:
    one, ranks = fits[name]
    never_stopped, resumed = load(one["paths"][1]), load(ranks[0]["paths"][1])
    for key in (
        "epoch",
        "global_step",
        "state_dict",
        "optimizer_states",
        "lr_schedulers",
        "random_seed",
        "teacher_updates",
    ):
        assert_same_checkpoint(never_stopped.get(key), resumed.get(key))
    assert resumed.get("frozen_blocks") == ([1] if name == "a frozen block" else None)
