"""Four pairs of teacher and student with their data: what is distilled in the comparison."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset
from torchvision.models.mobilenetv2 import MobileNetV2

from lightning_pipebd import BlockwiseDistillationModule

__all__ = [
    "MOBILENET_PATHS",
    "WORKLOADS",
    "Distil",
    "Rows",
    "SomeBlocks",
    "Workload",
    "convolutions",
    "decoder",
    "mobilenet",
    "separable",
    "vgg",
]

_NUM_STORED = 16
_VOCABULARY = 512


def convolutions(pairs: list[tuple[int, int]]) -> list[nn.Module]:
    """Give convolutions of 3 x 3."""
    return [layer for pair in pairs for layer in (nn.Conv2d(*pair, 3, padding=1), nn.ReLU())]


def separable(pairs: list[tuple[int, int]]) -> list[nn.Module]:
    """Give convolutions of 3 x 3, depthwise-separable."""
    layers: list[nn.Module] = []
    for inputs, outputs in pairs:
        layers += [nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv2d(inputs, outputs, 1), nn.ReLU()]
    return layers


def vgg(make_layers: Callable[[list[tuple[int, int]]], list[nn.Module]], width: int) -> nn.Module:
    """Give VGG-16, thirteen convolutions in five stages, and a classifier, for images of 32 x 32 pixels."""
    stages: list[nn.Module] = []
    inputs = 3
    for factor, num_layers in ((1, 2), (2, 2), (4, 3), (8, 3), (8, 3)):
        outputs = factor * width
        pairs = [(inputs, outputs), *[(outputs, outputs)] * (num_layers - 1)]
        stages.append(nn.Sequential(*make_layers(pairs), nn.MaxPool2d(2)))
        inputs = outputs
    return nn.Sequential(*stages, nn.Sequential(nn.Flatten(), nn.Linear(inputs, 10)))


def mobilenet(expansion: int) -> nn.Module:
    """Give MobileNetV2 with another factor of expansion."""
    layers = [(1, 16, 1, 1), *((expansion, *rest) for rest in _MOBILENET_STAGES)]
    network: nn.Module = MobileNetV2(inverted_residual_setting=[list(layer) for layer in layers])
    return network


_MOBILENET_STAGES = ((24, 2, 2), (32, 3, 2), (64, 4, 2), (96, 3, 1), (160, 3, 2), (320, 1, 1))
MOBILENET_PATHS = [*(f"features.{last}" for last in (1, 3, 6, 10, 13, 16, 18)), "classifier"]


def thin(num_blocks: int, num_layers: int) -> nn.Module:
    """Many convolutions with next to nothing to compute: a call costs more than the work in it."""
    blocks = [nn.Sequential(nn.Conv2d(3, 8, 1))]
    blocks += [nn.Sequential(*convolutions([(8, 8)] * num_layers)) for _ in range(num_blocks - 1)]
    return nn.Sequential(*blocks)


class DecoderLayer(nn.Module):
    """Causal attention and a feed-forward network, each around its residual connection."""

    def __init__(self, width: int, num_heads: int, hidden: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(width)
        self.mix = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.feed = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))

    def forward(self, hidden: Tensor) -> Tensor:
        parts = self.mix(self.norm(hidden)).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        hidden = hidden + self.out(mixed.transpose(1, 2).flatten(-2))
        output: Tensor = hidden + self.feed(hidden)
        return output


class Embedding(nn.Module):
    """Tokens and their places."""

    def __init__(self, width: int, length: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(_VOCABULARY, width)
        self.places = nn.Parameter(torch.randn(length, width))

    def forward(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.tokens(tokens) + self.places
        return embedded


def decoder(hidden: int, *, width: int = 192, num_layers: int = 8, length: int = 64, num_heads: int = 4) -> nn.Module:
    """A decoder transformer; the first block embeds too, and the last one makes logits."""
    layers = [DecoderLayer(width, num_heads, hidden) for _ in range(num_layers)]
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, _VOCABULARY, bias=False))
    return nn.Sequential(nn.Sequential(Embedding(width, length), layers[0]), *layers[1:], head)


def perceptron(hidden: int, *, width: int = 1024, num_blocks: int = 8) -> nn.Module:
    """Two linear layers per block, with nearly all of the memory in their weights."""
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(width, hidden), nn.ReLU(), nn.Linear(hidden, width)) for _ in range(num_blocks))
    )


class Rows(Dataset[Tensor]):
    """As many rows as wanted, of which a few are different.

    Args:
        example: A row.
        num_rows: How many.
    """

    def __init__(self, example: Tensor, num_rows: int) -> None:
        if example.is_floating_point():
            self._stored = torch.randn(_NUM_STORED, *example.shape)
        else:
            self._stored = torch.randint(_VOCABULARY, (_NUM_STORED, *example.shape))
        self._num_rows = num_rows

    def __len__(self) -> int:
        return self._num_rows

    def __getitem__(self, index: int) -> Tensor:
        return self._stored[index % _NUM_STORED]


@dataclass(frozen=True)
class Workload:
    """A pair of models and its batches.

    Args:
        description: In words.
        models: Makes teacher and student.
        paths: Where both are cut.
        batch_size: Rows of the whole batch.
        example: Makes a row.
        losses: Loss of blocks by path; the others have the mean squared error.
    """

    description: str
    models: Callable[[], tuple[nn.Module, nn.Module]]
    paths: list[str]
    batch_size: int
    example: Callable[[], Tensor]
    losses: Mapping[str | int, str | Callable[[Any, Any], Tensor]]


def _indices(num_blocks: int) -> list[str]:
    return [str(block) for block in range(num_blocks)]


WORKLOADS = {
    "vgg": Workload(
        "CIFAR-shaped: VGG-16 of half width, student of depthwise-separable convolutions; 6 blocks, 32 rows",
        lambda: (vgg(convolutions, 32), vgg(separable, 32)),
        _indices(6),
        32,
        partial(torch.zeros, 3, 32, 32),
        {"5": "soft_cross_entropy"},
    ),
    "mobilenet": Workload(
        "ImageNet-shaped: MobileNetV2, student with half the expansion, BatchNorm in both; 8 blocks, 4 rows",
        lambda: (mobilenet(6), mobilenet(3)),
        MOBILENET_PATHS,
        4,
        partial(torch.zeros, 3, 224, 224),
        {"classifier": "soft_cross_entropy"},
    ),
    "thin": Workload(
        "bound by calls: convolutions of 8 channels on 8 x 8 pixels; 8 blocks, 4 rows",
        lambda: (thin(8, 6), thin(8, 4)),
        _indices(8),
        4,
        partial(torch.zeros, 3, 8, 8),
        {},
    ),
    "decoder": Workload(
        "decoder transformer, 8 layers, 64 tokens, student with a quarter of the feed-forward width; 9 blocks, 8 rows",
        lambda: (decoder(768), decoder(192)),
        _indices(9),
        8,
        partial(torch.zeros, 64, dtype=torch.long),
        {"8": "soft_cross_entropy"},
    ),
    "teacher-heavy": Workload(
        "teacher of 268 MB, student of 17 MB; 8 blocks, 16 rows",
        lambda: (perceptron(4096), perceptron(256)),
        _indices(8),
        16,
        partial(torch.zeros, 1024),
        {},
    ),
    "tiny": Workload(
        "three blocks that take no time, to see that everything runs",
        lambda: (thin(3, 1), thin(3, 1)),
        _indices(3),
        4,
        partial(torch.zeros, 3, 8, 8),
        {},
    ),
}
"""The pairs; the last but one is for the measurement of memory, and the last one for no measurement."""


class Distil(BlockwiseDistillationModule):
    """A workload's pair.

    Args:
        workload: The workload, or its name.
        options: Of the module.
    """

    def __init__(self, workload: str | Workload, **options: Any) -> None:
        chosen = WORKLOADS[workload] if isinstance(workload, str) else workload
        teacher, student = chosen.models()
        paths = dict(zip(chosen.paths, chosen.paths, strict=True))
        super().__init__(teacher, student, paths, block_losses=chosen.losses, **options)
        self.workload = chosen

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.trainable_parameters(), lr=1e-4)


class SomeBlocks(Distil):
    """Trains some of the blocks, and runs the teacher from its beginning to the last of them.

    Args:
        name: Of the workload.
        blocks: To train.
    """

    def __init__(self, name: str, blocks: tuple[int, ...]) -> None:
        super().__init__(name)
        self.blocks = blocks
        for block in set(range(self.num_blocks)) - set(blocks):
            for parameter in self.block_parameters(block):
                parameter.requires_grad_(False)

    def training_step(self, batch: Any, batch_idx: int) -> dict[str, Tensor]:
        """Like the module's own, without what the blocks do not need."""
        boundary, targets = self.unpack_batch(batch)
        coordinates = {"epoch": self.trainer.current_epoch, "batch_idx": batch_idx}
        num_rows = len(boundary)
        losses: dict[int, Tensor] = {}
        for block in range(max(self.blocks) + 1):
            teacher_output = self.teach(block, boundary)
            if block in self.blocks:
                losses[block] = self.imitate(block, boundary, teacher_output, targets, **coordinates)
            boundary = teacher_output
        total = torch.stack(list(losses.values())).sum()
        self._log_losses({block: loss.detach() for block, loss in losses.items()}, total.detach(), num_rows)
        return {"loss": total}
