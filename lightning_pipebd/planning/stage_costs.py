"""Stage costs: what a stage costs a rank per step, by the stage alone, so that stages can be searched one by one.

A stage lies between two cut points and divides its rows evenly among `r` equal ranks; a rank has at most
``ceil(rows / r)`` of a job. Its cost is the largest of what one rank does side by side in a step:

    thread    overheads, teacher jobs, student jobs, updates, and what transfers, loading and reductions occupy; plus
              what of the reductions is not hidden behind later student jobs: they follow one another, each from the
              moment the last student job of its bucket ends; the last one ends later by as much as the last of the
              stage's ranks is to be expected behind the others after its jobs
    way in    the boundaries that cross the stage's first cut, and the labels; each rank gets ``1 / r``
    way out   the same at its last cut
    loader    loading beside the thread

Across a cut goes of the cut block's input what is taught or learned behind the cut, and of its output what was taught
before it. A student job that is shared with the stage next door is reduced over one rank more. Every term depends on
this stage alone (a link's cost on where its ranks lie), hence the slowest stage can be minimised exactly. Left to the
simulator: ranks that wait for each other where a job is shared, queues that are too short, and rows that change ranks
within a stage.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from math import inf, sqrt
from typing import NamedTuple

from lightning_pipebd.planning.buckets import BUCKET_BYTES
from lightning_pipebd.planning.costs import CostTable
from lightning_pipebd.planning.cut_points import CutPoint
from lightning_pipebd.planning.jitter import lateness
from lightning_pipebd.planning.stage_parts import Crossing, Edge, Part, PartCosts

__all__ = ["StageCosts", "StageMemory", "StageUse"]


class StageUse(NamedTuple):
    """What a stage needs of each of its ranks: time per step, and memory."""

    stop: int
    cost_ms: float
    num_bytes: int


class StageCosts:
    """Costs of every stage between the points of a list.

    Args:
        costs: Measurements.
        points: Cut points, in order; the first and the last are the ends of the chain.
        num_rows: Rows of the batch.
        target_blocks: Student blocks whose loss reads the labels.
        whole_students: Blocks whose student job must stay on one rank.
        max_in_flight: Steps of messages that a rank has to hold.
    """

    def __init__(
        self,
        costs: CostTable,
        points: Sequence[CutPoint],
        num_rows: int,
        *,
        target_blocks: Collection[int] = (),
        whole_students: Collection[int] = (),
        max_in_flight: int = 2,
    ) -> None:
        self.points = list(points)
        self.parts = PartCosts(costs, num_rows, target_blocks)
        self.whole_students = frozenset(whole_students)
        self.max_in_flight = max_in_flight
        self.in_block: list[list[int]] = [[] for _ in range(costs.num_blocks + 1)]
        for index, point in enumerate(self.points):
            self.in_block[point.block].append(index)
        self._ways_out: dict[tuple[int, bool], list[Edge]] = {}

    def column(
        self,
        start: int,
        num_ranks: int,
        device_class: str,
        *,
        crossing: Crossing = Crossing(),  # noqa: B008 - a constant
        limit_bytes: float = inf,
        ceiling_ms: float = inf,
    ) -> Iterator[StageUse]:
        """Give every point at which a stage from `start` may stop, with what the stage needs.

        Args:
            start: Index of the stage's first cut point.
            num_ranks: Ranks that divide the stage's rows.
            device_class: Class of these ranks' devices.
            crossing: Where the stage meets the border between nodes.
            limit_bytes: Memory of each of these ranks; stages that need more are left out.
            ceiling_ms: Stages that cost more are left out.
        """
        return _Column(self, start, num_ranks, device_class, crossing).walk(limit_bytes, ceiling_ms)

    def ways_out(self, num_ranks: int, *, is_far: bool) -> list[Edge]:
        """Give for every point what sending across it costs each of some ranks."""
        key = (num_ranks, is_far)
        if key not in self._ways_out:
            self._ways_out[key] = [
                self.parts.cut(point, num_ranks, is_far=is_far, is_send=True) for point in self.points
            ]
        return self._ways_out[key]


class StageMemory(StageCosts):
    """The memory of every stage in the place of its time: what it needs as a fraction of what its ranks have."""

    def column(
        self,
        start: int,
        num_ranks: int,
        device_class: str,
        *,
        crossing: Crossing = Crossing(),  # noqa: B008 - a constant
        limit_bytes: float = inf,
        ceiling_ms: float = inf,
    ) -> Iterator[StageUse]:
        """Give every point at which a stage from `start` may stop; nothing is left out."""
        for use in super().column(start, num_ranks, device_class, crossing=crossing):
            yield use._replace(cost_ms=use.num_bytes / limit_bytes)


_Sums = tuple[float, float, float, float, int, int, int, int, int]


class _Column:
    """All stages from one cut point on one number of equal ranks."""

    def __init__(self, stages: StageCosts, start: int, num_ranks: int, device_class: str, crossing: Crossing) -> None:
        self.stages = stages
        self.parts = parts = stages.parts
        self.start = start
        self.begin = stages.points[start]
        self.num_ranks = num_ranks
        self.device_class = device_class
        self.crossing = crossing
        self.base_ms = parts.costs.overheads.step_ms
        self.way_in_ms = self.background_ms = 0.0
        self.fixed_bytes = 0
        # The standard deviation of work grows with its root.
        self.lateness = lateness(num_ranks) * sqrt(parts.costs.jitter_ms)
        self.ways_out = stages.ways_out(num_ranks, is_far=crossing.behind)
        self._receive(parts.cut(self.begin, num_ranks, is_far=crossing.before, is_send=False))
        self.are_labels_here = start == 0
        if start == 0 and parts.targets:
            self._load_labels()

    def _receive(self, edge: Edge) -> None:
        self.way_in_ms += edge.link_ms
        self.base_ms += edge.thread_ms
        self.fixed_bytes += self.stages.max_in_flight * edge.num_bytes

    def _load_labels(self) -> None:
        """Hold the labels of the loaded rows, and send them on if a later stage reads them."""
        labels = self.parts.labels(self.num_ranks, is_far=self.crossing.behind, is_send=True)
        self.fixed_bytes += labels.num_bytes
        last = max(self.parts.targets)
        self.ways_out = [
            edge + labels if point.block <= last else edge
            for edge, point in zip(self.ways_out, self.stages.points, strict=True)
        ]

    def _receive_labels(self) -> None:
        labels = self.parts.labels(self.num_ranks, is_far=self.crossing.before, is_send=False)
        self._receive(labels)
        self.fixed_bytes += labels.num_bytes
        self.are_labels_here = True

    def _load(self, rows: int) -> None:
        background_ms, thread_ms = self.parts.load(rows, self.num_ranks)
        self.background_ms += background_ms
        self.base_ms += thread_ms

    def walk(self, limit_bytes: float, ceiling_ms: float) -> Iterator[StageUse]:
        """Go from block to block; what has come together only grows, so nothing behind an excess can fit.

        `learn` and `reduced` are when student jobs and reductions end if the first student job starts at 0, `live` is
        what all boundaries so far hold, the peaks are the most that is alive during teacher and student jobs. `bucket`
        is what waits to be summed with the gradients of further blocks, or below 0.
        """
        max_in_flight, points, in_block = self.stages.max_in_flight, self.stages.points, self.stages.in_block
        teach = learn = reduced = update = 0.0
        weights = learn_peak = 0
        bucket = -1
        live = teach_peak = self.parts.input_bytes(self.begin, self.num_ranks)
        # Millions of turns for a large cluster: local names, and no call that is not needed for every block.
        for block, part in self._passed():
            learn_end, reduced_end = (learn, reduced) if bucket < 0 else self._sum(learn, reduced, bucket)
            if reduced_end and self.lateness:
                reduced_end += self.lateness * sqrt(teach + learn_end)
            thread_ms = self.base_ms + teach + update + (learn_end if learn_end > reduced_end else reduced_end)
            num_bytes = self.fixed_bytes + weights + (teach_peak if teach_peak > learn_peak else learn_peak)
            if thread_ms > ceiling_ms or num_bytes > limit_bytes:
                return
            for stop in in_block[block]:
                if stop <= self.start:
                    continue
                out_ms, out_thread_ms, out_bytes = self.ways_out[stop]
                if points[stop].teacher_rows:
                    sums = (teach, learn, reduced, update, weights, live, teach_peak, learn_peak, bucket)
                    use = self._stop_inside(stop, sums)
                    if use is not None and use.cost_ms <= ceiling_ms and use.num_bytes <= limit_bytes:
                        yield use
                    continue
                cost_ms = max(thread_ms + out_thread_ms, self.way_in_ms, out_ms, self.background_ms)
                if cost_ms <= ceiling_ms and num_bytes + max_in_flight * out_bytes <= limit_bytes:
                    yield StageUse(stop, cost_ms, num_bytes + max_in_flight * out_bytes)
            if part is None:
                return
            teach += part[0]
            learn += part[1]
            if part[2]:
                reduced = (learn if learn > reduced else reduced) + part[2]
            if part[10] >= 0:
                bucket = part[10] + (bucket if bucket > 0 else 0)
                if bucket >= BUCKET_BYTES:
                    learn, reduced = self._sum(learn, reduced, bucket)
                    bucket = -1
            update += part[3]
            weights += part[4]
            live += part[6]
            teach_peak = max(teach_peak, live + part[7])
            learn_peak = max(learn_peak + part[6], part[5] + part[6] + part[8])

    def _passed(self) -> Iterator[tuple[int, Part | None]]:
        """Give every block that the stage may reach, with the part that passing it adds."""
        whole = self.parts.whole_parts(self.device_class, self.num_ranks, self.crossing.inside)
        first = self.begin[1:]
        for block in range(self.begin.block, len(whole)):
            if self.num_ranks > 1 and block in self.stages.whole_students:
                yield block, None
                return
            part = whole[block] if first == (0, 0) else self._part(block, first, self.parts.all)
            yield block, part
            if not block:
                self._load(self.parts.num_rows - first[0])
            if part.has_targets and not self.are_labels_here:
                self._receive_labels()
            first = (0, 0)
        yield len(whole), None

    def _sum(self, learn: float, reduced: float, bucket: int) -> tuple[float, float]:
        """Give `learn` and `reduced` with the sum of a bucket."""
        reduce_ms, thread_ms = self.parts.sum_ms(bucket, self.num_ranks, self.crossing.inside)
        learn += thread_ms
        return learn, max(learn, reduced) + reduce_ms

    def _part(self, block: int, first: tuple[int, int], last: tuple[int, int]) -> Part:
        return self.parts.part(self.device_class, self.num_ranks, self.crossing, block, first, last)

    def _stop_inside(self, stop: int, sums: _Sums) -> StageUse | None:
        """Give the stage that stops inside a block; `None` if its rows would run backwards or may not be divided."""
        point = self.stages.points[stop]
        block, last = point.block, point[1:]
        first = self.begin[1:] if block == self.begin.block else (0, 0)
        if first[0] > last[0] or first[1] > last[1]:
            return None
        if self.num_ranks > 1 and block in self.stages.whole_students and last[1] > first[1]:
            return None
        teach, learn, reduced, update, weights, live, teach_peak, learn_peak, bucket = sums
        part = self._part(block, first, last)
        # No block of the bucket comes after this one, which other ranks share.
        if bucket >= 0:
            learn, reduced = self._sum(learn, reduced, bucket)
        learn += part.learn_ms
        if part.reduce_ms:
            reduced = max(learn, reduced) + part.reduce_ms
        if reduced and self.lateness:
            reduced += self.lateness * sqrt(teach + part.teach_ms + learn)
        labels, load = Edge(), (0.0, 0.0)
        if part.has_targets and not self.are_labels_here:
            labels = self.parts.labels(self.num_ranks, is_far=self.crossing.before, is_send=False)
        if not block:
            load = self.parts.load(last[0] - first[0], self.num_ranks)
        out = self.ways_out[stop]
        thread_ms = self.base_ms + teach + part.teach_ms + max(learn, reduced) + update + part.update_ms
        cost_ms = max(
            thread_ms + out.thread_ms + labels.thread_ms + load[1],
            self.way_in_ms + labels.link_ms,
            out.link_ms,
            self.background_ms + load[0],
        )
        live += part.output_bytes
        peak = max(
            teach_peak,
            live + part.teach_bytes,
            learn_peak + part.output_bytes,
            part.input_bytes + part.output_bytes + part.learn_bytes,
        )
        queues = self.stages.max_in_flight * (out.num_bytes + labels.num_bytes)
        num_bytes = self.fixed_bytes + weights + part.weight_bytes + peak + queues + labels.num_bytes
        return StageUse(stop, cost_ms, num_bytes)
