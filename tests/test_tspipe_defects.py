"""Defects of TSPipe's released code, each as a test that we do not share it.

Source: kaist-ina/TSPipe, the only released version (2022-07-21), read and partly run. Losses that depend on several
outputs, batches of any size and single ranks are also in ``runtime/test_pipeline_executor.py``.
"""

from __future__ import annotations

import ast
import gc
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe

import lightning_pipebd
from lightning_pipebd.planning.pipeline_compiler import PipelineStep
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from tests.helpers.pipelines import Task, train_in_threads, train_in_turn
from tests.helpers.ranks import RankError, run_processes
from tests.helpers.training import max_difference
from tests.helpers.whole_students import WholeRun, train_whole

WIDTH = 4
STEP = PipelineStep(num_rows=1, num_micro_batches=4)


def blocks(number: int) -> list[nn.Module]:
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()).double() for _ in range(number)]


def task(**changes: Any) -> Task:
    data = [(torch.randn(8, WIDTH, dtype=torch.float64), torch.zeros(8)) for _ in range(3)]
    given: dict[str, Any] = {"teacher": blocks(2), "student": blocks(2), "batches": data}
    given["loss"] = lambda student_output, teacher_output, labels: F.mse_loss(student_output, teacher_output)
    return Task(**{**given, **changes})


def beginning(given: Task) -> list[list[Tensor]]:
    return [[parameter.detach() for parameter in block.parameters()] for block in given.student]


@pytest.mark.parametrize("row", range(8))
def test_the_gradient_of_every_micro_batch_counts(row: int) -> None:
    # Released: gradients were set to zero when half of the backwards were done.
    data = torch.zeros(8, WIDTH, dtype=torch.float64)
    data[row] = 1.0
    only_this_row = task(batches=[(data, torch.zeros(8))])
    found = train_in_threads(only_this_row, PipelinePlan.parse("0|1"), STEP)
    assert max_difference(found.student, beginning(only_this_row)) > 1e-6
    assert max_difference(found.student, train_in_turn(only_this_row).student) <= 1e-12


def test_gradients_add_up_over_accumulated_batches() -> None:
    # Released: the same reset threw away what earlier batches had accumulated.
    accumulated = task(accumulate=3)
    found = train_in_threads(accumulated, PipelinePlan.parse("0|1"), STEP)
    assert max_difference(found.student, train_in_turn(accumulated).student) <= 1e-12


class _Named(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH).double()

    def forward(self, given: Any) -> dict[str, Tensor]:
        hidden = self.layer(given["states"] if isinstance(given, dict) else given)
        return {"logits": hidden.detach(), "states": hidden}


def test_outputs_of_any_name_get_gradients() -> None:
    # Released: only what was called "logits" did; here that is the one output without a gradient.
    named = task(
        teacher=[_Named(), _Named()],
        student=[_Named(), _Named()],
        loss=lambda student_output, teacher_output, labels: F.mse_loss(
            student_output["states"], teacher_output["states"]
        ),
    )
    found, expected = train_in_threads(named, PipelinePlan.parse("0|1"), STEP), train_in_turn(named)
    assert max_difference(found.student, expected.student) <= 1e-12
    assert max_difference(found.student, beginning(named)) > 1e-6


@pytest.mark.spawn
def test_running_statistics_are_updated_once_per_batch(tmp_path: Path) -> None:
    # Released: twice per view, from halves of micro-batches.
    run = WholeRun(module="convolutional", double=False, trainer={"max_epochs": 1}, plan="0|1-2", num_ranks=2)
    state = train_whole(run, tmp_path / "run.ckpt")[0]["state_dict"]
    counts = {int(value) for key, value in state.items() if key.startswith("student.") and "tracked" in key}
    assert counts == {6}


def test_nothing_is_kept_from_batch_to_batch() -> None:
    # Released: the scheduler stored an object for every task for ever.
    def count_tensors(num_batches: int) -> int:
        seen: list[int] = []

        def loss(student_output: Tensor, teacher_output: Tensor, labels: Tensor) -> Tensor:
            gc.collect()
            seen.append(sum(issubclass(type(thing), Tensor) for thing in gc.get_objects()))
            return F.mse_loss(student_output, teacher_output)

        many = task(loss=loss, batches=task().batches[:1] * num_batches)
        # What is there already is neither counted nor looked through, 25 times.
        gc.freeze()
        try:
            train_in_threads(many, PipelinePlan.parse("0|1"), replace(STEP, num_micro_batches=1))
        finally:
            gc.unfreeze()
        return seen[-2] - seen[4]

    # The other rank may hold a few more or fewer when this one counts; 20 batches would add as many times that.
    assert abs(count_tensors(25)) < 20


@pytest.mark.parametrize("num_rows", [1, 2, 3, 5, 7])
def test_batches_of_any_size_are_trained_on_whole(num_rows: int) -> None:
    # Released: an index error, or a batch silently left out.
    odd = task(batches=[(torch.randn(num_rows, WIDTH, dtype=torch.float64), torch.zeros(num_rows))])
    found = train_in_threads(odd, PipelinePlan.parse("0|1"), STEP)
    assert max_difference(found.student, train_in_turn(odd).student) <= 1e-12


def test_one_device_is_enough() -> None:
    # Released: as many micro-batches as devices less one, so none.
    alone = task()
    found = train_in_threads(alone, PipelinePlan.parse("0-1"), STEP)
    assert max_difference(found.student, train_in_turn(alone).student) <= 1e-12


def test_no_teacher_block_makes_a_graph() -> None:
    # Released: the first layer of each stage of the teacher wanted a gradient.
    def loss(student_output: Tensor, teacher_output: Tensor, labels: Tensor) -> Tensor:
        assert not teacher_output.requires_grad
        return F.mse_loss(student_output, teacher_output)

    checked = task(loss=loss)
    train_in_threads(checked, PipelinePlan.parse("0|1"), STEP)
    assert all(parameter.grad is None for block in checked.teacher for parameter in block.parameters())


def _fail_on_the_last_rank(rank: int, path: str) -> None:
    from tests.helpers import whole_students

    class Broken(whole_students.Distil):
        def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Any:
            raise ZeroDivisionError("the loss is broken")

    whole_students.WHOLE_STUDENTS["broken"] = Broken
    whole_students.run_here(WholeRun(module="broken", plan="0-1|2 / 0-1|2-3", num_ranks=2), path)


@pytest.mark.spawn
def test_an_exception_on_one_rank_ends_all_of_them(tmp_path: Path) -> None:
    # Released: the worker's thread died and the rest hung.
    with pytest.raises(RankError, match="the loss is broken"):
        run_processes(2, _fail_on_the_last_rank, str(tmp_path / "run.ckpt"), timeout=60)


def test_nothing_stands_on_torchs_rpc() -> None:
    # Released: every task was sent as a remote call.
    for path in Path(lightning_pipebd.__file__).parent.rglob("*.py"):
        nodes = [
            node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, (ast.Import, ast.ImportFrom))
        ]
        names = [alias.name for node in nodes for alias in node.names]
        names += [node.module or "" for node in nodes if isinstance(node, ast.ImportFrom)]
        assert not any("rpc" in name.split(".") for name in names), path


def _gradients_of_torch(rank: int, schedule: str, states: Any, inputs: Tensor, target: Tensor) -> list[Tensor]:
    dist.init_process_group("gloo")
    stage_module = blocks(1)[0]
    stage_module.load_state_dict(states[rank])
    stage = PipelineStage(stage_module, rank, 2, torch.device("cpu"))
    kind = {"1f1b": Schedule1F1B, "gpipe": ScheduleGPipe}[schedule]
    runner = kind(stage, 4, loss_fn=F.mse_loss)
    if rank == 0:
        runner.step(inputs)
    else:
        runner.step(target=target)
    return [parameter.grad for parameter in stage_module.parameters() if parameter.grad is not None]


@pytest.mark.spawn
def test_gradients_are_those_of_torchs_own_pipeline() -> None:
    made = task(make_optimizer=lambda parameters: torch.optim.SGD(parameters, lr=1.0))
    made = replace(made, batches=made.batches[:1])
    with torch.no_grad():
        target = nn.Sequential(*made.teacher)(made.batches[0][0])
    states = [block.state_dict() for block in made.student]
    theirs = run_processes(2, _gradients_of_torch, "1f1b", states, made.batches[0][0], target)
    found = train_in_threads(made, PipelinePlan.parse("0|1"), STEP)
    ours = [
        [before.detach() - after for before, after in zip(block.parameters(), new, strict=True)]
        for block, new in zip(made.student, found.student, strict=True)
    ]
    assert max_difference(ours, theirs) <= 1e-12
