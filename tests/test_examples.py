"""The examples run as a reader would run them, from the repository root, in a short form."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
from pathlib import Path

import pytest

from lightning_pipebd.cli import main
from tests.helpers.ranks import run_processes
from tests.helpers.scripts import ROOT, run_forked, run_script

# On a busy machine a process that has to import torch and Lightning takes half a minute for that alone.
pytestmark = [pytest.mark.spawn, pytest.mark.slow, pytest.mark.timeout(200)]

SHORT = {
    "DIGITS_EPOCHS": "1",
    "LINEAR_ATTENTION_STEPS": "4",
    "RESNET_EPOCHS": "1",
    "RESNET_IMAGES": "120",
    "OMP_NUM_THREADS": "1",
}

#: A line of the table: name, accuracy, parameters and, for students, seconds per epoch and the plan.
_LINE = re.compile(r"(teacher|student, [^%]+?) +(\d+\.\d)% +([\d,]+)(?: +\d+\.\d\ds  (\S+))?")


def _environment(cache: Path) -> dict[str, str]:
    return {**SHORT, **{f"{example}_CACHE": str(cache) for example in ("DIGITS", "LINEAR_ATTENTION", "RESNET")}}


def _run(arguments: list[str], cache: Path, num_ranks: int = 1) -> str:
    return run_script(arguments, _environment(cache), num_ranks=num_ranks)


def _compare_rows(rank: int, environment: dict[str, str]) -> str:
    os.environ.update(environment)
    # What this process was launched with is not for those that it starts.
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "NODE_RANK", "GROUP_RANK"):
        del os.environ[name]
    from examples import digits

    digits.ROWS = [row for row in digits.ROWS if row[1] == "pipebd"]
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        digits.compare()
    return output.getvalue()


def test_the_demo_starts_its_rows_as_scripts_and_ends_with_a_table(tmp_path: Path) -> None:
    (output,) = run_processes(1, _compare_rows, _environment(tmp_path), timeout=180)
    *_, header, teacher, pipebd = output.splitlines()
    assert header.split() == ["accuracy", "parameters", "epoch", "plan"]
    rows = [_LINE.fullmatch(line.rstrip()) for line in (teacher, pipebd)]
    assert [row and (row[1], row[3]) for row in rows] == [
        ("teacher", "176,194"),
        ("student, pipebd, 2 processes", "28,474"),
    ]
    # Which plan is found, depends on the machine.
    assert "|" in pipebd


def test_digits_gives_under_every_strategy_a_student_that_was_rated(tmp_path: Path) -> None:
    results = {}
    for strategy, num_ranks in (("auto", 1), ("ddp", 2), ("pipebd", 2)):
        report = tmp_path / f"{strategy}.json"
        _run(["examples/digits.py", strategy, str(num_ranks), str(report)], tmp_path, num_ranks)
        results[strategy] = json.loads(report.read_text())
    assert [result["parameters"] for result in results.values()] == [28_474] * 3
    # One image of 360, in case that the plan found divides the last block.
    assert results["auto"]["accuracy"] == pytest.approx(results["pipebd"]["accuracy"], abs=0.003)
    assert [result["plan"] for result in results.values()][:2] == ["-", "-"]


def test_the_supernet_rates_nine_candidates_and_puts_three_of_them_together(tmp_path: Path) -> None:
    text = _run(["examples/supernet_nas.py", "--epochs", "1"], tmp_path, num_ranks=2)
    assert len(re.findall(r"^stage\d +(?:plain|separable|bottleneck) +\d", text, re.MULTILINE)) == 9
    assert text.count("<-- chosen") == 3
    (size,) = re.findall(r"^student: ([\d,]+) parameters", text, re.MULTILINE)
    # The chosen candidates have 40,000 at most; the first stage and the classifier have 914 together.
    assert int(size.replace(",", "")) <= 40_914


def test_the_digits_config_trains_from_the_command_line_where_no_teacher_is_kept_yet(tmp_path: Path) -> None:
    command = ["-m", "lightning_pipebd", "fit", "--config", "examples/digits.yaml", "--trainer.devices", "2"]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    _run([*command, *limits, "--trainer.default_root_dir", str(tmp_path)], tmp_path / "cache", num_ranks=2)
    assert (tmp_path / "cache" / "digits_teacher_1_epochs.pt").exists()
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


def test_distilling_logits_gives_the_same_student_in_one_process_and_in_two(tmp_path: Path) -> None:
    one, two = (
        _run(["examples/distill_logits.py", *arguments], tmp_path, num_ranks).splitlines()[-2:]
        for num_ranks, arguments in ((1, []), (2, ["pipebd", "2"]))
    )
    assert [re.sub(r"[\d.]+%", "", line) for line in one] == [
        "teacher    38,922 parameters",
        "student    1,626 parameters",
    ]
    assert one == two


def test_byol_learns_the_same_features_in_one_process_and_in_two(tmp_path: Path) -> None:
    one, two = (
        _run(["examples/byol.py", "1", *arguments], tmp_path, num_ranks).splitlines()[-1]
        for num_ranks, arguments in ((1, []), (2, ["pipebd", "2"]))
    )
    assert re.fullmatch(r"delay 1  linear probe \d+\.\d%  loss \d\.\d+  momentum 0\.9\d+", one)
    assert one == two


def _rates(metric: str, output: str) -> list[float]:
    """Give what Lightning's table of a validation says of a metric; rich, where it is installed, draws lines."""
    return [float(number) for number in re.findall(rf"{metric}[\s│]+([\d.]+)", output)]


def test_minimal_fits_on_a_screen_and_its_student_knows_the_digits(tmp_path: Path) -> None:
    assert len((ROOT / "examples/minimal.py").read_text().splitlines()) <= 60
    output = _run(["examples/minimal.py"], tmp_path, num_ranks=2)
    (student,), (teacher,) = _rates("student accuracy", output), _rates("teacher accuracy", output)
    assert teacher > 0.85
    assert student > teacher - 0.05


def test_linear_attention_ends_with_the_losses_of_teacher_and_student(tmp_path: Path) -> None:
    *_, header, teacher, before, after = _run(["examples/linear_attention.py"], tmp_path, num_ranks=2).splitlines()
    assert header.split() == ["held-out", "files", "loss", "per", "byte", "perplexity"]
    rows = [re.fullmatch(r"(.+?) +(\d\.\d{3}) +\d+\.\d\d", line) for line in (teacher, before, after)]
    assert [row and row[1] for row in rows] == [
        "teacher, softmax attention",
        "student before, linear attention",
        "student after, linear attention",
    ]
    # Four steps teach no language: all three are about as good as guessing among 256 bytes, ln(256) = 5.5.
    assert all(row and 4 < float(row[2]) < 6 for row in rows)


def test_resnet_to_mobilenet_ends_with_accuracies_and_sizes(tmp_path: Path) -> None:
    *_, header, teacher, joined, tuned, alone = _run(
        ["examples/resnet_to_mobilenet.py"], tmp_path, num_ranks=2
    ).splitlines()
    assert header.split() == ["held-out", "digits", "accuracy", "parameters"]
    rows = [re.fullmatch(r"(.+?) +\d+\.\d% +([\d,]+)", line) for line in (teacher, joined, tuned, alone)]
    assert [row and row.groups() for row in rows] == [
        ("teacher, ResNet-18", "11,181,642"),
        ("student, its blocks joined", "2,297,698"),
        ("student after 1 more epochs", "2,297,698"),
        ("MobileNetV2, 1 epochs, no teacher", "2,236,682"),
    ]


def test_plan_by_hand_compares_plans_and_shows_the_programs_of_the_best(tmp_path: Path) -> None:
    output = _run(["examples/plan_by_hand.py", "--repeats", "1"], tmp_path)
    assert len(re.findall(r"ms +\d+% +\d+%  (?:bitwise|statistics)$", output, re.MULTILINE)) == 5
    assert re.search(r"^The fastest that keeps every bit: (straight|half cut)", output, re.MULTILINE)
    assert "exactness: bitwise" in output
    assert re.search(r"^0 +LOAD 0:64", output, re.MULTILINE)


@pytest.mark.parametrize("name", ["linear_attention", "resnet_to_mobilenet"])
def test_an_example_has_a_configuration_that_trains(name: str, tmp_path: Path) -> None:
    command = ["-m", "lightning_pipebd", "fit", "--config", f"examples/{name}.yaml", "--trainer.devices", "1"]
    limits = ["--trainer.max_steps", "2", "--trainer.limit_val_batches", "1", "--trainer.strategy.plan", "0-3"]
    _run([*command, *limits, "--trainer.default_root_dir", str(tmp_path)], tmp_path / "cache")
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*step=2.ckpt"))


@pytest.mark.parametrize(
    ("name", "plan", "words"),
    [
        ("supernet_nas", ["--plan", "0-4|5-10"], "The same student as one process, bit for bit"),
        # Which plan is found, and with how many micro-batches, depends on the machine.
        ("distill_logits", [], "student (as|of) one process"),
    ],
)
def test_an_example_trains_the_student_of_one_process(
    name: str,
    plan: list[str],
    words: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("lightning_pipebd.commands.short_fit.subprocess.run", run_forked)
    monkeypatch.chdir(ROOT)
    for variable, value in _environment(tmp_path).items():
        monkeypatch.setenv(variable, value)
    assert main(["verify", "--config", f"examples/{name}.yaml", "--steps", "3", *plan]) == 0
    assert re.search(words, capsys.readouterr().out)
