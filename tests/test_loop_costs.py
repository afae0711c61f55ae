"""What Lightning's loop takes is measured without leaving a trace."""

from __future__ import annotations

import logging
import random
import signal

import torch
from lightning.pytorch.utilities import rank_zero_only

from lightning_pipebd.loop_costs import measure_loop


def test_a_step_of_the_loop_takes_some_time_and_nothing_has_changed_afterwards() -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = (logger.level, signal.getsignal(signal.SIGTERM), rank_zero_only.rank, random.getstate())
    generator = torch.get_rng_state()
    with torch.no_grad():
        assert 0 < measure_loop() < 1000
        assert not torch.is_grad_enabled()
    assert before == (logger.level, signal.getsignal(signal.SIGTERM), rank_zero_only.rank, random.getstate())
    assert torch.equal(generator, torch.get_rng_state())
