"""Distil a small student from a VGG-like teacher on scikit-learn's handwritten digits, block by block.

    python examples/digits.py

trains the teacher for a moment (kept in ``examples/.cache``), distils the same student in one process, under Lightning's
DDP and over two processes with ``strategy="pipebd"``, and ends with a table of what each cost and how good it is.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import BlockwiseDistillationModule, format_plan

CACHE = Path(__file__).parent / ".cache"
BLOCKS = {"stage1": "stage1", "stage2": "stage2", "stage3": "stage3", "stage4": "stage4", "classifier": "classifier"}


class DigitsData(LightningDataModule):
    """1,797 images of 8 x 8 pixels, enlarged to 16 x 16; every fifth is held out."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
        pixels = nn.functional.interpolate(pixels, scale_factor=2, mode="bilinear", align_corners=False)
        targets = torch.from_numpy(labels).long()
        is_held_out = torch.arange(len(targets)) % 5 == 0
        self.train = TensorDataset(pixels[~is_held_out], targets[~is_held_out])
        self.held_out = TensorDataset(pixels[is_held_out], targets[is_held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, batch_size=256)


def convolutions(inputs: int, outputs: int) -> nn.Sequential:
    """Two ordinary convolutions, as in VGG."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """A depthwise and two pointwise convolutions: a fraction of the parameters."""
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False),
        nn.Conv2d(inputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1, groups=outputs, bias=False),
        nn.Conv2d(outputs, outputs, 1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.ReLU(),
    )


class Network(nn.Module):
    """Four stages and a classifier."""

    def __init__(self, make_stage: Any) -> None:
        super().__init__()
        self.stage1 = make_stage(1, 32)
        self.stage2 = make_stage(32, 64)
        self.stage3 = make_stage(64, 96)
        self.stage4 = make_stage(96, 96)
        self.classifier = nn.Linear(96, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(self.stage2(self.stage1(x)), 2)
        x = nn.functional.max_pool2d(self.stage4(self.stage3(x)), 2)
        return self.classifier(x.mean(dim=(2, 3)))


class TrainTeacher(LightningModule):
    """Ordinary supervised training."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Network(convolutions)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.teacher(images), labels)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.teacher.parameters(), lr=2e-3)


def load_teacher() -> Network:
    """Give the trained teacher; trains it where there is none yet."""
    teacher, path = Network(convolutions), CACHE / "digits_teacher.pt"
    if path.exists():
        teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher


class DistilDigits(BlockwiseDistillationModule):
    """The whole of what a user writes."""

    def __init__(self, lr: float = 4e-3) -> None:
        super().__init__(load_teacher(), Network(separable), BLOCKS, block_losses={"classifier": "kl"})
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 1, 16, 16)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.student.parameters(), lr=self.hparams.lr)

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        self.log("val_acc", (self.student(images).argmax(-1) == labels).float().mean(), prog_bar=True)


class EpochTimes(Callback):
    """Seconds of each epoch's training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def train_teacher() -> float:
    """Train the teacher if there is none; give its accuracy on held-out digits."""
    path, data = CACHE / "digits_teacher.pt", DigitsData()
    data.setup("fit")
    if not path.exists():
        seed_everything(0, verbose=False)
        module = TrainTeacher()
        trainer = Trainer(accelerator="cpu", devices=1, max_epochs=6, logger=False, enable_checkpointing=False)
        trainer.fit(module, data.train_dataloader())
        CACHE.mkdir(exist_ok=True)
        torch.save(module.teacher.state_dict(), path)
    teacher = load_teacher().eval()
    images, labels = data.held_out.tensors
    with torch.no_grad():
        return (teacher(images).argmax(-1) == labels).float().mean().item()


def distil(strategy: str, devices: int, report: str) -> None:
    """One run: this function and nothing else differs between the rows of the table."""
    seed_everything(1, verbose=False)
    module, times = DistilDigits(), EpochTimes()
    batch_size = 64 // devices if strategy == "ddp" else 64  # Lightning's DDP counts rows per process, we count all
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=int(os.environ.get("DIGITS_EPOCHS", "8")),
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    trainer.fit(module, DigitsData(batch_size))
    if trainer.is_global_zero:
        plan = format_plan(trainer.strategy.plan) if strategy == "pipebd" else "-"
        seconds = sorted(times.seconds[1:] or times.seconds)
        result = {
            "accuracy": trainer.callback_metrics["val_acc"].item(),
            "epoch_s": seconds[len(seconds) // 2],
            "plan": plan,
            "parameters": sum(parameter.numel() for parameter in module.student.parameters()),
        }
        Path(report).write_text(json.dumps(result))


def compare() -> None:
    """Run every row in processes of its own and print the table."""
    teacher_accuracy = train_teacher()
    rows = [("one process", "auto", 1), ("Lightning DDP, 2 processes", "ddp", 2), ("pipebd, 2 processes", "pipebd", 2)]
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for index, (_, strategy, devices) in enumerate(rows):
            report = f"{folder}/{index}.json"
            # One thread per process everywhere: the rows differ in the strategy alone.
            environment = {**os.environ, "OMP_NUM_THREADS": "1"}
            subprocess.run([sys.executable, __file__, strategy, str(devices), report], check=True, env=environment)
            results.append(json.loads(Path(report).read_text()))
    teacher_size = sum(parameter.numel() for parameter in load_teacher().parameters())
    lines = [f"{'':28}{'accuracy':>9}{'parameters':>12}{'epoch':>9}  plan"]
    lines.append(f"{'teacher':28}{teacher_accuracy:>9.1%}{teacher_size:>12,}{'':>9}")
    for (name, _, _), result in zip(rows, results, strict=True):
        numbers = f"{result['accuracy']:>9.1%}{result['parameters']:>12,}{result['epoch_s']:>8.2f}s"
        lines.append(
            f"{'student, ' + name if name == 'one process' else '         ' + name:28}{numbers}  {result['plan']}"
        )
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        distil(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        compare()
