"""Distil torchvision's ResNet-18 into torchvision's MobileNetV2, both unchanged, cut at the paths of their modules.

    python examples/resnet_to_mobilenet.py                two CPU processes
    python examples/resnet_to_mobilenet.py --devices 1    one

The data are scikit-learn's handwritten digits, enlarged to 32 x 32 pixels. The teacher is trained on them for a moment
(kept in ``examples/.cache``); with images of your own you would begin with ``resnet18(weights="DEFAULT")``.

The two networks have different widths, so every boundary inside has two adapters, convolutions of one pixel: one that
lets the student's block be compared with the teacher's, one that makes the next student block's input of the teacher's
boundary. Afterwards both are put between the student's blocks, where together they do what the teacher's boundary did.

Joined, the blocks add up their errors, and their BatchNorm has seen the teacher's boundaries only. So the student is
fine-tuned as a whole for two epochs, as one does after blockwise distillation; beside it stands the same network that
was trained as long from its random weights.

The run ends with the accuracies on held-out digits. ``RESNET_EPOCHS=1 RESNET_IMAGES=200`` makes a short run,
``RESNET_CACHE`` names another folder for the teacher.
"""

from __future__ import annotations

import os
import tempfile
from argparse import ArgumentParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset
from torchvision.models import ResNet, mobilenet_v2, resnet18

from lightning_pipebd import BlockwiseDistillationModule

CACHE = Path(os.environ.get("RESNET_CACHE", Path(__file__).parent / ".cache"))
EPOCHS = int(os.environ.get("RESNET_EPOCHS", "8"))
NUM_IMAGES = int(os.environ.get("RESNET_IMAGES", "1797"))
TEACHER_EPOCHS, TUNING_EPOCHS = min(EPOCHS, 5), min(EPOCHS, 2)

# Same height and width on both sides: 8, 4 and 2 pixels for an image of 32, then the classes.
BLOCKS = {"layer1": "features.3", "layer2": "features.6", "layer3": "features.13", "fc": "classifier"}
CHANNELS = {"features.3": (64, 24), "features.6": (128, 32), "features.13": (256, 96)}  # the teacher's, the student's


class Digits(LightningDataModule):
    """1,797 images; every fifth is held out."""

    def setup(self, stage: str) -> None:
        pixels, labels = (array[:NUM_IMAGES] for array in load_digits(return_X_y=True))
        small = torch.from_numpy(pixels).float().view(-1, 1, 8, 8) / 16
        images, targets = F.interpolate(small, scale_factor=4).repeat(1, 3, 1, 1), torch.from_numpy(labels).long()
        is_held_out = torch.arange(len(targets)) % 5 == 0
        self.train = TensorDataset(images[~is_held_out], targets[~is_held_out])
        self.held_out = TensorDataset(images[is_held_out], targets[is_held_out])

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=64, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.held_out, batch_size=120)


def load_teacher() -> ResNet:
    """Give the trained teacher; train it where there is none yet."""
    teacher, path = resnet18(num_classes=10), CACHE / f"resnet_teacher_{TEACHER_EPOCHS}_epochs.pt"
    if not path.exists():
        train_teacher(path)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher


def train_teacher(path: Path) -> None:
    """Train the teacher on the labels, and keep it."""
    data = Digits()
    data.setup("fit")
    with isolate_rng():
        torch.manual_seed(0)
        teacher = resnet18(num_classes=10)
        train_on_labels(teacher, data, TEACHER_EPOCHS)
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(teacher.state_dict(), unfinished)
    unfinished.replace(path)


def train_on_labels(model: nn.Module, data: Digits, num_epochs: int) -> None:
    """Train a whole network as usual, without a teacher."""
    model.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    for _ in range(num_epochs):
        for images, labels in data.train_dataloader():
            optimizer.zero_grad()
            F.cross_entropy(model(images), labels).backward()
            optimizer.step()


def pixel_convolution(inputs: int, outputs: int) -> nn.Conv2d:
    """Map channels to channels, pixel by pixel."""
    return nn.Conv2d(inputs, outputs, kernel_size=1)


class ResNetToMobileNet(BlockwiseDistillationModule):
    """Four blocks; an adapter is named after the student's module that ends its block."""

    def __init__(self, lr: float = 3e-3) -> None:
        ends = list(BLOCKS.values())
        super().__init__(
            load_teacher(),
            mobilenet_v2(num_classes=10, dropout=0.0),
            BLOCKS,
            adapters={end: pixel_convolution(student, teacher) for end, (teacher, student) in CHANNELS.items()},
            input_adapters={following: pixel_convolution(*CHANNELS[end]) for end, following in pairwise(ends)},
            block_losses={"classifier": "kl"},
        )
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, 3, 32, 32)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trainable_parameters(), lr=self.hparams["lr"])
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["lr"], total_steps=num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def join_blocks(module: ResNetToMobileNet) -> nn.Module:
    """Give the student with both adapters of each boundary behind the block that ends there."""
    for block, end in enumerate(CHANNELS):
        outgoing, incoming = module.adapters[f"output_{block}"], module.adapters[f"input_{block + 1}"]
        joined = nn.Sequential(module.student.get_submodule(end), outgoing, incoming)
        module.student.set_submodule(end, joined)
    return module.student


def rate(model: nn.Module, data: Digits) -> float:
    """Give the accuracy on held-out digits."""
    images, labels = data.held_out.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(-1) == labels).float().mean())


def count(model: nn.Module) -> int:
    """Give the number of parameters."""
    return sum(parameter.numel() for parameter in model.parameters())


def distil(devices: int) -> None:
    """Distil over processes, then compare in the first one."""
    seed_everything(1)
    module, data = ResNetToMobileNet(), Digits()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="pipebd",
        max_epochs=EPOCHS,
        logger=False,
        enable_checkpointing=False,
    )
    trainer.fit(module, data)
    # Each process has trained its own blocks; a checkpoint holds them all, adapters included.
    with tempfile.TemporaryDirectory() as folder:
        path = trainer.strategy.broadcast(f"{folder}/trained.ckpt")
        trainer.save_checkpoint(path)
        if trainer.is_global_zero:
            module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
        trainer.strategy.barrier()
    if trainer.is_global_zero:
        trainer.print(compare(module, data))


def compare(module: ResNetToMobileNet, data: Digits) -> str:
    """Join and fine-tune the student, and give a table of all accuracies."""
    rows = [("teacher, ResNet-18", module.teacher, rate(module.teacher, data))]
    student = join_blocks(module)
    rows.append(("student, its blocks joined", student, rate(student, data)))
    train_on_labels(student, data, TUNING_EPOCHS)
    rows.append((f"student after {TUNING_EPOCHS} more epochs", student, rate(student, data)))
    alone = mobilenet_v2(num_classes=10, dropout=0.0)
    train_on_labels(alone, data, TUNING_EPOCHS)
    rows.append((f"MobileNetV2, {TUNING_EPOCHS} epochs, no teacher", alone, rate(alone, data)))
    lines = [f"{name:34}{accuracy:>9.1%}{count(model):>13,}" for name, model, accuracy in rows]
    return "\n".join(["", f"{'held-out digits':34}{'accuracy':>9}{'parameters':>13}", *lines])


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--devices", type=int, default=2)
    distil(parser.parse_args().devices)
