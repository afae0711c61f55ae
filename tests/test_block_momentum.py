"""A teacher whose blocks follow the student's, each where both are."""

from __future__ import annotations

import copy
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.plugins import MixedPrecision
from torch import nn

from lightning_pipebd import BlockwiseDistillationModule, PipeBDStrategy, Plan, PlanError
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.plan import Share
from lightning_pipebd.preflight import check_optimizers
from lightning_pipebd.runtime.partition import PartitionError
from tests.helpers.toy import make_loader
from tests.helpers.training import assert_same_checkpoint
from tests.helpers.whole_students import FollowedBlocks, WholeRun, train_whole
from tests.planning.cost_tables import constant_costs

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]
QUIET: dict[str, Any] = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def straight(*ranks: int) -> list[tuple[Share, ...]]:
    return [(Share(rank, Fraction(1)),) for rank in ranks]


class Rule(Callback):
    """The moving average, computed beside the run."""

    def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
        self.expected = copy.deepcopy(pl_module.teacher).double()

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step == getattr(self, "seen", 0):
            return
        momentum = 1 - 0.5 / trainer.global_step
        self.seen = trainer.global_step
        student = pl_module.student.state_dict()
        for name, value in self.expected.state_dict().items():
            if value.is_floating_point():
                value.mul_(momentum).add_(student[name].double(), alpha=1 - momentum)
            else:
                value.copy_(student[name])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_plain_lightning_follows_the_rule_once_per_optimizer_step(accumulate: int) -> None:
    module, rule = FollowedBlocks(), Rule()
    trainer = Trainer(max_steps=4, accumulate_grad_batches=accumulate, callbacks=[rule], **QUIET)
    trainer.fit(module, make_loader(module, 32, 4))
    for name, value in rule.expected.state_dict().items():
        torch.testing.assert_close(module.teacher.state_dict()[name].double(), value.double(), msg=name)
    assert module.block_momentum is not None
    assert module.block_momentum.num_updates == 4
    assert not module.teacher.training
    assert any(name.startswith("teacher.") for name in module.state_dict())


def test_a_block_whose_update_is_left_out_is_not_followed() -> None:
    class OneBad(FollowedBlocks):
        def block_loss(self, block: int, student_output: Any, teacher_output: Any, targets: Any = None) -> Any:
            loss = super().block_loss(block, student_output, teacher_output)
            return loss * float("nan") if block == 1 else loss

    module = OneBad(on_nonfinite="skip")
    before = {name: value.clone() for name, value in module.teacher.state_dict().items()}
    with pytest.warns(UserWarning, match="Block 1"):
        Trainer(max_steps=2, **QUIET).fit(module, make_loader(module, 16, 4))
    after = module.teacher.state_dict()
    same = {name.partition(".")[0] for name in before if torch.equal(before[name], after[name])}
    assert same == {"1"}


def test_without_a_teacher_it_begins_as_a_copy() -> None:
    student = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    module = BlockwiseDistillationModule(None, student, {"0": "0", "1": "1"}, momentum=0.9)
    assert_same_checkpoint(module.teacher.state_dict(), student.state_dict())
    assert not any(parameter.requires_grad for parameter in module.teacher.parameters())
    with pytest.raises(ValueError, match="must leave the teacher's parameters out"):
        check_optimizers([torch.optim.SGD(module.parameters(), lr=1.0)], module)


def test_what_cannot_follow_is_refused() -> None:
    def network(width: int) -> nn.Sequential:
        return nn.Sequential(nn.Linear(2, width), nn.Linear(width, 2))

    paths = {"0": "0", "1": "1"}
    with pytest.raises(ValueError, match="`teacher` must be a model unless it has `momentum`"):
        BlockwiseDistillationModule(None, network(2), paths)
    with pytest.raises(PartitionError, match="must have the student's blocks, tensor by tensor"):
        BlockwiseDistillationModule(network(3), network(2), paths, momentum=0.9)
    with pytest.raises(ValueError, match="`momentum` must lie between 0 and 1"):
        FollowedBlocks(momentum=2)
    with pytest.raises(ValueError, match="`buffers` must be 'average', 'copy' or 'leave'"):
        FollowedBlocks(buffers="drop")


@pytest.mark.parametrize(
    ("options", "trainer", "message"),
    [
        (
            {"plan": Plan(num_ranks=2, teacher=straight(0, 0, 1), student=straight(0, 1, 1))},
            {},
            "must have teacher block 1 where its student block is trained",
        ),
        ({"plan": "ahead 0,2|1"}, {}, "`momentum` must be left out where the teacher works one batch ahead"),
        ({"teach_ahead": True}, {}, "`momentum` must be left out where the teacher works one batch ahead"),
        ({"plan": "0-1|2"}, {"plugins": [MixedPrecision("16-mixed", "cpu")]}, "`precision` must not be '16-mixed'"),
    ],
)
def test_plans_and_precisions_that_cannot_work_are_refused(options: Any, trainer: Any, message: str) -> None:
    module = FollowedBlocks()
    strategy = PipeBDStrategy(**options)
    with pytest.raises((PlanError, ValueError), match=message):
        Trainer(devices=2, strategy=strategy, **QUIET, **trainer).fit(module, make_loader(module, 8, 4))


@pytest.mark.spawn
def test_any_straight_plan_trains_both_models_of_one_process_also_after_a_stop(tmp_path: Path) -> None:
    run = WholeRun(module="followed-blocks", validate=False, trainer={"max_epochs": 2, "accumulate_grad_batches": 2})
    middle = str(tmp_path / "middle.ckpt")
    expected, _ = train_whole(run, tmp_path / "plain.ckpt")
    ours, _ = train_whole(replace(run, plan="0-1|2", num_ranks=2, save_at=(2, middle)), tmp_path / "ours.ckpt")
    for key in ("state_dict", "optimizer_states", "teacher_updates"):
        assert_same_checkpoint(ours[key], expected[key])
    # The rest under a plan that is found, and chosen among some that are tried.
    again, _ = train_whole(
        replace(run, plan="", num_ranks=2, resume=middle, options={"trials": 2, "exactness": "bitwise"}),
        tmp_path / "again.ckpt",
    )
    for key in ("state_dict", "optimizer_states", "teacher_updates"):
        assert_same_checkpoint(again[key], expected[key])


def test_a_plan_that_is_found_keeps_teacher_blocks_with_their_student_blocks() -> None:
    # Teachers that take as long as all students: half cuts and scattered jobs would be faster.
    costs = constant_costs([(6, 1), (1, 1), (1, 6)])
    free = Measurement(costs=costs, num_rows=4).find_plan(Cluster.uniform(2), exactness="bitwise")
    assert free.family in ("half cut", "scattered")
    followed = Measurement(costs=costs, num_rows=4, has_momentum=True)
    for exactness in ("bitwise", "summation"):
        choice = followed.find_plan(Cluster.uniform(2), exactness=exactness)
        FollowedBlocks().block_momentum.check_plan(choice.plan)
        assert choice.step_time_ms >= free.step_time_ms
        assert {str(family) for family, why in choice.skipped if "because it follows" in why} >= {"half cut"}
    assert Measurement.from_dict(followed.to_dict()) == followed
