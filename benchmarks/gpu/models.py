"""What is distilled on one device: pairs of the size that GPUs are used for, and small ones of the same make."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import nn

from benchmarks.baselines.models import MOBILENET_PATHS, Workload, convolutions, decoder, mobilenet, separable, vgg

__all__ = ["MODELS", "SMALL_MODELS"]


def _vgg(width: int, rows: int) -> Workload:
    return Workload(
        f"VGG-16 of width {width}, student of depthwise-separable convolutions; 6 blocks, {rows} rows of 32 x 32",
        lambda: (vgg(convolutions, width), vgg(separable, width)),
        [str(block) for block in range(6)],
        rows,
        partial(torch.zeros, 3, 32, 32),
        {"5": "soft_cross_entropy"},
    )


def _mobilenet(size: int, rows: int) -> Workload:
    return Workload(
        f"MobileNetV2 of torchvision, student with half the expansion; 8 blocks, {rows} rows of {size} x {size}",
        lambda: (mobilenet(6), mobilenet(3)),
        MOBILENET_PATHS,
        rows,
        partial(torch.zeros, 3, size, size),
        {"classifier": "soft_cross_entropy"},
    )


def _decoder(width: int, num_layers: int, num_heads: int, length: int, rows: int) -> Workload:
    def make(hidden: int) -> nn.Module:
        return decoder(hidden, width=width, num_layers=num_layers, length=length, num_heads=num_heads)

    return Workload(
        f"decoder of {num_layers} layers of width {width}, student with a quarter of the feed-forward width; "
        f"{num_layers + 1} blocks, {rows} rows of {length} tokens, random weights",
        lambda: (make(4 * width), make(width)),
        [str(block) for block in range(num_layers + 1)],
        rows,
        partial(torch.zeros, length, dtype=torch.long),
        {str(num_layers): "soft_cross_entropy"},
    )


MODELS: dict[str, Callable[[], Workload]] = {
    "vgg": partial(_vgg, 64, 256),
    "mobilenet": partial(_mobilenet, 224, 64),
    # Twenty layers of fifty million parameters: the teacher has 1.0e9.
    "decoder": partial(_decoder, 2048, 20, 16, 512, 8),
}
SMALL_MODELS: dict[str, Callable[[], Workload]] = {
    "vgg": partial(_vgg, 8, 4),
    "mobilenet": partial(_mobilenet, 64, 2),
    "decoder": partial(_decoder, 64, 2, 4, 16, 2),
}
"""The same under ``--small``: they show that everything runs."""
