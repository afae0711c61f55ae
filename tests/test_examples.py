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
    environment = {**os.environ, "DIGITS_EPOCHS": "1", "DIGITS_CACHE": str(cache), "OMP_NUM_THREADS": "1"}
    finished = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=180
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
