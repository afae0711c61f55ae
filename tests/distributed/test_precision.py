"""Precision plugins, clipping and the user's hooks do what they do in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor

from tests.helpers.scenarios import Both, MakeTrainer, on_both, under_plan
from tests.helpers.toy import LinearModule, make_loader, make_module

pytestmark = pytest.mark.spawn

PLAN = "0-1|2-3"


def half_precision() -> MixedPrecision:
    # Small enough that nothing overflows by itself.
    return MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3))


SETTINGS: dict[str, Callable[[], dict[str, Any]]] = {
    "64-true": lambda: {"precision": "64-true"},
    "bf16-true": lambda: {"precision": "bf16-true"},
    "bf16-mixed": lambda: {"precision": "bf16-mixed"},
    "16-mixed": lambda: {"plugins": [half_precision()]},
    "16-mixed, clipped and accumulated": lambda: {
        "plugins": [half_precision()],
        "accumulate_grad_batches": 2,
        "gradient_clip_val": 0.01,
    },
    "clipped by norm": lambda: {"gradient_clip_val": 0.01},
    "clipped by value": lambda: {"gradient_clip_val": 0.001, "gradient_clip_algorithm": "value"},
}


def fit(make_trainer: MakeTrainer, name: str) -> dict[str, Any]:
    module = make_module("linear")
    trainer = make_trainer(**SETTINGS[name]())
    trainer.fit(module, make_loader(module, 22, 4), make_loader(module, 14, 4))
    accuracy = round(trainer.callback_metrics["val_acc"].item(), 6)
    # A second fit finds everything as the first did.
    trainer.fit_loop.max_epochs = 3
    trainer.fit(module, make_loader(module, 22, 4))
    return {
        "student": module.student.state_dict(),
        "teacher type": next(module.teacher.parameters()).dtype,
        "val_acc": accuracy,
    }


@pytest.fixture(scope="module")
def fits() -> dict[str, Both]:
    return on_both(fit, list(SETTINGS), plan=PLAN)


@pytest.mark.parametrize("name", SETTINGS)
def test_student_has_the_bits_of_one_process(name: str, fits: dict[str, Both]) -> None:
    one, ranks = fits[name]
    for rank in ranks:
        torch.testing.assert_close(rank["student"], one["student"], rtol=0, atol=0)
        assert rank["val_acc"] == one["val_acc"]
        assert rank["teacher type"] == one["teacher type"]


def test_teacher_follows_the_precision(fits: dict[str, Both]) -> None:
    assert fits["64-true"].ranks[1]["teacher type"] == torch.float64
    assert fits["bf16-true"].ranks[0]["teacher type"] == torch.bfloat16


class OverflowingModule(LinearModule):
    """The loss of block 1 overflows in the second batch, on the ranks that a test names."""

    def __init__(self, ranks: tuple[int, ...]) -> None:
        super().__init__()
        self.ranks = ranks
        self.num_calls = 0

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        loss = super().block_loss(block, student_output, teacher_output, targets)
        if block != 1:
            return loss
        self.num_calls += 1
        return loss * float("inf") if self.num_calls == 2 and self.global_rank in self.ranks else loss


class Updates(Callback):
    """Which blocks each step changed."""

    def __init__(self) -> None:
        self.before: list[Tensor] = []
        self.changed: list[list[int]] = []

    def weights(self, pl_module: Any) -> list[Tensor]:
        return [pl_module.block_parameters(block)[0].detach().clone() for block in range(pl_module.num_blocks)]

    def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.before = self.weights(pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        after = self.weights(pl_module)
        pairs = zip(self.before, after, strict=True)
        self.changed.append([block for block, (old, new) in enumerate(pairs) if not torch.equal(old, new)])
        self.before = after


def overflow(make_trainer: MakeTrainer, ranks: tuple[int, ...]) -> tuple[list[list[int]], dict[str, Tensor]]:
    torch.manual_seed(11)
    module, updates = OverflowingModule(ranks), Updates()
    make_trainer(plugins=[half_precision()], callbacks=[updates], max_epochs=1).fit(module, make_loader(module, 12, 4))
    return updates.changed, module.student.state_dict()


def test_an_overflow_skips_the_update_of_its_block_alone() -> None:
    (first, student), (second, other) = under_plan(overflow, (0,), plan=PLAN)
    assert first == [[0, 1], [0], [0, 1]]
    assert second == [[2, 3]] * 3
    torch.testing.assert_close(other, student, rtol=0, atol=0)


def test_an_overflow_on_one_of_the_ranks_that_share_a_block_skips_its_update_on_all() -> None:
    (first, student), (second, other) = under_plan(overflow, (1,), plan="joint")
    assert first == second == [[0, 1, 2, 3], [0, 2, 3], [0, 1, 2, 3]]
    torch.testing.assert_close(other, student, rtol=0, atol=0)


class TransferModule(LinearModule):
    """Changes the batch in every hook that Lightning has for it."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[str, str, int]] = []

    def note(self, hook: str, batch: Any) -> None:
        inputs, labels = batch
        assert len(inputs) == len(labels)
        self.seen.append((hook, self.trainer.state.stage or "", len(inputs)))

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.note("before", batch)
        return batch[0] + 1, batch[1]

    def transfer_batch_to_device(self, batch: Any, device: torch.device, dataloader_idx: int) -> Any:
        self.note("transfer", batch)
        return super().transfer_batch_to_device(batch, device, dataloader_idx)

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        self.note("after", batch)
        return batch[0] * 3, batch[1]


def fit_with_hooks(make_trainer: MakeTrainer, name: str) -> dict[str, Any]:
    torch.manual_seed(11)
    module = TransferModule()
    make_trainer(max_epochs=1, num_sanity_val_steps=0).fit(
        module, make_loader(module, 10, 4), make_loader(module, 6, 4)
    )
    return {"seen": module.seen, "student": module.student.state_dict()}


def test_hooks_of_the_transfer_see_batches_of_the_user_alone() -> None:
    one, ranks = on_both(fit_with_hooks, ["hooks"], plan=PLAN)["hooks"]
    training = [(hook, stage, rows) for hook, stage, rows in one["seen"] if stage == "train"]
    assert [[entry for entry in rank["seen"] if entry[1] == "train"] for rank in ranks] == [training, []]
    assert [sum(rows for _, stage, rows in rank["seen"] if stage == "validate") for rank in ranks] == [9, 9]
    torch.testing.assert_close([rank["student"] for rank in ranks], [one["student"]] * 2, rtol=0, atol=0)
