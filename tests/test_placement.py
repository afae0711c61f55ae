from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import SGD
from torchmetrics import MeanMetric, MetricCollection

from lightning_pipebd import BlockwiseDistillationModule, PipelinePlan, TeacherStudentModule, session_choice
from lightning_pipebd.distillation_module import DistillationModule
from lightning_pipebd.placement import BlockPlacement, PipelinePlacement, Placement, bring_others
from lightning_pipebd.planning.plan_text import parse_plan
from lightning_pipebd.session_choice import SessionChoice

pytestmark = pytest.mark.filterwarnings("ignore:.* lie behind the last boundary and will not be trained")

CPU, META = torch.device("cpu"), torch.device("meta")


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


# On GPUs, of which the meta device has the part that matters here: tensors of two devices do not mix.


class Rich:
    """What users' modules hold beside the models; the classes below have blocks as well."""

    centre: Tensor

    def add_others(self: Any) -> None:
        self.register_buffer("centre", torch.zeros(4))
        self.scale = nn.Parameter(torch.ones(4))
        self.means = MetricCollection({"mean": MeanMetric()})
        self.perceptual = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
        self.inner = LightningModule()
        # Under second names: a module of a block, twice, and a parameter.
        self.first, self.again = self.student[0], nn.ModuleList([self.student[0], nn.Linear(4, 2)])
        self.tied = self.student[1].weight


class RichBlocks(Rich, BlockwiseDistillationModule):
    def __init__(self) -> None:
        def models() -> nn.Sequential:
            return nn.Sequential(*(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)) for _ in range(3)))

        teacher, student = models(), models()
        student[1] = nn.Linear(4, 4)
        self_loss = nn.CrossEntropyLoss(weight=torch.ones(4))
        adapters = {"1": nn.Linear(4, 4)}
        # The third part of both models is behind the last boundary.
        super().__init__(
            teacher, student, {"0": "0", "1": "1"}, adapters=adapters, block_losses={"0": self_loss, "1": self_loss}
        )
        self.add_others()


class RichWhole(Rich, TeacherStudentModule):
    def __init__(self, *, momentum: float | None = None) -> None:
        models = {"teacher": None if momentum else make_model(), "student": make_model()}
        super().__init__(
            **models,  # type: ignore[arg-type]  # the teacher may be left out with momentum
            student_cuts=["0", "1"],
            predictor=nn.Linear(4, 4),
            momentum=momentum,
            teacher_delay=1 if momentum else 0,
        )
        self.add_others()


def tensors_of_blocks(module: DistillationModule) -> set[int]:
    return {id(own) for block in module.block_modules() for own in (*block.parameters(), *block.buffers())}


def all_tensors(module: DistillationModule) -> dict[str, Tensor]:
    """Give a module's tensors by name, with those of a hidden teacher."""
    own = [*module.named_parameters(), *module.named_buffers()]
    hidden = [*module.teacher.named_parameters(prefix="teacher"), *module.teacher.named_buffers(prefix="teacher")]
    return dict([*own, *hidden])


@pytest.mark.parametrize("make", [RichBlocks, RichWhole, lambda: RichWhole(momentum=0.9)])
def test_what_belongs_to_no_block_comes_to_the_device_and_blocks_do_not(make: Any) -> None:
    module = make()
    blocks = tensors_of_blocks(module)
    for own in module.trainable_parameters():
        own.grad = torch.zeros_like(own)  # of an earlier fit
    of_blocks = {name for name, own in all_tensors(module).items() if id(own) in blocks}
    before = {name: own for name, own in all_tensors(module).items() if name in of_blocks}
    bring_others(module, META)
    after = all_tensors(module)
    assert {name for name, own in after.items() if own.device == META} == after.keys() - of_blocks
    assert {"centre", "scale", "perceptual.1.running_mean", "again.1.weight"} <= after.keys() - of_blocks
    assert all(after[name] is own for name, own in before.items())
    assert {own.grad.device for own in before.values() if own.grad is not None} == {CPU}
    assert module.tied is module.student[1].weight
    assert (module.device, module.inner.device) == (META, META)


def test_metrics_losses_and_the_ends_of_models_come_along() -> None:
    module = RichBlocks()
    bring_others(module, META)
    metric = module.means["mean"]
    assert isinstance(metric, MeanMetric)
    assert (metric.device, metric.mean_value.device) == (META, META)
    loss: Any = module._losses[0]
    assert loss.weight.device == META
    ends = [module.student[2], module.teacher[2]]  # type: ignore[index]
    assert {own.device for end in ends for own in (*end.parameters(), *end.buffers())} == {META}
    assert {own.device for own in module.adapters.parameters()} == {CPU}


def test_parameters_that_move_stay_those_of_the_optimizer(monkeypatch: pytest.MonkeyPatch) -> None:
    module = RichBlocks()
    optimizer = SGD([module.get_parameter("scale"), *module.trainable_parameters()], lr=0.1)
    others = {"scale", "student.2.0.weight", "student.2.0.bias", "student.2.1.weight", "student.2.1.bias"}
    trained = {id(own) for own in optimizer.param_groups[0]["params"]}
    named = {name: own for name, own in module.named_parameters() if id(own) in trained}
    before = {name: own.data_ptr() for name, own in named.items()}
    # As far as the device of a tensor goes, a copy is one on another device.
    monkeypatch.setattr(Tensor, "to", lambda self, *_: self.clone())
    bring_others(module, torch.device("cuda", 0))
    assert all(module.get_parameter(name) is own for name, own in named.items())
    assert {name for name, own in named.items() if own.data_ptr() != before[name]} == others


def test_in_host_memory_nothing_moves() -> None:
    module = RichBlocks()
    before = {name: own.data_ptr() for name, own in all_tensors(module).items()}
    bring_others(module, CPU)
    assert {name: own.data_ptr() for name, own in all_tensors(module).items()} == before


class Reached(Exception):
    """Ends a set-up where a test has seen enough."""


@pytest.mark.parametrize("make", [RichBlocks, RichWhole])
def test_others_are_there_before_anything_is_measured(monkeypatch: pytest.MonkeyPatch, make: Any) -> None:
    brought: list[tuple[Any, torch.device]] = []

    def find(*_: Any) -> None:
        raise Reached

    monkeypatch.setattr(session_choice, "bring_others", lambda *given: brought.append(given))
    monkeypatch.setattr(session_choice, "find_plan_of_fit", find)
    monkeypatch.setattr(session_choice, "find_pipeline_of_fit", find)
    request: Any = SimpleNamespace(finder=None, options=None)
    nothing: Any = SimpleNamespace(root_device=META)
    module = make()
    with pytest.raises(Reached):
        SessionChoice.open(request, nothing, nothing, module, nothing, max_in_flight=1, time_limits=(None, None))  # type: ignore[arg-type]
    assert brought == [(module, META)]


class Tables(nn.Module):
    """Layers that read one table."""

    table: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(4, 4) for _ in range(2))
        self.register_buffer("table", torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x + self.table)
        return x


PATHS = {"layers.0": "layers.0", "layers.1": "layers.1"}


@pytest.mark.parametrize("rank", [0, 1])
def test_a_table_that_blocks_share_is_where_one_of_them_is(rank: int) -> None:
    module = BlockwiseDistillationModule(Tables(), Tables(), PATHS)
    BlockPlacement(module, parse_plan("0|1"), rank, META).place()
    for model in (module.teacher, module.student):
        assert model.get_buffer("table").device == META
        assert model.get_parameter(f"layers.{rank}.weight").device == META
        assert model.get_parameter(f"layers.{1 - rank}.weight").device == CPU


@pytest.mark.parametrize("rank", [0, 1])
def test_a_whole_student_s_table_is_where_one_of_its_blocks_is(monkeypatch: pytest.MonkeyPatch, rank: int) -> None:
    module = TeacherStudentModule(Tables(), Tables(), PATHS)
    homes: dict[int, torch.device] = {}
    monkeypatch.setattr(
        "lightning_pipebd.placement._put", lambda tensors, device: homes.update({id(own): device for own in tensors})
    )
    PipelinePlacement(module, PipelinePlan.parse("0|1"), rank, META).place()
    for model in (module.teacher, module.student):
        assert homes[id(model.get_buffer("table"))] == META
        assert homes[id(model.get_parameter(f"layers.{rank}.weight"))] == META
        assert homes[id(model.get_parameter(f"layers.{1 - rank}.weight"))] == CPU
