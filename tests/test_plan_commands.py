"""`pipebd plan` and `pipebd simulate`, run as a user types them, without a shell."""

from __future__ import annotations

import builtins
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipebd import Plan, load_plan, save_plan
from lightning_pipebd.cli import main
from lightning_pipebd.cost_tables import load_measurement, save_measurement
from lightning_pipebd.planning.costs import LinkCost
from lightning_pipebd.planning.explain import BlockTraits
from lightning_pipebd.planning.measurement import Measurement
from tests.planning.cost_tables import constant_costs


@pytest.fixture
def costs(tmp_path: Path) -> str:
    table = constant_costs([(1, 3), (1, 3), (2, 6)], gradient_bytes=100, boundary_bytes=1000, link=LinkCost())
    traits = (BlockTraits(name="stem", has_batch_statistics=True), BlockTraits(name="mid"), BlockTraits(name="head"))
    save_measurement(Measurement(costs=table, num_rows=8, traits=traits), tmp_path / "costs.yaml")
    return str(tmp_path / "costs.yaml")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_best_plan_for_given_costs_is_printed_and_saved(
    costs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan, again = tmp_path / "plan.yaml", tmp_path / "again.json"
    arguments = ["plan", "--costs", costs, "--devices", "2", "--save", str(plan), "--save-costs", str(again)]
    assert main(arguments) == 0
    assert "predicted: 8 ms per step (straight plan)" in capsys.readouterr().out
    assert load_plan(plan) == Plan.straight([2, 1])
    assert load_measurement(again) == load_measurement(costs)


def test_json_has_the_plan_and_the_numbers(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_json(capsys, "simulate", "--costs", costs, "--devices", "2")
    assert Plan.from_dict(found["plan"]) == Plan.straight([2, 1])
    assert (found["text"], found["family"], found["step_time_ms"]) == ("0-1|2", "straight", 8.0)
    assert (found["exactness"], found["utilisation"]) == ("bitwise", [1.0, 1.0])
    assert found["alternatives_ms"]["single"] == 16.0


@pytest.mark.parametrize("plan", ["0|1-2", "file"])
def test_a_given_plan_is_simulated(plan: str, costs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if plan == "file":
        plan = str(tmp_path / "plan.yaml")
        save_plan(Plan.straight([1, 2]), plan)
    found = run_json(capsys, "simulate", "--costs", costs, "--devices", "2", "--plan", plan)
    assert (found["text"], found["family"], found["step_time_ms"]) == ("0|1-2", None, 12.0)


def test_links_and_nodes_that_one_does_not_have(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--costs", costs, "--devices", "2", "--plan", "0-1|2"]
    slow = ["--ranks-per-node", "1", "--node-link-bytes-per-ms", "500", "--node-link-latency-ms", "1"]
    assert run_json(capsys, *arguments)["step_time_ms"] == 8.0
    assert run_json(capsys, *arguments, "--link-bytes-per-ms", "100")["step_time_ms"] == pytest.approx(80.0)
    # 8 rows of 1000 bytes take 16 ms.
    assert run_json(capsys, *arguments, *slow)["step_time_ms"] == pytest.approx(16.0, abs=1.1)


def test_another_number_of_rows(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--costs", costs, "--devices", "2", "--plan", "0-1|2", "--link-bytes-per-ms", "1000"]
    assert run_json(capsys, *arguments, "--rows", "80")["step_time_ms"] == pytest.approx(80.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "0|1"], "must name every block from 0 to 2, but block 2 is missing"),
        (["--plan", "0|1|2"], "`cluster` must have the plan's 3 ranks, but has 2"),
        (["--plan", "joint", "--exactness", "bitwise"], "`plan` must be bitwise"),
        (["--plan", "ahead 0,2|1", "--teach-ahead"], "`--teach-ahead` must be left out where `--plan` is given"),
        (["--memory", "150B"], "must leave room for some plan"),
        (["--plan", "0-1|2", "--memory", "150B"], "must fit the memory of every rank"),
        (["--memory", "much"], "`--memory` must be bytes above 0"),
        (["--plan", "nowhere.yaml"], "must name a readable YAML file"),
        (["--devices", "0"], "`--devices` must be at least 1"),
        (["--rows", "0"], "`num_rows` must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    arguments: list[str], message: str, costs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--costs", costs, "--devices", "2", *arguments]) == 1
    assert message in capsys.readouterr().err


def test_the_teacher_works_ahead_where_that_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    costs = str(tmp_path / "costs.yaml")
    save_measurement(Measurement(costs=constant_costs([(2, 1), (2, 7), (2, 4)]), num_rows=8), costs)
    arguments = ["plan", "--costs", costs, "--devices", "2"]
    assert run_json(capsys, *arguments)["step_time_ms"] == 10.0
    found = run_json(capsys, *arguments, "--teach-ahead")
    assert (found["text"][:6], found["step_time_ms"]) == ("ahead ", 9.0)
    given = run_json(capsys, "simulate", *arguments[1:], "--plan", found["text"])
    assert given["step_time_ms"] == 9.0
    assert Plan.from_dict(given["plan"]).teaches_ahead


def test_configuring_what_is_not_measured_is_refused(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["plan", "--costs", costs, "--devices", "2", "--config", "x.yaml"])
    assert "with --costs nothing is configured, but --config x.yaml is given" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["timeline.svg", "timeline.png"])
def test_the_timeline_is_drawn(name: str, costs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["simulate", "--costs", costs, "--devices", "2", "--plot", str(tmp_path / name)]) == 0
    content = (tmp_path / name).read_bytes()
    assert len(content) > 5000
    assert name.endswith("png") or b"rank 1" in content


def test_a_picture_without_matplotlib_names_what_to_install(
    costs: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any) -> Any:
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return real(name, *args)

    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["simulate", "--costs", costs, "--devices", "2", "--plot", "timeline.svg"]) == 1
    assert "`pip install lightning-pipebd[plot]`" in capsys.readouterr().err


# Lightning's command line and jsonargparse warn of each other, differently in every version.
@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_a_configured_module_is_measured_in_this_process(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PIPEBD_CACHE", str(tmp_path / "cache"))
    configuration = {
        "seed_everything": 1,
        "trainer": {
            "accelerator": "cpu",
            "devices": 2,
            "max_epochs": 1,
            "strategy": {"class_path": "lightning_pipebd.PipeBDStrategy", "init_args": {"plan": "0-1|2-3"}},
            "default_root_dir": str(tmp_path),
            "callbacks": [{"class_path": "lightning.pytorch.callbacks.ModelCheckpoint"}],
        },
        "model": {"class_path": "tests.test_cli.CliModule"},
        "data": {"class_path": "tests.test_cli.CliData"},
    }
    (tmp_path / "given.yaml").write_text(yaml.safe_dump(configuration))
    saved = tmp_path / "costs.yaml"
    arguments = ["plan", "--config", str(tmp_path / "given.yaml"), "--devices", "3", "--save-costs", str(saved)]
    found = run_json(capsys, *arguments, "--link-latency-ms", "0.1", "--link-bytes-per-ms", "1e6")
    measurement = load_measurement(saved)
    assert Plan.from_dict(found["plan"]).num_ranks == 3
    assert (measurement.num_rows, [block.name for block in measurement.costs.blocks]) == (4, ["0", "1", "2", "3"])
    assert measurement.costs.devices[0].blocks[0].learn_ms.amounts == (2.0, 4.0)
    assert measurement.costs.same_node == LinkCost(latency_ms=0.1, bytes_per_ms=1e6)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    # From the cache: the same costs, but for the loader's.
    run_json(capsys, *arguments)
    again = load_measurement(saved)
    assert again.costs.devices == measurement.costs.devices
