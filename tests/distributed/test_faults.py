"""The command behind the fault table, a few of its trials."""

from __future__ import annotations

import pytest

from faults.elastic import Restart, format_restarts
from faults.matrix import FAULTS, Trial, format_matrix, try_fault
from faults.rounds import format_rounds, try_rounds

pytestmark = [pytest.mark.spawn, pytest.mark.slow]


@pytest.mark.parametrize(
    "fault",
    ["a rank is told to end (SIGTERM)", "a rank has fewer batches", "killed while it saves", "the disk is full"],
)
def test_a_fault_ends_all_ranks_and_leaves_the_checkpoints(fault: str) -> None:
    trial = try_fault(fault, 2)
    assert trial is not None
    assert trial.is_as_promised, trial


def test_killed_and_resumed_runs_end_with_the_bits_of_one_process() -> None:
    assert try_rounds(2, seed=5) == []


def test_the_table_counts_what_was_not_as_promised() -> None:
    fault = next(iter(FAULTS))
    good, bad = Trial(fault, 2, 1.25, (1,), 10, 0), Trial(fault, 2, 3.0, (0,), 5, 1)
    table = format_matrix([good, bad])
    assert "Nothing was left" in table
    row = table.splitlines()[-1]
    assert row == f"| {fault} | 2 | 2 | 1 | 2.1 s, 3.0 s | 0, 1 | 7 steps, 1 files |"
    left = good._replace(left=("process 7 (python)",))
    assert good.is_as_promised
    assert not left.is_as_promised
    assert f"Left by {fault}: process 7 (python)." in format_matrix([left])
    assert format_restarts([Restart("job", [(2, 0), (1, 3)], True, False)]).endswith(
        "| job | 2 at 0, 1 at 3 | yes | NO |\n"
    )
    assert "Of 3 rounds" in format_rounds(3, ["round 1"])
    assert format_rounds(3, ["round 1"]).endswith("- round 1")
