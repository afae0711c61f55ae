from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision, Precision
from torch import Tensor, nn

from lightning_pipebd import shared_backward
from lightning_pipebd.block_jobs import BlockJobs, step_context
from lightning_pipebd.module import BlockwiseDistillationModule
from lightning_pipebd.planning.plan import Rows


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


def test_a_block_is_weighed_in_its_first_call_and_not_in_the_second(monkeypatch: pytest.MonkeyPatch) -> None:
    weighed: list[Tensor] = []
    monkeypatch.setattr(shared_backward, "_weigh", lambda loss: weighed.append(loss) or 0)
    layer, boundary = nn.Linear(2, 2), torch.ones(2, 2)
    module = SimpleNamespace(
        imitate=lambda block, boundary, *_, **__: layer(boundary).mean(),
        backward=lambda loss: torch.autograd.backward(loss),
        finite_guard=SimpleNamespace(stopped=()),
    )
    jobs = BlockJobs(module, Precision())
    for _ in range(2):
        jobs.learn(0, boundary, None, None, Rows(0, 2), 2)
        jobs.settle()
        layer(boundary)  # what others compute meanwhile belongs to no block
    assert len(weighed) == 1
