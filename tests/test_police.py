"""The fixtures of `conftest.py` catch what a test leaves behind, and the next test does not see it."""

from __future__ import annotations

import pytest

IMPORTS = "import os, threading, torch, torch.distributed as dist\n"

#: What a test does, what it is told, and what the next test finds.
LEAKS = {
    "environment": (
        "os.environ['STRAY'] = '1'",
        "left environment variables changed: ['STRAY']",
        "'STRAY' not in os.environ",
    ),
    "process group": (
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)",
        "left a process group open",
        "not dist.is_initialized()",
    ),
    "default dtype": (
        "torch.set_default_dtype(torch.float64)",
        "left torch with default dtype",
        "torch.get_default_dtype() == torch.float32",
    ),
    "torch threads": (
        "torch.set_num_threads(2)",
        "left torch with default dtype, threads",
        "torch.get_num_threads() == 1",
    ),
    "grad mode": (
        "torch.set_grad_enabled(False)",
        "left torch with default dtype, threads and grad mode",
        "torch.is_grad_enabled()",
    ),
}


@pytest.mark.parametrize(("leak", "report", "check"), LEAKS.values(), ids=LEAKS.keys())
def test_leak_is_reported_and_put_back(leak: str, report: str, check: str, pytester: pytest.Pytester) -> None:
    pytester.makepyfile(f"{IMPORTS}def test_leaks():\n    {leak}\ndef test_next():\n    assert {check}")
    result = pytester.runpytest_inprocess("-p", "tests.conftest")
    result.assert_outcomes(passed=2, errors=1)
    assert report in result.stdout.str()


def test_running_thread_is_reported_by_name(pytester: pytest.Pytester, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.conftest._THREAD_END_S", 0.1)
    pytester.makepyfile(f"""{IMPORTS}
end = threading.Event()
def test_leaks():
    threading.Thread(target=end.wait, name="stray").start()
def test_next():
    end.set()""")
    result = pytester.runpytest_inprocess("-p", "tests.conftest")
    result.assert_outcomes(passed=2, errors=1)
    assert "left threads running: ['stray']" in result.stdout.str()


def test_same_numbers_are_drawn_in_every_test(pytester: pytest.Pytester) -> None:
    pytester.makepyfile("""
import random, numpy, torch
drawn = set()
def test_first():
    drawn.add((random.random(), numpy.random.rand(), torch.rand(1).item()))
def test_second():
    test_first()
    assert len(drawn) == 1""")
    pytester.runpytest_inprocess("-p", "tests.conftest").assert_outcomes(passed=2)


def test_determinism_set_by_a_trainer_is_put_back(pytester: pytest.Pytester) -> None:
    pytester.makepyfile(f"""{IMPORTS}
def test_sets():
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = True
def test_next():
    assert not torch.are_deterministic_algorithms_enabled()
    assert not torch.backends.cudnn.benchmark""")
    pytester.runpytest_inprocess("-p", "tests.conftest").assert_outcomes(passed=2)
