"""What is told before a second process exists: each refusal with its reason, and each warning."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from datetime import timedelta
from inspect import signature
from pathlib import Path
from typing import Any

import lightning
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    Checkpoint,
    EarlyStopping,
    LearningRateFinder,
    ModelCheckpoint,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    Timer,
)
from lightning.pytorch.tuner import Tuner
from packaging.version import Version
from torch import nn
from torch.utils.data import DataLoader, DistributedSampler

from lightning_pipebd import BlockwiseDistillationModule, PartitionError, PipeBDStrategy, Plan, PlanError
from lightning_pipebd.preflight import check_optimizers, require_module, warn_of_statistics
from tests.helpers.ranks import RankError
from tests.helpers.scenarios import MakeTrainer, under_plan
from tests.helpers.toy import ConvModule, DropoutModule, LinearModule, ToyData, make_loader

PLAN = "0-1|2-3"
LAUNCHER = "lightning.pytorch.strategies.launchers.subprocess_script._SubprocessScriptLauncher"


class Launched(Exception):
    """The preflight has passed, and another process would have been started."""


@pytest.fixture(autouse=True)
def no_process_is_launched(monkeypatch: pytest.MonkeyPatch) -> None:
    def launch(*args: Any) -> None:
        raise Launched

    monkeypatch.setattr(f"{LAUNCHER}._call_children_scripts", launch)


def fit(module: LightningModule | None = None, plan: Any = PLAN, **settings: Any) -> None:
    defaults: dict[str, Any] = {
        "accelerator": "cpu",
        "devices": 2,
        "strategy": PipeBDStrategy(plan=plan),
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
    }
    module = LinearModule() if module is None else module
    Trainer(**{**defaults, **settings}).fit(module, make_loader(LinearModule, 8, 4))


def fit_with(callback: Callback, **settings: Any) -> None:
    fit(callbacks=[callback], enable_checkpointing=isinstance(callback, Checkpoint), **settings)


def test_a_fit_without_fault_gets_as_far_as_launching() -> None:
    with pytest.raises(Launched):
        fit()


@pytest.mark.parametrize("plan", [7, ["0-3"]])
def test_a_plan_of_no_known_kind_is_refused(plan: Any) -> None:
    with pytest.raises(TypeError, match=r"`plan` must be text, a dictionary or a Plan, but is .* Write for example"):
        fit(plan=plan)


def test_accumulating_no_batches_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`accumulate_grad_batches` must be at least 1, but is 0. Leave it out"):
        fit(accumulate_grad_batches=0)


# Modules.


class OwnStep(LinearModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        return super().training_step(batch, batch_idx)


class Manual(LinearModule):
    def __init__(self) -> None:
        super().__init__()
        self.automatic_optimization = False


class Unlike(BlockwiseDistillationModule):
    """Its student block 1 is too wide, which the example shows."""

    def __init__(self) -> None:
        wide = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 7))
        super().__init__(nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 5)), wide, {"0": "0", "1": "1"})
        self.example_input_array = torch.zeros(2, 6)

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.1)


class Plain(LightningModule):
    def training_step(self, batch: Any, batch_idx: int) -> Any:
        raise NotImplementedError

    def configure_optimizers(self) -> Any:
        raise NotImplementedError


class OwnClipping(LinearModule):
    def configure_gradient_clipping(self, *args: Any, **kwargs: Any) -> None:
        return super().configure_gradient_clipping(*args, **kwargs)


def test_another_kind_of_module_is_refused() -> None:
    with pytest.raises(
        TypeError, match=r"must train a BlockwiseDistillationModule or a TeacherStudentModule, but got Plain\. Subclass"
    ):
        fit(Plain())


def test_no_module_is_refused() -> None:
    with pytest.raises(TypeError, match="but got NoneType"):
        require_module(None)


def test_an_own_training_step_is_refused() -> None:
    with pytest.raises(TypeError, match=r"`OwnStep` must leave `training_step` alone.*Override `block_loss`"):
        fit(OwnStep())


def test_manual_optimization_is_refused() -> None:
    with pytest.raises(ValueError, match="`automatic_optimization` must be True"):
        fit(Manual())


def test_shapes_that_an_example_shows_to_differ_are_refused() -> None:
    with pytest.raises(PartitionError, match=r"(?s)\(2, 7\).*\(2, 5\)|\(2, 5\).*\(2, 7\)"):
        fit(Unlike(), plan="0|1")


def test_an_own_clipping_warns_that_it_sees_one_ranks_blocks() -> None:
    with pytest.warns(UserWarning, match="sees the gradients of one rank's blocks only"), pytest.raises(Launched):
        fit(OwnClipping(), gradient_clip_val=1.0)


# Plans.


@pytest.mark.parametrize(
    ("plan", "reason"),
    [
        ("0|1-2", r"must name every block from 0 to 3, but block 3 is missing"),
        ("0-1|2-4", r"must name blocks from 0 to 3, but names block 4"),
        (Plan.straight([1, 2]), r"must cover the module's 4 blocks, but covers 3\. The blocks are 0, 1, 2, 3"),
        ("0|1|2-3", r"must be for the 2 ranks of this run, but is for 3\. Set `devices=3`"),
        (Plan.joint(4, 1), r"must be for the 2 ranks of this run, but is for 1"),
        ({"num_ranks": 2}, r"keys must be `num_ranks`, `teacher` and `student`"),
        ("no.yaml", r"must name a readable YAML file, but no\.yaml is not"),
        ("first half, second half", r"`plan`"),
        ("", r"`plan`"),
    ],
)
def test_a_plan_that_does_not_fit_is_refused(plan: Any, reason: str) -> None:
    with pytest.raises(PlanError, match=reason):
        fit(plan=plan)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{", "must name a readable YAML file"),
        ("- 1\n- 2", "must be a mapping with `num_ranks`, `teacher` and `student`, but .* holds"),
        ("", "must be a mapping with .* holds None"),
        ("0|1|2-3", "must be for the 2 ranks of this run, but is for 3"),
    ],
)
def test_a_plan_file_that_does_not_fit_is_refused(text: str, reason: str, tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_text(text)
    with pytest.raises(PlanError, match=reason):
        fit(plan=str(path))


def test_a_file_that_is_no_text_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "plan.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlanError, match="must name a readable YAML file"):
        fit(plan=str(path))


@pytest.mark.parametrize("name", ["stall_timeout", "start_timeout"])
def test_a_time_limit_that_is_no_time_is_refused_where_it_is_written(name: str) -> None:
    with pytest.raises(ValueError, match=f"`{name}` must be above 0, but is 0:00:00"):
        PipeBDStrategy(**{name: timedelta(0)})


@pytest.mark.parametrize("max_in_flight", [0, -1])
def test_a_queue_without_room_is_refused_where_it_is_written(max_in_flight: int) -> None:
    with pytest.raises(ValueError, match=f"`max_in_flight` must be at least 1, but is {max_in_flight}"):
        PipeBDStrategy(max_in_flight=max_in_flight)


# Trainer and callbacks.


@pytest.mark.parametrize(
    ("make_callback", "reason"),
    [
        (lambda: StochasticWeightAveraging(1e-3), "`StochasticWeightAveraging` must see all weights after every step"),
        (LearningRateFinder, r"`LearningRateFinder` must judge .* Run it with `strategy='auto'`"),
        (BatchSizeFinder, r"`BatchSizeFinder` must judge"),
        (BackboneFinetuning, "`BackboneFinetuning` must not give the optimizer parameters while it trains"),
        (lambda: OnExceptionCheckpoint(tempfile.mkdtemp()), "`OnExceptionCheckpoint` must not save after an exception"),
        (lambda: EarlyStopping("train/loss"), "must be known on every rank, .* Monitor 'train/loss_epoch'"),
        (lambda: ModelCheckpoint(monitor="train/block/02/loss"), "Monitor 'train/block/02/loss_epoch'"),
    ],
)
def test_a_callback_that_cannot_work_is_refused(make_callback: Callable[[], Callback], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        fit_with(make_callback())


def test_weight_averaging_is_refused_where_lightning_has_it() -> None:
    callbacks = pytest.importorskip("lightning.pytorch.callbacks.weight_averaging")
    with pytest.raises(ValueError, match="`WeightAveraging` must see all weights after every step"):
        fit_with(callbacks.WeightAveraging())


@pytest.mark.skipif("save_on_exception" not in signature(ModelCheckpoint).parameters, reason="of later versions")
def test_a_checkpoint_after_an_exception_is_refused() -> None:
    with pytest.raises(ValueError, match="`ModelCheckpoint` must not save after an exception"):
        fit_with(ModelCheckpoint(save_on_exception=True))


def test_the_tuner_is_refused() -> None:
    trainer = Trainer(accelerator="cpu", devices=2, strategy=PipeBDStrategy(plan=PLAN), logger=False)
    module = LinearModule()
    with pytest.raises(ValueError, match="`LearningRateFinder` must judge"):
        Tuner(trainer).lr_find(module, make_loader(module, 8, 4))


@pytest.mark.skipif(Version(lightning.__version__) < Version("2.6"), reason="since Lightning 2.6")
def test_validation_by_time_is_refused() -> None:
    with pytest.raises(ValueError, match=r"`val_check_interval` must count batches, but is a time"):
        fit(val_check_interval="00:00:10:00")


def test_checkpoints_by_time_warn_that_ranks_wait() -> None:
    said = r"train_time_interval=.* makes all ranks wait .* Use `every_n_train_steps`"
    with pytest.warns(UserWarning, match=said), pytest.raises(Launched):
        fit_with(ModelCheckpoint(train_time_interval=timedelta(minutes=1)))


@pytest.mark.parametrize("settings", [{"callbacks": [Timer("00:01:00:00")]}, {"max_time": "00:01:00:00"}])
def test_a_time_limit_by_steps_warns_that_ranks_wait(settings: dict[str, Any]) -> None:
    said = r"`max_time` and `Timer\(interval='step'\)` make all ranks wait"
    with pytest.warns(UserWarning, match=said), pytest.raises(Launched):
        fit(**settings)


@pytest.mark.parametrize(
    "callback",
    [
        Timer("00:01:00:00", interval="epoch"),
        EarlyStopping("train/loss_epoch"),
        EarlyStopping("val_acc"),
        ModelCheckpoint(monitor="train/block/02/loss_epoch"),
        ModelCheckpoint(every_n_train_steps=2),
    ],
)
def test_a_callback_that_works_passes_without_a_word(callback: Callback) -> None:
    with pytest.raises(Launched):
        fit_with(callback)


# What a plan means for a block.


def test_synchronised_batch_norm_on_cpu_is_refused_for_shared_blocks() -> None:
    with pytest.raises(ValueError, match=r"`sync_batchnorm` must run on GPUs .* blocks features\.0, features\.1"):
        fit(DropoutModule(), plan="joint", sync_batchnorm=True)


def test_synchronised_batch_norm_on_cpu_is_accepted_where_no_block_needs_it() -> None:
    with pytest.raises(Launched):
        fit(DropoutModule(), plan="0-1|2-3", sync_batchnorm=True)


def test_a_plan_that_changes_the_mathematics_warns_and_names_the_blocks() -> None:
    plan = Plan.hybrid([(2, 2), (2, 1)])
    with pytest.warns(UserWarning, match=r"student blocks features\.0, features\.1 over ranks.*exactness: statistics"):
        warn_of_statistics(plan, DropoutModule(), is_synchronised=False)


@pytest.mark.parametrize("plan", [Plan.straight([2, 3]), Plan.joint(5, 2)])
def test_a_plan_that_does_not_says_nothing(plan: Plan) -> None:
    warn_of_statistics(plan, ConvModule(), is_synchronised=False)


# Optimizers: known only after `configure_optimizers` has run, on every rank alike.


def test_an_optimizer_that_couples_blocks_is_refused() -> None:
    module = LinearModule()
    with pytest.raises(ValueError, match=r"must not return LBFGS: its step couples all parameters"):
        check_optimizers([torch.optim.LBFGS(module.trainable_parameters())], module)


def test_the_teachers_parameters_in_the_optimizer_are_refused() -> None:
    module = LinearModule()
    both = [*module.teacher.parameters(), *module.student.parameters()]
    with pytest.raises(ValueError, match=r"must leave the teacher's parameters out: it is frozen"):
        check_optimizers([torch.optim.SGD(both, lr=0.1)], module)


def test_a_block_that_the_optimizer_does_not_know_warns() -> None:
    module = LinearModule()
    optimizer = torch.optim.SGD([*module.block_parameters(0), *module.block_parameters(2)], lr=0.1)
    with pytest.warns(UserWarning, match=r"no parameter of block 1, block 3: .* `self\.trainable_parameters\(\)`"):
        check_optimizers([optimizer], module)


class WithAdapter(LinearModule):
    def __init__(self) -> None:
        super().__init__()
        block = nn.Sequential(nn.Linear(6, 3), nn.Linear(3, 5))
        teacher = nn.Sequential(nn.Linear(6, 4), nn.Linear(4, 5))
        BlockwiseDistillationModule.__init__(
            self,
            teacher,
            block,
            {"0": "0", "1": "1"},
            adapters={"0": nn.Linear(3, 4)},
            input_adapters={"1": nn.Linear(4, 3)},
        )
        self.weighting = nn.Parameter(torch.ones(2))


def test_adapters_that_the_optimizer_does_not_know_warn() -> None:
    module = WithAdapter()
    with pytest.warns(UserWarning, match="no parameter of adapter output_0, adapter input_1: they will not change"):
        check_optimizers([torch.optim.SGD(module.student.parameters(), lr=0.1)], module)


def test_parameters_that_belong_to_no_block_warn() -> None:
    module = WithAdapter()
    with pytest.warns(UserWarning, match=r"parameters that belong to no block: weighting\. Under a plan only"):
        check_optimizers([torch.optim.SGD(module.parameters(), lr=0.1)], module)


def test_all_trainable_parameters_pass_without_a_word() -> None:
    for module in (LinearModule(), WithAdapter()):
        check_optimizers([torch.optim.SGD(module.trainable_parameters(), lr=0.1)], module)


class OwnSchedule(LinearModule):
    def __init__(self, **config: Any) -> None:
        super().__init__()
        self.config = config

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.trainable_parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, **self.config}}


class OwnCallback(LinearModule):
    def configure_callbacks(self) -> Any:
        return [StochasticWeightAveraging(1e-3)]


class LbfgsModule(LinearModule):
    def configure_optimizers(self) -> Any:
        return torch.optim.LBFGS(self.trainable_parameters())


class Two(LinearModule):
    def train_dataloader(self) -> Any:
        return [make_loader(self, 8, 4), make_loader(self, 8, 4)]


class Dealt(LinearModule):
    def train_dataloader(self) -> Any:
        data = ToyData(8, self.shape)
        return DataLoader(data, batch_size=4, sampler=DistributedSampler(data, num_replicas=2, rank=0))


class NoLabels(BlockwiseDistillationModule):
    def __init__(self) -> None:
        super().__init__(nn.Linear(6, 5), nn.Linear(6, 5), {"": ""}, target_blocks=[0])

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trainable_parameters(), lr=0.1)

    def train_dataloader(self) -> Any:
        return DataLoader(ToyData(8, (6,)).inputs, batch_size=4)


class Multiplied(LinearModule):
    def on_after_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        return torch.cat([batch[0], batch[0]]), torch.cat([batch[1], batch[1]])


LATE: dict[str, tuple[Callable[[], Any], str]] = {
    "a scheduler of a step's loss": (
        lambda: OwnSchedule(monitor="train/loss", interval="step"),
        "`monitor` of ReduceLROnPlateau must be known on every rank, but 'train/loss' is a step's loss",
    ),
    "a callback of the module": (OwnCallback, "`StochasticWeightAveraging` must see all weights"),
    "an optimizer that couples blocks": (LbfgsModule, "must not return LBFGS"),
    "several training loaders": (Two, "`train_dataloader` must be one loader, but several were given"),
    "a loader that deals to ranks": (Dealt, "has a DistributedSampler. Remove it"),
    "no labels for a block that wants them": (NoLabels, "`target_blocks` must get labels"),
    "a hook that changes the number of rows": (Multiplied, "must give the 4 rows that were loaded, but gives 8"),
}


def fit_late(make_trainer: MakeTrainer, name: str) -> str:
    module = LATE[name][0]()
    loader = None if "train_dataloader" in vars(type(module)) else make_loader(module, 8, 4)
    make_trainer(strategy="pipebd").fit(module, loader)
    return "no error"


@pytest.mark.spawn
@pytest.mark.parametrize("name", LATE)
def test_what_only_a_running_fit_shows_is_refused_there(name: str) -> None:
    with pytest.raises(RankError) as caught:
        under_plan(fit_late, name, plan="0", num_ranks=1)
    assert LATE[name][1] in str(caught.value.__cause__)
