"""Teacher blocks a batch ahead change nothing that anybody sees: not the student, not a resumed run, no random draw."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch.utils.data import DataLoader

from lightning_pipebd import PipeBDStrategy
from tests.helpers.plans import whole_jobs
from tests.helpers.resuming import NoisyData, states_of
from tests.helpers.scenarios import MakeTrainer, on_one_process, under_plan
from tests.helpers.toy import DropoutModule, LinearModule, ToyData
from tests.helpers.training import assert_same_checkpoint

pytestmark = pytest.mark.spawn

AHEAD = whole_jobs([0, 1, 0, 1], [1, 0, 0, 1])


class Noisy(DropoutModule):
    """Draws random numbers wherever a user's module may in training."""

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] + 0.1 * torch.randn_like(batch[0]), batch[1]) if self.trainer.training else batch

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return (batch[0] * (1 + 0.1 * torch.rand_like(batch[0])), batch[1]) if self.trainer.training else batch

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return batch[0].roll(int(torch.randint(3, ())), 0), batch[1]


class CutShort(DropoutModule):
    """Ends an epoch at a batch that its teacher has seen already."""

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> Any:
        return -1 if (self.trainer.current_epoch, batch_idx) == (0, 4) else None


class Normalising(LinearModule):
    """Keeps a mean of the inputs so far, which callbacks and checkpoints see."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("mean", torch.zeros(6))

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        if self.trainer.training:
            self.mean.lerp_(batch[0].mean(0), 0.2)
        return batch[0] - self.mean, batch[1]


class Logging(LinearModule):
    """Logs what it unpacks, from a loader in a dictionary too."""

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        inputs, labels = batch["train"] if isinstance(batch, dict) else batch
        self.log("largest", inputs.max())
        return inputs, labels


class TaughtAhead(Callback):
    """Counts the teacher's actions for a next batch."""

    num_actions = 0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(trainer.strategy, PipeBDStrategy):
            assert trainer.strategy._session is not None
            trainer.strategy._session.observe(self.note)

    def note(self, span: Any) -> None:
        self.num_actions += span.action.is_next


def train(
    make_trainer: MakeTrainer,
    options: dict[str, Any],
    resume: Any = None,
    *,
    kind: type[LinearModule | DropoutModule] = Noisy,
    is_in_dict: bool = False,
) -> tuple[dict[str, Any], int]:
    """Give everything that training has changed, and how much the teacher has worked ahead."""
    seed_everything(5, verbose=False)
    module = kind()
    counter = TaughtAhead()
    callbacks = [counter, *options.pop("callbacks", [])]
    trainer = make_trainer(max_epochs=2, callbacks=callbacks, **options)
    data = DataLoader((NoisyData if kind is Noisy else ToyData)(27, module.shape), batch_size=4, shuffle=True)
    validation = DataLoader(ToyData(6, module.shape), batch_size=4)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "You're resuming from a checkpoint that ended before the epoch ended")
        warnings.filterwarnings("ignore", "`unpack_batch` or a batch hook has changed `self._buffers`")
        trainer.fit(module, {"train": data} if is_in_dict else data, validation, ckpt_path=resume)
    logged = {name: value for name, value in trainer.callback_metrics.items() if "largest" in name}
    draw = torch.rand(2) if "limit_val_batches" in options else None
    return {**states_of(trainer, module), "logged": logged, "draw": draw}, counter.num_actions


class Saving(Callback):
    """Writes a checkpoint in the middle of an epoch."""

    def __init__(self, path: str) -> None:
        self.path = path

    def on_train_batch_end(self, trainer: Trainer, *args: object) -> None:
        if trainer.global_step == 3:
            trainer.save_checkpoint(self.path)


def run(make_trainer: MakeTrainer, path: str) -> dict[str, tuple[dict[str, Any], int]]:
    alone = {"limit_val_batches": 0}
    return {
        "through": train(make_trainer, {**alone, "callbacks": [Saving(path)]}),
        "validating": train(make_trainer, {"val_check_interval": 3, "accumulate_grad_batches": 2}),
        "cut short": train(make_trainer, {**alone, "max_steps": 9}, kind=CutShort),
        "logging": train(make_trainer, {**alone}, kind=Logging),
        "normalising": train(make_trainer, {**alone}, kind=Normalising),
        "in a dictionary": train(make_trainer, {**alone}, kind=Logging, is_in_dict=True),
    }


def run_in_one_process(make_trainer: MakeTrainer, path: str) -> dict[str, tuple[dict[str, Any], int]]:
    found = run(make_trainer, path)
    found["resumed from one process"] = train(make_trainer, {"limit_val_batches": 0}, resume=path)
    return found


def run_and_resume(make_trainer: MakeTrainer, path: str, plain: str) -> dict[str, tuple[dict[str, Any], int]]:
    found = run(make_trainer, path)
    for name, plan in (("resumed", AHEAD), ("resumed under another plan", "0-1|2-3")):
        options = {"limit_val_batches": 0, "strategy": PipeBDStrategy(plan=plan)}
        found[name] = train(make_trainer, options, resume=path)
    found["resumed from one process"] = train(make_trainer, {"limit_val_batches": 0}, resume=plain)
    return found


def test_teacher_blocks_a_batch_ahead_leave_everything_as_in_one_process(tmp_path: Path) -> None:
    plain, path = str(tmp_path / "one.ckpt"), str(tmp_path / "many.ckpt")
    one = on_one_process(run_in_one_process, plain)
    loading, other = under_plan(run_and_resume, path, plain, plan=AHEAD)
    for name in one:
        assert_same_checkpoint(one[name][0], loading[name][0], name)
    one["through"][0].pop("draw")
    for name in ("resumed", "resumed under another plan"):
        loading[name][0].pop("draw")
        assert_same_checkpoint(one["through"][0], loading[name][0], name)
    worked = {name: (loading[name][1], other[name][1]) for name in loading}
    # Nobody has looked ahead before it showed that nobody may.
    for name in ("resumed under another plan", "normalising", "in a dictionary"):
        assert worked.pop(name) == (0, 0)
    assert all(counts > (0, 0) for counts in worked.values()), worked
    assert worked["validating"] < worked["through"]
