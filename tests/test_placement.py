from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD

from lightning_pipebd import BlockwiseDistillationModule, PipelinePlan, TeacherStudentModule
from lightning_pipebd.placement import BlockPlacement, PipelinePlacement, Placement
from lightning_pipebd.planning.plan_text import parse_plan

CPU = torch.device("cpu")


def make_model() -> nn.Sequential:
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))


class WholeStudent(TeacherStudentModule):
    def __init__(self) -> None:
        super().__init__(teacher=make_model(), student=make_model(), student_cuts=["0", "1"])
        self.centre = nn.Parameter(torch.zeros(4))


def place(plan: str, *, is_pipeline: bool) -> tuple[nn.Module, list[Placement]]:
    if is_pipeline:
        student, pipeline = WholeStudent(), PipelinePlan.parse(plan)
        return student, [PipelinePlacement(student, pipeline, rank, CPU) for rank in range(pipeline.num_ranks)]
    module = BlockwiseDistillationModule(make_model(), make_model(), {name: name for name in "012"})
    blocks = parse_plan(plan)
    return module, [BlockPlacement(module, blocks, rank, CPU) for rank in range(blocks.num_ranks)]


def kept_parameters(module: nn.Module, placement: Placement) -> dict[str, Tensor]:
    """Give what the optimizer of one rank still has."""
    everything = {name: own for name, own in module.named_parameters() if own.requires_grad}
    pruned = placement.prune(SGD(everything.values()))
    names = list(everything)
    return {names[number]: everything[names[number]] for number in pruned.local_numbers}


@pytest.mark.parametrize(
    ("plan", "is_pipeline", "kept"),
    [
        ("0|1-2", False, ["0", "12"]),
        ("0-1*2|2", False, ["01", "01", "2"]),
        ("0-1|2", True, ["01", "2c"]),
        ("2 x 0|1-2", True, ["0", "12c", "0", "12c"]),
    ],
)
def test_each_optimizer_keeps_what_its_rank_trains(plan: str, is_pipeline: bool, kept: list[str]) -> None:
    module, placements = place(plan, is_pipeline=is_pipeline)
    names = [{name.removeprefix("student.")[0] for name in kept_parameters(module, one)} for one in placements]
    assert names == [set(expected) for expected in kept]


@pytest.mark.parametrize(("plan", "is_pipeline"), [("0-1*2|2", False), ("2 x 0|1-2", True)])
def test_the_values_that_count_are_those_of_a_rank_that_trains_them(plan: str, is_pipeline: bool) -> None:
    module, placements = place(plan, is_pipeline=is_pipeline)
    trained = [{id(own) for own in kept_parameters(module, one).values()} for one in placements]
    counting = placements[0].owned_tensors()
    assert all({id(tensor) for tensor in tensors} <= trained[rank] for tensors, rank in counting)
    assert {id(tensor) for tensors, _ in counting for tensor in tensors} == set.union(*trained)
