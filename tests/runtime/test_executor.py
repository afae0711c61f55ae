"""Programs run on threads as ranks: whatever the plan, what is learned is what one rank learns."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Collection, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from lightning_pipebd.planning.ahead import compile_ahead
from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.planning.program import TARGETS, Kind, Program
from lightning_pipebd.runtime.executor import Executor, Jobs, Span
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.relay import Relay, RelayError
from lightning_pipebd.runtime.row_trees import RowTree
from tests.helpers.plans import ahead_plans, plans
from tests.helpers.ranks import run_threads

WIDTH = 8  # also a number of rows that the tests draw, and that of a mask
RATE = 0.1


class Blocks:
    """Float64 teacher and student blocks, the same on every rank; remembers how many rows were taught."""

    def __init__(self, num_blocks: int, target_blocks: Collection[int] = ()) -> None:
        generator = torch.Generator().manual_seed(num_blocks)
        teachers, students = torch.randn(2, num_blocks, WIDTH, WIDTH, generator=generator, dtype=torch.float64)
        self.teachers = list(teachers)
        self.students = [torch.nn.Parameter(weight.clone()) for weight in students]
        self.target_blocks = target_blocks
        self.taught: list[tuple[int, int]] = []
        self.put_off: list[tuple[int, Tensor]] = []
        self.passes: list[list[int]] = []
        self.most_put_off = 2

    @property
    def is_full(self) -> bool:
        return len(self.put_off) >= self.most_put_off

    def teach(self, block: int, boundary: Any) -> Any:
        self.taught.append((block, len(boundary)))
        return torch.tanh(boundary @ self.teachers[block])

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        assert len(boundary) == len(target) == rows.num_rows
        output = boundary @ self.students[block]
        loss = (output - target).square().mean()
        if block in self.target_blocks:
            assert len(labels) == rows.num_rows
            loss = loss + (output.mean(1) - labels).square().mean()
        part: Tensor = loss * (rows.num_rows / num_rows)
        self.put_off.append((block, part))
        return part.detach()

    def settle(self) -> None:
        self.passes.append([block for block, _ in self.put_off])
        torch.autograd.backward([part for _, part in self.put_off])
        self.put_off = []


class MaskedBlocks(Blocks):
    """Boundaries are trees with a leaf that all rows share, as large as a batch may have rows, and leaves of no rows.

    The first boundary is the tensor that was loaded.
    """

    def teach(self, block: int, boundary: Any) -> Any:
        hidden, mask = self._open(boundary)
        assert mask.shape == (WIDTH, WIDTH)
        hidden = super().teach(block, hidden @ mask)
        return {"hidden": (hidden, [hidden.sum(1)]), "shared": {"mask": mask, "none": None, "width": WIDTH}}

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        hidden, mask = self._open(boundary)
        wanted, same_mask = self._open(target)
        assert mask.equal(same_mask)
        assert target["hidden"][1][0].equal(wanted.sum(1))
        return super().learn(block, hidden @ mask, wanted, labels, rows, num_rows)

    @staticmethod
    def _open(boundary: Any) -> tuple[Tensor, Tensor]:
        if isinstance(boundary, Tensor):
            return boundary, torch.ones(WIDTH, WIDTH, dtype=torch.float64).tril()
        assert boundary["shared"]["none"] is None
        assert boundary["shared"]["width"] == WIDTH
        return boundary["hidden"][0], boundary["shared"]["mask"]


class Batch(NamedTuple):
    """A batch; teacher blocks work on the ``"next"`` meanwhile, or on one that is ``"lost"``: it does not come."""

    num_rows: int
    is_update: bool = True
    ahead: str = ""


class Result(NamedTuple):
    """What one rank comes to: its blocks, and the losses of each step."""

    blocks: Blocks
    losses: list[dict[int, Tensor]]
    num_reductions: int


class CountingReducer(GradientReducer):
    """Counts how often a reduction is started."""

    num_started = 0

    def start(self, block: int, ranks: tuple[int, ...]) -> None:
        self.num_started += 1
        super().start(block, ranks)


#: Two steps of a rank that has all jobs, and whose teacher block works a batch ahead.
ALONE_AHEAD = (
    "PROGRAM rank=0 rows=4 next=4\nLOAD rows=0:4\nTEACH block=0 rows=0:4\nLOAD rows=0:4 next\n"
    "TEACH block=0 rows=0:4 next\nLEARN block=0 rows=0:4",
    "PROGRAM rank=0 rows=4 next=4 taught\nLOAD rows=0:4 next\nTEACH block=0 rows=0:4 next\nLEARN block=0 rows=0:4",
)


def load(plan: Plan, rank: int, step: int, num_rows: int) -> dict[int, RowTree]:
    """This rank's rows of the batch of a step: inputs and labels."""
    rows = plan.teacher_rows(0, num_rows).get(rank, Rows(0, 0))
    if rows.is_empty:
        return {}
    generator = torch.Generator().manual_seed(step)
    inputs = torch.randn(num_rows, WIDTH, generator=generator, dtype=torch.float64)
    mine = {0: inputs[rows.start : rows.stop], TARGETS: inputs[rows.start : rows.stop].sum(1)}
    return {boundary: RowTree(rows, tree, (True,)) for boundary, tree in mine.items()}


def make_executor(
    plan: Plan,
    world: LocalWorld,
    rank: int,
    blocks: Jobs,
    students: Sequence[torch.nn.Parameter] = (),
    *,
    max_in_flight: int = 2,
    **options: Any,
) -> tuple[Executor, Relay, CountingReducer]:
    others = [peer for peer in range(plan.num_ranks) if peer != rank]
    relay = Relay(world.transports[rank], sources=others, destinations=others, max_in_flight=max_in_flight)
    reducer = CountingReducer(world.transports[rank], {block: [student] for block, student in enumerate(students)})
    cuts_rows = plan.has_split_teachers or plan.has_split_students
    return Executor(blocks, relay, reducer, cuts_rows=cuts_rows, **options), relay, reducer


def train(
    plan: Plan, batches: Sequence[Batch], make_blocks: Callable[[], Blocks], max_in_flight: int = 2
) -> list[Result]:
    """Train by plain SGD, with one thread per rank."""
    world = LocalWorld(plan.num_ranks)

    def work(rank: int) -> Result:
        blocks = make_blocks()
        executor, relay, reducer = make_executor(
            plan, world, rank, blocks, blocks.students, max_in_flight=max_in_flight
        )
        losses = []
        dropped = taught = 0
        for step, batch in enumerate(batches):
            if dropped:
                executor.forget(compile_ahead(plan, dropped, is_taught=True, target_blocks=blocks.target_blocks)[rank])
            looked_at = {"next": [*batches, batch][step + 1].num_rows, "lost": batch.num_rows + 1, "": 0}[batch.ahead]
            program = compile_ahead(
                plan,
                batch.num_rows,
                num_next_rows=looked_at,
                is_taught=bool(taught),
                target_blocks=blocks.target_blocks,
                update=batch.is_update,
            )[rank]
            own = {} if taught else load(plan, rank, step, batch.num_rows)
            losses.append(
                executor.run(program, step, own, load(plan, rank, step + 1, looked_at) if looked_at else None)
            )
            taught, dropped = (looked_at if batch.ahead == name else 0 for name in ("next", "lost"))
            for action in program.actions:
                if action.kind is Kind.UPDATE:
                    student = blocks.students[action.index]
                    assert student.grad is not None
                    student.data -= RATE * student.grad
                    student.grad = None
        relay.close()
        return Result(blocks, losses, reducer.num_started)

    return run_threads(plan.num_ranks, work)


def assert_same_training(
    plan: Plan, batches: Sequence[Batch], make_blocks: Callable[[], Blocks], max_in_flight: int = 2
) -> None:
    """Compare with one rank: weights of every rank that learns a block, and the losses of all ranks together."""
    alone = [batch._replace(ahead="") for batch in batches]
    (one,) = train(Plan.joint(plan.num_blocks, 1), alone, make_blocks)
    many = train(plan, batches, make_blocks, max_in_flight)
    tolerance = 1e-12 if plan.has_split_teachers or plan.has_split_students else 0.0
    for block in range(plan.num_blocks):
        for rank in plan.student_ranks(block):
            ours, theirs = many[rank].blocks.students[block], one.blocks.students[block]
            torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)
    for step, losses in enumerate(one.losses):
        for block, loss in losses.items():
            parts = [result.losses[step][block] for result in many if block in result.losses[step]]
            torch.testing.assert_close(torch.stack(parts).sum(), loss, rtol=tolerance, atol=tolerance)


def draw_batches(sizes: st.SearchStrategy[int], max_steps: int) -> st.SearchStrategy[list[Batch]]:
    return st.lists(st.builds(Batch, sizes, st.booleans(), st.just("")), min_size=1, max_size=max_steps)


class TestTraining:
    @settings(max_examples=60)
    @given(plans(max_ranks=4, max_blocks=5), draw_batches(st.integers(1, 12), 5), st.frozensets(st.integers(0, 4)))
    def test_any_plan_trains_what_one_rank_trains(
        self, plan: Plan, batches: list[Batch], targets: frozenset[int]
    ) -> None:
        target_blocks = {block for block in targets if block < plan.num_blocks}
        assert_same_training(plan, batches, lambda: Blocks(plan.num_blocks, target_blocks))

    @settings(max_examples=30)
    @given(plans(max_ranks=4, max_blocks=4), draw_batches(st.sampled_from([1, 2, WIDTH, 2 * WIDTH]), 3))
    def test_leaves_that_all_rows_share_are_neither_cut_nor_joined(self, plan: Plan, batches: list[Batch]) -> None:
        assert_same_training(plan, batches, lambda: MaskedBlocks(plan.num_blocks))

    @pytest.mark.parametrize("text", ["0-2", "0|1|2", "0,2|1", "T0-2|S0-2", "0|1,T2|S2"])
    def test_unsplit_jobs_give_the_bits_of_one_rank(self, text: str) -> None:
        plan = parse_plan(text, num_blocks=3)
        batches = [Batch(5), Batch(12, is_update=False), Batch(1)]
        assert_same_training(plan, batches, lambda: Blocks(3, {1, 2}))

    @settings(max_examples=20)
    @given(data=st.data(), plan=ahead_plans(max_ranks=3, max_blocks=5), max_in_flight=st.integers(1, 2))
    def test_teacher_blocks_a_batch_ahead_change_no_bit(
        self, data: st.DataObject, plan: Plan, max_in_flight: int
    ) -> None:
        ahead = st.sampled_from(["next", "next", "", "lost"])
        batches = data.draw(st.lists(st.builds(Batch, st.integers(1, 9), st.booleans(), ahead), min_size=1, max_size=6))
        batches[-1] = batches[-1]._replace(ahead=data.draw(st.sampled_from(["", "lost"])))
        targets = data.draw(st.frozensets(st.integers(0, plan.num_blocks - 1)))
        assert_same_training(plan, batches, lambda: Blocks(plan.num_blocks, targets), max_in_flight)

    @pytest.mark.parametrize("target_blocks", [(), (0,)], ids=["boundary", "labels"])
    def test_what_was_made_a_step_early_may_not_be_changed_before_it_is_learned_from(
        self, target_blocks: Collection[int]
    ) -> None:
        first, second = (Program.parse(text) for text in ALONE_AHEAD)
        plan = Plan.joint(1, 1)
        for changes in (False, True):
            blocks = Blocks(1, target_blocks)
            executor, _, _ = make_executor(plan, LocalWorld(1), 0, blocks, blocks.students)
            batches = [load(plan, 0, step, 4) for step in range(3)]
            for batch in batches:
                for piece in batch.values():
                    piece.note_versions()
            executor.run(first, 0, batches[0], batches[1])
            if not changes:
                executor.run(second, 1, {}, batches[2])
                continue
            batches[1][TARGETS if target_blocks else 0].tree.add_(1)
            what = "The labels of a batch" if target_blocks else "Boundary 0"
            with pytest.raises(RuntimeError, match=f"{what} must stay as it was made until .* leave `teach_ahead` out"):
                executor.run(second, 1, {}, batches[2])

    def test_teacher_that_gives_the_same_memory_each_time_may_not_work_a_batch_ahead(self) -> None:
        class Reusing(Blocks):
            room = torch.empty(4, WIDTH, dtype=torch.float64)

            def teach(self, block: int, boundary: Any) -> Any:
                return self.room.copy_(super().teach(block, boundary))

        plan, blocks = Plan.joint(1, 1), Reusing(1)
        executor, _, _ = make_executor(plan, LocalWorld(1), 0, blocks, blocks.students)
        with pytest.raises(RuntimeError, match="Boundary 1 must stay as it was made until"):
            executor.run(Program.parse(ALONE_AHEAD[0]), 0, load(plan, 0, 0, 4), load(plan, 0, 1, 4))

    def test_labels_of_a_block_do_not_disturb_another_block_of_the_rank_with_other_rows(self) -> None:
        # Rank 1 receives labels for its half of block 0 alone, and then learns all rows of block 1.
        plan = Plan.from_dict(
            {"num_ranks": 2, "teacher": [[[0, 1]], [[0, 1]]], "student": [[[0, "1/2"], [1, "1/2"]], [[1, 1]]]}
        )
        assert_same_training(plan, [Batch(4), Batch(4)], lambda: Blocks(2, {0}))

    def test_accumulated_gradients_are_reduced_once(self) -> None:
        batches = [Batch(4, is_update=False), Batch(3, is_update=False), Batch(4)]
        results = train(Plan.joint(2, 2), batches, lambda: Blocks(2))
        assert [result.num_reductions for result in results] == [2, 2]

    def test_losses_belong_to_the_blocks_that_a_rank_has_rows_of(self) -> None:
        first, second, third = train(Plan.hybrid([(1, 2), (1, 1)]), [Batch(1), Batch(2)], lambda: Blocks(2))
        assert [list(losses) for losses in first.losses] == [[0], [0]]
        assert [list(losses) for losses in second.losses] == [[], [0]]
        assert [list(losses) for losses in third.losses] == [[1], [1]]
        assert not first.losses[0][0].requires_grad


class TestRowLeaves:
    def test_split_blocks_are_taught_a_second_number_of_rows_once(self) -> None:
        results = train(Plan.joint(2, 2), [Batch(6), Batch(6), Batch(4)], lambda: Blocks(2))
        assert [result.blocks.taught for result in results] == [
            [(0, 3), (0, 1), (1, 3), (1, 1), (0, 3), (1, 3), (0, 2), (1, 2)]
        ] * 2

    def test_a_single_row_is_compared_with_two(self) -> None:
        results = train(Plan.joint(1, 2), [Batch(2), Batch(2)], lambda: Blocks(1))
        assert [result.blocks.taught for result in results] == [[(0, 1), (0, 2), (0, 1)]] * 2

    def test_unsplit_plans_teach_nothing_twice(self) -> None:
        results = train(Plan.straight([1, 1]), [Batch(6)], lambda: Blocks(2))
        assert [result.blocks.taught for result in results] == [[(0, 6)], [(1, 6)]]

    @pytest.mark.parametrize(
        ("output", "message"),
        [
            (lambda boundary: boundary.t(), r"`teacher block 0` must give one entry per row .*\(8, 2\) for 2 rows"),
            (lambda boundary: (boundary, len(boundary)), "`teacher block 0` must give numbers that are the same"),
        ],
        ids=["rows last", "number of rows"],
    )
    def test_output_that_cannot_be_cut_is_refused(self, output: Callable[[Tensor], Any], message: str) -> None:
        blocks = Blocks(1)
        blocks.teach = lambda block, boundary: output(boundary)  # type: ignore[method-assign]
        plan, world = Plan.joint(1, 2), LocalWorld(2)
        executor, _, _ = make_executor(plan, world, 0, blocks)
        with pytest.raises(ValueError, match=message):
            executor.run(compile_programs(plan, 4)[0], 0, load(plan, 0, 0, 4))
        world.end(1)


def run_alone(blocks: Jobs, num_blocks: int, **options: Any) -> Executor:
    """Run one batch of two rows on one rank."""
    plan = Plan.joint(num_blocks, 1)
    executor, relay, _ = make_executor(plan, LocalWorld(1), 0, blocks, **options)
    executor.run(compile_programs(plan, 2)[0], 0, load(plan, 0, 0, 2))
    relay.close()
    return executor


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("PROGRAM rank=0 rows=4\nRECV boundary=5 rows=0:4 from=1", r"boundary 5 \(rows 0:4\) of step 3"),
        ("PROGRAM rank=0 rows=4\nRECV boundary=targets rows=0:2 from=1", r"the labels \(rows 0:2\) of step 3"),
        (
            "PROGRAM rank=0 rows=4 next=4\nRECV boundary=5 rows=0:4 from=1 next",
            r"boundary 5 of the next batch \(rows 0:4\) of step 3",
        ),
        (
            "PROGRAM rank=0 rows=4 taught\nRECV boundary=0 rows=0:4 from=1",
            r"boundary 0 of the next batch \(rows 0:4\) of step 2",
        ),
        (
            "PROGRAM rank=0 rows=4 taught\nRECV boundary=targets rows=0:4 from=1",
            r"the labels of the next batch \(rows 0:4\) of step 2",
        ),
    ],
)
def test_a_failure_names_what_will_not_arrive_as_programs_know_it(program: str, message: str) -> None:
    world = LocalWorld(2)
    executor, relay, _ = make_executor(Plan.straight([3, 3]), world, 0, Blocks(6))
    executor.run(Program(0, 4, ()), 2, {})
    world.end(1)
    with pytest.raises(RelayError, match=f": {message} will not arrive from rank 1: "):
        executor.run(Program.parse(program), 3, {})
    relay.abandon()


class TestObserving:
    def test_neighbouring_blocks_are_settled_together_until_the_jobs_are_full(self) -> None:
        blocks = Blocks(5)
        run_alone(blocks, 5)
        assert blocks.passes == [[0, 1], [2, 3], [4]]

    def test_observer_is_told_every_action_in_order(self) -> None:
        spans: list[Span] = []
        run_alone(Blocks(2), 2, observer=spans.append)
        times = [time for span in spans for time in (span.start_s, span.stop_s)]
        assert [span.action for span in spans] == list(compile_programs(Plan.joint(2, 1), 2)[0].actions)
        assert times == sorted(times)

    def test_a_shared_backward_pass_is_divided_among_its_blocks(self, monkeypatch: pytest.MonkeyPatch) -> None:
        now_s = 0.0

        class Timed(Blocks):
            def teach(self, *args: Any) -> Any:
                nonlocal now_s
                now_s += 1
                return super().teach(*args)

            def learn(self, block: int, *args: Any) -> Tensor:
                nonlocal now_s
                now_s += 2 + block
                return super().learn(block, *args)

            def settle(self) -> None:
                nonlocal now_s
                now_s += 10
                super().settle()

        monkeypatch.setattr("lightning_pipebd.runtime.executor.time", SimpleNamespace(perf_counter=lambda: now_s))
        spans: list[Span] = []
        run_alone(Timed(2), 2, observer=spans.append)
        assert [(str(span.action.kind), span.start_s, span.stop_s) for span in spans if span.stop_s > span.start_s] == [
            ("TEACH", 0, 1),
            ("LEARN", 1, 1 + 2 + 4),
            ("TEACH", 7, 8),
            ("LEARN", 8, 8 + 3 + 6),
        ]

    def test_failing_action_is_pointed_at(self) -> None:
        blocks, plan = Blocks(2), Plan.joint(2, 1)
        program = compile_programs(plan, 2)[0]
        executor, _, _ = make_executor(plan, LocalWorld(1), 0, blocks)
        blocks.students[1] = torch.nn.Parameter(torch.ones(3, 3, dtype=torch.float64))
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            executor.run(program, 0, load(plan, 0, 0, 2))
        assert executor.current is not None
        assert str(executor.current[0].actions[executor.current[1]]) == "LEARN block=1 rows=0:2"

    def test_nothing_is_pointed_at_between_batches(self) -> None:
        assert run_alone(Blocks(2), 2).current is None

    def test_absent_rows_are_an_error(self) -> None:
        plan = Plan.joint(1, 1)
        executor, _, _ = make_executor(plan, LocalWorld(1), 0, Blocks(1))
        with pytest.raises(LookupError, match="rows 3:4 are not present"):
            executor.run(compile_programs(plan, 4)[0], 0, load(plan, 0, 0, 3))


class WatchedBlocks(Blocks):
    """Notes before each job which of the boundaries that it has seen still exist."""

    def __init__(self, num_blocks: int) -> None:
        super().__init__(num_blocks)
        self.seen: dict[int, weakref.ref[Tensor]] = {}
        self.alive: list[tuple[str, list[int]]] = []

    def _note(self, job: str, **boundaries: Tensor) -> None:
        self.seen.update({int(name[1:]): weakref.ref(tensor) for name, tensor in boundaries.items()})
        self.alive.append((job, sorted(index for index, tensor in self.seen.items() if tensor() is not None)))

    def teach(self, block: int, boundary: Any) -> Any:
        self._note(f"T{block}", **{f"b{block}": boundary})
        return super().teach(block, boundary)

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        self._note(f"S{block}", **{f"b{block}": boundary, f"b{block + 1}": target})
        return super().learn(block, boundary, target, labels, rows, num_rows)


class TestMemory:
    def test_boundaries_go_after_their_last_use(self) -> None:
        blocks = WatchedBlocks(3)
        run_alone(blocks, 3)
        # The loaded boundary belongs to the caller.
        assert blocks.alive == [
            *(("T0", [0]), ("S0", [0, 1])),
            *(("T1", [0, 1]), ("S1", [0, 1, 2])),
            *(("T2", [0, 2]), ("S2", [0, 2, 3])),
        ]
        blocks._note("end")
        assert blocks.alive[-1] == ("end", [])

    def test_boundaries_that_were_received_go_after_their_last_use(self) -> None:
        plan, world = parse_plan("T0-2|S0-2", num_blocks=3), LocalWorld(2)

        def work(rank: int) -> list[tuple[str, list[int]]]:
            blocks = WatchedBlocks(3)
            executor, relay, _ = make_executor(plan, world, rank, blocks)
            executor.run(compile_programs(plan, 2)[rank], 0, load(plan, rank, 0, 2))
            relay.close()
            blocks._note("end")
            return blocks.alive

        assert run_threads(2, work)[1] == [("S0", [0, 1]), ("S1", [1, 2]), ("S2", [2, 3]), ("end", [])]
