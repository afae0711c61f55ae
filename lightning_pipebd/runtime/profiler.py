"""The profiler: how long every block takes, and what it holds, on real activations and without leaving a trace.

One walk through the teacher brings every measured block its boundary and its target, for several numbers of rows; then
the blocks are taught and learned in rounds. Ranks measure different blocks at the same time, which is also what they
will do in training.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from math import isclose
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.planning.costs import BlockSizes, BlockTimes
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.executor import Jobs
from lightning_pipebd.runtime.peak_memory import peak_bytes
from lightning_pipebd.runtime.row_trees import (
    RowTree,
    divide_rows,
    find_row_leaves,
    leading_row_leaves,
    take_rows,
    tree_bytes,
)
from lightning_pipebd.runtime.sampling import Samples, device_clock
from lightning_pipebd.runtime.side_effects import at_work, preserved_random_states

__all__ = ["BlockCosts", "BlockParts", "BlockProfile", "measured_row_counts", "profile_blocks"]

_MAX_ROW_COUNTS = 4
# Rounding in half precision lies below, whatever couples rows mostly far above.
_SAME_LOSS = 2e-3


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockParts:
    """What the profiler has to know of a block beside how it is called.

    Args:
        name: Name of the block.
        teacher: The teacher block.
        student: The student block and its adapters.
        parameters: What the block trains.
        is_divisible: Whether its student's rows may be divided at all; if not, only whole batches are learned.
    """

    name: str
    teacher: nn.Module
    student: tuple[nn.Module, ...]
    parameters: tuple[nn.Parameter, ...]
    is_divisible: bool = True


class BlockCosts(NamedTuple):
    """What was measured of one block."""

    times: BlockTimes
    sizes: BlockSizes


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockProfile:
    """What was measured of some blocks.

    Args:
        blocks: Per measured block its costs; update time and optimizer bytes are not among them.
        boundary_bytes_per_row: Of all boundaries.
        whole_reason: Why no rows may be divided; empty if they may.
        coupled: Measured blocks whose loss is not the mean of the losses of two parts of the batch.
        noise: Relative uncertainty of a single time.
        jitter_ms: Variance of the time of work by the ms that it takes.
        num_rounds: How often everything was measured.
    """

    blocks: Mapping[int, BlockCosts]
    boundary_bytes_per_row: tuple[int, ...]
    whole_reason: str
    coupled: frozenset[int]
    noise: float
    jitter_ms: float
    num_rounds: int


def measured_row_counts(num_rows: int, num_ranks: int) -> tuple[int, ...]:
    """Choose numbers of rows between a whole batch and a rank's equal part of it, ascending.

    Example:
        >>> measured_row_counts(64, 2), measured_row_counts(64, 8), measured_row_counts(3, 8)
        ((32, 64), (8, 16, 32, 64), (1, 2, 3))
    """
    num_counts = min(_MAX_ROW_COUNTS, max(2, num_ranks))
    parts = {max(1, round(num_ranks ** (index / (num_counts - 1)))) for index in range(num_counts)}
    return tuple(sorted({-(-num_rows // part) for part in parts}))


class _Case(NamedTuple):
    """One block at one number of rows, in host memory where the device is a GPU."""

    boundary: Any
    target: Any
    labels: Any


@dataclass(slots=True)
class _Walk:
    """What the walk through the teacher found."""

    cases: dict[tuple[int, int], _Case] = field(default_factory=dict)
    boundary_bytes: list[int] = field(default_factory=list)
    row_leaves: dict[int, tuple[bool, ...]] = field(default_factory=dict)
    coupled: set[int] = field(default_factory=set)
    whole_reason: str = ""


class _Profiler:
    def __init__(self, jobs: Jobs, blocks: Sequence[BlockParts], device: torch.device, num_rows: int) -> None:
        self.jobs = jobs
        self.blocks = blocks
        self.device = device
        self.num_rows = num_rows

    def walk(self, inputs: Any, labels: Any, row_counts: Sequence[int], own: Collection[int]) -> _Walk:
        found = _Walk()
        boundaries = divide_rows(inputs, self.num_rows, row_counts)
        all_labels = divide_rows(labels, self.num_rows, row_counts)
        found.boundary_bytes.append(tree_bytes(boundaries[self.num_rows]) // self.num_rows)
        found.row_leaves[0] = leading_row_leaves(inputs, self.num_rows)
        for index, parts in enumerate(self.blocks):
            targets = self._teach_all(index, parts, boundaries, found)
            if index in own:
                for rows, target in targets.items():
                    found.cases[index, rows] = _Case(*map(self._keep, (boundaries[rows], target, all_labels[rows])))
            boundaries = targets
            found.boundary_bytes.append(tree_bytes(boundaries[self.num_rows]) // self.num_rows)
        return found

    def _teach_all(self, index: int, parts: BlockParts, boundaries: dict[int, Any], found: _Walk) -> dict[int, Any]:
        targets = {}
        with at_work([parts.teacher], self.device):
            whole = targets[self.num_rows] = self.jobs.teach(index, boundaries[self.num_rows])
            try:
                for rows in sorted(boundaries.keys() - {self.num_rows}):
                    targets[rows] = self.jobs.teach(index, boundaries[rows])
                    subject = f"teacher block {parts.name}"
                    leaves = find_row_leaves(whole, self.num_rows, targets[rows], rows, subject=subject)
                    found.row_leaves[index + 1] = leaves
            except Exception as error:
                found.whole_reason = f"teacher block {parts.name}, given {rows} rows: {error}"
                return {self.num_rows: whole}
        return targets

    def measure(self, found: _Walk, own: Sequence[int], samples: Samples, tell: Callable[[str], None]) -> int:
        rounds = 0

        def measure_round() -> None:
            nonlocal rounds
            for index in own:
                self._visit(index, found, samples)
            rounds += 1
            tell(f"round {rounds}")

        return samples.repeat(measure_round) if own else 0

    def _visit(self, index: int, found: _Walk, samples: Samples) -> None:
        parts = self.blocks[index]
        with at_work([parts.teacher, *parts.student], self.device):
            for (block, rows), kept in found.cases.items():
                if block != index:
                    continue
                case = self._brought(kept)
                samples.take(("teach", index, rows), partial(self.jobs.teach, index, case.boundary))
                if rows == self.num_rows or self._is_divisible(index, found):
                    samples.take(("learn", index, rows), partial(self._learn, index, case, rows))
                    _drop_gradients(parts)

    def _learn(self, index: int, case: _Case, rows: int) -> Tensor:
        loss = self.jobs.learn(index, case.boundary, case.target, case.labels, Rows(0, rows), rows)
        self.jobs.settle()
        return loss

    def _is_divisible(self, index: int, found: _Walk) -> bool:
        return self.blocks[index].is_divisible and index not in found.coupled and not found.whole_reason

    def find_coupling(self, index: int, found: _Walk) -> None:
        """Note if the block's loss is not the mean of the losses of two parts of the batch."""
        if not self._is_divisible(index, found) or self.num_rows < 2:
            return
        case, half = found.cases[index, self.num_rows], self.num_rows // 2
        if index + 1 not in found.row_leaves:
            return
        labels = leading_row_leaves(case.labels, self.num_rows)
        leaves = (found.row_leaves[index], found.row_leaves[index + 1], labels)
        parts = [
            _Case(*(_cut(tree, flags, self.num_rows, rows) for tree, flags in zip(case, leaves, strict=True)))
            for rows in (Rows(0, half), Rows(half, self.num_rows))
        ]
        modules = [self.blocks[index].teacher, *self.blocks[index].student]
        try:
            with at_work(modules, self.device):
                whole = self._learn(index, self._brought(case), self.num_rows).item()
                losses = [
                    self._learn(index, self._brought(part), rows).item() * rows / self.num_rows
                    for part, rows in zip(parts, (half, self.num_rows - half), strict=True)
                ]
        except Exception:
            # What does not even run on half of the rows cannot be divided.
            found.coupled.add(index)
            return
        if not isclose(sum(losses), whole, rel_tol=_SAME_LOSS, abs_tol=1e-12):
            found.coupled.add(index)

    def sizes(self, index: int, found: _Walk) -> BlockSizes:
        parts, case = self.blocks[index], found.cases[index, self.num_rows]
        trained = [parameter for parameter in parts.parameters if parameter.requires_grad]
        with at_work([parts.teacher, *parts.student], self.device):
            case = self._brought(case)
            teach = peak_bytes(partial(self.jobs.teach, index, case.boundary), self.device)
            # The second time: gradients are there, as they are counted by themselves.
            self._learn(index, case, self.num_rows)
            learn = peak_bytes(partial(self._learn, index, case, self.num_rows), self.device)
            target_bytes = tree_bytes(case.target)
        return BlockSizes(
            name=parts.name,
            teacher_parameter_bytes=_module_bytes([parts.teacher]),
            student_parameter_bytes=_module_bytes(parts.student),
            gradient_bytes=sum(parameter.nbytes for parameter in trained),
            teach_bytes_per_row=max(0, teach - target_bytes) // self.num_rows,
            learn_bytes_per_row=-(-learn // self.num_rows),
        )

    def times(self, index: int, samples: Samples) -> BlockTimes:
        curves: dict[str, list[tuple[int, float]]] = {"teach": [], "learn": []}
        for kind, block, rows in samples.values:
            if block == index:
                curves[kind].append((rows, samples.median_ms((kind, block, rows))))
        return BlockTimes(teach_ms=Curve(curves["teach"]), learn_ms=Curve(curves["learn"]))

    def _keep(self, tree: Any) -> Any:
        return pytree.tree_map_only(Tensor, Tensor.cpu, tree) if self.device.type == "cuda" else tree

    def _brought(self, case: _Case) -> _Case:
        return _Case(*(pytree.tree_map_only(Tensor, lambda leaf: leaf.to(self.device), tree) for tree in case))


def profile_blocks(
    jobs: Jobs,
    blocks: Sequence[BlockParts],
    inputs: Any,
    labels: Any,
    *,
    num_rows: int,
    row_counts: Sequence[int],
    own: Sequence[int],
    device: torch.device,
    samples: Samples | None = None,
    tell: Callable[[str], None] = lambda _: None,
) -> BlockProfile:
    """Measure some blocks on one batch; weights, buffers, gradients and random states are then as they were before.

    Args:
        jobs: Teaches and learns.
        blocks: All blocks.
        inputs: The batch's boundary 0, on the device.
        labels: The batch's labels, for blocks that want them.
        num_rows: Rows of the batch.
        row_counts: Numbers of rows to measure besides; none may exceed `num_rows`.
        own: The blocks to measure.
        device: Where the jobs compute.
        samples: Repeats and times; `None` for a clock that waits for the device.
        tell: Called with the progress in words.
    """
    profiler = _Profiler(jobs, blocks, device, num_rows)
    samples = samples or Samples(device_clock(device))
    with preserved_random_states():
        found = profiler.walk(inputs, labels, sorted({*row_counts, num_rows}), own)
        sizes = {index: profiler.sizes(index, found) for index in own}
        for index in own:
            profiler.find_coupling(index, found)
        num_rounds = profiler.measure(found, own, samples, tell)
    return BlockProfile(
        blocks={index: BlockCosts(profiler.times(index, samples), sizes[index]) for index in own},
        boundary_bytes_per_row=tuple(found.boundary_bytes),
        whole_reason=found.whole_reason,
        coupled=frozenset(found.coupled),
        noise=samples.noise(),
        jitter_ms=samples.jitter_ms(),
        num_rounds=num_rounds,
    )


def _cut(tree: Any, row_leaves: tuple[bool, ...], num_rows: int, rows: Rows) -> Any:
    return take_rows(RowTree(Rows(0, num_rows), tree, row_leaves), rows).tree


def _module_bytes(modules: Sequence[nn.Module]) -> int:
    tensors = {id(value): value for module in modules for value in (*module.parameters(), *module.buffers())}
    return sum(value.nbytes for value in tensors.values())


def _drop_gradients(parts: BlockParts) -> None:
    for parameter in parts.parameters:
        parameter.grad = None
