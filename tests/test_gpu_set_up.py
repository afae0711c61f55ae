"""What a set-up on GPUs does otherwise than one on a CPU, as far as that shows without one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from lightning.pytorch.plugins import MixedPrecision
from torch import Tensor, nn

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd import strategy as strategy_file
from lightning_pipebd.callbacks import _read
from lightning_pipebd.evaluation import Evaluation
from lightning_pipebd.lightning_internals.processes import ProcessGroupStrategy
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.scaling import BlockScalers

META = torch.device("meta")


@pytest.mark.parametrize(("operation", "dtype"), [("mean", torch.float64), ("sum", torch.float32)])
def test_a_value_logged_in_host_memory_is_exchanged_on_the_device(
    monkeypatch: pytest.MonkeyPatch, operation: str, dtype: torch.dtype
) -> None:
    exchanged: list[Tensor] = []

    def reduce(_: object, tensor: Tensor, *others: object) -> Tensor:
        exchanged.append(tensor)
        return tensor

    monkeypatch.setattr(ProcessGroupStrategy, "reduce", reduce)
    monkeypatch.setattr(Evaluation, "root_device", META)
    PipeBDStrategy().reduce(torch.ones(2), reduce_op=operation)
    assert [(tensor.device, tensor.dtype) for tensor in exchanged] == [(META, dtype)]


@pytest.mark.parametrize(("has_met", "is_reported"), [(True, True), (False, False)])
def test_a_failure_before_the_session_ends_the_process_too_once_ranks_have_met(
    monkeypatch: pytest.MonkeyPatch, has_met: bool, is_reported: bool
) -> None:
    reported: list[tuple[BaseException, str]] = []
    monkeypatch.setattr(strategy_file, "report_failure", lambda *given: reported.append(given))
    monkeypatch.setattr(strategy_file.dist, "is_initialized", lambda: has_met)
    error = RuntimeError("out of memory")
    PipeBDStrategy().on_exception(error)
    assert reported == ([(error, "")] if is_reported else [])


def test_scales_of_all_blocks_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    calm, wild, idle = ([nn.Parameter(torch.zeros(3))] for _ in range(3))
    plugin = MixedPrecision("16-mixed", "cpu", scaler=torch.amp.GradScaler("cpu", init_scale=4.0))
    scalers = BlockScalers(plugin, {0: calm, 2: wild, 3: idle}, torch.device("cpu"), LocalWorld(1).transports[0])
    calm[0].grad, wild[0].grad = torch.full((3,), 8.0), torch.tensor([1.0, float("inf"), 1.0])
    reads: list[Any] = []
    item, tolist = Tensor.item, Tensor.tolist
    monkeypatch.setattr(Tensor, "item", lambda self: reads.append("item") or item(self))
    monkeypatch.setattr(Tensor, "tolist", lambda self: reads.append("tolist") or tolist(self))
    scalers.unscale()
    assert reads == ["tolist"]
    assert [own.grad for own in (*wild, *idle)] == [None, None]
    assert calm[0].grad is not None
    assert torch.equal(calm[0].grad, torch.full((3,), 2.0))
    states = {block: scaler.scaler.get_scale() for block, scaler in scalers._scalers.items()}
    assert states == {0: 4.0, 2: 2.0, 3: 4.0}


def test_losses_of_all_blocks_are_read_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    losses = {0: torch.tensor(0.1), 1: torch.tensor(0.3, dtype=torch.bfloat16), 2: torch.tensor([0.7]).double()}
    expected = {block: loss.item() for block, loss in losses.items()}
    monkeypatch.setattr(Tensor, "item", lambda self: pytest.fail("read by itself"))
    assert _read(losses) == expected  # type: ignore[arg-type]  # any names will do
    assert _read({}) == {}
