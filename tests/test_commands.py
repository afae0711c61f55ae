"""The package's own commands: each is run as a user types it, without a shell."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import LightningDataModule
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_pipebd import BlockwiseDistillationModule, Candidates
from lightning_pipebd.cli import COMMANDS, main
from lightning_pipebd.commands.compare import compare_runs
from lightning_pipebd.commands.waiting import waiting
from lightning_pipebd.trace_summary import summarise
from tests.helpers.scripts import run_forked
from tests.helpers.toy import make_loader, make_module

PLAN = {"class_path": "lightning_pipebd.PipeBDStrategy", "init_args": {"plan": "0-1|2-3"}}


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_examples_and_exit_codes(
    command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit, match="0"):
        main([command, "--help"])
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "exit codes:" in text


class TestExport:
    @pytest.fixture
    def checkpoint(self, tmp_path: Path) -> Path:
        state = {"student.fc.weight": torch.ones(2, 2), "student.steps": torch.tensor(3), "adapters.a": torch.ones(1)}
        torch.save({"state_dict": state}, tmp_path / "last.ckpt")
        return tmp_path / "last.ckpt"

    def test_the_student_alone_is_written_under_its_own_names(self, checkpoint: Path, tmp_path: Path) -> None:
        assert main(["export", str(checkpoint), str(tmp_path / "student.pt")]) == 0
        state = torch.load(tmp_path / "student.pt", weights_only=True)
        assert list(state) == ["fc.weight", "steps"]
        assert torch.equal(state["fc.weight"], torch.ones(2, 2))

    def test_floating_point_tensors_alone_are_converted(self, checkpoint: Path, tmp_path: Path) -> None:
        assert main(["export", str(checkpoint), str(tmp_path / "student.pt"), "--dtype", "bfloat16"]) == 0
        state = torch.load(tmp_path / "student.pt", weights_only=True)
        assert [value.dtype for value in state.values()] == [torch.bfloat16, torch.int64]

    def test_safetensors_hold_the_same_tensors(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        safetensors = pytest.importorskip("safetensors.torch")
        output = tmp_path / "student.safetensors"
        assert main(["export", str(checkpoint), str(output), "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == {"output": str(output), "tensors": 2, "bytes": 24}
        state = safetensors.load_file(output)
        assert torch.equal(state["fc.weight"], torch.ones(2, 2))
        assert torch.equal(state["steps"], torch.tensor(3))

    def test_one_candidate_of_every_place_is_kept_under_the_places_name(self, tmp_path: Path) -> None:
        place = Candidates([nn.Linear(2, 2), nn.Linear(2, 2, bias=False), nn.Identity()])
        student = nn.Sequential(place, nn.Linear(2, 1))
        state = {f"student.{name}": value for name, value in student.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "last.ckpt")
        command = ["export", str(tmp_path / "last.ckpt"), str(tmp_path / "student.pt"), "--overwrite"]
        for number, candidate in enumerate(place.candidates):
            assert main([*command, "--pick", f"0={number}"]) == 0
            plain = nn.Sequential(candidate, nn.Linear(2, 1))
            plain.load_state_dict(torch.load(tmp_path / "student.pt", weights_only=True))

    @pytest.mark.parametrize(
        ("picks", "problem"),
        [
            ([], "`--pick` must name one candidate of every place, but 0 is left open. Places: 0 (2 candidates)."),
            (["0=2"], "but 0=2 does not exist"),
            (["0=0", "1=0"], "but 1=0 does not exist"),
            (["0"], "`--pick` must be PLACE=NUMBER, but is '0'"),
        ],
    )
    def test_a_wrong_pick_is_refused(
        self, picks: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        student = nn.Sequential(Candidates([nn.Linear(2, 2), nn.Identity()]))
        state = {f"student.{name}": value for name, value in student.state_dict().items()}
        torch.save({"state_dict": state}, tmp_path / "last.ckpt")
        command = ["export", str(tmp_path / "last.ckpt"), str(tmp_path / "student.pt")]
        assert main([*command, *(text for pick in picks for text in ("--pick", pick))]) == 1
        assert problem in capsys.readouterr().err

    def test_an_existing_file_stays_unless_told_otherwise(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        output = tmp_path / "student.pt"
        output.write_text("precious")
        assert main(["export", str(checkpoint), str(output)]) == 1
        assert "`output` must not exist yet" in capsys.readouterr().err
        assert output.read_text() == "precious"
        assert main(["export", str(checkpoint), str(output), "--overwrite"]) == 0

    def test_a_checkpoint_without_a_student_is_refused(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        torch.save({"state_dict": {"model.weight": torch.ones(1)}}, tmp_path / "other.ckpt")
        assert main(["export", str(tmp_path / "other.ckpt"), str(tmp_path / "student.pt")]) == 1
        assert "must have entries that begin with 'student.', but has model.weight" in capsys.readouterr().err

    def test_safetensors_that_are_not_installed_are_named(
        self, checkpoint: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "safetensors.torch", None)
        assert main(["export", str(checkpoint), str(tmp_path / "student.safetensors")]) == 1
        assert "pip install safetensors" in capsys.readouterr().err


class TestCompletion:
    def test_shell_completes_commands_their_options_and_files(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        pytest.importorskip("shtab")
        assert main(["completion", "bash"]) == 0
        script = tmp_path / "pipebd"
        script.write_text(capsys.readouterr().out)
        (tmp_path / "config.yaml").write_text("")

        def complete(*words: str) -> list[str]:
            ask = f". ./pipebd; COMP_WORDS=(pipebd {' '.join(words)}); COMP_CWORD={len(words)}; _shtab_pipebd; echo"
            command = ["bash", "-c", f'{ask} "${{COMPREPLY[@]}}"']
            return subprocess.run(command, cwd=tmp_path, text=True, check=True, capture_output=True).stdout.split()

        assert complete("ver") == ["verify"]
        assert complete("verify", "--to") == ["--tolerance"]
        assert complete("fit", "--config", "conf") == ["config.yaml"]

    def test_missing_package_is_named(
        self, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setitem(sys.modules, "shtab", None)
        assert main(["completion", "zsh"]) == 1
        assert "pip install shtab" in capsys.readouterr().err


class TestWaiting:
    def test_a_terminal_sees_what_is_done_and_for_how_long(self, monkeypatch: pytest.MonkeyPatch) -> None:
        pytest.importorskip("rich")
        terminal = io.StringIO()
        terminal.isatty = lambda: True
        monkeypatch.setattr("sys.stderr", terminal)
        monkeypatch.setenv("TERM", "xterm")
        with waiting("measuring"):
            pass
        assert "measuring" in terminal.getvalue()
        assert "0:00:00" in terminal.getvalue()

    def test_a_file_gets_one_plain_line(self, capsys: pytest.CaptureFixture[str]) -> None:
        with waiting("measuring"):
            pass
        assert capsys.readouterr().err == "measuring ...\n"


def save_run(folder: Path, initial: Tensor, final: Tensor, moment: float = 0.5) -> Path:
    folder.mkdir()
    torch.save({"student.w": initial}, folder / "initial.pt")
    state = {"state": {0: {"exp_avg": torch.full((2,), moment)}}, "param_groups": []}
    torch.save({"state_dict": {"student.w": final}, "optimizer_states": [state]}, folder / "final.ckpt")
    blocks = [{"name": "stem", "parameters": ["student.w"], "buffers": [], "optimizer": [[0, 0]]}]
    (folder / "blocks.json").write_text(json.dumps(blocks))
    return folder


class TestCompareRuns:
    def test_equal_runs_are_bitwise(self, tmp_path: Path) -> None:
        runs = [save_run(tmp_path / name, torch.zeros(2), torch.ones(2)) for name in "ab"]
        (block,) = compare_runs(*runs, tolerance=0.01)
        assert (block.block, block.verdict, block.share_of_way) == ("stem", "bitwise", 0.0)

    @pytest.mark.parametrize(("off", "verdict"), [(0.005, "within"), (0.02, "differs")])
    def test_difference_is_judged_by_the_way_trained(self, off: float, verdict: str, tmp_path: Path) -> None:
        first = save_run(tmp_path / "a", torch.full((2,), 5.0), torch.full((2,), 6.0))
        second = save_run(tmp_path / "b", torch.full((2,), 5.0), torch.full((2,), 6.0 + off))
        (block,) = compare_runs(first, second, tolerance=0.01)
        assert block.verdict == verdict
        assert block.share_of_way == pytest.approx(off, rel=1e-3)

    def test_optimizer_state_alone_makes_a_difference(self, tmp_path: Path) -> None:
        first = save_run(tmp_path / "a", torch.zeros(2), torch.ones(2))
        second = save_run(tmp_path / "b", torch.zeros(2), torch.ones(2), moment=0.75)
        (block,) = compare_runs(first, second, tolerance=0.01)
        assert (block.verdict, block.optimizer) == ("within", 0.25)

    def test_runs_that_began_apart_are_refused(self, tmp_path: Path) -> None:
        runs = [
            save_run(tmp_path / name, torch.full((2,), value), torch.ones(2)) for name, value in (("a", 0), ("b", 9))
        ]
        with pytest.raises(ValueError, match="Both runs must begin with the same weights"):
            compare_runs(*runs, tolerance=0.01)


def write_configuration(folder: Path, **trainer: Any) -> str:
    content = {
        "seed_everything": 1,
        "trainer": {"accelerator": "cpu", "devices": 2, "max_epochs": 50, "strategy": PLAN, **trainer},
        "model": {"class_path": "tests.test_cli.CliModule"},
        "data": {"class_path": "tests.test_cli.CliData"},
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(content))
    return str(path)


def make_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))


def make_slim_classifier() -> nn.Module:
    return nn.Sequential(nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def make_convolutions(width: int = 3) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, width, 2, stride=2), nn.Conv2d(width, 1, 2, stride=2))


def make_slim_convolutions() -> nn.Module:
    return make_convolutions(width=2)


class SlimModule(BlockwiseDistillationModule):
    def __init__(self) -> None:
        adapters, input_adapters = {"1": nn.Linear(3, 4)}, {"2": nn.Linear(4, 3)}
        maps: dict[str, Any] = {"adapters": adapters, "input_adapters": input_adapters}
        super().__init__(make_classifier(), make_slim_classifier(), {"1": "1", "2": "2"}, **maps)
        self.example_input_array = torch.zeros(2, 4)


def make_text() -> str:
    return "no model"


class SmallData(LightningDataModule):
    def val_dataloader(self) -> DataLoader[Any]:
        module = make_module("candidates")
        return make_loader(module, 8, 4)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # between Lightning and jsonargparse
class TestRate:
    @pytest.fixture
    def command(self, tmp_path: Path) -> list[str]:
        content = {
            "seed_everything": 1,
            "trainer": {"accelerator": "cpu", "logger": False},
            "model": {"class_path": "tests.helpers.toy.CandidatesModule"},
            "data": {"class_path": "tests.test_commands.SmallData"},
        }
        (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
        torch.save({"state_dict": make_module("candidates").state_dict()}, tmp_path / "last.ckpt")
        return ["rate", "--config", str(tmp_path / "config.yaml"), "--checkpoint", str(tmp_path / "last.ckpt")]

    def test_the_best_candidate_of_every_place_is_chosen(
        self, command: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*command, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        for place in ("features.1", "features.2"):
            losses = [score["loss"] for score in found["candidates"] if score["place"] == place]
            assert losses[found["chosen"][place]] == min(losses)

    def test_parameters_are_limited_and_the_export_is_spelled_out(
        self, command: list[str], capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main([*command, "--max-parameters", "300"]) == 0
        text = capsys.readouterr().out
        assert "--pick features.1=2 --pick features.2=1" in text
        assert main([*command, "--max-parameters", "10"]) == 1
        assert "`max_size` must leave room for the smallest candidates" in capsys.readouterr().err

    def test_a_student_without_candidates_is_refused(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = write_configuration(tmp_path)
        assert main(["rate", "--config", config, "--checkpoint", "last.ckpt"]) == 1
        assert "must have a place with candidates" in capsys.readouterr().err


class TestCheck:
    def test_blocks_are_listed_with_shapes_and_parameters(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        assert main(["check", "--config", write_configuration(tmp_path), "--json"]) == 0
        blocks = json.loads(capsys.readouterr().out)["blocks"]
        assert [block["block"] for block in blocks] == ["0", "1", "2", "3"]
        assert [block["boundary per row"] for block in blocks] == ["6", "6", "6", "5"]
        assert [block["student parameters"] for block in blocks] == [42, 42, 42, 35]

    def test_adapters_are_counted_apart_from_the_student(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        content = {"trainer": {"accelerator": "cpu"}, "model": {"class_path": "tests.test_commands.SlimModule"}}
        (tmp_path / "slim.yaml").write_text(yaml.safe_dump(content))
        assert main(["check", "--config", str(tmp_path / "slim.yaml"), "--json"]) == 0
        blocks = json.loads(capsys.readouterr().out)["blocks"]
        assert [block["student parameters"] for block in blocks] == [15, 8]
        assert [block["adapter parameters"] for block in blocks] == [16, 15]
        assert [block["share"] for block in blocks] == ["75%", "80%"]

    def test_a_wrong_plan_is_a_problem(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        config = write_configuration(tmp_path)
        assert main(["check", "--config", config, "--", "--trainer.strategy.plan", "0|1"]) == 1
        assert "Problem: `plan` must name every block from 0 to 3" in capsys.readouterr().err

    def test_a_block_map_is_suggested_as_yaml(self, capsys: pytest.CaptureFixture[str]) -> None:
        models = [
            "--teacher",
            "tests.test_commands.make_classifier",
            "--student",
            "tests.test_commands.make_classifier",
        ]
        assert main(["check", *models, "--input", "1,4"]) == 0
        assert yaml.safe_load(capsys.readouterr().out) == {"block_map": {1: 1, 2: 2}}

    def test_a_suggestion_names_both_adapters_where_widths_differ(self, capsys: pytest.CaptureFixture[str]) -> None:
        here = "tests.test_commands"
        models = [f"--teacher={here}.make_convolutions", f"--student={here}.make_slim_convolutions"]
        assert main(["check", *models, "--input", "1,1,8,8"]) == 0
        *_, first, last = capsys.readouterr().out.splitlines()
        assert first.endswith("# 2x4x4 -> needs an adapter to 3x4x4, and the next block an input adapter back")
        assert last.endswith("# 1x2x2")

    @pytest.mark.parametrize(
        ("student", "problem"),
        [
            ("tests.test_commands.make_text", "`--student` must make a torch.nn.Module, but"),
            ("tests.test_commands.make_nothing", "has no attribute 'make_nothing'"),
            ("tests.nowhere.make", "No module named 'tests.nowhere'"),
        ],
    )
    def test_what_makes_no_model_is_a_problem(
        self, student: str, problem: str, capsys: pytest.CaptureFixture[str]
    ) -> None:
        models = ["--teacher", "tests.test_commands.make_classifier", "--student", student]
        assert main(["check", *models, "--input", "1,4"]) == 1
        assert problem in capsys.readouterr().err

    def test_neither_a_configuration_nor_models_is_a_usage_error(self, capsys: pytest.CaptureFixture[str]) -> None:
        with pytest.raises(SystemExit, match="2"):
            main(["check"])
        assert "give --config, or --teacher, --student and --input" in capsys.readouterr().err


def span(rank: int, step: int, name: str, start_ms: float, duration_ms: float) -> dict[str, Any]:
    event = {"ph": "X", "name": name, "cat": name.split()[0], "pid": rank, "args": {"step": step}}
    return {**event, "ts": start_ms * 1000, "dur": duration_ms * 1000}


class TestTrace:
    def test_time_per_step_and_rank_is_summed_up(self) -> None:
        first = [span(0, step, "TEACH block=0 rows=0:8", 10 * step, 4) for step in (3, 4, 5)]
        second = [span(1, step, "LEARN block=1 rows=0:8", 12 * step, 9) for step in (3, 4, 5)]
        summary = summarise({"traceEvents": [{"ph": "M"}, *first, *second]})
        assert (summary["steps"], summary["slowest_block"]) == (3, 1)
        assert summary["step_time_ms"] == pytest.approx(12)
        assert summary["ranks"][0]["teach"] == pytest.approx(4)
        assert summary["ranks"][1]["learn"] == pytest.approx(9)
        assert summary["ranks"][1]["teach"] == 0
        assert [rank["utilisation"] for rank in summary["ranks"]] == pytest.approx([4 / 12, 9 / 12])
        assert summary["bubble_fraction"] == pytest.approx(1 - 13 / 24)

    @pytest.mark.spawn
    def test_all_ranks_are_recorded_and_the_run_is_reported(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_pipebd.commands.short_fit.subprocess.run", run_forked)
        output, report = tmp_path / "timeline.json", tmp_path / "run.md"
        command = ["trace", "--config", write_configuration(tmp_path), "--steps", "9", "--output", str(output)]
        assert main([*command, "--report", str(report)]) == 0
        text = capsys.readouterr().out
        assert "over 3 steps" in text
        assert "rank 1" in text
        names = {
            (event["pid"], event["cat"]) for event in json.loads(output.read_text())["traceEvents"] if "cat" in event
        }
        assert "| plan | 0-1\\|2-3 |" in report.read_text()
        assert {(0, "LOAD"), (0, "SEND"), (0, "LEARN"), (1, "RECV"), (1, "TEACH"), (1, "UPDATE")} <= names


@pytest.mark.spawn
class TestVerify:
    def test_the_plan_of_the_configuration_is_judged_and_nothing_is_left_behind(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("lightning_pipebd.commands.short_fit.subprocess.run", run_forked)
        config = write_configuration(tmp_path, default_root_dir=str(tmp_path / "logs"))
        assert main(["verify", "--config", config, "--steps", "7"]) == 0
        text = capsys.readouterr().out
        assert text.count("bitwise") == 4
        assert "The same student as one process, bit for bit, after 7 steps with 2 ranks." in text
        assert sorted(path.name for path in tmp_path.iterdir()) == ["config.yaml"]

    def test_a_run_that_fails_is_shown(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PYTHONPATH", os.getcwd())
        plan = {"class_path": "PipeBDStrategy", "init_args": {"plan": "0|1|2-3"}}
        config = write_configuration(tmp_path, strategy=plan)
        assert main(["verify", "--config", config, "--steps", "2"]) == 2
        text = capsys.readouterr().err
        # One process, which goes before, has nothing to do with the plan.
        assert "The run with 2 ranks failed" in text
        assert "must be for the 2 ranks of this run, but is for 3" in text
