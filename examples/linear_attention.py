"""Replace the softmax attention of a small language model by linear attention, block by block.

    python examples/linear_attention.py                two CPU processes
    python examples/linear_attention.py --devices 1    one

The text is Python's own standard library, byte by byte. A decoder with softmax attention is trained on it for a moment
(kept in ``examples/.cache``). The student begins as its copy with another attention, whose cost
grows with the length of the text and not with its square, and learns, layer by layer, to give what the teacher's layer
gives. The idea is that of LoLCATs (arXiv:2410.10254), which trains only what is new; here the whole block learns, and
the second stage of LoLCATs, fine-tuning of the whole model, is left out. All in all it takes two minutes or three.

The run ends with three losses on held-out files: the teacher's, the student's before and the student's after.
``LINEAR_ATTENTION_STEPS=4`` makes a short run, ``LINEAR_ATTENTION_CACHE`` names another folder for the teacher.
"""

from __future__ import annotations

import copy
import math
import os
import sysconfig
from argparse import ArgumentParser
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from lightning.pytorch import LightningDataModule, Trainer, seed_everything
from lightning.pytorch.utilities.seed import isolate_rng
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import BlockwiseDistillationModule

CACHE = Path(os.environ.get("LINEAR_ATTENTION_CACHE", Path(__file__).parent / ".cache"))
STEPS = int(os.environ.get("LINEAR_ATTENTION_STEPS", "800"))
NUM_BYTES, LENGTH, WIDTH, NUM_HEADS, NUM_LAYERS, BATCH_SIZE = 256, 96, 64, 4, 4, 16
BLOCKS = {"layers.0": "layers.0", "layers.1": "layers.1", "layers.2": "layers.2", "head": "head"}


class SourceText(LightningDataModule):
    """The standard library's top-level modules as rows of 96 bytes; every tenth file is held out."""

    def setup(self, stage: str) -> None:
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        self.train = self._cut([file for number, file in enumerate(files) if number % 10])
        self.held_out = self._cut(files[::10])

    def _cut(self, files: list[Path]) -> TensorDataset:
        text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8).long()
        rows = text[: len(text) // (LENGTH + 1) * (LENGTH + 1)].view(-1, LENGTH + 1)
        return TensorDataset(rows[:, :-1], rows[:, 1:])  # a byte's label is the next byte

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, batch_size=BATCH_SIZE, shuffle=True, drop_last=True)

    def val_dataloader(self) -> DataLoader[Any]:
        first = TensorDataset(*(tensor[:256] for tensor in self.held_out.tensors))
        return DataLoader(first, batch_size=64)


class SoftmaxAttention(nn.Module):
    """What everybody uses: every byte looks at all earlier ones."""

    def __init__(self) -> None:
        super().__init__()
        self.mix = nn.Linear(WIDTH, 3 * WIDTH)
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Any:
        num_rows, length, _ = hidden.shape
        query, key, value = self.mix(hidden).view(num_rows, length, 3, NUM_HEADS, -1).permute(2, 0, 3, 1, 4)
        return self.out(self.attend(query, key, value).transpose(1, 2).reshape(num_rows, length, WIDTH))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True)


class LinearAttention(SoftmaxAttention):
    """Attention whose weights are products of positive features of query and key."""

    def __init__(self) -> None:
        super().__init__()
        # Features begin as the heads' own coordinates, so that training starts near what the copied weights mean.
        self.features = nn.Parameter(torch.eye(WIDTH // NUM_HEADS).repeat(NUM_HEADS, 1, 1))

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        # The same sums as a recurrence over `key^T value`, written as a product of matrices: faster for 96 bytes.
        weights = (self._map(query) @ self._map(key).transpose(-1, -2)).tril()
        return weights @ value / weights.sum(dim=-1, keepdim=True)

    def _map(self, part: Tensor) -> Tensor:
        mapped = part @ self.features
        return torch.cat([mapped.softmax(dim=-1), (-mapped).softmax(dim=-1)], dim=-1)


class Layer(nn.Module):
    """Attention and a feed-forward network, as in any decoder."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(WIDTH)
        self.attention = SoftmaxAttention()
        self.feed = nn.Sequential(
            nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 3 * WIDTH), nn.GELU(), nn.Linear(3 * WIDTH, WIDTH)
        )

    def forward(self, hidden: Tensor) -> Any:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.feed(hidden)


class Decoder(nn.Module):
    """A language model over bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(NUM_BYTES, WIDTH)
        self.positions = nn.Parameter(0.02 * torch.randn(LENGTH, WIDTH))
        self.layers = nn.Sequential(*(Layer() for _ in range(NUM_LAYERS)))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, NUM_BYTES)

    def forward(self, tokens: Tensor) -> Any:
        return self.head(self.norm(self.layers(self.embedding(tokens) + self.positions)))


def next_byte_loss(logits: Tensor, targets: Tensor) -> Tensor:
    """Give the mean cross-entropy per byte."""
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


def load_teacher() -> Decoder:
    """Give the trained teacher; train it where there is none yet."""
    teacher, path = Decoder(), CACHE / f"linear_attention_teacher_{STEPS}_steps.pt"
    if not path.exists():
        train_teacher(path)
    teacher.load_state_dict(torch.load(path, weights_only=True))
    return teacher


def train_teacher(path: Path) -> None:
    """Train the teacher to predict the next byte, and keep it."""
    data = SourceText()
    data.setup("fit")
    with isolate_rng():
        torch.manual_seed(0)
        teacher, rows = Decoder(), iter(data.train_dataloader())
        optimizer = torch.optim.AdamW(teacher.parameters())
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 5e-3, total_steps=STEPS)
        for _ in range(STEPS):
            tokens, targets = next(rows)
            optimizer.zero_grad()
            next_byte_loss(teacher(tokens), targets).backward()
            optimizer.step()
            schedule.step()
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(f".{os.getpid()}")
    torch.save(teacher.state_dict(), unfinished)
    unfinished.replace(path)


def with_linear_attention(teacher: Decoder) -> Decoder:
    """Copy a decoder, weights included, and give every layer the other attention."""
    student = copy.deepcopy(teacher)
    for path in [f"layers.{number}.attention" for number in range(NUM_LAYERS)]:
        attention = LinearAttention()
        attention.load_state_dict(teacher.get_submodule(path).state_dict(), strict=False)  # `features` alone is new
        student.set_submodule(path, attention)
    return student


class LinearizeAttention(BlockwiseDistillationModule):
    """Layers imitate layers; the last block ends in logits and is compared as such."""

    def __init__(self, lr: float = 2e-3) -> None:
        teacher = load_teacher()
        super().__init__(teacher, with_linear_attention(teacher), BLOCKS, block_losses={"head": "kl"})
        self.save_hyperparameters()
        self.example_input_array = torch.zeros(2, LENGTH, dtype=torch.long)

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.trainable_parameters(), lr=self.hparams["lr"])
        num_steps = int(self.trainer.estimated_stepping_batches)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, self.hparams["lr"], total_steps=num_steps)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        tokens, targets = batch
        for name, model in (("teacher_loss", self.teacher), ("student_loss", self.student)):
            self.log(name, next_byte_loss(model(tokens), targets), sync_dist=True)


def distil(devices: int) -> None:
    """Rate, distil, rate again."""
    seed_everything(1)
    module, data = LinearizeAttention(), SourceText()
    trainer = Trainer(
        accelerator="cpu",
        devices=devices,
        strategy="pipebd",
        max_steps=STEPS // 2,
        logger=False,
        enable_checkpointing=False,
    )
    before = trainer.validate(module, data, verbose=False)[0]
    trainer.fit(module, data)
    after = trainer.validate(module, data, verbose=False)[0]
    losses = {
        "teacher, softmax attention": after["teacher_loss"],
        "student before, linear attention": before["student_loss"],
        "student after, linear attention": after["student_loss"],
    }
    trainer.print(f"\n{'held-out files':34}{'loss per byte':>14}{'perplexity':>12}")
    for name, loss in losses.items():
        trainer.print(f"{name:34}{loss:>14.3f}{math.exp(loss):>12.2f}")


if __name__ == "__main__":
    parser = ArgumentParser()
    parser.add_argument("--devices", type=int, default=2)
    distil(parser.parse_args().devices)
