"""Tries entries: refusals, the divided teacher beside the undivided one, and training in one process and in several."""

from __future__ import annotations

import hashlib
import json
import logging
import sys
import tempfile
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer, seed_everything
from torch import Tensor, distributed, nn
from torch.utils import _pytree as pytree
from torch.utils.data import DataLoader, TensorDataset

from lightning_pipebd import PartitionError, PipeBDStrategy
from lightning_pipebd.runtime.partition import call_block, cut_model
from tests.helpers.ranks import RankError, run_processes
from zoo.entries import Entry, Imitation, make_example, make_module
from zoo.library import find_entry

__all__ = ["MODES", "Trial", "try_entries"]

NUM_ROWS, BATCH_SIZE, NUM_RANKS = 8, 4, 2
#: In float64 sums in another order differ by 1e-16 of their size.
TOLERANCE = 1e-11
MODES = ("whole", "joint", "compile")


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What was seen of an entry.

    Attributes:
        num_blocks: How many blocks it has; 0 if it could not be divided.
        is_as_undivided: Whether all boundaries are bit for bit what the undivided teacher gives there.
        is_refused_well: Whether the first try was refused in the words that are promised.
        is_trained: Whether it was trained at all.
        has_learned: Whether training changed most blocks. Some begin as zeros or the identity, in the teacher as well.
        equal: By mode, whether several ranks trained the student of one process: bit for bit, and where rows are
            split up to the order of summation.
        failure: The first error, in a line.
        seconds: How long one process took.
    """

    num_blocks: int = 0
    is_as_undivided: bool = False
    is_refused_well: bool = False
    is_trained: bool = True
    has_learned: bool = False
    equal: dict[str, bool]
    failure: str = ""
    seconds: float = 0.0

    @property
    def is_as_promised(self) -> bool:
        """Whether all was."""
        is_same = self.has_learned and bool(self.equal) and all(self.equal.values())
        return not self.failure and self.is_as_undivided and self.is_refused_well and (is_same or not self.is_trained)


def try_entries(names: Sequence[str], modes: Sequence[str] = MODES) -> dict[str, Trial]:
    """Try entries: all of them in one launch of one process, and one of several for each mode.

    An entry that ends a launch by an error has the others go on in a new one.

    Args:
        names: As :func:`~zoo.library.find_entry` takes them.
        modes: ``"whole"`` for a plan of whole blocks, ``"joint"`` and ``"compile"`` for the entries that ask for them.
    """
    with tempfile.TemporaryDirectory() as directory:
        folder = Path(directory)
        found: dict[str, dict[str, Any]] = {}
        failures: dict[str, str] = {}
        for mode in modes:
            chosen = [name for name in names if mode == "whole" or mode in find_entry(name).further]
            for num_ranks in (1, NUM_RANKS):
                alive = [name for name in chosen if name not in failures]
                alive = [name for name in alive if num_ranks == 1 or find_entry(name).is_trained]
                failures |= _launch(num_ranks, alive, mode, folder)
        for name in names:
            found[name] = {}
            for path in sorted(folder.glob(f"{name}@*.json")):
                found[name][path.stem.split("@")[1]] = json.loads(path.read_text())
        return {name: _judge(name, found[name], failures.get(name, ""), folder) for name in names}


def _launch(num_ranks: int, names: Sequence[str], mode: str, folder: Path) -> dict[str, str]:
    """Run entries in one launch after another; give the errors of those that raised."""
    failures: dict[str, str] = {}
    left = list(names)
    while left:
        error = _launch_once(num_ranks, left, mode, folder)
        if not error:
            break
        done = [name for name in left if (folder / f"{name}@{mode}{num_ranks}.json").exists()]
        # An error after the last entry is the last one's.
        broken = left[min(len(done), len(left) - 1)]
        failures[broken] = f"{mode} on {num_ranks}: {error}"
        left = left[len(done) + 1 :]
    return failures


def _launch_once(num_ranks: int, names: Sequence[str], mode: str, folder: Path) -> str:
    """Run entries in one launch; give its error in a line, or nothing."""
    try:
        run_processes(num_ranks, _try_all, names, mode, num_ranks, str(folder), timeout=60.0 + 60.0 * len(names))
    except (RankError, TimeoutError) as error:
        cause = error.__cause__ or error
        return " ".join(f"{type(cause).__name__}: {cause}".split())
    return ""


def _try_all(rank: int, names: Sequence[str], mode: str, num_ranks: int, folder: str) -> None:
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    # Advice to the users of a model or a trainer; what must be said is asserted where it is tested.
    warnings.simplefilter("ignore")
    for name in names:
        seen = _try_one(find_entry(name), mode, num_ranks, Path(folder, f"{name}@{mode}{num_ranks}.pt"))
        if rank == 0:
            Path(folder, f"{name}@{mode}{num_ranks}.json").write_text(json.dumps(seen))
            sys.stderr.write(f"{name}, {mode}, {num_ranks} ranks: {seen['seconds']:.1f} s\n")
        if distributed.is_initialized() and distributed.get_world_size() == 1:
            # Lightning leaves the group of a run open, and would take the next one, on its own, for distributed.
            distributed.destroy_process_group()


def _try_one(entry: Entry, mode: str, num_ranks: int, path: Path) -> dict[str, Any]:
    start = time.perf_counter()
    seed_everything(5, verbose=False)
    seen: dict[str, Any] = {}
    module = make_module(entry, compile=mode == "compile")
    if mode == "whole" and num_ranks == 1:
        seen = {
            "is_refused_well": _is_refused_well(entry),
            "is_as_undivided": _is_as_undivided(entry, module),
            "num_blocks": module.num_blocks,
        }
    if not entry.is_trained:
        return seen | {"has_learned": False, "digests": {}, "seconds": time.perf_counter() - start}
    if mode == "joint":
        module.double()
        module.block_pairs.teacher_model.double()
    before = _digests(module)
    _train(entry, module, "joint" if mode == "joint" else _plan(module.num_blocks), num_ranks, mode == "joint")
    after = _digests(module)
    changed = [
        any(before[name] != after[name] for name in names) for names in module.block_pairs.student.parameter_names
    ]
    seen["has_learned"] = sum(changed) > len(changed) / 2
    seen["digests"] = after
    if mode == "joint":
        torch.save(module.student.state_dict(), path)
    return seen | {"seconds": time.perf_counter() - start}


def _plan(num_blocks: int) -> str:
    """Half of the blocks to each rank, and of the one in the middle the student to the second rank."""
    middle = num_blocks // 2
    first = f"0-{middle - 1},T{middle}" if middle else f"T{middle}"
    second = f"S{middle},{middle + 1}-{num_blocks - 1}" if middle + 1 < num_blocks else f"S{middle}"
    return f"{first}|{second}"


def _train(entry: Entry, module: Imitation, plan: str, num_ranks: int, double: bool) -> None:
    rows = make_example(entry, NUM_ROWS)
    loader = DataLoader(TensorDataset(rows.double() if double else rows), batch_size=BATCH_SIZE)
    trainer = Trainer(
        accelerator="cpu",
        devices=num_ranks,
        strategy="auto" if num_ranks == 1 else PipeBDStrategy(plan=plan),
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, loader)


def _is_refused_well(entry: Entry) -> bool:
    if not entry.first_try:
        return True
    try:
        cut_model(entry.teacher(), entry.first_try, role="student")
    except PartitionError as error:
        return all(piece in str(error) for piece in entry.refusal)
    return False


def _is_as_undivided(entry: Entry, module: Imitation) -> bool:
    """Compare every boundary of the teacher with what the undivided teacher gives at that module."""
    inputs = make_example(entry, 2)
    teacher, partition = module.block_pairs.teacher_model, module.block_pairs.teacher
    ends: dict[str, Any] = {}
    paths = entry.paths or ("",)
    handles = [teacher.get_submodule(path).register_forward_hook(partial(_note, ends, path)) for path in paths]
    try:
        with torch.no_grad():
            teacher(inputs.clone())
    finally:
        for handle in handles:
            handle.remove()
    boundaries: list[Any] = []
    boundary: Any = inputs
    with torch.no_grad():
        for block in partition.blocks:
            boundary = call_block(block, boundary)
            # A later block may change what it was handed, as an activation in place does.
            boundaries.append(pytree.tree_map_only(Tensor, torch.clone, boundary))
    if entry.list_blocks is not None:
        return entry.ends_inside or _is_same(boundaries[-1], ends[""])
    return all(_is_same(found, ends[path]) for found, path in zip(boundaries, paths, strict=True))


def _note(ends: dict[str, Any], path: str, _module: nn.Module, _given: Any, output: Any) -> None:
    ends[path] = pytree.tree_map_only(Tensor, torch.clone, output)


def _is_same(first: Any, second: Any) -> bool:
    firsts, seconds = pytree.tree_leaves(first), pytree.tree_leaves(second)
    return len(firsts) == len(seconds) and all(
        torch.equal(one, other) if isinstance(one, Tensor) else one == other
        for one, other in zip(firsts, seconds, strict=True)
    )


def _digests(module: Imitation) -> dict[str, str]:
    return {
        name: hashlib.blake2b(value.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
        for name, value in module.student.state_dict().items()
    }


def _judge(name: str, found: dict[str, dict[str, Any]], failure: str, folder: Path) -> Trial:
    equal = {}
    for mode in MODES:
        one, many = found.get(f"{mode}1"), found.get(f"{mode}{NUM_RANKS}")
        if one is None or many is None:
            continue
        equal[mode] = one["digests"] == many["digests"]
        if mode == "joint":
            states = [torch.load(folder / f"{name}@joint{ranks}.pt", weights_only=True) for ranks in (1, NUM_RANKS)]
            equal[mode] = all(torch.allclose(states[1][key], states[0][key], 0.0, TOLERANCE) for key in states[0])
    first = found.get("whole1", {})
    return Trial(
        num_blocks=first.get("num_blocks", 0),
        is_as_undivided=first.get("is_as_undivided", False),
        is_refused_well=first.get("is_refused_well", False),
        is_trained=find_entry(name).is_trained,
        has_learned=all(seen["has_learned"] for seen in found.values()),
        equal=equal,
        failure=failure,
        seconds=first.get("seconds", 0.0),
    )
