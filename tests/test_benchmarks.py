"""Benchmarks run in their smallest form: what they print is of no use, but they print it."""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib
import io
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.baselines.main import main as baselines
from benchmarks.baselines.variants import VARIANTS, Chores
from benchmarks.emulated.cost_tables import TABLES, scaled, work_bound_ms
from benchmarks.emulated.main import main as emulated
from benchmarks.end_to_end.main import foresee
from benchmarks.gpu.main import VARIANTS as GPU_VARIANTS
from benchmarks.gpu.main import Clock, Contender, Turn, measure, with_one_teacher
from benchmarks.gpu.main import main as gpu_main
from benchmarks.gpu.models import SMALL_MODELS
from benchmarks.shared.ranks import run_side_by_side
from benchmarks.shared.tables import Spread, interleave, markdown_table, ratios
from tests.helpers.scripts import run_script

ROOT = Path(__file__).parent.parent
MAINS = sorted(ROOT.glob("benchmarks/*/main.py"))


@pytest.fixture(scope="module")
def printed() -> str:
    output = io.StringIO()
    with contextlib.redirect_stdout(output), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Lightning's advice on loaders and loggers
        baselines(["--models", "tiny", "--repeats", "1", "--steps", "1"])
        emulated(["--ranks", "2", "--tables", "Pipe-BD", "--repeats", "1", "--steps", "1", "--work-ms", "20"])
    # Which opens a process group of its own.
    words = "-m benchmarks.gpu.main --device cpu --small --models vgg --steps 1 --warm-up 1 --repeats 1"
    return output.getvalue() + run_script(words.split(), {})


@pytest.mark.parametrize("path", MAINS, ids=[path.parent.name for path in MAINS])
def test_every_benchmark_can_be_imported_and_says_what_it_is(path: Path) -> None:
    module = importlib.import_module(f"benchmarks.{path.parent.name}.main")
    assert f"benchmarks.{path.parent.name}.main" in module.__doc__ or f"{path.parent.name}/main.py" in module.__doc__


@pytest.mark.parametrize("num_ranks", [4, 8])
def test_what_the_end_to_end_benchmark_claims_is_foreseen(num_ranks: int) -> None:
    ours, first = (foresee(variant, num_ranks, ratio=2.0, per_rank=2) for variant in ("1f1b", "teacher-first"))
    assert ours.utilisation >= 0.98
    assert first.step_time_ms / ours.step_time_ms >= 1.29


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_baselines_print_a_line_for_every_variant(printed: str) -> None:
    lines = [line for line in printed.splitlines() if line.startswith("| ")]
    for name in VARIANTS:
        cells = next(line for line in lines if line.startswith(f"| {name} |")).split(" | ")
        assert float(cells[1].split()[0]) > 0


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_one_device_prints_its_name_and_a_line_for_every_variant_that_a_cpu_can_show(printed: str) -> None:
    assert re.search(r"^Device: .+ \(cpu\); torch ", printed, re.MULTILINE)
    assert "failed: " not in printed
    tables = printed.partition("Device: ")[2]
    for name, variant in GPU_VARIANTS.items():
        lines = [line.split(" | ") for line in tables.splitlines() if line.startswith(f"| {name} |")]
        assert len(lines) == (0 if variant.needs_gpu else 1)
        assert all(float(cells[2]) > 0 and float(cells[5].rstrip("% |")) > 0 for cells in lines)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_told_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        gpu_main(["--device", "cuda"])
    assert "Choose `--device cpu --small`" in capsys.readouterr().err


def test_a_variant_that_fails_leaves_the_others_their_figures(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = argparse.Namespace(device="cpu", warm_up=1, steps=1, repeats=2, small=True)
    broken = dataclasses.replace(GPU_VARIANTS["plain PyTorch"], options={"on_nonfinite": "raise"})
    monkeypatch.setitem(GPU_VARIANTS, "broken", broken)
    train = Contender.train

    def train_or_fail(self: Contender, *args: Any) -> Turn:
        if self.variant is broken:
            raise RuntimeError("no such\nkernel")
        return train(self, *args)

    monkeypatch.setattr(Contender, "train", train_or_fail)
    table = measure(SMALL_MODELS["vgg"](), ["broken", "plain PyTorch"], settings)
    assert "* broken failed: no such kernel" in table
    assert "| plain PyTorch | " in table


def test_pairs_with_one_teacher_have_the_students_that_they_would_have() -> None:
    workload = SMALL_MODELS["vgg"]()
    shared = with_one_teacher(workload)
    torch.manual_seed(0)
    teacher, _ = shared.models()
    for models in (workload.models, shared.models):
        torch.manual_seed(0)
        own_teacher, student = models()
        states = [model.state_dict() for model in (own_teacher, student)]
        if models is workload.models:
            expected = states
    assert own_teacher is teacher
    for own, other in zip(states, expected, strict=True):
        assert all(torch.equal(value, other[name]) for name, value in own.items())


def test_memory_that_others_keep_is_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, stand_in in (
        ("memory_allocated", lambda _: 100),
        ("max_memory_allocated", lambda _: 350),
        ("reset_peak_memory_stats", lambda _: None),
        ("synchronize", lambda _: None),
    ):
        monkeypatch.setattr(torch.cuda, name, stand_in)
    clock = Clock(torch.device("cuda", 0), num_skipped=1, num_measured=2)
    for _ in range(3):
        clock.note()
    assert clock.turn is not None
    assert clock.turn.peak_bytes == 250


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_emulated_ranks_print_a_line_for_every_family(printed: str) -> None:
    lines = [line.split(" | ") for line in printed.splitlines() if line.startswith("| 2 ranks")]
    assert any("automatic" in line[1] for line in lines)
    for line in lines:
        assert float(line[3].split()[0]) > 0
    assert {"joint", "straight"} <= {line[1] for line in lines} | {line[1].strip("*").split(": ")[-1] for line in lines}


@pytest.mark.spawn
@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_process_that_fails_ends_the_benchmark_with_what_it_printed() -> None:
    with pytest.raises(RuntimeError, match=r"A process failed \(1\)\.\n(.*\n)*ZeroDivisionError"):
        run_side_by_side(divmod, [(1, 1), (1, 0)])


def test_blocks_are_packed_so_that_the_slower_process_is_as_fast_as_possible() -> None:
    chores = Chores(teach_ms=(1.0, 1.0, 1.0), learn_ms=(1.0, 2.0, 5.0), load_ms=0.5)
    # Alone the blocks take 2.5, 4.5 and 8.5 ms.
    assert chores.pack(chores.in_turn_ms) == ((0, 1), (2,))
    assert [chores.in_turn_ms(blocks) for blocks in ((0, 1), (2,))] == [7.0, 8.5]
    assert chores.task_ms((0, 1)) == 5.5
    assert chores.cut == 2


def test_a_table_is_scaled_to_the_work_of_a_step() -> None:
    for table in TABLES.values():
        assert work_bound_ms(scaled(table, 8, 300.0), 8) == pytest.approx(300.0)


def test_rounds_are_interleaved_and_ratios_are_taken_within_a_round() -> None:
    order: list[str] = []
    found = interleave("ab", 3, lambda name: order.append(name) or len(order))
    assert order == ["a", "b", "b", "a", "a", "b"]
    assert found == {"a": [1, 4, 5], "b": [2, 3, 6]}
    assert ratios([8.0, 3.0, 9.0], [2.0, 1.0, 9.0]) == Spread(3.0, 1.0, 4.0)


def test_a_bar_does_not_end_a_cell_of_a_table() -> None:
    assert markdown_table(["plan"], [["0|1"]]).splitlines()[2] == "| 0\\|1 |"
