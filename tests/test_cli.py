"""The command line: a strategy in YAML, and the configuration that a run leaves behind."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, LightningDataModule, Trainer
from torch.utils.data import DataLoader

from lightning_pipebd import PipeBDStrategy, Plan, format_plan, save_plan
from lightning_pipebd.cost_tables import save_measurement
from lightning_pipebd.planning.measurement import Measurement
from tests.helpers.ranks import run_processes
from tests.helpers.toy import LinearModule, make_loader
from tests.planning.cost_tables import constant_costs

pytestmark = pytest.mark.spawn


class CliModule(LinearModule):
    def __init__(self, learning_rate: float = 0.1) -> None:
        super().__init__()
        self.learning_rate = learning_rate

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.trainable_parameters(), lr=self.learning_rate)


class CliData(LightningDataModule):
    def __init__(self, batch_size: int = 4) -> None:
        super().__init__()
        self.batch_size = batch_size

    def train_dataloader(self) -> DataLoader[Any]:
        return make_loader(CliModule, 12, self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return make_loader(CliModule, 8, self.batch_size)

    test_dataloader = val_dataloader


class PlanWriter(Callback):
    """Writes what the strategy was made of to a file."""

    def __init__(self, path: str) -> None:
        self.path = path

    def teardown(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        strategy = trainer.strategy
        assert isinstance(strategy, PipeBDStrategy)
        if trainer.is_global_zero:
            plan = format_plan(strategy.plan) if strategy.plan else "unknown"
            fn = str(trainer.state.fn and trainer.state.fn.value)
            text = f"{fn} {plan} lr {pl_module.learning_rate} of {trainer.world_size}"
            Path(self.path).write_text(text)


def configuration(folder: Path, strategy: Any) -> dict[str, Any]:
    return {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "max_epochs": 1,
            "strategy": strategy,
            "default_root_dir": str(folder),
            "logger": {"class_path": "lightning.pytorch.loggers.CSVLogger", "init_args": {"save_dir": str(folder)}},
            "callbacks": [
                {"class_path": "tests.test_cli.PlanWriter", "init_args": {"path": str(folder / "plan.txt")}},
                {"class_path": "lightning.pytorch.callbacks.ModelCheckpoint", "init_args": {"filename": "last"}},
            ],
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
        "model": {"class_path": "tests.test_cli.CliModule", "init_args": {"learning_rate": 0.2}},
        "data": {"class_path": "tests.test_cli.CliData"},
    }


def run_command(rank: int, arguments: list[str]) -> None:
    # Here, because older versions of Lightning's command line warn when they are imported.
    from lightning_pipebd.cli import main

    sys.argv = ["pipebd", *arguments]
    main()


def run(folder: Path, *arguments: str) -> str:
    """Run the command on two ranks and give what the callback wrote."""
    run_processes(2, run_command, list(arguments))
    return (folder / "plan.txt").read_text()


def with_plan(plan: Any, **arguments: Any) -> dict[str, Any]:
    return {"class_path": "lightning_pipebd.PipeBDStrategy", "init_args": {"plan": plan, **arguments}}


@pytest.mark.parametrize(
    ("strategy", "plan"),
    [
        pytest.param(with_plan(None, costs="{folder}/costs.yaml", memory_limit="1MiB"), "0-1|2-3", id="costs"),
        pytest.param(with_plan("0|1-3", max_in_flight=3, timeout="0:05:00"), "0|1-3", id="text"),
        pytest.param(with_plan("joint"), "0-3*2", id="joint"),
        pytest.param(with_plan(Plan.straight([3, 1]).to_dict()), "0-2|3", id="dictionary"),
        pytest.param(with_plan("{folder}/written.yaml"), "0,1:1/4|1:3/4,2-3", id="file"),
    ],
)
def test_a_strategy_is_written_in_yaml_and_its_configuration_can_be_used_again(
    strategy: Any, plan: str, tmp_path: Path
) -> None:
    text = yaml.safe_dump(configuration(tmp_path, strategy)).replace("{folder}", str(tmp_path))
    (tmp_path / "given.yaml").write_text(text)
    quarters = {"num_ranks": 2, "teacher": [], "student": []}
    quarters["teacher"] = quarters["student"] = [[[0, "1"]], [[0, "1/4"], [1, "3/4"]], [[1, "1"]], [[1, "1"]]]
    save_plan(Plan.from_dict(quarters), tmp_path / "written.yaml")
    save_measurement(Measurement(costs=constant_costs([(1, 9)] * 4), num_rows=4), tmp_path / "costs.yaml")

    assert run(tmp_path, "fit", "--config", str(tmp_path / "given.yaml")) == f"fit {plan} lr 0.2 of 2"
    (saved,) = tmp_path.glob("lightning_logs/version_0/config.yaml")
    (checkpoint,) = tmp_path.rglob("last.ckpt")
    again = ["--config", str(saved), "--ckpt_path", str(checkpoint), "--trainer.logger", "false"]
    # Only a fit finds a plan.
    known = "unknown" if isinstance(strategy, dict) and strategy["init_args"]["plan"] is None else plan
    assert run(tmp_path, "test", *again) == f"test {known} lr 0.2 of 2"


def test_a_plan_is_given_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(configuration(tmp_path, with_plan(None))))
    arguments = ["fit", "--config", str(tmp_path / "given.yaml"), "--trainer.strategy.plan", "0-2|3"]
    assert run(tmp_path, *arguments) == "fit 0-2|3 lr 0.2 of 2"
