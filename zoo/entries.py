"""What is tried of a model: how it is made and divided, and what is promised for it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lightning_pipebd import BlockwiseDistillationModule

__all__ = ["Entry", "Imitation", "make_example", "make_module"]

Build = Callable[[], nn.Module]
ListBlocks = Callable[[nn.Module, Tensor], Sequence[nn.Module | Callable[..., Any]]]

TEACHER_SEED, STUDENT_SEED, DATA_SEED = 1, 2, 3


@dataclass(frozen=True, kw_only=True)
class Entry:
    """A teacher, a student, and a way to divide them.

    Args:
        teacher: Makes the teacher, with random weights.
        student: Makes the student; ``None`` makes another teacher.
        paths: Modules of the teacher that end a block.
        student_paths: Modules of the student that do, where they have other names.
        list_blocks: Makes the blocks of a model where there are no paths.
        way: How the blocks are made, in a word for the table.
        shape: Of one row of the input.
        adapters: Make the adapters of the module: those of outputs and those of inputs.
        first_try: Paths that one would try, and that are refused.
        refusal: What the refusal must say, a piece of the reason and of the way out each.
        is_trained: Whether it is trained, too, and not only divided and compared.
        further: What is tried beside a plan of whole blocks: ``"joint"``, ``"compile"``, or both.
        ends_inside: Whether the model goes on behind its last block.
        remark: For the table.
    """

    teacher: Build
    student: Build | None = None
    paths: tuple[str, ...] = ()
    student_paths: tuple[str, ...] = ()
    list_blocks: ListBlocks | None = None
    way: str = "`block_map`"
    shape: tuple[int, ...] = (3, 64, 64)
    adapters: Callable[[], tuple[Mapping[str | int, nn.Module], Mapping[str | int, nn.Module]]] | None = None
    first_try: tuple[str, ...] = ()
    refusal: tuple[str, ...] = ()
    is_trained: bool = True
    further: frozenset[str] = field(default_factory=frozenset)
    ends_inside: bool = False
    remark: str = ""


class Imitation(BlockwiseDistillationModule):
    """An entry's blocks with an optimizer whose steps are bounded and that does not enlarge rounding."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Give Adam with a large constant: gradients that are next to nothing move next to nothing."""
        return torch.optim.Adam(self.trainable_parameters(), lr=1e-3, eps=1e-3)


def make_example(entry: Entry, num_rows: int) -> Tensor:
    """Give an input, always the same."""
    generator = torch.Generator().manual_seed(DATA_SEED)
    return torch.randn(num_rows, *entry.shape, generator=generator)


def make_module(entry: Entry, *, compile: bool = False) -> Imitation:
    """Give teacher and student, divided; always with the same weights."""
    teacher = _seeded(TEACHER_SEED, entry.teacher)
    student = _seeded(STUDENT_SEED, entry.student or entry.teacher)
    example = make_example(entry, 2)
    options: dict[str, Any] = {"example_input": example}
    if compile:
        # What can be followed is the question here, not what it is translated to.
        options["compile"] = {"backend": "eager"}
    if entry.adapters is not None:
        options["adapters"], options["input_adapters"] = _seeded(STUDENT_SEED, entry.adapters)
    if entry.list_blocks is None:
        pairs = list(zip(entry.paths, entry.student_paths or entry.paths, strict=True))
        return Imitation(teacher, student, pairs, **options)
    blocks = [entry.list_blocks(model, example) for model in (teacher, student)]
    return Imitation(teacher, student, teacher_blocks=blocks[0], student_blocks=blocks[1], **options)


def _seeded(seed: int, make: Callable[[], Any]) -> Any:
    torch.manual_seed(seed)
    return make()
