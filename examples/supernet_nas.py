"""Search an architecture block by block: every block of the student has candidates, all trained at once.

    python examples/supernet_nas.py            # --devices 1 trains in one process: the same student

A digits teacher is imitated by a student whose three inner blocks each have three candidates: a plain convolution, a
depthwise-separable one and a narrow bottleneck. Each candidate learns by itself from the teacher's activations (DNA,
arXiv:1911.13053; Puzzle, arXiv:2411.19146), spread over the ranks like any other block. Afterwards every candidate is
rated on held-out digits, the best ones within a number of parameters are put together, and the whole is fine-tuned.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))
from examples.digits import DigitsData, Network, load_teacher, one_cycle
from lightning_pipebd import BlockwiseDistillationModule, Candidates
from lightning_pipebd.planning.selection import select_candidates

PLACES = ("stage2", "stage3", "stage4")


def separable(inputs: int, outputs: int) -> nn.Sequential:
    """Depthwise, then pointwise."""
    depthwise = nn.Conv2d(inputs, inputs, 3, padding=1, groups=inputs, bias=False)
    return nn.Sequential(depthwise, nn.Conv2d(inputs, outputs, 1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def bottleneck(inputs: int, outputs: int) -> nn.Sequential:
    """Narrow in the middle."""
    narrow = nn.Conv2d(inputs, 8, 1, bias=False)
    return nn.Sequential(narrow, nn.Conv2d(8, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU())


def plain(inputs: int, outputs: int) -> nn.Sequential:
    """One ordinary convolution."""
    convolution = nn.Conv2d(inputs, outputs, 3, padding=1, bias=False)
    return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())


def student_stage(inputs: int, outputs: int) -> nn.Module:
    """A small first stage without a choice; three candidates for every other stage."""
    if inputs == 1:
        return plain(inputs, outputs)
    return Candidates([make(inputs, outputs) for make in (plain, separable, bottleneck)])


class Supernet(BlockwiseDistillationModule):
    """Eleven blocks: the first stage, three candidates at three places, the classifier."""

    def __init__(self) -> None:
        paths = ("stage1", *PLACES, "classifier")
        super().__init__(load_teacher(), Network(student_stage), {path: path for path in paths})
        self.example_input_array = torch.zeros(2, 1, 8, 8)

    def configure_optimizers(self) -> Any:
        return one_cycle(self, torch.optim.AdamW(self.student.parameters()), lr=1e-2)


class Finetune(BlockwiseDistillationModule):
    """The chosen student as one block: its logits imitate the teacher's."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__(load_teacher(), student, {"classifier": "classifier"}, block_losses={"classifier": "kl"})

    def configure_optimizers(self) -> Any:
        return one_cycle(self, torch.optim.AdamW(self.student.parameters()), lr=5e-3)


def rate(module: Supernet, data: DigitsData) -> dict[str, list[tuple[float, int]]]:
    """Give loss and number of parameters of every candidate of every place."""
    module.eval()
    scores: dict[str, list[tuple[float, int]]] = {place: [] for place in PLACES}
    losses = module.rate_blocks(data.held_out.tensors)
    for block, (candidate, loss) in enumerate(zip(module.block_pairs.candidates, losses, strict=True)):
        if candidate is not None:
            size = sum(parameter.numel() for parameter in module.block_parameters(block))
            scores[candidate.place].append((loss.item(), size))
    return scores


def assemble(supernet: nn.Module, chosen: dict[str, int]) -> nn.Module:
    """Put the chosen candidates where the places were."""
    student = Network(plain)
    # The first stage and the classifier; the places have other names.
    student.load_state_dict(supernet.state_dict(), strict=False)
    for place, number in chosen.items():
        setattr(student, place, supernet.get_submodule(place).get_submodule(f"candidates.{number}"))
    return student


def accuracy(model: nn.Module, data: DigitsData) -> float:
    """Give the share of held-out digits that are recognised."""
    images, labels = data.held_out.tensors
    with torch.no_grad():
        return float((model.eval()(images).argmax(-1) == labels).float().mean())


def make_trainer(epochs: int, devices: int) -> Trainer:
    """Everything quiet, so that the table is what one sees."""
    strategy = "pipebd" if devices > 1 else "auto"
    quiet: dict[str, Any] = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar"), False)
    return Trainer(
        accelerator="cpu", devices=devices, strategy=strategy, max_epochs=epochs, enable_model_summary=False, **quiet
    )


def write(text: str) -> None:
    """Write a line of the table."""
    sys.stdout.write(f"{text}\n")


def main() -> None:
    """Train, rate, choose, fine-tune."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--devices", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=12)
    parser.add_argument("--max-parameters", type=int, default=40_000, help="of the chosen candidates together")
    arguments = parser.parse_args()
    seed_everything(1, verbose=False)
    module, data = Supernet(), DigitsData()
    trainer = make_trainer(arguments.epochs, arguments.devices)
    trainer.fit(module, data)
    if not trainer.is_global_zero:
        return
    scores = rate(module, data)
    losses, sizes = ([[score[side] for score in scores[place]] for place in PLACES] for side in (0, 1))
    chosen = dict(zip(PLACES, select_candidates(losses, sizes, arguments.max_parameters), strict=True))
    write(f"\n{'place':8}{'candidate':>16}{'loss':>10}{'parameters':>12}")
    for place, candidates in scores.items():
        for number, (loss, size) in enumerate(candidates):
            name = ("plain", "separable", "bottleneck")[number]
            mark = "  <-- chosen" if chosen[place] == number else ""
            write(f"{place:8}{name:>16}{loss:>10.4f}{size:>12,}{mark}")
    student = assemble(module.student, chosen)
    before = accuracy(student, data)
    make_trainer(arguments.epochs, 1).fit(Finetune(student), data.train_dataloader())
    teacher = load_teacher()
    for name, model in (("teacher", teacher), ("student", student)):
        size = sum(parameter.numel() for parameter in model.parameters())
        write(f"{name}: {size:,} parameters, accuracy {accuracy(model, data):.1%}")
    write(f"student before fine-tuning: {before:.1%}")


if __name__ == "__main__":
    main()
