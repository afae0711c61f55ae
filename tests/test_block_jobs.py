from __future__ import annotations

from contextlib import nullcontext

import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision

from lightning_pipebd.block_jobs import BlockJobs, step_context
from lightning_pipebd.module import BlockwiseDistillationModule


def test_a_step_in_float32_needs_no_context() -> None:
    assert step_context(Precision()) is nullcontext


def test_other_precisions_have_their_own_context() -> None:
    with step_context(MixedPrecision("bf16-mixed", "cpu"))():
        assert torch.is_autocast_enabled("cpu")
    with step_context(HalfPrecision("bf16-true"))():
        assert torch.get_default_dtype() == torch.bfloat16
    with step_context(DoublePrecision())():
        assert torch.get_default_dtype() == torch.float64
    assert torch.get_default_dtype() == torch.float32


def test_blocks_that_must_not_share_a_backward_pass_are_settled_one_by_one() -> None:
    jobs = BlockJobs(BlockwiseDistillationModule.__new__(BlockwiseDistillationModule), Precision())
    assert not jobs.is_full
    jobs.shares_backward = False
    assert jobs.is_full
