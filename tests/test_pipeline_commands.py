"""`pipebd plan` and `pipebd simulate` with the costs of a whole student, run as a user types them, without a shell."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from lightning_pipebd.cli import main
from lightning_pipebd.cost_tables import save_measurement
from lightning_pipebd.planning.cluster import Cluster
from lightning_pipebd.planning.measurement import Measurement
from lightning_pipebd.planning.pipeline_judge import PipelineCandidate, PipelineJudge
from lightning_pipebd.planning.pipeline_outlook import PipelineOutlook
from lightning_pipebd.planning.pipeline_plan import PipelinePlan
from lightning_pipebd.planning.pipeline_schedule import Schedule
from tests.planning.cost_tables import constant_costs
from tests.planning.test_pipeline_drift import measurement

COSTS = replace(
    measurement(),
    student=[replace(own, parameter_bytes=100, output_bytes_per_row=1000) for own in measurement().student],
    one_replica_reason="",
)


@pytest.fixture
def costs(tmp_path: Path) -> str:
    save_measurement(COSTS, tmp_path / "costs.yaml")
    return str(tmp_path / "costs.yaml")


def run_json(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_the_best_plan_is_found_for_devices_that_one_does_not_have(
    costs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    plan = tmp_path / "plan.yaml"
    found = run_json(capsys, "simulate", "--costs", costs, "--devices", "8", "--save", str(plan))
    expected = PipelineOutlook.find(COSTS, Cluster.uniform(8))
    assert found == json.loads(json.dumps(expected.to_dict()))
    assert PipelinePlan.from_dict(yaml.safe_load(plan.read_text())) == expected.plan
    again = run_json(capsys, "simulate", "--costs", costs, "--devices", "8", "--plan", str(plan))
    assert again["plan"] == found["plan"]


@pytest.mark.parametrize(
    ("options", "number", "schedule"),
    [
        ([], 8, Schedule.ONE_FORWARD_ONE_BACKWARD),
        (["--exactness", "bitwise"], 1, Schedule.ONE_FORWARD_ONE_BACKWARD),
        (["--num-micro-batches", "2", "--schedule", "gpipe"], 2, Schedule.GPIPE),
        (["--num-micro-batches", "4", "--split-backward"], 4, Schedule.ONE_FORWARD_ONE_BACKWARD),
    ],
)
def test_a_given_plan_is_simulated_as_the_strategy_would_run_it(
    options: list[str], number: int, schedule: Schedule, costs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "simulate", "--costs", costs, "--devices", "2", "--plan", "0-1|2-3", *options)
    way = PipelineCandidate(PipelinePlan.parse("0-1|2-3"), number, schedule)
    judge = PipelineJudge(COSTS, Cluster.uniform(2), splits_backward="--split-backward" in options)
    assert (found["text"], found["num_micro_batches"], found["schedule"]) == ("0-1|2-3", number, str(schedule))
    assert found["step_time_ms"] == judge.judge(way).step_time_ms
    assert found["bound_ms"] is None


def test_replicas_are_simulated_unless_all_rows_must_be_on_one_rank(
    costs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = run_json(capsys, "simulate", "--costs", costs, "--devices", "4", "--plan", "2 x 0-1|2-3")
    assert (found["text"], found["num_micro_batches"], found["exactness"]) == ("2 x 0-1|2-3", 8, "summation")
    save_measurement(measurement(), tmp_path / "one.yaml")
    assert main(["simulate", "--costs", str(tmp_path / "one.yaml"), "--devices", "2", "--plan", "2 x 0-3"]) == 1
    assert "must have one replica, because the test says so, but 2 x 0-3 has 2" in capsys.readouterr().err


def test_replicas_of_a_loss_of_the_full_batch_are_simulated(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    save_measurement(replace(COSTS, is_full_batch=True), tmp_path / "full.yaml")
    arguments = ["simulate", "--costs", str(tmp_path / "full.yaml"), "--devices", "2", "--plan", "2 x 0-3"]
    quick, slow = (
        run_json(capsys, *arguments, "--link-bytes-per-ms", speed)["step_time_ms"] for speed in ("1e9", "1e3")
    )
    # At the last block a row has 1000 bytes: those of four rows go to the loss, and their gradients come back.
    assert slow - quick == pytest.approx(8, abs=1e-3)
    assert main(arguments) == 0
    assert "rank 0 has the loss of all rows" in capsys.readouterr().out


def test_links_and_rows_that_one_does_not_have(costs: str, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["simulate", "--costs", costs, "--devices", "2", "--plan", "0-1|2-3", "--num-micro-batches", "2"]
    plain = run_json(capsys, *arguments)["step_time_ms"]
    # Eight rows of 1000 bytes go over and their gradients come back, in turn.
    assert run_json(capsys, *arguments, "--link-bytes-per-ms", "100")["step_time_ms"] > plain + 80
    assert run_json(capsys, *arguments, "--rows", "16")["step_time_ms"] > 1.5 * plain


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--plan", "0|1-2"], "must cover the teacher's 4 blocks, but covers 3"),
        (["--plan", "0|1|2-3"], "must be for the 2 ranks of this run, but is for 3"),
        (["--plan", "joint"], "has the token 'joint'"),
        (["--plan", "nowhere.yaml"], "must name a readable YAML file"),
        (["--plan", "0-1|2-3", "--exactness", "bitwise", "--num-micro-batches", "2"], "2 micro-batches make it"),
        (["--plan", "2 x 0-3", "--exactness", "bitwise"], "2 replicas make it summation"),
        (["--exactness", "bitwise", "--num-micro-batches", "2"], "must keep the student bitwise"),
        (["--plan", "0-1|2-3", "--memory", "10B"], "must fit the memory of every rank"),
        (["--teach-ahead"], "`--teach-ahead` must be left out for a whole student"),
        (["--memory", "10B"], "which need least of what was tried"),
        (["--num-micro-batches", "0"], "`num_micro_batches` must be at least 1"),
        (["--rows", "0"], "`num_rows` must be at least 1"),
        (["--devices", "0"], "`--devices` must be at least 1"),
    ],
)
def test_what_cannot_be_is_refused_in_words(
    arguments: list[str], message: str, costs: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["simulate", "--costs", costs, "--devices", "2", *arguments]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("option", [["--num-micro-batches", "2"], ["--schedule", "gpipe"], ["--split-backward"]])
@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_micro_batches_of_separate_blocks_are_refused(
    command: str, option: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_measurement(Measurement(costs=constant_costs([(1, 3)] * 2), num_rows=8), tmp_path / "blocks.yaml")
    assert main([command, "--costs", str(tmp_path / "blocks.yaml"), "--devices", "2", *option]) == 1
    assert f"`{option[0]}` must be left out for blocks that learn by themselves" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["plan", "simulate"])
def test_the_timeline_is_drawn(command: str, costs: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    picture = tmp_path / "timeline.svg"
    assert main([command, "--costs", costs, "--devices", "2", "--plot", str(picture), "--split-backward"]) == 0
    text = picture.read_text()
    assert "rank 1" in text
    assert {kind for kind in ("TEACH", "FORWARD", "BACKWARD_INPUT", "LEARN") if f"<!-- {kind} -->" in text} == {
        *("TEACH", "FORWARD", "BACKWARD_INPUT")
    }
