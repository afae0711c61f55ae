"""What one process would not have to think of: types that a step makes, and the order of tensors in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pipebd import BlockwiseDistillationModule, TeacherStudentModule
from tests.helpers.scenarios import Both, MakeTrainer, on_both
from tests.helpers.toy import make_loader
from tests.helpers.training import assert_same_checkpoint

pytestmark = pytest.mark.spawn


class Slicing(nn.Module):
    """Gives a slice of what it computes: a tensor with gaps in memory."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(3, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        normal: Tensor = self.norm(self.convolution(x))
        return normal[:, : self.norm.num_features // 2]


class Summing(nn.Module):
    """Begins with what reads the order in memory, and hands back a gradient that is one number for a whole image."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm2d(width)
        self.head = nn.Linear(2 * width, 5)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.head(torch.cat([self.norm(x).relu().sum((2, 3)), x.sum((2, 3))], dim=1) / 64)
        return found


def network() -> nn.Sequential:
    return nn.Sequential(Slicing(32), Summing(16))


class _Augmenting:
    """Draws noise and smooths the images where the batch is unpacked, and gives a slice of them."""

    shape = (6, 8, 8)
    tokens = False

    def unpack_batch(self, batch: Any) -> tuple[Tensor, Tensor]:
        inputs, targets = batch
        noisy = inputs + torch.randn(inputs.shape)
        smooth = F.conv2d(noisy, torch.full((6, 1, 3, 3), 1 / 9, dtype=inputs.dtype), padding=1, groups=6)
        return smooth.to(inputs.dtype)[:, :3], targets

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trainable_parameters(), lr=0.01)  # type: ignore[attr-defined]  # a mixin


class Blocks(_Augmenting, BlockwiseDistillationModule):
    def __init__(self) -> None:
        super().__init__(network(), network(), {"0": "0", "1": "1"})


class Whole(_Augmenting, TeacherStudentModule):
    def __init__(self) -> None:
        super().__init__(network(), network(), {"0": "0"})

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        return F.mse_loss(student_output, teacher_output) + F.cross_entropy(student_output, targets)


class Centred(Blocks):
    """The loss of the last block keeps a centre of the teacher's outputs in a buffer of the module."""

    centre: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("centre", torch.zeros(5))

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        if block == 0:
            return super().block_loss(block, student_output, teacher_output, targets)
        self.centre = 0.9 * self.centre + 0.1 * teacher_output.mean(0)
        return F.mse_loss(student_output, teacher_output - self.centre)


MODULES: dict[str, Callable[[], Any]] = {"blocks": Blocks, "whole": Whole, "centred": Centred}
CASES = [
    f"{module}, {precision}" for module in ("blocks", "whole") for precision in ("32-true", "64-true", "bf16-mixed")
]
CASES.append("centred, 32-true")


def fit(make_trainer: MakeTrainer, name: str) -> dict[str, Any]:
    kind, precision = name.split(", ")
    torch.manual_seed(11)
    module = MODULES[kind]()
    trainer = make_trainer(precision=precision, max_epochs=2)
    trainer.fit(module, make_loader(module, 20, 8, shuffle=True))
    state: dict[str, Any] = module.state_dict()
    return state


@pytest.fixture(scope="module")
def fits() -> dict[str, Both]:
    return on_both(fit, CASES, plan="0|1")


@pytest.mark.parametrize("name", CASES)
def test_student_has_the_bits_of_one_process(name: str, fits: dict[str, Both]) -> None:
    for state in fits[name].ranks:
        assert_same_checkpoint(fits[name].one, state, name)
