"""Distil a small student from a VGG-like teacher on scikit-learn's handwritten digits, block by block.

    python examples/digits.py

trains the teacher for a moment (kept in ``examples/.cache``), distils the same student in one process, under
Lightning's DDP and over two processes with ``strategy="pipebd"``, and ends with a table of what each cost and how good
it is. ``DIGITS_EPOCHS=1`` makes a short run, ``DIGITS_CACHE`` names another folder for the teacher.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, Plan, format_plan
from lightning_pipebd.planning.plan_text import has_text_form

CACHE = Path(os.environ.get("DIGITS_CACHE", Path(__file__).parent / ".cache"))
EPOCHS = int(os.environ.get("DIGITS_EPOCHS", "14"))
TEACHER_EPOCHS = min(EPOCHS, 10)
BLOCKS = {"stage1": "stage1", "stage2": "stage2", "stage3": "stage3", "stage4": "stage4", "classifier": "classifier"}

ROWS = [("one process", "auto", 1), ("Lightning DDP, 2 processes", "ddp", 2), ("pipebd, 2 processes", "pipebd", 2)]


class DigitsData(LightningDataModule):
    """1,797 images of 8 x 8 pixels; every fifth is held out."""

    def __init__(self, batch_size: int = 64) -> None:
        super().__init__()
        self.batch_size = batch_size

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels = torch.from_numpy(images).float().reshape(-1, 1, 8, 8) / 16
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


def teacher_stage(inputs: int, outputs: int) -> nn.Sequential:
    """Convolutions and dropout."""
    # What dropout taught the teacher to bear, later bears the small errors that a student adds up block by block.
    return nn.Sequential(*convolutions(inputs, outputs), nn.Dropout(0.2))


def student_stage(inputs: int, outputs: int) -> nn.Sequential:
    """Depthwise and pointwise convolutions: a fraction of the parameters."""
    if inputs == 1:
        return convolutions(inputs, outputs)  # one channel leaves nothing to separate
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

    def __init__(self, make_stage: Callable[[int, int], nn.Module]) -> None:
        super().__init__()
        self.stage1 = make_stage(1, 24)
        self.stage2 = make_stage(24, 48)
        self.stage3 = make_stage(48, 64)
        self.stage4 = make_stage(64, 64)
        self.classifier = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Any:
        x = nn.functional.max_pool2d(self.stage2(self.stage1(x)), 2)
        x = nn.functional.max_pool2d(self.stage4(self.stage3(x)), 2)
        return self.classifier(x.mean(dim=(2, 3)))


class TrainTeacher(LightningModule):
    """Ordinary supervised training."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = Network(teacher_stage)

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.teacher(images), labels)

    def configure_optimizers(self) -> Any:
        return one_cycle(self, torch.optim.AdamW(self.teacher.parameters()), lr=5e-3)


def one_cycle(module: LightningModule, optimizer: torch.optim.Optimizer, lr: float) -> dict[str, Any]:
    """Raise the learning rate to ``lr`` and lower it to zero over the whole run, step by step."""
    num_steps = int(module.trainer.estimated_stepping_batches)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=num_steps)
    return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def load_teacher() -> Network:
    """Give the trained teacher; train it (some ten seconds) where there is none yet."""
    teacher, path = Network(teacher_stage), CACHE / f"digits_teacher_{TEACHER_EPOCHS}_epochs.pt"
    if not path.exists():
        train_teacher(path)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher


def train_teacher(path: Path) -> None:
    """Train the teacher and keep it; several processes may do so at once, with the same result."""
    with isolate_rng():
        # Not `seed_everything`: its seed would outlive this block, in the environment.
        torch.manual_seed(0)
        module, data = TrainTeacher(), DigitsData()
        data.setup("fit")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_epochs=TEACHER_EPOCHS,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
        )
        trainer.fit(module, data.train_dataloader())
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(module.teacher.state_dict(), unfinished)
    unfinished.replace(path)


class DistilDigits(BlockwiseDistillationModule):
    """The whole of what a user writes."""

    def __init__(self, lr: float = 3e-2) -> None:
        super().__init__(load_teacher(), Network(student_stage), BLOCKS, block_losses={"classifier": "kl"})
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def configure_optimizers(self) -> Any:
        return one_cycle(self, torch.optim.AdamW(self.student.parameters()), lr=self.hparams["lr"])

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        images, labels = batch
        accuracy = (self.student(images).argmax(-1) == labels).float().mean()
        self.log("val_acc", accuracy, prog_bar=True, sync_dist=True)


class EpochTimes(Callback):
    """Seconds of each epoch's training."""

    def __init__(self) -> None:
        self.seconds: list[float] = []

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.start = time.perf_counter()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.seconds.append(time.perf_counter() - self.start)


def rate_teacher() -> float:
    """Give the teacher's accuracy on held-out digits."""
    data = DigitsData()
    data.setup("validate")
    images, labels = data.held_out.tensors
    with torch.no_grad():
        is_right = load_teacher().eval()(images).argmax(-1) == labels
    return float(is_right.float().mean())


def distil(strategy: str, devices: int, report: str) -> None:
    """One run: this function and nothing else differs between the rows of the table."""
    seed_everything(1, verbose=False)
    module, times = DistilDigits(), EpochTimes()
    batch_size = 64 // devices if strategy == "ddp" else 64  # Lightning's DDP counts rows per process, we count all
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy=strategy,
        max_epochs=EPOCHS,
        callbacks=[times],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=sys.stdout.isatty(),
        enable_model_summary=False,
    )
    trainer.fit(module, DigitsData(batch_size))
    if trainer.is_global_zero:
        plan = trainer.strategy.plan if isinstance(trainer.strategy, PipeBDStrategy) else None
        seconds = sorted(times.seconds[1:] or times.seconds)
        result = {
            "accuracy": trainer.callback_metrics["val_acc"].item(),
            "epoch_s": seconds[len(seconds) // 2],
            "plan": format_plan(plan) if isinstance(plan, Plan) and has_text_form(plan) else "-",
            "parameters": sum(parameter.numel() for parameter in module.student.parameters()),
        }
        Path(report).write_text(json.dumps(result))


def compare() -> None:
    """Run every row in processes of its own and print the table."""
    teacher_accuracy = rate_teacher()
    teacher_size = sum(parameter.numel() for parameter in load_teacher().parameters())
    lines = [
        f"{'':35}{'accuracy':>9}{'parameters':>12}{'epoch':>9}  plan",
        f"{'teacher':35}{teacher_accuracy:>9.1%}{teacher_size:>12,}",
    ]
    # One thread per process everywhere: the rows differ in the strategy alone.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory() as folder:
        for name, strategy, devices in ROWS:
            report = f"{folder}/{strategy}.json"
            subprocess.run([sys.executable, __file__, strategy, str(devices), report], check=True, env=environment)
            result = json.loads(Path(report).read_text())
            numbers = f"{result['accuracy']:>9.1%}{result['parameters']:>12,}{result['epoch_s']:>8.2f}s"
            lines.append(f"{'student, ' + name:35}{numbers}  {result['plan']}")
    sys.stdout.write("\n" + "\n".join(lines) + "\n")


if __name__ == "__main__":
    if len(sys.argv) > 1:
        distil(sys.argv[1], int(sys.argv[2]), sys.argv[3])
    else:
        compare()
