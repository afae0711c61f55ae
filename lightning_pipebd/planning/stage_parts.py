"""Stage parts: what one block, or some rows of it, adds to the cost of a stage."""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from typing import NamedTuple

from lightning_pipebd.planning.costs import CostTable, LinkCost
from lightning_pipebd.planning.cut_points import CutPoint

__all__ = ["Crossing", "Edge", "Part", "PartCosts"]


class Crossing(NamedTuple):
    """Where a stage meets the border between nodes: inside its ranks, before them, behind them."""

    inside: bool = False
    before: bool = False
    behind: bool = False


class Edge(NamedTuple):
    """What moving rows costs each rank: time of its way in or out, time of its thread, and bytes per step."""

    link_ms: float = 0.0
    thread_ms: float = 0.0
    num_bytes: int = 0

    def __add__(self, other: Edge) -> Edge:  # type: ignore[override]  # a sum of costs, not a longer tuple
        return Edge(self[0] + other[0], self[1] + other[1], self[2] + other[2])


class Part(NamedTuple):
    """What each rank of a stage spends on one block.

    Args:
        teach_ms: Teacher job.
        learn_ms: Student job, and what a sum of its gradients alone occupies of the thread.
        reduce_ms: Sum of its gradients alone, beside the thread.
        update_ms: Update.
        weight_bytes: Parameters, gradients, optimizer state.
        input_bytes: The block's input.
        output_bytes: The block's output.
        teach_bytes: What the teacher job needs for a while.
        learn_bytes: What the student job needs for a while.
        has_targets: Whether the student job reads the labels.
        bucket_bytes: Gradients to be summed with those of other blocks of the stage; below 0 if there are none.
    """

    teach_ms: float
    learn_ms: float
    reduce_ms: float
    update_ms: float
    weight_bytes: int
    input_bytes: int
    output_bytes: int
    teach_bytes: int
    learn_bytes: int
    has_targets: bool
    bucket_bytes: int = -1


class PartCosts:
    """Looks up what parts of blocks cost; equal parts are looked up once.

    Args:
        costs: Measurements.
        num_rows: Rows of the batch.
        target_blocks: Student blocks whose loss reads the labels.
    """

    def __init__(self, costs: CostTable, num_rows: int, target_blocks: Collection[int]) -> None:
        self.costs = costs
        self.num_rows = num_rows
        self.targets = frozenset(target_blocks)
        self.all = (num_rows, num_rows)
        self._times = {device.device_class: device.blocks for device in costs.devices}
        self._least_job_ms = [
            num_rows * min(curve.least_rate(num_rows) for curve in curves)
            for times in zip(*self._times.values(), strict=True)
            for curves in ([entry.teach_ms for entry in times], [entry.learn_ms for entry in times])
        ]
        # Kept per object; a cache on the methods would keep every object alive.
        self.part = lru_cache(maxsize=None)(self._part)
        self.whole_parts = lru_cache(maxsize=None)(self._whole_parts)
        self.sum_ms = lru_cache(maxsize=None)(self._sum_ms)

    def _whole_parts(self, device_class: str, num_ranks: int, is_inside: bool) -> list[Part]:
        crossing = Crossing(inside=is_inside)
        return [
            self._part(device_class, num_ranks, crossing, block, (0, 0), self.all)
            for block in range(self.costs.num_blocks)
        ]

    def _part(
        self,
        device_class: str,
        num_ranks: int,
        crossing: Crossing,
        block: int,
        first: tuple[int, int],
        last: tuple[int, int],
    ) -> Part:
        """Give the part between two cuts of one block, each given by teacher and student rows before it."""
        sizes, times = self.costs.blocks[block], self._times[device_class][block]
        overheads, boundaries = self.costs.overheads, self.costs.boundary_bytes_per_row
        taught, learned = (-(-(stop - start) // num_ranks) for start, stop in zip(first, last, strict=True))
        teach_ms = times.teach_ms.at(taught) + overheads.teach_ms if taught else 0.0
        learn_ms = reduce_ms = update_ms = 0.0
        bucket_bytes = -1
        weights = sizes.teacher_parameter_bytes if taught else 0
        if learned:
            # A student job that is shared with the stage next door is reduced with one more rank.
            is_before, is_behind = first[1] > 0, last[1] < self.num_rows
            num_sharers = num_ranks + is_before + is_behind
            is_far = crossing.inside or (is_before and crossing.before) or (is_behind and crossing.behind)
            learn_ms = times.learn_ms.at(learned) + overheads.learn_ms
            update_ms = times.update_ms + overheads.update_ms
            weights += sizes.student_parameter_bytes + sizes.gradient_bytes + sizes.optimizer_bytes
            if num_sharers > 1:
                weights += sizes.gradient_bytes
            if num_sharers > num_ranks:
                reduce_ms, thread_ms = self.sum_ms(sizes.gradient_bytes, num_sharers, is_far)
                learn_ms += thread_ms
            elif num_ranks > 1:
                bucket_bytes = sizes.gradient_bytes
        # Behind the last row of a block the whole output is there for what follows; before it, what was taught is.
        output_rows = self.num_rows if last == self.all else last[0] - first[1]
        return Part(
            teach_ms,
            learn_ms,
            reduce_ms,
            update_ms,
            weights,
            self.rank_rows(self.num_rows - first[1], num_ranks) * boundaries[block],
            self.rank_rows(output_rows, num_ranks) * boundaries[block + 1],
            taught * sizes.teach_bytes_per_row,
            learned * sizes.learn_bytes_per_row,
            bool(learned) and block in self.targets,
            bucket_bytes,
        )

    def _sum_ms(self, num_bytes: int, num_ranks: int, is_far: bool) -> tuple[float, float]:
        """Give the time of a sum of gradients over some ranks: beside the thread, and of the thread."""
        link = self._link(is_far)
        reduce_ms = link.reduce_ms(num_bytes, num_ranks)
        return reduce_ms, self.costs.overheads.reduce_ms + link.reduce_occupation * reduce_ms

    def cut(self, point: CutPoint, num_ranks: int, *, is_far: bool, is_send: bool) -> Edge:
        """Give what a cut costs each of the ranks on one side of it; nothing at the ends of the chain."""
        num_blocks = self.costs.num_blocks
        block, taught, learned = point
        if block == num_blocks or point == (0, 0, 0):
            return Edge()
        # The model input need not be sent to those who teach the first block: they load their rows.
        input_rows = (self.num_rows if block else taught) - learned
        output_rows = taught - (learned if block + 1 == num_blocks else 0)
        boundaries = self.costs.boundary_bytes_per_row
        edge = Edge()
        for rows, size in ((input_rows, boundaries[block]), (output_rows, boundaries[block + 1] if taught else 0)):
            if rows:
                edge += self._move(self.rank_rows(rows, num_ranks) * size, is_far=is_far, is_send=is_send)
        return edge

    def labels(self, num_ranks: int, *, is_far: bool, is_send: bool) -> Edge:
        """Give what it costs each of the ranks to send or receive the labels of its rows."""
        num_bytes = self.rank_rows(self.num_rows, num_ranks) * self.costs.target_bytes_per_row
        return self._move(num_bytes, is_far=is_far, is_send=is_send)

    def input_bytes(self, point: CutPoint, num_ranks: int) -> int:
        """Give what each of some ranks behind a cut holds of the cut block's input."""
        if point.block == self.costs.num_blocks:
            return 0
        size = self.costs.boundary_bytes_per_row[point.block]
        return self.rank_rows(self.num_rows - point.student_rows, num_ranks) * size

    def least_work(self, point: CutPoint) -> tuple[float, float]:
        """Give the time that lies before a cut and behind it at least, on the best devices at their best rates."""
        before = sum(self._least_job_ms[: 2 * point.block])
        if point.block < self.costs.num_blocks:
            shares = zip(point[1:], self._least_job_ms[2 * point.block : 2 * point.block + 2], strict=True)
            before += sum(rows / self.num_rows * job_ms for rows, job_ms in shares)
        return before, sum(self._least_job_ms) - before

    def load(self, rows: int, num_ranks: int) -> tuple[float, float]:
        """Give what loading costs each of the ranks: beside the thread, and of the thread."""
        if not rows:
            return 0.0, 0.0
        loader = self.costs.loader
        load_ms = loader.load_ms(self.rank_rows(rows, num_ranks))
        return (1 - loader.occupation) * load_ms, loader.occupation * load_ms + self.costs.overheads.load_ms

    @staticmethod
    def rank_rows(rows: int, num_ranks: int) -> int:
        """Give the most rows that a rank has if `num_ranks` divide them evenly."""
        return -(-rows // num_ranks)

    def _link(self, is_far: bool) -> LinkCost:
        return self.costs.other_node if is_far else self.costs.same_node

    def _move(self, num_bytes: int, *, is_far: bool, is_send: bool) -> Edge:
        link = self._link(is_far)
        overheads = self.costs.overheads
        link_ms = link.transfer_ms(num_bytes)
        if is_send:
            return Edge(link_ms, overheads.send_ms + link.send_occupation * link_ms, num_bytes)
        return Edge(link_ms, overheads.recv_ms + link.receive_occupation * link_ms, num_bytes)
