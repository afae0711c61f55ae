"""Pipelines side by side, on rank threads, train what one process trains."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pipebd.planning.pipeline_compiler import PipelineStep
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Schedule
from tests.helpers.pipelines import Task, Trained, train_in_threads, train_in_turn
from tests.helpers.ranks import RankError
from tests.helpers.training import max_difference

WIDTH = 5


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()


def distance(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
    return F.mse_loss(student_output, teacher_output) + F.cross_entropy(student_output, labels)


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, WIDTH, dtype=torch.float64), torch.randint(WIDTH, (size,))) for size in sizes]


def make_task(momentum: float | None = None, **changes: Any) -> Task:
    student = [block() for _ in range(3)]
    teacher = [block() for _ in range(2)] if momentum is None else student
    # Six rows, then so few that a replica has none, then as many again.
    task = Task(teacher=teacher, student=student, loss=distance, batches=batches(6, 7, 1, 6, 2), momentum=momentum)
    return replace(task, **changes)


def step(num_micro_batches: int = 2, **options: Any) -> PipelineStep:
    return PipelineStep(num_rows=1, num_micro_batches=num_micro_batches, **options)


def assert_same(found: Trained, expected: Trained) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=1e-12)
    assert max_difference(found.student, expected.student) <= 1e-12
    assert max_difference(found.teacher, expected.teacher) <= 1e-12


OPTIONS = [
    pytest.param({}, id="1f1b"),
    pytest.param({"schedule": Schedule.GPIPE}, id="gpipe"),
    pytest.param({"schedule": Schedule.TEACHER_FIRST}, id="teacher-first"),
    pytest.param({"splits_backward": True, "num_micro_batches": 1}, id="split"),
]


@pytest.mark.parametrize("plan", ["2 x 0|1 / 0-1|2", "3 x 0-1 / 0-2", "2 x 1|0 / 0,2|1"])
@pytest.mark.parametrize("options", OPTIONS)
def test_replicas_of_any_plan_and_schedule(plan: str, options: dict[str, Any]) -> None:
    task = make_task()
    assert_same(train_in_threads(task, PipelinePlan.parse(plan), step(**options)), train_in_turn(task))


@pytest.mark.parametrize("plan", ["2 x 0-1|2", "3 x 0-2", "2 x 2|0-1 / 0-1|2"])
@pytest.mark.parametrize("delay", [0, 1])
def test_every_replica_has_a_copy_of_the_momentum_teacher(plan: str, delay: int) -> None:
    task = make_task(0.9, delay=delay)
    found = train_in_threads(task, PipelinePlan.parse(plan), step(), looks_ahead=delay == 1)
    assert_same(found, train_in_turn(task))


def test_gradients_are_summed_once_per_optimizer_step() -> None:
    # In the last step but one the second replica has rows of the first batch alone.
    task = make_task(0.9, delay=1, accumulate=2, batches=batches(6, 5, 4, 1, 1, 1))
    assert_same(train_in_threads(task, PipelinePlan.parse("2 x 0|1-2"), step()), train_in_turn(task))


def test_as_many_replicas_as_ranks_are_plain_data_parallelism() -> None:
    task = make_task()
    found = train_in_threads(task, PipelinePlan.parse("4 x 0-1 / 0-2"), step(1))
    assert_same(found, train_in_turn(task))


def contrast(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
    """Each row's teacher against those of all other rows: no mean over rows can be taken of parts."""
    return F.cross_entropy(student_output @ teacher_output.T, torch.arange(len(labels)))


@pytest.mark.parametrize("plan", ["2 x 0|1 / 0|1-2", "2 x 0-1|- / -|0-2", "2 x 1|0 / 0,2|1", "3 x 0-1 / 0-2"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_loss_of_the_full_batch_over_replicas(plan: str, options: dict[str, Any]) -> None:
    task = make_task(loss=contrast)
    found = train_in_threads(task, PipelinePlan.parse(plan), step(**{"is_full_batch": True, **options}))
    assert_same(found, train_in_turn(task))


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_a_loss_of_the_full_batch_with_a_momentum_teacher_in_every_replica(delay: int, accumulate: int) -> None:
    task = make_task(0.9, loss=contrast, delay=delay, accumulate=accumulate, batches=batches(6, 5, 4, 1, 1, 1))
    found = train_in_threads(task, PipelinePlan.parse("2 x 0|1-2"), step(is_full_batch=True), looks_ahead=delay == 1)
    assert_same(found, train_in_turn(task))


def test_each_replica_alone_would_train_another_student() -> None:
    task = make_task(loss=contrast)
    found = train_in_threads(task, PipelinePlan.parse("2 x 0-1 / 0-2"), step(1))
    assert max_difference(found.student, train_in_turn(task).student) > 1e-6


class _Layered(nn.Module):
    """Gives its rows in the second dimension, and something else beside them."""

    def __init__(self, beside: Any) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).double()
        self.beside = beside

    def forward(self, given: Any) -> Any:
        return self.beside(self.layer(given))


@pytest.mark.parametrize(
    "beside",
    [
        pytest.param(lambda rows: (rows, torch.stack([rows, rows])), id="rows-second"),
        pytest.param(lambda rows: (rows, rows.square().mean()), id="mean-over-rows"),
        pytest.param(lambda rows: (rows, rows.shape[0]), id="number-of-rows"),
    ],
)
def test_outputs_of_a_full_batch_that_cannot_be_joined_are_refused(beside: Any) -> None:
    def loss(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
        return contrast(student_output[0], teacher_output, labels)

    task = make_task(student=[block(), _Layered(beside)], loss=loss, batches=batches(5))
    with pytest.raises(RankError, match="`the student's output` must have the rows of the batch in the first dim"):
        train_in_threads(task, PipelinePlan.parse("2 x 0-1"), step(1, is_full_batch=True), timeout=10)


def test_a_failure_of_the_loss_of_all_rows_ends_all_replicas() -> None:
    def broken(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
        raise ZeroDivisionError("the loss is broken")

    task = make_task(loss=broken, batches=batches(5, 5))
    with pytest.raises(RankError, match="the loss is broken"):
        train_in_threads(task, PipelinePlan.parse("2 x 0|1 / 0|1-2"), step(1, is_full_batch=True), timeout=10)


class _FailingBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, given: Tensor) -> Tensor:
        if len(given) == 2:
            raise ZeroDivisionError("the block is broken")
        found: Tensor = self.layer(given)
        return found


def test_a_failure_before_the_outputs_are_sent_ends_the_rank_of_the_loss_too() -> None:
    task = make_task(student=[block(), _FailingBlock()], loss=contrast, batches=batches(5, 5))
    with pytest.raises(RankError, match="the block is broken"):
        train_in_threads(task, PipelinePlan.parse("2 x 0|1"), step(1, is_full_batch=True), timeout=10)


class _Tree(nn.Module):
    """Lets a mask without rows pass beside the rows."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, given: Any) -> Any:
        return {"rows": self.layer(given["rows"] * given["mask"]).tanh(), "mask": given["mask"]}


def test_what_has_no_rows_comes_to_every_replica_whole() -> None:
    mask = torch.rand(WIDTH + 1, 1, WIDTH, dtype=torch.float64)[0]
    data = [({"rows": inputs, "mask": mask}, labels) for inputs, labels in batches(6, 3)]
    task = make_task(
        teacher=[_Tree(), _Tree()],
        student=[_Tree(), _Tree()],
        batches=data,
        loss=lambda student_output, teacher_output, labels: distance(
            student_output["rows"], teacher_output["rows"], labels
        ),
    )
    assert_same(train_in_threads(task, PipelinePlan.parse("2 x 0|1"), step()), train_in_turn(task))


def test_a_failure_of_one_replica_ends_all() -> None:
    def broken(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
        if len(labels) == 2:
            raise ZeroDivisionError("the loss is broken")
        return distance(student_output, teacher_output, labels)

    task = make_task(loss=broken, batches=batches(5, 5))
    with pytest.raises(RankError, match="the loss is broken"):
        train_in_threads(task, PipelinePlan.parse("2 x 0|1 / 0|1-2"), step(1), timeout=10)
