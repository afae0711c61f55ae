"""Two ranks on one GPU, whose boundaries stay in its memory; `tests/runtime` has what can be seen without a GPU."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd import PipeBDStrategy
from lightning_pipebd.runtime.device_links import DeviceLinkSender
from lightning_pipebd.runtime.link_probe import Links, measure_links, probe_edges, probe_groups
from lightning_pipebd.runtime.transport import Lane, Message, ProcessGroupTransport, Transport
from tests.helpers.ranks import run_processes
from tests.helpers.scenarios import Both, MakeTrainer, on_both
from tests.helpers.toy import make_loader, make_module
from tests.helpers.training import assert_same_checkpoint
from tests.runtime.test_transport import make_tree, values_of

pytestmark = [
    pytest.mark.spawn,
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU"),
]

GPU = torch.device("cuda", 0)
NUM_MESSAGES = 100
MIB = 2**20


def send_tree(transport: Transport) -> Any:
    tree = {"gpu": pytree.tree_map_only(Tensor, lambda leaf: leaf.to(GPU), make_tree()), "host": torch.arange(3)}
    if transport.rank == 0:
        transport.send(Message((1, 2, 3, 4), tree), 1, Lane.RELAY).wait()
        return None
    received = transport.recv(0, Lane.RELAY).tree
    places = {leaf.device for leaf in pytree.tree_leaves(received["gpu"]) if isinstance(leaf, Tensor) and leaf.numel()}
    return values_of(received["gpu"]), places, received["host"].device


def send_late(transport: Transport) -> list[tuple[float, float]]:
    """What is sent is made late, and is overwritten behind the sender's back at once."""
    if transport.rank == 0:
        pending = []
        for index in range(NUM_MESSAGES):
            torch.cuda._sleep(1_000_000)  # type: ignore[no-untyped-call]
            tensor = torch.full((1000 * (index % 7 + 1),), float(index), device=GPU)
            pending.append(transport.send(Message((0, 0, 0, 0), tensor), 1, Lane.RELAY))
            tensor.fill_(-1.0)
        for each in pending:
            each.wait()
        return []
    seen = []
    for _ in range(NUM_MESSAGES):
        tensor = transport.recv(0, Lane.RELAY).tree
        torch.cuda._sleep(500_000)  # type: ignore[no-untyped-call]
        # Still to be computed when the tensor's memory is free for the next message.
        seen.append((tensor.min(), tensor.max()))
        del tensor
    return [(low.item(), high.item()) for low, high in seen]


def send_large(transport: Transport) -> int:
    """Give what a rank holds of the device after many messages."""
    before = torch.cuda.memory_allocated(GPU)
    for _ in range(NUM_MESSAGES):
        if transport.rank == 0:
            transport.send(Message((0, 0, 0, 0), torch.zeros(4 * MIB, device=GPU)), 1, Lane.RELAY).wait()
        else:
            transport.recv(0, Lane.RELAY)
    return torch.cuda.memory_allocated(GPU) - before


def measure(transport: Transport) -> Links:
    transport.connect(probe_edges([0, 0]), probe_groups(2))
    return measure_links(transport, [0, 0], GPU, num_threads=1)


SCENARIOS: list[Callable[[Transport], Any]] = [send_tree, send_late, send_large, measure]


def run_scenarios(rank: int) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    transport = ProcessGroupTransport(GPU, edges=[(0, 1), (1, 0)])
    assert isinstance(transport._neighbours.senders[1 - rank], DeviceLinkSender)
    return {scenario.__name__: scenario(transport) for scenario in SCENARIOS}


class TestTransport:
    @pytest.fixture(scope="class")
    def seen(self) -> dict[str, list[Any]]:
        everyone = run_processes(2, run_scenarios, timeout=180.0)
        return {name: [mine[name] for mine in everyone] for name in everyone[0]}

    def test_every_tensor_arrives_where_it_was(self, seen: dict[str, list[Any]]) -> None:
        values, on_gpu, on_host = seen["send_tree"][1]
        assert values == values_of(make_tree())
        assert on_gpu == {GPU}
        assert on_host == torch.device("cpu")

    def test_message_has_what_its_tensors_were_when_they_were_sent(self, seen: dict[str, list[Any]]) -> None:
        assert seen["send_late"][1] == [(float(index),) * 2 for index in range(NUM_MESSAGES)]

    def test_sender_keeps_a_buffer_and_receiver_nothing(self, seen: dict[str, list[Any]]) -> None:
        sender, receiver = seen["send_large"]
        assert 16 * MIB < sender < 36 * MIB
        assert receiver < MIB

    def test_links_are_measured(self, seen: dict[str, list[Any]]) -> None:
        mine, theirs = seen["measure"]
        assert mine == theirs
        assert 0 < mine.same_node.bytes_per_ms < float("inf")


def strategy() -> PipeBDStrategy:
    return PipeBDStrategy(plan="0-1|2-3", parallel_devices=[GPU, GPU], process_group_backend="gloo")


def fit(make_trainer: MakeTrainer, precision: str) -> dict[str, Any]:
    module = make_module("linear")
    trainer = make_trainer(accelerator="gpu", devices=1, precision=precision)
    trainer.fit(module, make_loader(module, 40, 8, shuffle=True))
    return {name: value.cpu() for name, value in module.state_dict().items()}


class TestTraining:
    @pytest.fixture(scope="class")
    def fits(self) -> dict[str, Both]:
        return on_both(fit, ["32-true", "bf16-mixed"], plan=strategy)

    @pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
    def test_student_has_the_bits_of_one_process(self, precision: str, fits: dict[str, Both]) -> None:
        for state in fits[precision].ranks:
            assert_same_checkpoint(fits[precision].one, state, precision)
