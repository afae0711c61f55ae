"""Small teachers and students, and modules over them, that the tests train."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset, IterableDataset

from lightning_pipebd import BlockwiseDistillationModule, Candidates

__all__ = [
    "MODULES",
    "CandidatesModule",
    "ConvModule",
    "DropoutModule",
    "LinearModule",
    "ToyData",
    "ToyStream",
    "TransformerModule",
    "make_loader",
    "make_module",
]

NUM_CLASSES = 5


class ToyData(Dataset[tuple[Tensor, Tensor]]):
    """Rows that depend on nothing but their index; remembers which were asked for."""

    def __init__(self, num_rows: int, shape: tuple[int, ...], *, tokens: bool = False) -> None:
        generator = torch.Generator().manual_seed(5)
        if tokens:
            self.inputs = torch.randint(0, 17, (num_rows, *shape), generator=generator)
        else:
            self.inputs = torch.randn(num_rows, *shape, generator=generator, dtype=torch.float64).to(
                torch.get_default_dtype()
            )
        self.labels = torch.randint(0, NUM_CLASSES, (num_rows,), generator=generator)
        self.asked: list[int] = []

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        self.asked.append(index)
        return self.inputs[index], self.labels[index]


class ToyStream(IterableDataset[tuple[Tensor, Tensor]]):
    """The same rows as a stream without a length."""

    def __init__(self, data: ToyData) -> None:
        self.data = data

    def __iter__(self) -> Any:
        return (self.data[index] for index in range(len(self.data)))


def _conv(inputs: int, outputs: int, *, is_last_relu: bool = True) -> list[nn.Module]:
    relu: list[nn.Module] = [nn.ReLU(inplace=True)] if is_last_relu else []
    return [nn.Conv2d(inputs, outputs, 3, padding=1), nn.BatchNorm2d(outputs), *relu]


def _separable(inputs: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs), nn.Conv2d(inputs, outputs, 1), nn.ReLU(inplace=True)
    )


class _Classifier(nn.Module):
    """Convolutional blocks, then pooling by a function between modules, then logits."""

    def __init__(self, *blocks: nn.Module, width: int) -> None:
        super().__init__()
        self.features = nn.Sequential(*blocks)
        self.head = nn.Linear(width, NUM_CLASSES)

    def forward(self, x: Tensor) -> Any:
        return self.head(torch.flatten(nn.functional.adaptive_avg_pool2d(self.features(x), 1), 1))


class _ToyModule(BlockwiseDistillationModule):
    def configure_optimizers(self) -> Any:
        parameters = self.trainable_parameters()
        groups: list[dict[str, Any]] = [{"params": parameters[::2]}, {"params": parameters[1::2], "weight_decay": 0.1}]
        optimizer = torch.optim.AdamW(groups, lr=0.01)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=40)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        inputs, labels = batch
        logits = self(inputs)
        logits = logits[0][:, -1, :NUM_CLASSES] if isinstance(logits, tuple) else logits
        self.log("val_acc", (logits.argmax(-1) == labels).double().mean(), batch_size=len(labels))

    test_step = validation_step

    def predict_step(self, batch: Any, batch_idx: int) -> Any:
        return self(batch[0])


class ConvModule(_ToyModule):
    """Six blocks: a VGG-like teacher with BatchNorm, a depthwise-separable student without."""

    shape = (3, 8, 8)
    tokens = False

    def __init__(self) -> None:
        teacher = _Classifier(*_conv(3, 8), *_conv(8, 8), nn.MaxPool2d(2), *_conv(8, 12), *_conv(12, 12), width=12)
        student = _Classifier(*(_separable(*pair) for pair in ((3, 8), (8, 8), (8, 12), (12, 12))), width=12)
        student.features.insert(2, nn.MaxPool2d(2))
        paths = {"features.2": "features.0", "features.5": "features.1", "features.9": "features.3"}
        super().__init__(
            teacher,
            student,
            {**paths, "features.12": "features.4", "head": "head"},
            target_blocks=["head"],
        )

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        loss = super().block_loss(block, student_output, teacher_output, targets)
        return loss if targets is None else loss + nn.functional.cross_entropy(student_output, targets)


class DropoutModule(_ToyModule):
    """Four blocks whose student has BatchNorm and dropout."""

    shape = (3, 8, 8)
    tokens = False

    def __init__(self) -> None:
        def student_block(inputs: int, outputs: int) -> nn.Sequential:
            return nn.Sequential(*_conv(inputs, outputs), nn.Dropout(0.3))

        teacher = _Classifier(*(nn.Sequential(*_conv(*pair)) for pair in ((3, 8), (8, 8), (8, 8))), width=8)
        student = _Classifier(*(student_block(*pair) for pair in ((3, 8), (8, 8), (8, 8))), width=8)
        paths = {f"features.{index}": f"features.{index}" for index in range(3)}
        super().__init__(teacher, student, {**paths, "head": "head"}, block_losses={"head": "kl"})


class LinearModule(_ToyModule):
    """Four blocks without anything that couples rows or draws numbers."""

    shape = (6,)
    tokens = False

    def __init__(self) -> None:
        teacher = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)), nn.Linear(6, NUM_CLASSES)
        )
        student = nn.Sequential(
            *(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(3)), nn.Linear(6, NUM_CLASSES)
        )
        super().__init__(teacher, student, {str(index): str(index) for index in range(4)})


class _Embedding(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.tokens = nn.Embedding(17, width)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        length = tokens.shape[1]
        mask = torch.full((length, length), float("-inf")).triu(1)
        angles = torch.arange(length, dtype=torch.get_default_dtype())[:, None] / 3
        return self.tokens(tokens), mask, (angles.cos(), angles.sin())


class _Decoder(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, hidden), nn.GELU(), nn.Linear(hidden, width))
        self.dropout = nn.Dropout(0.1)

    def forward(self, hidden: Tensor, mask: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Any, ...]:
        cos, sin = rotary
        q, k, v = self.qkv(hidden).chunk(3, dim=-1)
        q, k = q * cos + q.flip(-1) * sin, k * cos + k.flip(-1) * sin
        weights = (q @ k.transpose(1, 2) / q.shape[-1] ** 0.5 + mask).softmax(-1)
        hidden = hidden + self.dropout(self.out(weights @ v))
        return hidden + self.mlp(hidden), mask, rotary


class _Transformer(nn.Module):
    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.embedding = _Embedding(width)
        self.layers = nn.ModuleList(_Decoder(width, hidden) for _ in range(3))

    @property
    def blocks(self) -> list[nn.Module]:
        return [self.embedding, *self.layers]

    def forward(self, tokens: Tensor) -> Any:
        boundary = self.embedding(tokens)
        for layer in self.layers:
            boundary = layer(*boundary)
        return boundary


class TransformerModule(_ToyModule):
    """A decoder-only transformer; its boundaries are hidden states, a mask and rotary tables.

    The sequence is as long as a batch has rows, so that only a second row count tells a mask from hidden states.
    """

    shape = (8,)
    tokens = True

    def __init__(self, dropout: float = 0.1) -> None:
        teacher, student = _Transformer(8, 32), _Transformer(8, 8)
        for layer in student.layers:
            layer.get_submodule("dropout").p = dropout  # type: ignore[assignment]  # a float attribute
        super().__init__(teacher, student, teacher_blocks=teacher.blocks, student_blocks=student.blocks)


class CandidatesModule(_ToyModule):
    """Seven blocks in four places: a stem, three and two candidates, a head; one candidate begins in place."""

    shape = (3, 8, 8)
    tokens = False

    def __init__(self) -> None:
        teacher = _Classifier(*(nn.Sequential(*_conv(*pair)) for pair in ((3, 8), (8, 8), (8, 8))), width=8)
        first = [
            nn.Sequential(nn.ReLU(inplace=True), *_conv(8, 8)),
            _separable(8, 8),
            nn.Sequential(nn.Conv2d(8, 8, 1)),
        ]
        second = [nn.Sequential(*_conv(8, 8), nn.Dropout(0.3)), _separable(8, 8)]
        student = _Classifier(_separable(3, 8), Candidates(first), Candidates(second, chosen=1), width=8)
        paths = {f"features.{index}": f"features.{index}" for index in range(3)}
        super().__init__(teacher, student, {**paths, "head": "head"}, target_blocks=["features.2"])

    def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Tensor:
        loss = super().block_loss(block, student_output, teacher_output)
        return loss if targets is None else loss + 0.01 * (student_output.mean((1, 2, 3)) - targets).square().mean()


MODULES: dict[str, Callable[[], Any]] = {
    "candidates": CandidatesModule,
    "conv": ConvModule,
    "dropout": DropoutModule,
    "linear": LinearModule,
    "transformer": TransformerModule,
    "transformer-no-dropout": partial(TransformerModule, dropout=0.0),
}


def make_module(name: str) -> Any:
    """Build a module with the same weights wherever it is built."""
    torch.manual_seed(11)
    return MODULES[name]()


def make_loader(
    module: Any, num_rows: int, batch_size: int, *, shuffle: bool = False, stream: bool = False
) -> DataLoader[Any]:
    """Make a loader of rows that fit the module."""
    data = ToyData(num_rows, module.shape, tokens=module.tokens)
    if stream:
        return DataLoader(ToyStream(data), batch_size=batch_size)
    return DataLoader(data, batch_size=batch_size, shuffle=shuffle)
