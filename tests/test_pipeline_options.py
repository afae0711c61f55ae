"""What users may say about a whole student under a plan, and what is refused before other processes start."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import StochasticWeightAveraging
from torch import nn

from lightning_pipebd import PipeBDStrategy, PipelinePlan, Plan, PlanError, TeacherStudentModule
from lightning_pipebd.pipeline_options import PipelineOptions, check_pipeline_optimizers, even_plan
from lightning_pipebd.pipeline_replicas import Replica, check_replicas, unchanged_blocks
from lightning_pipebd.planning.curve import Curve
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement, StudentBlockCosts, TeacherBlockCosts
from lightning_pipebd.planning.pipeline_program import PipelineProgram
from lightning_pipebd.runtime.local_transport import LocalWorld
from tests.helpers.ranks import run_threads
from tests.helpers.toy import LinearModule, make_loader
from tests.helpers.whole_students import Byol, Contrast, Convolutional, Crowd, Distil

# What Lightning says of every module that is in eval() when training begins; a momentum teacher is, on purpose.
pytestmark = pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode")

PLAN = "0-1|2 / 0-1|2-3"
WHOLE_COSTS = PipelineMeasurement(
    teacher=(TeacherBlockCosts(name="all", teach_ms=Curve([(8, 1)])),),
    student=(StudentBlockCosts(name="all", forward_ms=Curve([(8, 1)]), backward_ms=Curve([(8, 2)])),),
    num_rows=8,
    loss_ms=Curve([(8, 0)]),
)


def fit(module: Any, options: dict[str, Any], **trainer: Any) -> None:
    """Begin a fit on two ranks; the refusal comes before the second process."""
    strategy = PipeBDStrategy(**options)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    loader = make_loader(LinearModule(), 4, 2)
    Trainer(accelerator="cpu", devices=2, strategy=strategy, **{**quiet, **trainer}).fit(module, loader)


class OwnStep(Distil):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return None


class Words(TeacherStudentModule):
    """A student whose first layer has sparse gradients."""

    def __init__(self) -> None:
        teacher, student = (nn.Sequential(nn.Embedding(8, 4, sparse=True), nn.Linear(4, 2)) for _ in range(2))
        super().__init__(teacher, student, student_cuts=["0"])


class Manual(Distil):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


@pytest.mark.parametrize(
    ("make", "options", "trainer", "message"),
    [
        (Distil, {"plan": "0|1"}, {}, "must cover the teacher's 3 blocks, but covers 2"),
        (Distil, {"plan": "0-1|2 / 0-2"}, {}, "must cover the student's 4 blocks, but covers 3"),
        (Distil, {"plan": "0|1|2 / 0|1|2-3"}, {}, "must be for the 2 ranks of this run, but is for 3"),
        (Distil, {"plan": "joint"}, {}, "has the token 'joint'"),
        (Distil, {"plan": Plan.straight([1, 2])}, {}, "must be a PipelinePlan, its text or its dictionary"),
        (Distil, {"plan": "none.yaml"}, {}, "must name a readable YAML file"),
        (Distil, {"plan": "2 x 0|1-2 / 0|1-3"}, {}, "must be for the 2 ranks of this run, but is for 4"),
        (Byol, {"plan": "2 x 0-3"}, {}, "must have one replica for Byol, because it overrides `on_teacher_update`"),
        (Words, {"plan": "2 x 0-1"}, {}, "because `student.0` has sparse gradients, which ranks cannot sum"),
        (
            Distil,
            {"plan": "2 x 0-2 / 0-3", "exactness": "bitwise"},
            {},
            "must keep the student bitwise, because `exactness` says so, but 2 replicas make it summation",
        ),
        (Distil, {"plan": PLAN}, {"sync_batchnorm": True}, "`sync_batchnorm` must be False"),
        (Distil, {"plan": PLAN}, {"callbacks": [StochasticWeightAveraging(0.1)]}, "must see all weights"),
        (Distil, {"plan": PLAN, "trials": 2}, {}, "`trials` must be left out"),
        (Distil, {"teach_ahead": True}, {}, "`teach_ahead` must be left out for a TeacherStudentModule"),
        (OwnStep, {"plan": PLAN}, {}, "must leave `training_step` alone"),
        (Manual, {"plan": PLAN}, {}, "`automatic_optimization` must be True"),
        (LinearModule, {"num_micro_batches": 2}, {}, "`num_micro_batches` must be left out"),
        (LinearModule, {"schedule": "gpipe"}, {}, "`schedule` must be left out"),
        (LinearModule, {"split_backward": True}, {}, "`split_backward` must be left out"),
        (LinearModule, {"costs": WHOLE_COSTS}, {}, "`costs` must be of blocks that learn by themselves"),
        (LinearModule, {"plan": PipelinePlan.parse("0-1|2-3")}, {}, "is for a TeacherStudentModule"),
    ],
)
def test_what_cannot_work_is_refused(make: Any, options: Any, trainer: Any, message: str) -> None:
    with pytest.raises((TypeError, ValueError, PlanError), match=message):
        fit(make(), options, **trainer)


def test_numbers_and_names_are_checked_at_once() -> None:
    with pytest.raises(ValueError, match="`num_micro_batches` must be at least 1, but is 0"):
        PipeBDStrategy(num_micro_batches=0)
    with pytest.raises(ValueError, match="`schedule` must be one of 1f1b, gpipe, teacher-first, but is 'zigzag'"):
        PipeBDStrategy(schedule="zigzag")


def test_the_optimizer_leaves_the_teacher_alone() -> None:
    module = Byol()
    with pytest.raises(ValueError, match="must leave the teacher's parameters out"):
        check_pipeline_optimizers([torch.optim.SGD(module.parameters(), lr=1.0)], module)
    with pytest.raises(ValueError, match="must not return LBFGS"):
        check_pipeline_optimizers([torch.optim.LBFGS(module.trainable_parameters())], module)


def test_a_plan_is_read_from_a_file_a_dictionary_or_an_object(tmp_path: Path) -> None:
    expected = PipelinePlan.parse(PLAN)
    path = tmp_path / "plan.yaml"
    path.write_text(f"'{PLAN}'")
    for given in (PLAN, expected, expected.to_dict(), str(path)):
        assert PipelineOptions().given_plan(given, Distil(), 2) == expected


def test_spread_by_size_every_rank_has_blocks_and_a_momentum_teacher_stays_with_its_student() -> None:
    plan = even_plan(Byol(), 3)
    assert set(plan.student) == {0, 1, 2}
    assert plan.teacher == plan.student
    assert set(even_plan(Distil(), 2).teacher) == {0, 1}
    assert PipelineOptions().given_plan(None, Byol(), 1) == PipelinePlan.parse("0-3")
    assert PipelineOptions().given_plan(None, Byol(), 2) is None


def test_batches_are_cut_by_default_only_where_that_changes_nothing() -> None:
    assert PipelineOptions().micro_batches(Distil(), 2) == 8
    assert PipelineOptions().micro_batches(Convolutional(), 2) == 1


def test_cutting_batches_of_batch_norm_warns_and_says_so() -> None:
    plan = PipelinePlan.parse("0|1-2")
    with pytest.warns(UserWarning, match=r"student blocks 0, 1 use batch\s+statistics or random numbers"):
        text = PipelineOptions(num_micro_batches=4).announce(plan, Convolutional())
    assert "exactness: statistics (student blocks 0, 1 see micro-batches, not batches)" in text
    assert "exactness: bitwise" in PipelineOptions().announce(plan, Convolutional())


def test_replicas_of_batch_norm_warn_and_say_so_and_one_rank_alone_cuts_nothing() -> None:
    plan = PipelinePlan.parse("2 x 0-2")
    with pytest.warns(UserWarning, match=r"cut into 2 replicas, and student blocks 0, 1 use batch\s+statistics"):
        text = PipelineOptions().announce(plan, Convolutional())
    assert "exactness: statistics (student blocks 0, 1 see replicas, not batches)" in text
    assert "plan: 2 x 0-2 (2 ranks, 2 replicas, a part of each batch each, 1f1b)" in text
    assert "ranks 0, 1: teacher 0-2, student 0-2, loss" in text
    assert PipelineOptions().micro_batches(Distil(), 1) == 1


def test_a_hook_after_the_teachers_step_leaves_the_blocks_of_replicas_alone() -> None:
    class Tied(Crowd):
        changes_student = False

        def on_teacher_update(self) -> None:
            if self.changes_student:
                self.student[3].bias.detach().zero_()

    module, plan = Tied(), PipelinePlan.parse("2 x 0-3")
    with unchanged_blocks(plan, module):
        module.on_teacher_update()
    module.changes_student = True
    with unchanged_blocks(PipelinePlan.parse("0-1|2-3"), module):
        module.on_teacher_update()
    with (
        pytest.raises(RuntimeError, match=r"must leave the blocks of both models alone .* changed student block 3"),
        unchanged_blocks(plan, module),
    ):
        module.on_teacher_update()


def test_a_loss_of_the_full_batch_may_have_replicas_and_says_where_it_is() -> None:
    plan, module = PipelinePlan.parse("2 x 0|1-3"), Crowd()
    check_replicas(plan, module)
    text = PipelineOptions().explain(plan, module)
    assert "replicas: rank 0 loads for all, rank 1 has the loss of all rows, gradients are summed" in text
    assert "ranks 1, 3: teacher 1-3, student 1-3\n" in text
    assert plan.loss_ranks(is_full_batch=True) == (1,)
    assert plan.loss_ranks(is_full_batch=False) == (1, 3)


def test_what_belongs_to_the_loss_is_summed_with_the_last_block() -> None:
    plan, world = PipelinePlan.parse("2 x 0-3"), LocalWorld(2)
    # Not by the ranks' threads: a model that is cut while another thread draws looks like one that draws.
    modules = [Contrast(), Contrast()]

    def sum_up(rank: int) -> tuple[float, Any]:
        module = modules[rank]
        module.temperature.grad = torch.tensor(rank + 1.0)
        reducer = Replica(plan, world.transports[rank]).reducer(module)
        reducer.begin(PipelineProgram.parse(f"PIPELINE rank={rank} rows=2 next=0\nREDUCE block=3 ranks=0,1"))
        reducer.start(3, (0, 1))
        reducer.finish()
        assert module.temperature.grad is not None
        return module.temperature.grad.item(), module.student_parameters(3)[0].grad

    assert run_threads(2, sum_up) == [(3.0, None), (3.0, None)]


def test_a_teacher_works_ahead_only_if_its_weights_are_known() -> None:
    found = {
        name: PipelineOptions().looks_ahead(module)
        for name, module in (("frozen", Distil()), ("delayed", Byol(1)), ("prompt", Byol(0)))
    }
    assert found == {"frozen": True, "delayed": True, "prompt": False}
    assert not PipelineOptions(schedule="teacher-first").looks_ahead(Distil())
