"""Learn features of handwritten digits without labels: two views, a predictor and a momentum teacher.

    python examples/byol.py                 # one process; the teacher without a delay
    python examples/byol.py 1               # the teacher one step late
    python examples/byol.py 1 pipebd 2      # the same, divided over two processes
    python examples/byol.py compare         # delay 0 and 1 over five seeds

Source: Grill et al., "Bootstrap Your Own Latent". A linear probe, fitted to the features of labelled digits, tells what
they are worth. ``DIGITS_EPOCHS=1`` makes a short run, ``DIGITS_SEED`` chooses another beginning.
"""

from __future__ import annotations

import math
import os
import statistics
import subprocess
import sys
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import TeacherStudentModule

EPOCHS = int(os.environ.get("DIGITS_EPOCHS", "15"))
SEED = int(os.environ.get("DIGITS_SEED", "0"))


def layer(inputs: int, outputs: int) -> nn.Sequential:
    """BatchNorm, without which features of so small a network collapse; a plan leaves batches whole because of it."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU())


class Byol(TeacherStudentModule):
    """The whole of what a user writes. Layers 0 to 2 make the features, the last projects them."""

    def __init__(self, delay: int = 0) -> None:
        student = nn.Sequential(layer(64, 256), layer(256, 256), layer(256, 128), nn.Linear(128, 64))
        super().__init__(
            None,  # a copy of the student
            student,
            student_cuts=["0", "1", "2"],
            predictor=nn.Sequential(layer(64, 128), nn.Linear(128, 64)),
            # From 0.97 to 1 along half a cosine, as in BYOL.
            momentum=lambda step: 1 - 0.03 * (1 + math.cos(math.pi * min(1.0, step / (23 * EPOCHS)))) / 2,
            teacher_delay=delay,
            views=True,
        )

    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        (images,) = batch
        return [augment(images), augment(images)]

    def unpack_batch(self, batch: Any) -> tuple[Any, Any]:
        return batch, None

    def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Tensor:
        # Each view of the student predicts the teacher's other view.
        (first, second), (other_second, other_first) = student_output, teacher_output
        similarity = F.cosine_similarity(first, other_first) + F.cosine_similarity(second, other_second)
        return 2 - similarity.mean()

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.trainable_parameters(), lr=3e-4, weight_decay=1e-4)


def augment(images: Tensor) -> Tensor:
    """Shift by up to a pixel, change the contrast, add noise and blank out a few pixels."""
    across, down = (int(shift) for shift in torch.randint(-1, 2, (2,)))
    moved = images.reshape(-1, 8, 8).roll((across, down), dims=(1, 2)).reshape(len(images), 64)
    contrast = 0.7 + 0.6 * torch.rand(len(images), 1)
    noisy = moved * contrast + 0.1 * torch.randn_like(moved)
    return noisy * (torch.rand_like(moved) > 0.15)


class Digits(LightningDataModule):
    """1,797 images of 8 x 8 pixels; every fifth is held out."""

    def setup(self, stage: str) -> None:
        images, labels = load_digits(return_X_y=True)
        pixels, targets = torch.from_numpy(images).float() / 16, torch.from_numpy(labels).long()
        is_held_out = torch.arange(len(targets)) % 5 == 0
        self.train = TensorDataset(pixels[~is_held_out], targets[~is_held_out])
        self.held_out = TensorDataset(pixels[is_held_out], targets[is_held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(TensorDataset(self.train.tensors[0]), batch_size=64, shuffle=True)


def probe(module: Byol, data: Digits) -> float:
    """Fit a linear classifier to features and give its accuracy on held-out digits."""
    encoder = nn.Sequential(*list(module.student.children())[:3]).eval()
    with torch.no_grad():
        features = [encoder(part.tensors[0]).numpy() for part in (data.train, data.held_out)]
    classifier = LogisticRegression(max_iter=2000).fit(features[0], data.train.tensors[1].numpy())
    return float(classifier.score(features[1], data.held_out.tensors[1].numpy()))


def main(delay: str = "0", strategy: str = "auto", devices: str = "1") -> None:
    """Learn, probe, print."""
    seed_everything(SEED, verbose=False)
    module, data = Byol(int(delay)), Digits()
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
        loss, rate = (float(trainer.callback_metrics[f"train/{name}_epoch"]) for name in ("loss", "momentum"))
        accuracy = probe(module, data)
        sys.stdout.write(f"delay {delay}  linear probe {accuracy:.1%}  loss {loss:.3f}  momentum {rate:.4f}\n")


def compare() -> None:
    """Print the probe's accuracy for both delays over five seeds."""
    for delay in ("0", "1"):
        found = []
        for seed in range(5):
            environment = {**os.environ, "DIGITS_SEED": str(seed)}
            command = [sys.executable, __file__, delay]
            finished = subprocess.run(command, env=environment, check=True, capture_output=True, text=True)
            found.append(float(finished.stdout.split("linear probe ")[1].split("%")[0]))
        mean, spread = statistics.mean(found), statistics.stdev(found)
        sys.stdout.write(
            f"delay {delay}: {mean:.1f}% +- {spread:.1f}  ({', '.join(f'{value:.1f}' for value in found)})\n"
        )


if __name__ == "__main__":
    if sys.argv[1:] == ["compare"]:
        compare()
    else:
        main(*sys.argv[1:])
