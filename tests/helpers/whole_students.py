"""Toy modules with a loss of the whole student, and runs of them in one process or under a plan."""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import Callback, LightningDataModule, Trainer, seed_everything
from torch import Tensor, nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, TeacherStudentModule
from tests.helpers.ranks import run_processes
from tests.helpers.resuming import NoisyData
from tests.helpers.toy import NUM_CLASSES, ToyData
from tests.helpers.training import load

__all__ = [
    "WHOLE_STUDENTS",
    "Bootstrap",
    "Byol",
    "Contrast",
    "Convolutional",
    "Crowd",
    "Distil",
    "Failing",
    "FollowedBlocks",
    "Poisoned",
    "WholeData",
    "WholeRun",
    "run_here",
    "train_whole",
]

WIDTH = 6


def perceptron(width: int, depth: int, outputs: int = NUM_CLASSES) -> nn.Sequential:
    """Layers 0 to depth, of which the last gives the outputs."""
    middle = [nn.Sequential(nn.Linear(width, width), nn.Tanh()) for _ in range(depth - 1)]
    return nn.Sequential(nn.Linear(WIDTH, width), *middle, nn.Linear(width, outputs))


class _Whole(TeacherStudentModule):
    shape: tuple[int, ...] = (WIDTH,)
    tokens = False

    def configure_optimizers(self) -> Any:
        parameters = self.trainable_parameters()
        groups: list[dict[str, Any]] = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        accuracy = (self(inputs)[:, :NUM_CLASSES].argmax(-1) == labels).double().mean()
        self.log("val_acc", accuracy, batch_size=len(labels))


class Distil(_Whole):
    """A deeper, wider, frozen teacher; labels and two terms in the loss."""

    def __init__(self) -> None:
        super().__init__(perceptron(10, 5), perceptron(8, 3), teacher_cuts=["1", "3"], student_cuts=["0", "1", "2"])

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> dict[str, Tensor]:
        soft = F.mse_loss(student_output, teacher_output)
        return {"loss": soft + F.cross_entropy(student_output, targets), "soft": soft}


class Bootstrap(_Whole):
    """A momentum teacher with a schedule, and two views of which the teacher sees them swapped."""

    def __init__(self, delay: int = 1) -> None:
        super().__init__(
            None,
            perceptron(8, 3),
            student_cuts=["0", "1", "2"],
            predictor=nn.Linear(NUM_CLASSES, NUM_CLASSES),
            momentum=lambda step: 1 - 0.3 / (step + 1),
            teacher_delay=delay,
            views=True,
        )

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        inputs, _ = batch
        return [inputs, inputs.flip(1)], None

    def teacher_inputs(self, inputs: Any) -> Any:
        return inputs[::-1]

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        pairs = zip(student_output, teacher_output, strict=True)
        return torch.stack([F.mse_loss(student, teacher) for student, teacher in pairs]).mean()


class Byol(Bootstrap):
    """A centre of the teacher's outputs, which is subtracted from them."""

    centre: Tensor

    def __init__(self, delay: int = 1, rate: float = 0.001) -> None:
        super().__init__(delay)
        self.register_buffer("centre", torch.zeros(NUM_CLASSES))
        self.rate_of_centre = rate
        self._seen: list[Tensor] = []

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        self._seen += [output.sum(0) for output in teacher_output]
        return super().loss(student_output, [output - self.centre for output in teacher_output], targets)

    def on_teacher_update(self) -> None:
        self.centre.mul_(0.9).add_(torch.stack(self._seen).sum(0), alpha=self.rate_of_centre)
        self._seen.clear()


class Contrast(_Whole):
    """A contrastive loss, which needs the full batch, with a learned temperature of its own."""

    def __init__(self, delay: int = 0) -> None:
        super().__init__(
            None,
            perceptron(8, 3),
            student_cuts=["0", "1", "2"],
            momentum=0.9,
            teacher_delay=delay,
            full_batch_loss=True,
        )
        self.temperature = nn.Parameter(torch.tensor(1.0))

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        return F.cross_entropy(student_output @ teacher_output.T * self.temperature, torch.arange(len(targets)))


class Crowd(Contrast):
    """Beside the rows of the batch a queue of earlier ones; random numbers in the loss, and a centre that is moved."""

    centre: Tensor
    queue: Tensor

    def __init__(self, delay: int = 0) -> None:
        super().__init__(delay)
        self.register_buffer("centre", torch.zeros(NUM_CLASSES))
        self.register_buffer("queue", torch.zeros(12, NUM_CLASSES))
        self._seen: list[Tensor] = []

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        keys = torch.cat([teacher_output - self.centre, self.queue])
        self.queue.copy_(keys[: len(self.queue)])
        self._seen.append(teacher_output.mean(0))
        return super().loss(F.dropout(student_output, 0.2), keys, targets)

    def on_teacher_update(self) -> None:
        self.centre.mul_(0.9).add_(torch.stack(self._seen).mean(0), alpha=0.1)
        self._seen.clear()


class Convolutional(_Whole):
    """BatchNorm, dropout and in-place operations in the student; running statistics are averaged."""

    shape = (3, 8, 8)

    def __init__(self, **options: Any) -> None:
        def layer(inputs: int) -> nn.Sequential:
            return nn.Sequential(
                nn.ReLU(inplace=True), nn.Conv2d(inputs, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Dropout(0.2)
            )

        student = nn.Sequential(
            layer(3), layer(4), nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()), nn.Linear(4, 5)
        )
        super().__init__(None, student, student_cuts=["0", "1"], momentum=0.8, teacher_delay=1, **options)

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        return F.mse_loss(student_output, teacher_output) + F.cross_entropy(student_output, targets)


class Poisoned(Convolutional):
    """The loss of one step is not a number; that step is skipped."""

    def __init__(self, on_nonfinite: str = "skip") -> None:
        super().__init__(on_nonfinite=on_nonfinite)

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        factor = float("nan") if self.trainer.global_step == 2 else 1.0
        return super().loss(student_output, teacher_output, targets) * factor


class Failing(Distil):
    """The loss of rank 1 raises in the third batch."""

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> dict[str, Tensor]:
        if self.global_rank == 1 and self.trainer.global_step == 2:
            raise ZeroDivisionError("the loss of rank 1 failed")
        return super().loss(student_output, teacher_output, targets)


class NoisyDistil(Distil):
    """Draws random numbers for every batch, beside those that the loader draws."""

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        inputs, labels = batch
        return inputs + 0.1 * torch.randn_like(inputs), labels


class FollowedBlocks(BlockwiseDistillationModule):
    """Blocks that learn by themselves from a teacher whose blocks follow them, with running statistics."""

    shape = (WIDTH,)
    tokens = False

    def __init__(self, **options: Any) -> None:
        def network() -> nn.Sequential:
            sizes = (WIDTH, 8, 8)
            layers = [
                nn.Sequential(nn.Linear(one, other), nn.BatchNorm1d(other), nn.Tanh()) for one, other in pairwise(sizes)
            ]
            return nn.Sequential(*layers, nn.Linear(8, NUM_CLASSES))

        paths = {"0": "0", "1": "1", "2": "2"}
        options = {"momentum": lambda step: 1 - 0.5 / (step + 1), **options}
        super().__init__(network(), network(), paths, **options)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.trainable_parameters(), lr=0.01)


class WholeData(LightningDataModule):
    """What the command line trains the perceptrons on."""

    def train_dataloader(self) -> Any:
        return DataLoader(ToyData(16, (WIDTH,)), batch_size=8)


WHOLE_STUDENTS: dict[str, Callable[[], Any]] = {
    "distil": Distil,
    "bootstrap": Bootstrap,
    "byol": Byol,
    "byol-no-delay": lambda: Byol(0),
    "byol-no-centre": lambda: Byol(1, 0.0),
    "contrast": Contrast,
    "crowd": Crowd,
    "crowd-delayed": lambda: Crowd(1),
    "convolutional": Convolutional,
    "poisoned": Poisoned,
    "failing": Failing,
    "noisy": NoisyDistil,
    "followed-blocks": FollowedBlocks,
}


@dataclass(frozen=True, kw_only=True)
class WholeRun:
    """One call of ``fit``.

    Args:
        module: Name of a toy module.
        plan: Text of a plan, empty to have one found; ``None`` trains under plain Lightning in one process.
        num_ranks: Processes.
        options: Of the strategy.
        strategy: Lightning's, where there is no plan.
        trainer: Further arguments of the trainer.
        resume: Checkpoint to go on from.
        double: Whether to compute in float64.
        validate: Whether to validate every epoch.
        noise: Whether loading draws random numbers.
        save_at: Step after which a checkpoint is written on the way, and where to.
    """

    module: str = "distil"
    plan: str | None = None
    num_ranks: int = 1
    options: dict[str, Any] = field(default_factory=dict)
    strategy: str = "auto"
    batch_size: int = 8
    num_rows: int = 42
    double: bool = True
    validate: bool = True
    shuffle: bool = True
    noise: bool = False
    save_at: tuple[int, str] | None = None
    trainer: dict[str, Any] = field(default_factory=dict)
    resume: str | None = None


class SaveOnTheWay(Callback):
    """Write a checkpoint in the middle of the run."""

    def __init__(self, step: int, path: str) -> None:
        self.step, self.path = step, path
        self.has_saved = False

    def on_train_batch_end(self, trainer: Trainer, *args: Any) -> None:
        # Once: in the middle of an accumulation gradients would be lost.
        if trainer.global_step == self.step and not self.has_saved:
            self.has_saved = True
            trainer.save_checkpoint(self.path)


def train_whole(run: WholeRun, path: Path, *, timeout: float = 100.0) -> tuple[dict[str, Any], list[dict[str, float]]]:
    """Train in processes of their own; give the checkpoint and each rank's metrics."""
    metrics = run_processes(run.num_ranks, _train_rank, run, str(path), timeout=timeout)
    return load(path), metrics


def _train_rank(rank: int, run: WholeRun, path: str) -> dict[str, float]:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.simplefilter("ignore")
    trainer = run_here(run, path)
    return {name: float(value) for name, value in trainer.callback_metrics.items()}


def run_here(run: WholeRun, path: str | None = None) -> Trainer:
    """Train in this process."""
    seed_everything(3, verbose=False)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64 if run.double else torch.float32)
    try:
        torch.manual_seed(11)
        module = WHOLE_STUDENTS[run.module]()
        data = (NoisyData if run.noise else ToyData)(run.num_rows, module.shape)
        loader = DataLoader(data, batch_size=run.batch_size, shuffle=run.shuffle)
        if run.strategy == "ddp":
            # Lightning's own would shuffle: rank by rank in turn, so that the batches hold the rows of one process.
            sampler: Any = DistributedSampler(data, run.num_ranks, int(os.environ["RANK"]), shuffle=False)
            loader = DataLoader(data, batch_size=run.batch_size, sampler=sampler)
        validation = DataLoader(ToyData(20, module.shape), batch_size=6) if run.validate else None
        defaults: dict[str, Any] = {
            "max_epochs": 3,
            "logger": False,
            "enable_checkpointing": False,
            "enable_progress_bar": False,
            "enable_model_summary": False,
            "callbacks": [] if run.save_at is None else [SaveOnTheWay(*run.save_at)],
        }
        strategy = run.strategy if run.plan is None else PipeBDStrategy(plan=run.plan or None, **run.options)
        trainer = Trainer(accelerator="cpu", devices=run.num_ranks, strategy=strategy, **{**defaults, **run.trainer})
        trainer.fit(module, loader, validation, ckpt_path=run.resume)
        if path is not None:
            trainer.save_checkpoint(path)
    finally:
        torch.set_default_dtype(default)
    return trainer
