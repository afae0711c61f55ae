"""The command behind the fault table, a few of its trials."""

from __future__ import annotations

import pytest

from faults.matrix import FAULTS, Trial, format_matrix, try_fault
from faults.rounds import format_rounds, try_rounds

pytestmark = [pytest.mark.spawn, pytest.mark.slow]


@pytest.mark.parametrize("fault", ["a rank is killed (SIGKILL)", "a loss is not a number"])
def test_a_fault_ends_all_ranks_and_leaves_the_checkpoints(fault: str) -> None:
    trial = try_fault(fault, 2)
    assert trial.is_as_promised, trial


def test_killed_and_resumed_runs_end_with_the_bits_of_one_process() -> None:
    assert try_rounds(2, seed=5) == []


def test_the_table_counts_what_was_not_as_promised() -> None:
    fault = next(iter(FAULTS))
    good, bad = Trial(fault, 2, 1.25, (1,), 10, 0), Trial(fault, 2, 3.0, (0,), 5, 1)
    row = format_matrix([good, bad]).splitlines()[-1]
    assert row == f"| {fault} | 2 | 2 | 1 | 2.1 s, 3.0 s | 0, 1 | 7 steps, 1 files |"
    assert "Of 3 rounds" in format_rounds(3, ["round 1"])
    assert format_rounds(3, ["round 1"]).endswith("- round 1")
