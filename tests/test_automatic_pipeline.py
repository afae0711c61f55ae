"""A whole student's plan is found from measured costs; what is measured leaves no trace."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer

from lightning_pipebd import PipeBDStrategy, PlanError
from lightning_pipebd.bench import Bench
from lightning_pipebd.cli import main
from lightning_pipebd.commands.pipeline_answer import pipeline_entries
from lightning_pipebd.cost_tables import MeasurementCache, as_measurement, load_measurement, save_measurement
from lightning_pipebd.machines import Machine
from lightning_pipebd.pipeline_measuring import measure_pipeline
from lightning_pipebd.planning.curve import CostError
from lightning_pipebd.planning.pipeline_costs import PipelineMeasurement
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.pipeline_profiler import PipelineParts, PipelineProfiler
from lightning_pipebd.runtime.sampling import Samples
from tests.helpers.toy import LinearModule, make_loader
from tests.helpers.training import assert_same_checkpoint
from tests.helpers.whole_students import WHOLE_STUDENTS, Convolutional, Distil, WholeRun, run_here, train_whole
from tests.planning.cost_tables import constant_costs

pytestmark = [
    pytest.mark.filterwarnings(r"ignore:Found \d+ module\(s\) in eval mode"),
    pytest.mark.filterwarnings("ignore:You defined a `validation_step` but have no"),
    pytest.mark.filterwarnings("ignore:The 'train_dataloader' does not have many workers"),
]

QUIET = {
    "logger": False,
    "enable_checkpointing": False,
    "enable_progress_bar": False,
    "enable_model_summary": False,
    "accelerator": "cpu",
}


def measure(module: Any, *, num_ranks: int = 2, cache: MeasurementCache | None = None) -> PipelineMeasurement:
    """Measure a module in this process before its first step."""
    found: list[PipelineMeasurement | None] = []

    class Measure(Callback):
        def on_fit_start(self, trainer: Trainer, pl_module: Any) -> None:
            bench = Bench(
                trainer=trainer,
                module=pl_module,
                transport=LocalWorld(1).transports[0],
                plugin=trainer.precision_plugin,
                device=torch.device("cpu"),
                to_device=trainer.strategy.batch_to_device,
                is_synchronised=False,
                tell=lambda _: None,
            )
            machine = Machine.here(torch.device("cpu"), 0)
            found.append(
                measure_pipeline(
                    bench, trainer.optimizers, [machine], num_ranks=num_ranks, looks_ahead=True, cache=cache
                )
            )

    trainer = Trainer(max_steps=0, callbacks=[Measure()], **QUIET)  # type: ignore[arg-type]
    trainer.fit(module, make_loader(module, 16, 8))
    (measured,) = found
    assert measured is not None
    return measured


@pytest.fixture(autouse=True)
def _quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Few rounds: what is tested is what is measured, not how surely."""
    quick = partial(Samples, min_rounds=1, max_rounds=1)
    monkeypatch.setattr("lightning_pipebd.runtime.pipeline_profiler.Samples", quick)
    monkeypatch.setattr("lightning_pipebd.pipeline_measuring.measure_loop", lambda: 0.0)


@pytest.mark.parametrize("name", ["byol", "convolutional", "contrast", "crowd"])
def test_measuring_changes_nothing_and_knows_every_block(name: str) -> None:
    module = WHOLE_STUDENTS[name]()
    before = {key: value.clone() for key, value in module.state_dict().items()}
    measured = measure(module)
    assert (len(measured.teacher), len(measured.student)) == (module.num_teacher_blocks, module.num_student_blocks)
    assert measured.num_rows == 8
    assert measured.has_momentum
    assert measured.is_full_batch == (name in ("contrast", "crowd"))
    assert bool(measured.one_replica_reason) == (name == "byol")
    assert bool(measured.coupled_blocks) == (name == "convolutional")
    assert all(block.parameter_bytes for block in measured.student[:2])
    assert {key: value.tolist() for key, value in module.state_dict().items()} == {
        key: value.tolist() for key, value in before.items()
    }
    assert all(parameter.grad is None for parameter in module.parameters())
    assert getattr(module, "_seen", []) == []


def test_sizes_are_those_of_the_tensors() -> None:
    module = Distil()
    measured = measure(module)
    assert measured.student_input_bytes_per_row == measured.teacher_input_bytes_per_row == 6 * 4
    assert measured.target_bytes_per_row == 8
    assert measured.student[0].output_bytes_per_row == 8 * 4
    # The output of a linear layer is all that backward wants of it beside the input.
    assert measured.student[0].held_bytes_per_row == 8 * 4
    assert measured.student[0].gradient_bytes == (6 * 8 + 8) * 4
    assert measured.student[0].optimizer_bytes >= 2 * measured.student[0].gradient_bytes
    assert measured.teacher[0].output_bytes_per_row == 10 * 4
    assert measured.whole_reason == ""


def test_whether_there_may_be_replicas_is_asked_anew_though_the_costs_were_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = MeasurementCache(tmp_path / "cache")
    with monkeypatch.context() as earlier:
        earlier.setattr("lightning_pipebd.pipeline_measuring.one_replica_reason", lambda _: "it was not possible")
        first = measure(WHOLE_STUDENTS["crowd"](), cache=cache)
    again = measure(WHOLE_STUDENTS["crowd"](), cache=cache)
    assert (first.may_replicate, again.may_replicate) == (False, True)
    assert again.loss_ms == first.loss_ms


def test_a_loss_that_is_no_mean_over_rows_keeps_batches_whole() -> None:
    class Sum(Distil):
        def loss(self, student_output: Any, teacher_output: Any, targets: Any) -> Any:
            return (student_output - teacher_output).square().sum()

    module = Sum()
    measured = measure(module)
    assert measured.whole_reason == "the loss of a batch is not the mean of the losses of its halves"
    assert not measured.may_cut


def test_a_block_that_only_runs_on_whole_batches_is_noticed() -> None:
    class Fixed(torch.nn.Module):
        def forward(self, inputs: Any) -> Any:
            return inputs.reshape(8, -1)

    parts = PipelineParts([[Fixed()]], [[torch.nn.Linear(4, 4)]], [], torch.nn.Module())

    class Work:
        def teach(self, block: int, boundary: Any) -> Any:
            return parts.teacher[block][0](boundary)

        def forward(self, block: int, boundary: Any, rows: Any) -> Any:
            return parts.student[block][0](boundary)

        def loss(self, student_output: Any, teacher_output: Any, targets: Any, rows: Any, num_rows: int) -> Any:
            raise AssertionError

    profiler = PipelineProfiler(Work(), parts, torch.device("cpu"), num_rows=8, row_counts=[3], is_full_batch=False)
    inputs = torch.randn(8, 4)
    found = profiler.profile((inputs, inputs, None), ([0], [0]), measures_loss=False)
    assert found.whole_reason.startswith("teach of block 0, given 3 rows")
    assert found.teacher[0].teach_ms.amounts == (8.0,)
    assert found.student[0].forward_ms.amounts == (3.0, 8.0)


def test_costs_are_kept_and_found_again(tmp_path: Path) -> None:
    module = Distil()
    cache = MeasurementCache(tmp_path / "cache")
    first, again = (measure(module, cache=cache) for _ in range(2))
    assert replace(again, loader=first.loader) == first
    save_measurement(first, tmp_path / "costs.yaml")
    assert load_measurement(tmp_path / "costs.yaml") == first
    with pytest.raises(CostError, match="must be of blocks that learn by themselves"):
        as_measurement(tmp_path / "costs.yaml", 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"plan": "0-1|2 / 0-1|2-3", "exactness": "bitwise", "num_micro_batches": 2},
            "2 micro-batches make it summation",
        ),
        ({"exactness": "bitwise", "num_micro_batches": 2}, "must keep the student bitwise"),
    ],
)
def test_cutting_more_finely_than_was_asked_for_is_refused(options: Any, message: str) -> None:
    trainer = Trainer(devices=2, strategy=PipeBDStrategy(**options), **QUIET)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message):
        trainer.fit(Distil(), make_loader(LinearModule(), 4, 2))


def test_statistics_are_refused_where_summation_is_asked_for() -> None:
    strategy = PipeBDStrategy(plan="0|1-2", exactness="summation", num_micro_batches=2)
    with pytest.raises(PlanError, match="2 micro-batches make it statistics"):
        Trainer(devices=2, strategy=strategy, **QUIET).fit(Convolutional(), make_loader(LinearModule(), 4, 2))  # type: ignore[arg-type]


def test_changing_plans_are_refused_for_a_whole_student() -> None:
    with pytest.raises(ValueError, match="`replan` must be left out for a TeacherStudentModule"):
        Trainer(devices=2, strategy=PipeBDStrategy(replan="epoch"), **QUIET).fit(
            Distil(), make_loader(LinearModule(), 4, 2)
        )  # type: ignore[arg-type]


def test_costs_of_another_kind_of_module_are_refused() -> None:
    strategy = PipeBDStrategy(costs=constant_costs([(1, 3)] * 3))
    with pytest.raises(CostError, match="must describe the 3 teacher blocks and 4 student blocks"):
        Trainer(devices=2, strategy=strategy, **QUIET).fit(Distil(), make_loader(LinearModule(), 4, 2))  # type: ignore[arg-type]


@pytest.mark.spawn
def test_a_found_plan_trains_the_student_of_one_process(tmp_path: Path) -> None:
    run = WholeRun(module="distil", trainer={"max_steps": 4}, validate=False)
    reference = run_here(run, str(tmp_path / "reference.ckpt"))
    assert reference.global_step == 4
    options = {"exactness": "bitwise", "memory_limit": "1GiB"}
    ours, _ = train_whole(replace(run, plan="", num_ranks=2, options=options), tmp_path / "ours.ckpt")
    expected = torch.load(tmp_path / "reference.ckpt", weights_only=True)
    assert_same_checkpoint(ours, expected)


def test_the_commands_know_whole_students(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEBD_CACHE", "")
    config = tmp_path / "config.yaml"
    config.write_text(
        yaml.safe_dump(
            {
                "model": {"class_path": "tests.helpers.whole_students.Distil"},
                "data": {"class_path": "tests.helpers.whole_students.WholeData"},
                "trainer": {"accelerator": "cpu", "strategy": "pipebd", "devices": 2},
            }
        )
    )
    assert main(["check", "--config", str(config)]) == 0
    assert "student 3" in capsys.readouterr().out
    saved, plan = tmp_path / "costs.yaml", tmp_path / "plan.yaml"
    assert main(["plan", "--config", str(config), "--devices", "2", "--save-costs", str(saved), "--no-cache"]) == 0
    assert "predicted: " in capsys.readouterr().out
    assert main(["plan", "--costs", str(saved), "--devices", "2", "--save", str(plan)]) == 0
    assert set(yaml.safe_load(plan.read_text())) == {"num_ranks", "teacher", "student"}
    capsys.readouterr()
    assert main(["simulate", "--costs", str(saved), "--devices", "2", "--plan", str(plan)]) == 0
    assert "predicted: " in capsys.readouterr().out
    assert main(["rate", "--config", str(config), "--checkpoint", "none.ckpt"]) == 1
    assert "a whole student has none: its blocks have one loss together" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["byol", "contrast", "distil"])
def test_a_comparison_of_runs_covers_every_entry_of_the_checkpoint_once(name: str) -> None:
    module = WHOLE_STUDENTS[name]()
    entries = list(pipeline_entries(module))
    compared = [id(tensor) for _, parameters, buffers in entries for tensor in (*parameters, *buffers)]
    assert sorted(compared) == sorted(map(id, module.state_dict(keep_vars=True).values()))
    names = [block for block, _, _ in entries]
    assert ("teacher 0" in names) == (name != "distil")
    assert ("loss" in names) == (name != "distil")
