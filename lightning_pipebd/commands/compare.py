"""Two runs compared block by block: what differs, by how much, and how far that is beside the way trained."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from typing_extensions import override

from lightning_pipebd.commands.pipeline_answer import pipeline_entries
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.teacher_student import TeacherStudentModule

__all__ = ["BITWISE", "DIFFERS", "WITHIN", "BlockComparison", "SaveRun", "compare_runs"]

BITWISE, WITHIN, DIFFERS = "bitwise", "within", "differs"
_INITIAL, _FINAL, _BLOCKS = "initial.pt", "final.ckpt", "blocks.json"


class SaveRun(Callback):
    """Save what a comparison needs: the weights before, the checkpoint after, and which block each entry belongs to.

    Args:
        folder: Where to; made if it is not there.
    """

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    @override
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the weights that training begins with."""
        if trainer.is_global_zero:
            self._folder.mkdir(parents=True, exist_ok=True)
            torch.save(pl_module.state_dict(), self._folder / _INITIAL)

    @override
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """**Collective** over all ranks: save the checkpoint."""
        trainer.save_checkpoint(self._folder / _FINAL)
        if trainer.is_global_zero:
            blocks = list(_find_entries(pl_module, trainer))
            (self._folder / _BLOCKS).write_text(json.dumps(blocks))


def _entries(module: LightningModule) -> Iterable[tuple[str, list[nn.Parameter], list[Tensor]]]:
    if isinstance(module, TeacherStudentModule):
        yield from pipeline_entries(module)
        return
    assert isinstance(module, BlockwiseDistillationModule)
    for block, name in enumerate(module.block_pairs.names):
        yield name, module.block_parameters(block), module.block_buffers(block)


def _find_entries(module: LightningModule, trainer: Trainer) -> Iterable[dict[str, Any]]:
    names = {id(value): name for name, value in module.state_dict(keep_vars=True).items()}
    numbers = {}
    for index, optimizer in enumerate(trainer.optimizers):
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        numbers.update({id(parameter): (index, number) for number, parameter in enumerate(parameters)})
    for name, parameters, buffers in _entries(module):
        yield {
            "name": name,
            "parameters": [names[id(parameter)] for parameter in parameters],
            # A buffer that is not saved (persistent=False) is nothing that training changes.
            "buffers": [names[id(buffer)] for buffer in buffers if id(buffer) in names],
            "optimizer": [numbers[id(parameter)] for parameter in parameters if id(parameter) in numbers],
        }


@dataclass(frozen=True, slots=True)
class BlockComparison:
    """How one block's state differs between two runs.

    Args:
        block: Name of the block.
        verdict: ``"bitwise"``, ``"within"`` the tolerance, or ``"differs"``.
        parameters: Greatest difference of a parameter's element.
        buffers: Greatest difference of a buffer's element.
        optimizer: Greatest difference of an element of the optimizer's state.
        share_of_way: Length of the difference of all parameters, divided by that of the way they were trained.
    """

    block: str
    verdict: str
    parameters: float
    buffers: float
    optimizer: float
    share_of_way: float

    def to_dict(self) -> dict[str, Any]:
        """Describe the comparison in strings and numbers."""
        return asdict(self)


def compare_runs(first: Path, second: Path, *, tolerance: float) -> list[BlockComparison]:
    """Compare two runs that :class:`SaveRun` saved; the first must be one process's.

    Args:
        first: Folder of the reference.
        second: Folder of the run to judge.
        tolerance: Greatest difference that counts as rounding, as a share of the way trained.

    Raises:
        ValueError: The second run began with other weights than the first, so that nothing can be said.
    """
    initial, others = (torch.load(run / _INITIAL, weights_only=True) for run in (first, second))
    if not _is_equal(initial, others):
        msg = (
            "Both runs must begin with the same weights, but do not. Set `seed_everything` in the configuration, or "
            "load the student's weights from a file."
        )
        raise ValueError(msg)
    runs = [torch.load(run / _FINAL, weights_only=True) for run in (first, second)]
    blocks = json.loads((first / _BLOCKS).read_text())
    return [_compare_block(block, initial, *runs, tolerance=tolerance) for block in blocks]


def _compare_block(
    block: dict[str, Any], initial: dict[str, Tensor], first: Any, second: Any, *, tolerance: float
) -> BlockComparison:
    def states(run: Any) -> list[Any]:
        return [run["optimizer_states"][index]["state"].get(number) for index, number in block["optimizer"]]

    def tensors(state: dict[str, Tensor], kind: str) -> list[Tensor]:
        return [state[name] for name in block[kind]]

    mine, theirs = first["state_dict"], second["state_dict"]
    pairs = {kind: (tensors(mine, kind), tensors(theirs, kind)) for kind in ("parameters", "buffers")}
    pairs["optimizer"] = (states(first), states(second))
    way = _length(pairs["parameters"][0], tensors(initial, "parameters"))
    off = _length(*pairs["parameters"])
    # No way at all: a block that nothing trains may not differ either.
    share = off / way if way else float(off > 0)
    rounded = WITHIN if share <= tolerance else DIFFERS
    verdict = BITWISE if all(_is_equal(*pair) for pair in pairs.values()) else rounded
    greatest = {kind: _greatest_difference(*pair) for kind, pair in pairs.items()}
    return BlockComparison(block["name"], verdict, **greatest, share_of_way=share)


def _is_equal(first: Any, second: Any) -> bool:
    firsts, form = pytree.tree_flatten(first)
    seconds, other_form = pytree.tree_flatten(second)
    return form == other_form and all(
        torch.equal(mine, theirs) if isinstance(mine, Tensor) and isinstance(theirs, Tensor) else bool(mine == theirs)
        for mine, theirs in zip(firsts, seconds, strict=True)
    )


def _greatest_difference(first: Any, second: Any) -> float:
    pairs = zip(pytree.tree_leaves(first), pytree.tree_leaves(second), strict=False)
    found = [
        float((mine.double() - theirs.double()).abs().max())
        for mine, theirs in pairs
        if isinstance(mine, Tensor) and isinstance(theirs, Tensor) and mine.numel() and mine.shape == theirs.shape
    ]
    return max(found, default=0.0)


def _length(first: list[Tensor], second: list[Tensor]) -> float:
    differences = [(mine.double() - theirs.double()).flatten() for mine, theirs in zip(first, second, strict=True)]
    return float(torch.cat(differences).norm()) if differences else 0.0
