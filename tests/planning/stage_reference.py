"""Stage costs once more, term by term as `stage_costs` describes them, without sums that grow from block to block."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from math import sqrt
from typing import NamedTuple

from lightning_pipebd.planning.buckets import BUCKET_BYTES
from lightning_pipebd.planning.costs import CostTable, LinkCost
from lightning_pipebd.planning.cut_points import CutPoint
from lightning_pipebd.planning.jitter import lateness
from lightning_pipebd.planning.stage_parts import Crossing

__all__ = ["Need", "Question", "need_of_stage"]


class Need(NamedTuple):
    """What one rank of a stage needs."""

    cost_ms: float
    num_bytes: int


class Question(NamedTuple):
    """A stage, and all it depends on."""

    costs: CostTable
    num_rows: int
    start: CutPoint
    stop: CutPoint
    num_ranks: int
    device_class: str = "default"
    crossing: Crossing = Crossing()
    targets: Collection[int] = ()
    max_in_flight: int = 2

    def rank_rows(self, rows: int) -> int:
        return -(-rows // self.num_ranks)

    def rows_of(self, block: int) -> tuple[int, int]:
        """Give the rows of teacher and student job in the stage."""
        first = self.start[1:] if block == self.start.block else (0, 0)
        last = self.stop[1:] if block == self.stop.block else (self.num_rows, self.num_rows)
        return last[0] - first[0], last[1] - first[1]

    @property
    def blocks(self) -> list[int]:
        """The blocks of which the stage has rows."""
        last = min(self.stop.block, self.costs.num_blocks - 1)
        return [block for block in range(self.start.block, last + 1) if any(self.rows_of(block))]

    def link(self, is_far: bool) -> LinkCost:
        return self.costs.other_node if is_far else self.costs.same_node


def need_of_stage(question: Question) -> Need:
    """Give what a rank of the stage needs."""
    q = question
    ins, outs = list(_moves_in(q)), list(_moves_out(q))
    in_link, out_link = q.link(q.crossing.before), q.link(q.crossing.behind)
    in_ms, out_ms = (
        sum(link.latency_ms + size / link.bytes_per_ms for size in sizes)
        for link, sizes in ((in_link, ins), (out_link, outs))
    )
    overheads, loader = q.costs.overheads, q.costs.loader
    load_rows = q.rank_rows(q.rows_of(0)[0]) if q.start.block == 0 else 0
    load_ms = loader.fixed_ms + loader.per_row_ms * load_rows if load_rows else 0.0
    thread_ms = (
        overheads.step_ms
        + loader.occupation * load_ms
        + (overheads.load_ms if load_rows else 0.0)
        + overheads.recv_ms * len(ins)
        + overheads.send_ms * len(outs)
        + in_link.receive_occupation * in_ms
        + out_link.send_occupation * out_ms
        + _jobs_ms(q)
    )
    cost_ms = max(thread_ms, in_ms, out_ms, (1 - loader.occupation) * load_ms)
    queue_bytes = q.max_in_flight * (sum(ins) + sum(outs))
    return Need(cost_ms, _weight_bytes(q) + _working_bytes(q) + queue_bytes)


def _cut(q: Question, point: CutPoint) -> Iterator[int]:
    """List the bytes of each boundary that crosses a cut, for one rank."""
    num_blocks = q.costs.num_blocks
    if point in (CutPoint(0), CutPoint(num_blocks)):
        return
    block, taught, learned = point
    sizes = q.costs.boundary_bytes_per_row
    input_rows = q.num_rows - learned if block else taught - learned
    output_rows = taught if block + 1 < num_blocks else taught - learned
    if input_rows:
        yield q.rank_rows(input_rows) * sizes[block]
    if taught and output_rows:
        yield q.rank_rows(output_rows) * sizes[block + 1]


def _labels(q: Question) -> int:
    return q.rank_rows(q.num_rows) * q.costs.target_bytes_per_row


def _learns_labels(q: Question) -> bool:
    return any(q.rows_of(block)[1] for block in q.blocks if block in q.targets)


def _moves_in(q: Question) -> Iterator[int]:
    yield from _cut(q, q.start)
    if q.start != CutPoint(0) and _learns_labels(q):
        yield _labels(q)


def _moves_out(q: Question) -> Iterator[int]:
    yield from _cut(q, q.stop)
    if q.start == CutPoint(0) and any(block >= q.stop.block for block in q.targets):
        yield _labels(q)


def _sharers(q: Question, block: int) -> int:
    before = block == q.start.block and q.start.student_rows > 0
    behind = block == q.stop.block and q.stop.student_rows < q.num_rows
    return q.num_ranks + before + behind


def _sum_ms(q: Question, blocks: Sequence[int]) -> tuple[float, float]:
    """Give the time of the sum of these blocks' gradients, and how much of it occupies the thread."""
    first, last = blocks[0], blocks[-1]
    before = first == q.start.block and q.start.student_rows > 0 and q.crossing.before
    behind = last == q.stop.block and q.stop.student_rows < q.num_rows and q.crossing.behind
    link, num_ranks = q.link(q.crossing.inside or before or behind), _sharers(q, first)
    ms = link.reduce_ms(sum(q.costs.blocks[block].gradient_bytes for block in blocks), num_ranks)
    return ms, link.reduce_occupation * ms + q.costs.overheads.reduce_ms


def _buckets(q: Question) -> list[list[int]]:
    """List the blocks that are summed together: neighbours are shared with one rank more, and summed alone."""
    learned = [block for block in q.blocks if q.rows_of(block)[1]]
    alone = [[block] for block in learned if _sharers(q, block) > q.num_ranks]
    together: list[list[int]] = []
    for block in learned if q.num_ranks > 1 else []:
        if [block] in alone:
            continue
        if not together or sum(q.costs.blocks[other].gradient_bytes for other in together[-1]) >= BUCKET_BYTES:
            together.append([])
        together[-1].append(block)
    return alone + together


def _jobs_ms(q: Question) -> float:
    times, overheads = q.costs.times(q.device_class), q.costs.overheads
    taught = [block for block in q.blocks if q.rows_of(block)[0]]
    learned = [block for block in q.blocks if q.rows_of(block)[1]]
    teach_ms = sum(times[b].teach_ms.at(q.rank_rows(q.rows_of(b)[0])) + overheads.teach_ms for b in taught)
    sums = {bucket[-1]: _sum_ms(q, bucket) for bucket in _buckets(q)}
    learns = [
        times[b].learn_ms.at(q.rank_rows(q.rows_of(b)[1])) + overheads.learn_ms + sums.get(b, (0.0, 0.0))[1]
        for b in learned
    ]
    reduces = [sums.get(b, (0.0, 0.0))[0] for b in learned]
    # The thread goes on with the updates when the slowest chain of students, then reductions, has ended.
    ends = [sum(learns[: k + 1]) + sum(reduces[k:]) for k in range(len(learned)) if reduces[k]]
    late = lateness(q.num_ranks) * sqrt(q.costs.jitter_ms * (teach_ms + sum(learns)))
    learn_end = max([sum(learns), *(end + late for end in ends)])
    return teach_ms + learn_end + sum(times[b].update_ms + overheads.update_ms for b in learned)


def _weight_bytes(q: Question) -> int:
    total = 0
    for block in q.blocks:
        sizes, (taught, learned) = q.costs.blocks[block], q.rows_of(block)
        total += sizes.teacher_parameter_bytes if taught else 0
        if learned:
            total += sizes.student_parameter_bytes + sizes.gradient_bytes + sizes.optimizer_bytes
            total += sizes.gradient_bytes if _sharers(q, block) > 1 else 0
    return total


def _boundary_rows(q: Question) -> dict[int, int]:
    """Map each boundary of the stage to the rows of it that are alive in the end."""
    rows = {q.start.block: q.num_rows - q.start.student_rows}
    for block in q.blocks:
        first = q.start.student_rows if block == q.start.block else 0
        rows[block + 1] = q.num_rows if block < q.stop.block else q.stop.teacher_rows - first
    return rows


def _working_bytes(q: Question) -> int:
    sizes = {
        boundary: q.rank_rows(rows) * q.costs.boundary_bytes_per_row[boundary]
        for boundary, rows in _boundary_rows(q).items()
    }
    peaks = [sizes[q.start.block]]
    for block in q.blocks:
        taught, learned = map(q.rank_rows, q.rows_of(block))
        known = sum(size for boundary, size in sizes.items() if boundary <= block + 1)
        needed = sum(size for boundary, size in sizes.items() if boundary >= block)
        peaks.append(known + taught * q.costs.blocks[block].teach_bytes_per_row)
        peaks.append(needed + learned * q.costs.blocks[block].learn_bytes_per_row)
    has_labels = bool(q.targets) if q.start == CutPoint(0) else _learns_labels(q)
    return max(peaks) + (_labels(q) if has_labels else 0)


def sequence_cost(questions: Sequence[Question]) -> float:
    """Give the cost of the slowest of some stages."""
    return max(need_of_stage(question).cost_ms for question in questions)
