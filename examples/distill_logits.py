"""Distil a small student from a larger teacher by its logits, on scikit-learn's handwritten digits.

    python examples/distill_logits.py            # one process
    python examples/distill_logits.py pipebd 2   # both models divided over two processes: the same student

trains the teacher for a moment (kept in ``examples/.cache``) and prints how good teacher and student are. The loss is
that of Hinton et al., "Distilling the Knowledge in a Neural Network": labels and softened logits. ``DIGITS_EPOCHS=1``
makes a short run, ``DIGITS_CACHE`` names another folder for the teacher.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import TeacherStudentModule
from lightning_pipebd.losses import kl_divergence

CACHE = Path(os.environ.get("DIGITS_CACHE", Path(__file__).parent / ".cache"))
EPOCHS = int(os.environ.get("DIGITS_EPOCHS", "15"))


def network(width: int, depth: int) -> nn.Sequential:
    """Convolutions with GroupNorm, which treats rows one by one: micro-batches give the gradients of the batch."""

    def stage(inputs: int) -> nn.Sequential:
        return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), nn.GroupNorm(4, width), nn.ReLU())

    head = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * width, 10))
    return nn.Sequential(stage(1), *(stage(width) for _ in range(depth - 1)), head)


class Digits(LightningDataModule):
    """1,797 images of 8 x 8 pixels; every fifth is held out."""

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
        targets = torch.from_numpy(labels).long()
        is_held_out = torch.arange(len(targets)) % 5 == 0
        self.train = TensorDataset(pixels[~is_held_out], targets[~is_held_out])
        self.held_out = TensorDataset(pixels[is_held_out], targets[is_held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, batch_size=len(self.held_out))


def load_teacher() -> nn.Sequential:
    """Give the trained teacher; train it where there is none yet, which takes some seconds."""
    teacher, path = network(32, 5), CACHE / f"logits_teacher_{EPOCHS}_epochs.pt"
    if not path.exists():
        data = Digits()
        data.setup("fit")
        with torch.random.fork_rng():
            torch.manual_seed(0)
            optimizer = torch.optim.AdamW(teacher.parameters(), lr=3e-3)
            for _ in range(EPOCHS):
                for images, labels in data.train_dataloader():
                    optimizer.zero_grad()
                    torch.autograd.backward(F.cross_entropy(teacher(images), labels))
                    optimizer.step()
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(f".{os.getpid()}")
        torch.save(teacher.state_dict(), unfinished)
        unfinished.replace(path)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher


class DistilLogits(TeacherStudentModule):
    """The whole of what a user writes. The models differ in depth, so each is cut at places of its own."""

    def __init__(self, temperature: float = 4.0) -> None:
        super().__init__(load_teacher(), network(8, 3), teacher_cuts=["1", "3"], student_cuts=["0", "1"])
        self.temperature = temperature

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> dict[str, Tensor]:
        hard = F.cross_entropy(student_output, targets)
        soft = kl_divergence(student_output, teacher_output, self.temperature)
        return {"loss": 0.1 * hard + 0.9 * soft, "hard": hard, "soft": soft}

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.trainable_parameters(), lr=1e-2)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", accuracy(self.student, images, labels), batch_size=len(labels))


def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Give the share of images that the model names rightly."""
    with torch.no_grad():
        return float((model(images).argmax(-1) == labels).float().mean())


def main(strategy: str = "auto", devices: str = "1") -> None:
    """Distil and print."""
    seed_everything(1, verbose=False)
    module, data = DistilLogits(), Digits()
    trainer = Trainer(
        accelerator="cpu",
        devices=int(devices),
        strategy=strategy,
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    trainer.fit(module, data)
    if trainer.is_global_zero:
        for name, model, value in (
            ("teacher", module.teacher, accuracy(module.teacher, *data.held_out.tensors)),
            ("student", module.student, trainer.callback_metrics["val_acc"].item()),
        ):
            size = sum(parameter.numel() for parameter in model.parameters())
            sys.stdout.write(f"{name}  {value:.1%}  {size:,} parameters\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
