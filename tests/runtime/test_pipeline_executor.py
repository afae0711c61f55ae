"""End-to-end training on rank threads equals the same rule in one process."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_pipebd.planning.pipeline_compiler import PipelineStep, compile_pipeline
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_program import PipelineAction, PipelineKind, PipelineProgram, Stream
from lightning_pipebd.planning.pipeline_schedule import Schedule
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.pipeline_executor import PipelineExecutor, PipelineSpan
from lightning_pipebd.runtime.relay import Relay, RelayError
from tests.helpers.pipelines import Task, Trained, train_in_threads, train_in_turn
from tests.helpers.ranks import RankError
from tests.helpers.training import max_difference

WIDTH = 5


def block() -> nn.Module:
    return nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double()


def distance(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
    return F.mse_loss(student_output, teacher_output) + F.cross_entropy(student_output, labels)


def contrast(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
    """Each row's teacher against those of all other rows: no mean over rows can be taken of parts."""
    return F.cross_entropy(student_output @ teacher_output.T, torch.arange(len(labels)))


def batches(*sizes: int) -> list[tuple[Tensor, Tensor]]:
    return [(torch.randn(size, WIDTH, dtype=torch.float64), torch.randint(WIDTH, (size,))) for size in sizes]


def frozen(**changes: Any) -> Task:
    task = Task(
        teacher=[block() for _ in range(3)],
        student=[block() for _ in range(4)],
        loss=distance,
        batches=batches(8, 8, 8, 3),
    )
    return replace(task, **changes)


def momentum(delay: int, **changes: Any) -> Task:
    student = [block() for _ in range(4)]
    return frozen(teacher=student, student=student, momentum=0.9, delay=delay, **changes)


def step(num_micro_batches: int = 3, **options: Any) -> PipelineStep:
    return PipelineStep(num_rows=1, num_micro_batches=num_micro_batches, **options)


def assert_same(found: Trained, expected: Trained, tolerance: float = 1e-12) -> None:
    assert found.losses == pytest.approx(expected.losses, abs=tolerance)
    assert max_difference(found.student, expected.student) <= tolerance
    assert max_difference(found.teacher, expected.teacher) <= tolerance


PLANS = ["0|1|2 / 0-1|2|3", "0-1|2 / 0-2|3", "0|1|2|- / 0|1|2|3", "2|0|1 / 0,3|1|2", "0-2|-|- / -|0-1|2-3"]
OPTIONS = [
    pytest.param({}, id="1f1b"),
    pytest.param({"schedule": Schedule.GPIPE}, id="gpipe"),
    pytest.param({"schedule": Schedule.TEACHER_FIRST}, id="teacher-first"),
    pytest.param({"splits_backward": True}, id="split"),
]


@pytest.mark.parametrize("plan", PLANS)
@pytest.mark.parametrize("options", OPTIONS)
def test_a_frozen_teacher_under_any_plan_and_schedule(plan: str, options: dict[str, Any]) -> None:
    task = frozen()
    assert_same(train_in_threads(task, PipelinePlan.parse(plan), step(**options)), train_in_turn(task))


@pytest.mark.parametrize("plan", ["0-1|2-3", "0|1|2|3", "2-3|0-1 / 0-1|2-3", "0,2|1,3"])
@pytest.mark.parametrize("options", OPTIONS)
def test_a_delayed_momentum_teacher_is_one_step_late(plan: str, options: dict[str, Any]) -> None:
    task = momentum(1)
    assert_same(train_in_threads(task, PipelinePlan.parse(plan), step(**options)), train_in_turn(task))


@pytest.mark.parametrize("plan", ["0-1|2-3", "1|0,2|3"])
def test_a_momentum_teacher_without_delay_is_ordinary_training(plan: str) -> None:
    task = momentum(0)
    found = train_in_threads(task, PipelinePlan.parse(plan), step(), looks_ahead=False)
    assert_same(found, train_in_turn(task))


def test_a_delayed_teacher_is_the_same_whether_it_worked_ahead_or_not() -> None:
    task, plan = momentum(1), PipelinePlan.parse("0-1|2-3")
    assert_same(train_in_threads(task, plan, step(), looks_ahead=False), train_in_threads(task, plan, step()))


def test_the_delay_changes_what_is_learned() -> None:
    task = momentum(1)
    assert max_difference(train_in_turn(task).student, train_in_turn(replace(task, delay=0)).student) > 1e-6


@pytest.mark.parametrize("delay", [0, 1])
@pytest.mark.parametrize("accumulate", [2, 3])
def test_under_accumulation_the_teacher_follows_once_per_optimizer_step(delay: int, accumulate: int) -> None:
    task = momentum(delay, accumulate=accumulate, batches=batches(4, 5, 4, 4, 4, 3))
    found = train_in_threads(task, PipelinePlan.parse("0-1|2-3"), step(), looks_ahead=delay == 1)
    assert_same(found, train_in_turn(task))


@pytest.mark.parametrize("options", OPTIONS)
def test_a_loss_of_the_full_batch(options: dict[str, Any]) -> None:
    task = frozen(loss=contrast)
    found = train_in_threads(task, PipelinePlan.parse("0|1|2 / 0-1|2|3"), step(is_full_batch=True, **options))
    assert_same(found, train_in_turn(task))


def test_a_loss_of_the_full_batch_is_not_the_mean_over_its_micro_batches() -> None:
    task = frozen(loss=contrast)
    found = train_in_threads(task, PipelinePlan.parse("0-1|2 / 0-1|2-3"), step())
    assert max_difference(found.student, train_in_turn(task).student) > 1e-6


@pytest.mark.parametrize("plan", ["0-1|2 / 0-1|2-3", "0|1|2 / 0|1|2-3", "0|1|2|- / 0|1|2|3"])
def test_whole_batches_give_the_bits_of_one_process(plan: str) -> None:
    task = frozen()
    found, expected = train_in_threads(task, PipelinePlan.parse(plan), step(1)), train_in_turn(task)
    assert found.losses == expected.losses
    assert max_difference(found.student, expected.student) == 0


def test_every_action_is_told_in_order_and_a_message_with_its_bytes() -> None:
    task, plan, told = frozen(batches=batches(8, 8)), PipelinePlan.parse("0-1|2 / 0-1|2-3"), defaultdict(list)

    def tell(rank: int, span: PipelineSpan) -> None:
        told[rank].append(span)

    train_in_threads(task, plan, step(2, splits_backward=True), looks_ahead=False, observer=tell)
    every = PipelineStep(num_rows=8, num_micro_batches=2, has_targets=True, splits_backward=True)
    for rank, program in enumerate(compile_pipeline(plan, every)):
        assert [span.action for span in told[rank]] == [*program.actions] * 2
        times = [time for span in told[rank] for time in (span.start_s, span.stop_s)]
        assert times == sorted(times)
    sizes = {(span.action.stream, span.num_bytes) for span in told[0] if span.action.kind is PipelineKind.SEND}
    assert sizes == {(Stream.BOUNDARY, 4 * WIDTH * 8), (Stream.HIDDEN, 4 * WIDTH * 8), (Stream.TARGETS, 4 * 8)}
    assert {span.num_bytes for span in told[0] if span.action.kind is not PipelineKind.SEND} == {0}


@pytest.mark.parametrize("num_micro_batches", [1, 2, 5, 8, 50])
def test_any_number_of_micro_batches(num_micro_batches: int) -> None:
    task = frozen(batches=batches(7, 8, 2, 1))
    found = train_in_threads(task, PipelinePlan.parse("0-1|2 / 0-1|2-3"), step(num_micro_batches))
    assert_same(found, train_in_turn(task))


def test_one_rank_alone_can_train() -> None:
    task = momentum(1)
    assert_same(train_in_threads(task, PipelinePlan.parse("0-3"), step()), train_in_turn(task))


class _Pair(nn.Module):
    """Gives a dictionary of two tensors and a number, and lets a mask pass."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, given: Any) -> Any:
        logits = given["logits"] if isinstance(given, dict) else given
        mask = given["mask"] if isinstance(given, dict) else torch.ones(WIDTH, dtype=torch.float64)
        hidden = self.layer(logits * mask).tanh()
        return {"logits": hidden.sin(), "hidden": hidden, "mask": mask, "scale": 2}


def all_outputs(student_output: Any, teacher_output: Any, labels: Any) -> Any:
    hidden = F.cosine_embedding_loss(student_output["hidden"], teacher_output["hidden"], torch.ones(len(labels)))
    return F.mse_loss(student_output["logits"], teacher_output["logits"]) + student_output["scale"] * hidden


def test_every_output_in_a_tree_gets_its_gradient() -> None:
    task = frozen(teacher=[_Pair(), _Pair()], student=[_Pair(), _Pair(), _Pair()], loss=all_outputs)
    for full in (False, True):
        found = train_in_threads(task, PipelinePlan.parse("0|1|- / 0|1|2"), step(is_full_batch=full))
        assert_same(found, train_in_turn(task))


class _Sequence(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, hidden: Tensor) -> Any:
        return self.layer(hidden).tanh() + hidden.mean(dim=1, keepdim=True)


def test_shapes_may_change_from_batch_to_batch() -> None:
    data = [(torch.randn(rows, length, WIDTH).double(), torch.zeros(rows)) for rows, length in ((4, 3), (4, 7), (2, 1))]
    task = frozen(
        teacher=[_Sequence() for _ in range(2)],
        student=[_Sequence() for _ in range(2)],
        loss=lambda student_output, teacher_output, labels: F.mse_loss(student_output, teacher_output),
        batches=data,
    )
    assert_same(train_in_threads(task, PipelinePlan.parse("0|1"), step(2)), train_in_turn(task))


def test_a_student_whose_first_block_is_frozen() -> None:
    task = frozen()
    task.student[0].requires_grad_(False)
    task = replace(task, make_optimizer=lambda parameters: torch.optim.SGD(list(parameters), lr=0.1))
    for split in (False, True):
        found = train_in_threads(task, PipelinePlan.parse("0|1|2 / 0|1|2-3"), step(splits_backward=split))
        assert_same(found, train_in_turn(task))


def test_a_failure_of_one_rank_ends_all() -> None:
    def broken(student_output: Any, teacher_output: Any, labels: Any) -> Tensor:
        raise ZeroDivisionError("the loss is broken")

    with pytest.raises(RankError, match="the loss is broken"):
        train_in_threads(frozen(loss=broken), PipelinePlan.parse("0|1|2 / 0|1|2-3"), step(), timeout=10)


@pytest.mark.parametrize(
    ("action", "message"),
    [
        ("RECV boundary=2 rows=0:4 from=1 batch=next", r"boundary 2 of the teacher of the next batch \(rows 0:4\)"),
        ("RECV hidden=1 rows=2:4 from=1", r"boundary 1 of the student \(rows 2:4\)"),
        ("RECV gradient=1 rows=0:4 from=1", r"the gradient of the student's boundary 1 \(rows 0:4\)"),
        ("RECV targets=0 rows=0:4 from=1", r"what the loss needs \(rows 0:4\)"),
        ("RECV weights=3 from=1", "the weights of student block 3"),
        ("RECV inputs=0 rows=0:4 from=1 batch=next", r"the inputs of both models of the next batch \(rows 0:4\)"),
    ],
    ids=[stream.word for stream in Stream],
)
def test_a_failure_names_what_will_not_arrive(action: str, message: str) -> None:
    world = LocalWorld(2)
    relay = Relay(world.transports[0], sources=[1], destinations=[])
    executor = PipelineExecutor(object(), relay, num_teacher_blocks=3, num_student_blocks=4)
    world.end(1)

    def work_off() -> None:
        executor.run(PipelineProgram(0, 4, 4, (PipelineAction.parse(action),)), 5, {})
        executor.finish()

    with pytest.raises(RelayError, match=rf"\({action}\): {message} of step 5 will not arrive from rank 1: "):
        work_off()
    relay.abandon()
