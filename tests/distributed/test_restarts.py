"""Started again by torchrun, whose store lives on: the run goes on from its last checkpoint, also on fewer ranks."""

from __future__ import annotations

import os
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import TCPStore

from tests.helpers.ranks import RankError, run_processes
from tests.helpers.resuming import Leg, run_leg, train_leg
from tests.helpers.training import assert_same_checkpoint

pytestmark = pytest.mark.spawn


def start_below_agent(rank: int, leg: Leg, port: int, directory: str) -> Any:
    # What torchrun gives its processes, in every start alike.
    os.environ.update(TORCHELASTIC_USE_AGENT_STORE="True", MASTER_PORT=str(port), TORCHELASTIC_RUN_ID="job")
    return train_leg(rank, leg, directory)


def test_a_job_that_is_started_again_goes_on_with_the_ranks_that_are_left(tmp_path: Path) -> None:
    # Lives as long as the test, as that of an agent as long as the job; full of dead addresses after the first start.
    agent = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=timedelta(seconds=60))
    legs = [
        Leg(plan="0-1|2-3", num_ranks=2, module="dropout", kill_at=8, kill_rank=1),
        Leg(plan="0-1|2-3", num_ranks=2, module="dropout", kill_at=17, kill_rank=0),
        Leg(plan="0-3", num_ranks=1, module="dropout"),
    ]
    for leg in legs[:-1]:
        with pytest.raises(RankError):
            run_processes(leg.num_ranks, start_below_agent, leg, agent.port, str(tmp_path))
        assert (tmp_path / "last.ckpt").exists()
    states = run_processes(1, start_below_agent, legs[-1], agent.port, str(tmp_path))[0]
    reference = run_leg(Leg(plan=None, num_ranks=1, module="dropout"), tmp_path / "reference")
    assert_same_checkpoint(reference, states)
