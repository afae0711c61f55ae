"""The cost table: what was measured of blocks, devices, links and the loader; all the planner knows of the world."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import isfinite
from typing import TypeVar

from lightning_pipebd.planning.curve import CostError, Curve
from lightning_pipebd.planning.plain_data import PlainData

__all__ = ["BlockSizes", "BlockTimes", "CostTable", "DeviceTimes", "LinkCost", "LoaderCost", "Overheads", "ReduceTimes"]

T = TypeVar("T")


def _as_tuple(name: str, entries: Iterable[T]) -> tuple[T, ...]:
    if isinstance(entries, str) or not isinstance(entries, Iterable):
        raise CostError(f"`{name}` must be a list, but is {entries!r}. Write a list.")
    return tuple(entries)


def _check_amounts(costs: object, owner: str, *, except_for: str = "") -> None:
    for name in getattr(costs, "__slots__", ()):
        value = getattr(costs, name)
        if isinstance(value, (int, float)) and name != except_for:
            _check_amount(f"{name}` of `{owner}", value)


def _check_amount(name: str, value: float) -> None:
    if not (value >= 0 and isfinite(value)):
        raise CostError(f"`{name}` must be finite and not below 0, but is {value}. Measure it again.")


def _check_fraction(name: str, value: float) -> None:
    if not 0 <= value <= 1:
        raise CostError(f"`{name}` must lie between 0 and 1, but is {value}. Give a fraction, such as 0.05 for 5 %.")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockSizes:
    """What one block occupies in memory, in bytes.

    Args:
        name: Name to print, such as the module path.
        teacher_parameter_bytes: Parameters and buffers of the teacher block.
        student_parameter_bytes: Parameters and buffers of the student block.
        gradient_bytes: Gradients of the student block; what a REDUCE moves.
        optimizer_bytes: State that the optimizer keeps for the student block.
        teach_bytes_per_row: What the teacher block needs for a while beside its input and output.
        learn_bytes_per_row: What forward and backward of the student block keep at their peak beside input and target.
    """

    name: str
    teacher_parameter_bytes: int = 0
    student_parameter_bytes: int = 0
    gradient_bytes: int = 0
    optimizer_bytes: int = 0
    teach_bytes_per_row: int = 0
    learn_bytes_per_row: int = 0

    def __post_init__(self) -> None:
        _check_amounts(self, f"block {self.name!r}")


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTimes:
    """How long one block takes on one class of devices.

    Args:
        teach_ms: Forward of the teacher block, by rows.
        learn_ms: Forward, loss and backward of the student block, by rows.
        update_ms: Optimizer step of the student block, whatever the rows.
    """

    teach_ms: Curve
    learn_ms: Curve
    update_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_amounts(self, "block times")


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceTimes:
    """How long every block takes on one class of devices.

    Args:
        device_class: Name of the class, such as the device's model.
        blocks: Times of every block, in block order.
    """

    device_class: str
    blocks: tuple[BlockTimes, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "blocks", tuple(self.blocks))


@dataclass(frozen=True, slots=True, kw_only=True)
class ReduceTimes:
    """How long a measured all-reduce takes.

    Args:
        num_ranks: Ranks that reduce together, at least 2.
        ms: The time by bytes that every rank contributes.
    """

    num_ranks: int
    ms: Curve

    def __post_init__(self) -> None:
        if self.num_ranks < 2:
            raise CostError(f"`num_ranks` of a REDUCE must be at least 2, but is {self.num_ranks}. Leave it out.")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkCost:
    """What it costs to move bytes between two ranks, and to reduce over several.

    An occupation is the fraction of a transfer during which the rank's own thread cannot compute: 0 if the transfer is
    fully overlapped, 1 if nothing is.

    Args:
        latency_ms: Time of an empty message.
        bytes_per_ms: Bandwidth of one direction.
        send_occupation: Fraction that occupies the sender.
        receive_occupation: Fraction that occupies the receiver.
        reduce_occupation: Fraction of a REDUCE that occupies each of its ranks.
        reduces: Measured all-reduces. A number of ranks that was not measured is taken for a ring over this link.
    """

    latency_ms: float = 0.0
    bytes_per_ms: float = float("inf")
    send_occupation: float = 0.0
    receive_occupation: float = 0.0
    reduce_occupation: float = 0.0
    reduces: tuple[ReduceTimes, ...] = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "reduces", tuple(self.reduces))
        _check_amounts(self, "link", except_for="bytes_per_ms")
        if not self.bytes_per_ms > 0:
            raise CostError(f"`bytes_per_ms` must be above 0, but is {self.bytes_per_ms}. Measure the link again.")
        for name in ("send_occupation", "receive_occupation", "reduce_occupation"):
            _check_fraction(name, getattr(self, name))
        if len({reduce.num_ranks for reduce in self.reduces}) < len(self.reduces):
            raise CostError("`reduces` must have every number of ranks once, but has one twice. Give one curve each.")

    def transfer_ms(self, num_bytes: float) -> float:
        """Give the time from the start of a message to its arrival."""
        return self.latency_ms + num_bytes / self.bytes_per_ms

    def reduce_ms(self, num_bytes: float, num_ranks: int) -> float:
        """Give the time of an all-reduce: as measured for this number of ranks, otherwise that of a ring.

        Example:
            >>> LinkCost(latency_ms=0.1, bytes_per_ms=1000).reduce_ms(3000, 3)
            4.4
        """
        if num_ranks < 2:
            return 0.0
        for reduce in self.reduces:
            if reduce.num_ranks == num_ranks:
                return reduce.ms.at(num_bytes)
        num_hops = 2 * (num_ranks - 1)
        return num_hops * (self.latency_ms + num_bytes / num_ranks / self.bytes_per_ms)


@dataclass(frozen=True, slots=True, kw_only=True)
class LoaderCost:
    """What it costs a rank to load rows.

    Args:
        fixed_ms: Time per batch.
        per_row_ms: Time per row.
        occupation: Fraction of loading that occupies the rank's own thread: 1 without loader workers, 0 with enough.
    """

    fixed_ms: float = 0.0
    per_row_ms: float = 0.0
    occupation: float = 0.0

    def __post_init__(self) -> None:
        _check_amounts(self, "loader")
        _check_fraction("occupation", self.occupation)

    def load_ms(self, num_rows: int) -> float:
        """Give the time to load some rows; none take none."""
        return self.fixed_ms + self.per_row_ms * num_rows if num_rows else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Overheads:
    """What a rank's thread spends besides the measured times, in ms: once per step, and once per action of a kind.

    Of the REDUCEs, only those count that begin a sum; the others leave their gradients to it.
    """

    step_ms: float = 0.0
    load_ms: float = 0.0
    recv_ms: float = 0.0
    teach_ms: float = 0.0
    send_ms: float = 0.0
    learn_ms: float = 0.0
    reduce_ms: float = 0.0
    update_ms: float = 0.0

    def __post_init__(self) -> None:
        _check_amounts(self, "overheads")


@dataclass(frozen=True, slots=True, kw_only=True)
class CostTable(PlainData):
    """All measurements that a plan is judged by.

    Args:
        blocks: Sizes of every block.
        devices: Times of every block, for each class of devices.
        boundary_bytes_per_row: Bytes per row of boundary 0 (the model input) up to the last teacher block's output:
            one more than there are blocks.
        target_bytes_per_row: Bytes per row of the labels.
        loader: Cost of loading.
        same_node: Cost of links between ranks of one node.
        other_node: Cost of links between ranks of different nodes.
        overheads: Time per step and action besides the measured times.
        noise: Relative uncertainty of a single time of this table: by so much another measurement may differ.
        model_error: Relative error of predicted step times that would be left if all times were exact: caches and
            memory that ranks share, threads that go astray.
        jitter_ms: How unsteady the ranks are, independently of each other: the variance of the time of their work, by
            the ms that it takes. Work of 100 ms whose standard deviation is 5 ms has 0.25. Where ranks sum gradients,
            it makes them wait for each other.

    Raises:
        CostError: Numbers of blocks differ, a class of devices is there twice, or a number is impossible.

    Example:
        >>> times = BlockTimes(teach_ms=Curve([(64, 1.0)]), learn_ms=Curve([(64, 3.0)]))
        >>> costs = CostTable(
        ...     blocks=[BlockSizes(name="stem")],
        ...     devices=[DeviceTimes(device_class="default", blocks=[times])],
        ...     boundary_bytes_per_row=[12, 8],
        ... )
        >>> CostTable.from_dict(costs.to_dict()) == costs
        True
        >>> costs.times("default")[0].learn_ms.at(32)
        1.5
    """

    _subject = "costs"

    blocks: tuple[BlockSizes, ...]
    devices: tuple[DeviceTimes, ...]
    boundary_bytes_per_row: tuple[int, ...]
    target_bytes_per_row: int = 0
    loader: LoaderCost = LoaderCost()
    same_node: LinkCost = LinkCost()
    other_node: LinkCost = LinkCost()
    overheads: Overheads = Overheads()
    noise: float = 0.0
    model_error: float = 0.0
    jitter_ms: float = 0.0

    def __post_init__(self) -> None:
        for name in ("blocks", "devices", "boundary_bytes_per_row"):
            object.__setattr__(self, name, _as_tuple(name, getattr(self, name)))
        if not self.blocks:
            raise CostError("`blocks` must have at least one block, but is empty. Describe every block.")
        if not self.devices:
            raise CostError("`devices` must have at least one class of devices, but is empty. Measure one device.")
        for device in self.devices:
            if len(device.blocks) != self.num_blocks:
                raise CostError(
                    f"`devices` must have the times of all {self.num_blocks} blocks, but {device.device_class!r} has "
                    f"{len(device.blocks)}. Measure every block on every class of devices."
                )
        if len({device.device_class for device in self.devices}) < len(self.devices):
            raise CostError("`devices` must have every class of devices once, but has one twice. Leave one out.")
        if len(self.boundary_bytes_per_row) != self.num_blocks + 1:
            raise CostError(
                f"`boundary_bytes_per_row` must have {self.num_blocks + 1} entries, one more than there are blocks, "
                f"but has {len(self.boundary_bytes_per_row)}. Count the model input and the last block's output."
            )
        for boundary, size in enumerate(self.boundary_bytes_per_row):
            _check_amount(f"boundary_bytes_per_row[{boundary}]", size)
        _check_amount("target_bytes_per_row", self.target_bytes_per_row)
        _check_amount("jitter_ms", self.jitter_ms)
        _check_fraction("noise", self.noise)
        _check_fraction("model_error", self.model_error)

    @property
    def num_blocks(self) -> int:
        """Number of blocks."""
        return len(self.blocks)

    def times(self, device_class: str) -> tuple[BlockTimes, ...]:
        """Give the times of every block on a class of devices.

        Raises:
            CostError: The class was not measured.
        """
        for device in self.devices:
            if device.device_class == device_class:
                return device.blocks
        raise CostError(
            f"`device_class` must be one of {', '.join(device.device_class for device in self.devices)}, but is "
            f"{device_class!r}. Measure the blocks on that class of devices."
        )
