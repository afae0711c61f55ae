"""Which blocks depend on the rows they see together, and which draw random numbers."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lightning_pipebd.runtime.partition import CallableBlock, cut_model, has_batch_statistics, is_stochastic
from tests.helpers.containers import Container


class DropPath(nn.Module):
    def __init__(self, drop_prob: float) -> None:
        super().__init__()
        self.drop_prob = drop_prob

    def forward(self, x: Any) -> Any:
        return x if not self.training else x * torch.empty(len(x), 1).bernoulli_(1 - self.drop_prob)


class StochasticDepth(nn.Module):
    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p


class Noise(nn.Module):
    def forward(self, x: Any) -> Any:
        return x + torch.randn_like(x)


class FixedDropout(nn.Module):
    def forward(self, x: Any) -> Any:
        return F.dropout(x, 0.1, self.training)


class OwnNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(3))


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.BatchNorm2d(3), True),
        (nn.BatchNorm2d(3, track_running_stats=False), True),
        (nn.SyncBatchNorm(3), True),
        (nn.InstanceNorm2d(3, track_running_stats=True), True),
        (OwnNorm(), True),
        (nn.InstanceNorm2d(3), False),
        (nn.GroupNorm(1, 3), False),
        (nn.LayerNorm(3), False),
    ],
)
def test_has_batch_statistics_finds_what_depends_on_the_rows(module: nn.Module, expected: bool) -> None:
    assert has_batch_statistics(nn.Sequential(nn.Identity(), module)) is expected


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        (nn.Dropout(0.5), True),
        (nn.AlphaDropout(0.5), True),
        (nn.RReLU(), True),
        (nn.MultiheadAttention(4, 2, dropout=0.1), True),
        (nn.LSTM(4, 4, num_layers=2, dropout=0.1), True),
        (DropPath(0.1), True),
        (StochasticDepth(0.1), True),
        (Noise(), True),
        (FixedDropout(), True),
        (CallableBlock(lambda x: F.dropout(x, 0.5)), True),
        (nn.Dropout(0.0), False),
        (nn.MultiheadAttention(4, 2), False),
        (DropPath(0.0), False),
        (StochasticDepth(0.0), False),
        (CallableBlock(torch.relu), False),
        (Container(lambda self, x: self.dropout(x), dropout=nn.Dropout(0.0)), False),
        (nn.BatchNorm2d(3), False),
    ],
)
def test_is_stochastic_finds_what_draws_random_numbers(module: nn.Module, expected: bool) -> None:
    assert is_stochastic(nn.Sequential(nn.Identity(), module)) is expected


@pytest.mark.parametrize(
    ("function", "expected"),
    [
        (lambda self, x: F.dropout(self.a(x), training=self.training), True),
        (lambda self, x: F.dropout(self.a(x)), True),
        (lambda self, x: F.scaled_dot_product_attention(self.a(x), self.a.weight, self.a.weight, dropout_p=0.1), True),
        (lambda self, x: torch.rand_like(self.a(x)), True),
        (lambda self, x: self.a(x).bernoulli_(), True),
        (lambda self, x: F.dropout(self.a(x), 0.0, self.training), False),
        (lambda self, x: F.dropout(self.a(x), 0.5, training=False), False),
        (lambda self, x: F.scaled_dot_product_attention(self.a(x), self.a.weight, self.a.weight), False),
        (lambda self, x: F.relu(self.a(x)), False),
    ],
)
def test_is_stochastic_looks_at_code_between_modules(function: Any, expected: bool) -> None:
    model = Container(function, a=nn.Linear(3, 3))
    assert is_stochastic(cut_model(model, ["a", ""]).blocks[1]) is expected
