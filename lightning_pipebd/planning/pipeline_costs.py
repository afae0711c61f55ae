"""What was measured of a whole student, its teacher and their loss: what plans of end-to-end training are judged by."""

from __future__ import annotations

from dataclasses import dataclass, fields
from math import isfinite
from typing import Any

from lightning_pipebd.planning.costs import LinkCost, LoaderCost
from lightning_pipebd.planning.curve import CostError, Curve
from lightning_pipebd.planning.plain_data import PlainData

__all__ = ["PipelineMeasurement", "StudentBlockCosts", "TeacherBlockCosts"]

_FREE_LOADER, _FREE_LINK = LoaderCost(), LinkCost()


def _check_amounts(costs: Any, owner: str) -> None:
    for field in fields(costs):
        value = getattr(costs, field.name)
        if isinstance(value, (int, float)) and not (value >= 0 and isfinite(value)):
            raise CostError(
                f"`{field.name}` of {owner} must be finite and not below 0, but is {value}. Measure it again."
            )


@dataclass(frozen=True, slots=True, kw_only=True)
class TeacherBlockCosts:
    """What a teacher block costs.

    Args:
        name: Name to print, such as the module path.
        teach_ms: Forward, by rows.
        follow_ms: What a momentum teacher takes to follow its student block, whatever the rows.
        parameter_bytes: Parameters and buffers; those of both versions, if the teacher is delayed.
        teach_bytes_per_row: What the block needs for a while beside its input and output.
        output_bytes_per_row: Its output.
    """

    name: str
    teach_ms: Curve
    follow_ms: float = 0.0
    parameter_bytes: int = 0
    teach_bytes_per_row: int = 0
    output_bytes_per_row: int = 0

    def __post_init__(self) -> None:
        _check_amounts(self, f"teacher block {self.name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class StudentBlockCosts:
    """What a student block costs.

    Args:
        name: Name to print, such as the module path.
        forward_ms: Forward, by rows.
        backward_ms: Backward, by rows.
        update_ms: Optimizer step, whatever the rows.
        parameter_bytes: Parameters and buffers.
        gradient_bytes: Gradients of what it trains.
        optimizer_bytes: State that the optimizer keeps.
        held_bytes_per_row: What stays from forward to backward beside the input: the output and what was saved for it.
        work_bytes_per_row: What forward or backward needs for a while beside that.
        output_bytes_per_row: Its output.
    """

    name: str
    forward_ms: Curve
    backward_ms: Curve
    update_ms: float = 0.0
    parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    held_bytes_per_row: int = 0
    work_bytes_per_row: int = 0
    output_bytes_per_row: int = 0

    def __post_init__(self) -> None:
        _check_amounts(self, f"student block {self.name!r}")

    @property
    def trained_bytes(self) -> int:
        """What the block occupies as long as it is trained."""
        return self.parameter_bytes + self.gradient_bytes + self.optimizer_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineMeasurement(PlainData):
    """What was measured of both models, of the loss and of the batch; ranks are taken for equal.

    Args:
        teacher: Every teacher block.
        student: Every student block.
        num_rows: Rows of the batch.
        loss_ms: The loss and its gradient by the student's output, by rows.
        teacher_input_bytes_per_row: What the teacher sees of a row.
        student_input_bytes_per_row: What the student sees of a row.
        target_bytes_per_row: What the loss reads of a row beside the outputs.
        loader: What loading costs.
        same_node: Links between ranks of one node.
        other_node: Links between ranks of different nodes.
        step_ms: What a step takes beside everything else: an optimizer step without parameters.
        send_ms: What a message takes of the sender's own time, however small it is.
        recv_ms: What it takes of the receiver's.
        noise: Relative uncertainty of the times; smaller gains are no reason to cut batches more finely.
        device_class: Name of the devices.
        has_momentum: Whether the teacher follows the student.
        looks_ahead: Whether the teacher may work on the next batch.
        is_full_batch: Whether the loss needs the whole batch.
        coupled_blocks: Student blocks whose result depends on how a batch is cut.
        whole_reason: Why batches may not be cut at all; empty if they may.
        one_replica_reason: Why there must be one replica; empty if there may be more.

    Raises:
        CostError: A model has no block, a momentum teacher has other blocks, or a number is impossible.

    Example:
        >>> block = StudentBlockCosts(name="all", forward_ms=Curve([(8, 1)]), backward_ms=Curve([(8, 2)]))
        >>> costs = PipelineMeasurement(
        ...     teacher=[TeacherBlockCosts(name="all", teach_ms=Curve([(8, 1)]))],
        ...     student=[block],
        ...     num_rows=8,
        ...     loss_ms=Curve([(8, 0)]),
        ... )
        >>> PipelineMeasurement.from_dict(costs.to_dict()) == costs
        True
    """

    _subject = "measurement"

    teacher: tuple[TeacherBlockCosts, ...]
    student: tuple[StudentBlockCosts, ...]
    num_rows: int
    loss_ms: Curve
    teacher_input_bytes_per_row: int = 0
    student_input_bytes_per_row: int = 0
    target_bytes_per_row: int = 0
    loader: LoaderCost = _FREE_LOADER
    same_node: LinkCost = _FREE_LINK
    other_node: LinkCost = _FREE_LINK
    step_ms: float = 0.0
    send_ms: float = 0.0
    recv_ms: float = 0.0
    noise: float = 0.0
    device_class: str = "default"
    has_momentum: bool = False
    looks_ahead: bool = True
    is_full_batch: bool = False
    coupled_blocks: tuple[int, ...] = ()
    whole_reason: str = ""
    one_replica_reason: str = ""

    def __post_init__(self) -> None:
        for name in ("teacher", "student", "coupled_blocks"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        for name in ("teacher", "student"):
            if not getattr(self, name):
                raise CostError(f"`{name}` must have at least one block, but is empty. Describe every block.")
        _check_amounts(self, "the measurement")
        if self.num_rows < 1:
            raise CostError(f"`num_rows` must be at least 1, but is {self.num_rows}. Give the rows of a batch.")
        if self.has_momentum and len(self.teacher) != len(self.student):
            raise CostError(
                f"`teacher` must have the student's {len(self.student)} blocks, because it follows them, but has "
                f"{len(self.teacher)}. Describe every block."
            )
        if any(block not in range(len(self.student)) for block in self.coupled_blocks):
            raise CostError(
                f"`coupled_blocks` must be below {len(self.student)}, but are {list(self.coupled_blocks)}. Blocks are "
                "counted from 0."
            )

    @property
    def may_cut(self) -> bool:
        """Whether cutting batches changes nothing but the order of sums."""
        return not self.coupled_blocks and not self.whole_reason

    @property
    def may_replicate(self) -> bool:
        """Whether replicas, each with its rows of a batch, change nothing but the order of sums."""
        return self.may_cut and not self.one_replica_reason
