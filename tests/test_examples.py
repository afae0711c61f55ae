"""The examples run as a reader would run them: in processes of their own, from the repository root."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Eight processes import torch and Lightning one after another: on a busy machine that alone takes a minute.
pytestmark = [pytest.mark.spawn, pytest.mark.slow, pytest.mark.timeout(200)]

ROOT = Path(__file__).parent.parent

#: A line of the table: name, accuracy, parameters and, for students, seconds per epoch and the plan.
_LINE = re.compile(r"(teacher|student, [^%]+?) +(\d+\.\d)% +([\d,]+)(?: +\d+\.\d\ds  (\S+))?")


def _run(arguments: list[str], cache: Path) -> str:
    short = {
        "DIGITS_EPOCHS": "1",
        "LINEAR_ATTENTION_STEPS": "4",
        "RESNET_EPOCHS": "1",
        "RESNET_IMAGES": "200",
        "OMP_NUM_THREADS": "1",
    }
    caches = {f"{example}_CACHE": str(cache) for example in ("DIGITS", "LINEAR_ATTENTION", "RESNET")}
    finished = subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, **short, **caches},
        capture_output=True,
        text=True,
        timeout=180,
    )
    assert finished.returncode == 0, finished.stdout + finished.stderr
    return finished.stdout


def test_digits_ends_with_a_table_in_which_pipebd_is_as_accurate_as_one_process(tmp_path: Path) -> None:
    *_, header, teacher, one, ddp, pipebd = _run(["examples/digits.py"], tmp_path).splitlines()
    assert header.split() == ["accuracy", "parameters", "epoch", "plan"]
    rows = [_LINE.fullmatch(line.rstrip()) for line in (teacher, one, ddp, pipebd)]
    assert [row and (row[1], row[3], row[4]) for row in rows] == [
        ("teacher", "176,194", None),
        ("student, one process", "28,474", "-"),
        ("student, Lightning DDP, 2 processes", "28,474", "-"),
        ("student, pipebd, 2 processes", "28,474", "0-1|2-4"),
    ]
    assert rows[1]
    assert rows[3]
    assert rows[1][2] == rows[3][2]


def test_the_supernet_rates_nine_candidates_and_puts_three_of_them_together(tmp_path: Path) -> None:
    text = _run(["examples/supernet_nas.py", "--epochs", "1"], tmp_path)
    assert len(re.findall(r"^stage\d +(?:plain|separable|bottleneck) +\d", text, re.MULTILINE)) == 9
    assert text.count("<-- chosen") == 3
    (size,) = re.findall(r"^student: ([\d,]+) parameters", text, re.MULTILINE)
    # The chosen candidates have 40,000 at most; the first stage and the classifier have 914 together.
    assert int(size.replace(",", "")) <= 40_914


def test_the_digits_config_trains_from_the_command_line_where_no_teacher_is_kept_yet(tmp_path: Path) -> None:
    command = ["-m", "lightning_pipebd", "fit", "--config", "examples/digits.yaml", "--trainer.devices", "2"]
    limits = ["--trainer.max_epochs", "1", "--trainer.limit_train_batches", "2"]
    _run([*command, *limits, "--trainer.default_root_dir", str(tmp_path)], tmp_path / "cache")
    assert (tmp_path / "cache" / "digits_teacher_1_epochs.pt").exists()
    assert list(tmp_path.glob("lightning_logs/version_0/checkpoints/*.ckpt"))


def test_distilling_logits_gives_the_same_student_in_one_process_and_in_two(tmp_path: Path) -> None:
    one, two = (
        _run(["examples/distill_logits.py", *arguments], tmp_path).splitlines()[-2:]
        for arguments in ([], ["pipebd", "2"])
    )
    assert [re.sub(r"[\d.]+%", "", line) for line in one] == [
        "teacher    38,922 parameters",
        "student    1,626 parameters",
    ]
    assert one == two


def test_byol_learns_the_same_features_in_one_process_and_in_two(tmp_path: Path) -> None:
    one, two = (
        _run(["examples/byol.py", "1", *arguments], tmp_path).splitlines()[-1] for arguments in ([], ["pipebd", "2"])
    )
    assert re.fullmatch(r"delay 1  linear probe \d+\.\d%  loss \d\.\d+  momentum 0\.9\d+", one)
    assert one == two


def _rates(metric: str, output: str) -> list[float]:
    """Give what Lightning's table of a validation says of a metric; rich, where it is installed, draws lines."""
    return [float(number) for number in re.findall(rf"{metric}[\s│]+([\d.]+)", output)]


def test_minimal_fits_on_a_screen_and_its_student_knows_the_digits(tmp_path: Path) -> None:
    assert len((ROOT / "examples/minimal.py").read_text().splitlines()) <= 60
    output = _run(["examples/minimal.py"], tmp_path)
    (student,), (teacher,) = _rates("student accuracy", output), _rates("teacher accuracy", output)
    assert teacher > 0.85
    assert student > teacher - 0.05


def test_linear_attention_ends_with_the_losses_of_teacher_and_student(tmp_path: Path) -> None:
    *_, header, teacher, before, after = _run(["examples/linear_attention.py"], tmp_path).splitlines()
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
    *_, header, teacher, joined, tuned, alone = _run(["examples/resnet_to_mobilenet.py"], tmp_path).splitlines()
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
