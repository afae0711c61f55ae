"""The profiler of end-to-end training: what every block of both models takes and holds, on real activations.

One walk through each model brings every measured block its input, for several numbers of rows; then blocks are run in
rounds. Nothing that runs leaves a trace in weights, buffers, gradients or random states.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from math import isclose
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.plan import Rows
from lightning_pipebd.runtime.peak_memory import peak_and_held_bytes
from lightning_pipebd.runtime.row_trees import (
    RowTree,
    divide_rows,
    find_row_leaves,
    leading_row_leaves,
    take_rows,
    tree_bytes,
)
from lightning_pipebd.runtime.sampling import Samples, device_clock
from lightning_pipebd.runtime.side_effects import at_work, preserved_random_states, untouched

__all__ = ["PipelineParts", "PipelineProfile", "PipelineProfiler", "StudentFindings", "TeacherFindings"]

# Rounding in half precision lies below, whatever couples rows mostly far above.
_SAME_LOSS = 2e-3


class PipelineWork(Protocol):
    """What is measured; the executor's jobs do it."""

    def teach(self, block: int, boundary: Any) -> Any:
        """Give the teacher's next boundary."""

    def forward(self, block: int, boundary: Any, rows: Rows) -> Any:
        """Give the student's next boundary."""

    def loss(
        self, student_output: Any, teacher_output: Any, targets: Any, rows: Rows, num_rows: int
    ) -> dict[str, Tensor]:
        """Put the gradients of the loss into the leaves of ``student_output``."""


class PipelineParts(NamedTuple):
    """What has to be on the device, and to be put back, when a block runs.

    Args:
        teacher: For every teacher block its modules.
        student: For every student block its modules.
        loss: What else the loss may change.
        owner: The module whose own attributes the loss may change.
    """

    teacher: Sequence[Sequence[nn.Module]]
    student: Sequence[Sequence[nn.Module]]
    loss: Sequence[nn.Module]
    owner: nn.Module


class TeacherFindings(NamedTuple):
    """What was measured of a teacher block."""

    teach_ms: Curve
    work_bytes: int
    output_bytes: int


class StudentFindings(NamedTuple):
    """What was measured of a student block."""

    forward_ms: Curve
    backward_ms: Curve
    held_bytes: int
    work_bytes: int
    output_bytes: int


class PipelineProfile(NamedTuple):
    """What was measured.

    Args:
        teacher: Per measured teacher block.
        student: Per measured student block.
        loss_ms: The loss by rows; ``None`` where it was not measured.
        whole_reason: Why batches may not be cut; empty if they may.
        noise: Relative uncertainty of a single time.
    """

    teacher: Mapping[int, TeacherFindings]
    student: Mapping[int, StudentFindings]
    loss_ms: Curve | None
    whole_reason: str
    noise: float


class _Case(NamedTuple):
    """What a piece of work is given."""

    boundary: Any
    output_bytes: int


class PipelineProfiler:
    """Measures blocks on one batch.

    Args:
        work: Teaches, goes forward, and takes the loss.
        parts: The modules.
        device: Where the work computes.
        num_rows: Rows of the batch.
        row_counts: Numbers of rows to measure.
        is_full_batch: Whether the loss needs the whole batch.
    """

    def __init__(
        self,
        work: PipelineWork,
        parts: PipelineParts,
        device: torch.device,
        *,
        num_rows: int,
        row_counts: Sequence[int],
        is_full_batch: bool,
    ) -> None:
        self._work = work
        self._parts = parts
        self._device = device
        self._num_rows = num_rows
        self._row_counts = sorted({*row_counts, num_rows})
        self._is_full_batch = is_full_batch
        self._samples = Samples(device_clock(device))
        self._cases: dict[tuple[str, int, int], _Case] = {}
        self._outputs: dict[int, tuple[Any, Any, Any]] = {}
        self._whole_reason = ""
        self._all_rows = Rows(0, num_rows)

    def profile(
        self,
        inputs: tuple[Any, Any, Any],
        own: tuple[Collection[int], Collection[int]],
        *,
        measures_loss: bool,
        tell: Callable[[str], None] = lambda _: None,
    ) -> PipelineProfile:
        """Measure some blocks.

        Args:
            inputs: The teacher's input, the student's, and what the loss reads beside the outputs; on the device.
            own: Teacher blocks and student blocks to measure.
            measures_loss: Whether to measure the loss as well.
            tell: Called with the progress in words.
        """
        teacher, student = sorted(own[0]), sorted(own[1])
        with preserved_random_states():
            self._walk(inputs, teacher, student)
            sizes = {("teach", block): self._teacher_bytes(block) for block in teacher}
            sizes |= {("study", block): self._student_bytes(block) for block in student}
            if measures_loss:
                self._check_loss()
            rounds = 0

            def measure_round() -> None:
                nonlocal rounds
                for block in teacher:
                    self._time_teacher(block)
                for block in student:
                    self._time_student(block)
                if measures_loss:
                    self._time_loss()
                rounds += 1
                tell(f"round {rounds}")

            if teacher or student or measures_loss:
                self._samples.repeat(measure_round)
        return self._put_together(teacher, student, sizes, measures_loss=measures_loss)

    # The walk.

    def _walk(self, inputs: tuple[Any, Any, Any], teacher: Collection[int], student: Collection[int]) -> None:
        taught, studied, targets = (divide_rows(tree, self._num_rows, self._row_counts) for tree in inputs)
        for block, modules in enumerate(self._parts.teacher):
            call = partial(self._work.teach, block)
            taught = self._step("teach", block, modules, call, taught, block in teacher)
        for block, modules in enumerate(self._parts.student):
            studied = self._step("study", block, modules, partial(self._study, block), studied, block in student)
        for rows in self._row_counts:
            if rows in taught and rows in studied and rows in targets:
                self._outputs[rows] = (studied[rows], taught[rows], targets[rows])

    def _study(self, block: int, boundary: Any) -> Any:
        # As another rank would get it: a leaf wherever a gradient is wanted.
        return _as_leaves(self._work.forward(block, boundary, self._all_rows))

    def _step(
        self,
        kind: str,
        block: int,
        modules: Sequence[nn.Module],
        call: Callable[[Any], Any],
        given: dict[int, Any],
        is_own: bool,
    ) -> dict[int, Any]:
        """Run a block on every number of rows; less than the batch only as long as the outputs' rows come first."""
        outputs: dict[int, Any] = {}
        with at_work(modules, self._device):
            whole = outputs[self._num_rows] = call(given[self._num_rows])
            try:
                for rows in sorted(given.keys() - {self._num_rows}):
                    outputs[rows] = call(given[rows])
                    role = "teacher" if kind == "teach" else "student"
                    subject = f"{role} block {block}"
                    find_row_leaves(whole, self._num_rows, outputs[rows], rows, subject=subject)
            except Exception as error:
                self._whole_reason = self._whole_reason or f"{kind} of block {block}, given {rows} rows: {error}"
                outputs = {self._num_rows: whole}
        if is_own:
            for rows, output in outputs.items():
                self._cases[kind, block, rows] = _Case(self._keep(given[rows]), tree_bytes(output))
        return outputs

    # Times.

    def _time_teacher(self, block: int) -> None:
        with at_work(self._parts.teacher[block], self._device):
            for rows, case in self._cases_of("teach", block):
                boundary = self._brought(case.boundary)
                self._samples.take(("teach", block, rows), partial(self._work.teach, block, boundary))

    def _time_student(self, block: int) -> None:
        with at_work(self._parts.student[block], self._device):
            for rows, case in self._cases_of("study", block):
                boundary = _as_leaves(self._brought(case.boundary))
                outputs: list[Any] = []

                def forward(boundary: Any = boundary, outputs: list[Any] = outputs) -> None:
                    outputs.append(self._work.forward(block, boundary, self._all_rows))

                self._samples.take(("forward", block, rows), forward)
                self._samples.take(("backward", block, rows), partial(_backward, outputs.pop()))
                self._drop_gradients(block)

    def _time_loss(self) -> None:
        with untouched(self._parts.loss, alone=[self._parts.owner]):
            for rows in self._outputs:
                if rows == self._num_rows or not self._is_full_batch:
                    self._samples.take(("loss", 0, rows), partial(self._take_loss, rows))

    def _take_loss(self, rows: int) -> None:
        student, teacher, targets = self._outputs[rows]
        self._work.loss(_as_leaves(student), teacher, targets, Rows(0, rows), rows)
        for module in self._parts.loss:
            for parameter in module.parameters():
                parameter.grad = None

    def _check_loss(self) -> None:
        """Find out whether the loss is a mean over rows, so that a batch may be cut."""
        if self._is_full_batch or self._whole_reason or self._num_rows < 2:
            return
        half = self._num_rows // 2
        trees = self._outputs[self._num_rows]
        losses = []
        with untouched(self._parts.loss, alone=[self._parts.owner]):
            for rows in (self._all_rows, Rows(0, half), Rows(half, self._num_rows)):
                student, teacher, targets = (
                    take_rows(RowTree(self._all_rows, tree, leading_row_leaves(tree, self._num_rows)), rows).tree
                    for tree in trees
                )
                terms = self._work.loss(_as_leaves(student), teacher, targets, rows, self._num_rows)
                losses.append(float(terms["loss"]))
        if not isclose(losses[0], losses[1] + losses[2], rel_tol=_SAME_LOSS, abs_tol=1e-12):
            self._whole_reason = "the loss of a batch is not the mean of the losses of its halves"

    # Sizes.

    def _teacher_bytes(self, block: int) -> tuple[int, int, int]:
        case = self._cases["teach", block, self._num_rows]
        boundary = self._brought(case.boundary)
        with at_work(self._parts.teacher[block], self._device):
            peak, _ = peak_and_held_bytes(partial(self._work.teach, block, boundary), self._device)
        return max(0, peak - case.output_bytes), 0, case.output_bytes

    def _student_bytes(self, block: int) -> tuple[int, int, int]:
        case = self._cases["study", block, self._num_rows]
        boundary = _as_leaves(self._brought(case.boundary))
        with at_work(self._parts.student[block], self._device):
            # The second time: gradients of the weights are there, as they are counted by themselves.
            _backward(self._work.forward(block, boundary, self._all_rows))
            outputs: list[Any] = []
            peak, held = peak_and_held_bytes(
                lambda: outputs.append(self._work.forward(block, boundary, self._all_rows)), self._device
            )
            back, _ = peak_and_held_bytes(partial(_backward, outputs.pop()), self._device)
            self._drop_gradients(block)
        return max(0, peak - held, back - tree_bytes(case.boundary)), held, case.output_bytes

    # Both.

    def _put_together(
        self,
        teacher: Sequence[int],
        student: Sequence[int],
        sizes: Mapping[tuple[str, int], tuple[int, int, int]],
        *,
        measures_loss: bool,
    ) -> PipelineProfile:
        def curve(kind: str, block: int) -> Curve:
            found = [key for key in self._samples.values if key[:2] == (kind, block)]
            return Curve([(rows, self._samples.median_ms((kind, block, rows))) for _, _, rows in found])

        def per_row(size: int) -> int:
            return -(-size // self._num_rows)

        return PipelineProfile(
            teacher={
                block: TeacherFindings(
                    curve("teach", block),
                    *(per_row(size) for size in (sizes["teach", block][0], sizes["teach", block][2])),
                )
                for block in teacher
            },
            student={
                block: StudentFindings(
                    curve("forward", block),
                    curve("backward", block),
                    *(per_row(sizes["study", block][place]) for place in (1, 0, 2)),
                )
                for block in student
            },
            loss_ms=curve("loss", 0) if measures_loss else None,
            whole_reason=self._whole_reason,
            noise=self._samples.noise(),
        )

    def _cases_of(self, kind: str, block: int) -> list[tuple[int, _Case]]:
        return [(key[2], case) for key, case in self._cases.items() if key[:2] == (kind, block)]

    def _drop_gradients(self, block: int) -> None:
        for module in self._parts.student[block]:
            for parameter in module.parameters():
                parameter.grad = None

    def _keep(self, tree: Any) -> Any:
        """Put a boundary aside: to host memory if the device is a GPU."""
        if self._device.type != "cuda":
            return tree
        return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().cpu().requires_grad_(leaf.requires_grad), tree)

    def _brought(self, tree: Any) -> Any:
        return pytree.tree_map_only(
            Tensor, lambda leaf: leaf.detach().to(self._device).requires_grad_(leaf.requires_grad), tree
        )


def _as_leaves(tree: Any) -> Any:
    """Give fresh leaves, so that no gradient of an earlier round is there."""
    return pytree.tree_map_only(Tensor, lambda leaf: leaf.detach().requires_grad_(leaf.requires_grad), tree)


def _backward(output: Any) -> None:
    wanted = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor) and leaf.requires_grad]
    if wanted:
        torch.autograd.backward(wanted, [torch.ones_like(leaf) for leaf in wanted])
