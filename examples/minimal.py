"""Distil a small student from a trained teacher on handwritten digits, block by block, over two CPU processes.

``python examples/minimal.py --devices 1`` does it in one: the same student, up to the order of sums.
"""

from argparse import ArgumentParser
from typing import Any

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import BlockwiseDistillationModule

images, labels = load_digits(return_X_y=True)
images, labels = torch.tensor(images, dtype=torch.float32) / 16, torch.tensor(labels)
train, held_out = TensorDataset(images[:1500], labels[:1500]), TensorDataset(images[1500:], labels[1500:])


def network(width: int) -> nn.Sequential:
    """Give three blocks of two layers."""
    sizes = [(64, 32), (32, 32), (32, 10)]
    return nn.Sequential(*(nn.Sequential(nn.Linear(a, width), nn.ReLU(), nn.Linear(width, b)) for a, b in sizes))


def train_teacher() -> nn.Sequential:
    """Give a wide network that knows the digits."""
    teacher = network(width=256)
    optimizer = torch.optim.Adam(teacher.parameters(), lr=3e-3)
    for _ in range(80):
        optimizer.zero_grad()
        nn.functional.cross_entropy(teacher(images[:1500]), labels[:1500]).backward()
        optimizer.step()
    return teacher


class Distillation(BlockwiseDistillationModule):
    """All that has to be written: an optimizer, and here how to rate."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.trainable_parameters(), lr=1e-2)

    def validation_step(self, batch: list[torch.Tensor], batch_idx: int) -> None:
        for name, model in (("teacher", self.teacher), ("student", self.student)):
            self.log(f"{name} accuracy", (model(batch[0]).argmax(-1) == batch[1]).float().mean(), sync_dist=True)


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--devices", type=int, default=2)
    lightning.seed_everything(1)
    module = Distillation(train_teacher(), network(width=24), {"0": "0", "1": "1", "2": "2"})
    where: dict[str, Any] = {"strategy": "pipebd", "accelerator": "cpu", "devices": parser.parse_args().devices}
    trainer = lightning.Trainer(**where, max_epochs=15, logger=False, enable_checkpointing=False)
    trainer.fit(module, DataLoader(train, batch_size=50, shuffle=True))
    trainer.validate(module, DataLoader(held_out, batch_size=297))
