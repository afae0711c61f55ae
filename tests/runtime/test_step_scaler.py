"""One loss scale for all ranks: they step or skip together."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.step_scaler import StepScaler
from tests.helpers.ranks import run_threads

CPU = torch.device("cpu")


def make_scaler() -> torch.amp.GradScaler:
    return torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)


def train(scaler: torch.amp.GradScaler, weights: list[nn.Parameter], factors: list[float]) -> list[float]:
    """Step with every factor as the gradient; give the scales."""
    optimizer = torch.optim.SGD([{"params": weights}], lr=0.5)
    scales = []
    for factor in factors:
        optimizer.zero_grad()
        loss = scaler.scale(torch.stack([torch.zeros(()), *(factor * own for own in weights)]).sum())
        if weights:
            torch.autograd.backward(loss)
        scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return scales


def train_rank(rank: int, world: LocalWorld, factors: list[list[float]]) -> tuple[list[float], list[float], Any]:
    scaler = StepScaler(make_scaler(), world.transports[rank], CPU)
    weights = [nn.Parameter(torch.ones(()))] if any(factors[rank]) else []
    scales = train(scaler, weights, factors[rank])
    return scales, [weight.item() for weight in weights], scaler.state_dict()


INFINITE = float("inf")


def test_an_overflow_on_one_rank_skips_the_step_of_all() -> None:
    factors = [[1.0, INFINITE, 1.0, 1.0], [1.0, 1.0, 1.0, 1.0], [0.0, 0.0, 0.0, 0.0]]
    found = run_threads(3, train_rank, LocalWorld(3), factors)
    alone = nn.Parameter(torch.ones(()))
    expected = train(reference := make_scaler(), [alone], factors[0])
    assert expected == [8.0, 4.0, 4.0, 8.0]
    assert [scales for scales, _, _ in found] == [expected] * 3
    assert [weights for _, weights, _ in found] == [[alone.item()], [alone.item()], []]
    assert [state for _, _, state in found] == [reference.state_dict()] * 3


def test_alone_it_is_the_scaler_it_began_with() -> None:
    factors = [[1.0, 1.0, INFINITE]]
    ((scales, _, _),) = run_threads(1, train_rank, LocalWorld(1), factors)
    assert scales == train(make_scaler(), [nn.Parameter(torch.ones(()))], factors[0])


def test_a_rank_that_ends_does_not_leave_the_others_waiting() -> None:
    world = LocalWorld(2)

    def run(rank: int) -> None:
        if rank == 1:
            world.end(1)
            return
        with pytest.raises(RuntimeError, match="lost rank 1"):
            train(StepScaler(make_scaler(), world.transports[0], CPU), [nn.Parameter(torch.ones(()))], [1.0])

    run_threads(2, run, timeout=10)
