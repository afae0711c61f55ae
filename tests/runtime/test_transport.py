"""What every transport does alike: each scenario runs over threads and over real processes, and one class judges both.

All scenarios run in one launch, so that the processes are started once.
"""

from __future__ import annotations

import os
import pickle
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
from torch import Tensor
from torch.utils import _pytree as pytree

from lightning_pipebd.runtime import transport as transport_module
from lightning_pipebd.runtime.device_links import DeviceLinkSender
from lightning_pipebd.runtime.link_probe import Links, measure_links, probe_edges, probe_groups
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.transport import Lane, Message, Pending, ProcessGroupTransport, Transport
from tests.helpers.device_memory import HostMemory
from tests.helpers.ranks import RankError, run_processes, run_threads

NUM_RANKS = 3
GROUPS = ((0, 2), (0, 1, 2))
EDGES = ((0, 1), (0, 2), (1, 2), (2, 1))
NUM_LAYOUTS = 210  # two thirds of them are more than a transport remembers
Scenario = Callable[[Transport], Any]


class Pair(NamedTuple):
    left: Tensor
    right: Any


def make_tree() -> Any:
    """A tree with every kind of leaf that a boundary may have."""
    wide = torch.arange(24.0).reshape(4, 6)
    return {
        "nested": (wide, [torch.ones(2, dtype=torch.bool), {"deep": torch.arange(3)}], Pair(wide[0], None)),
        "plain": (None, 7, 0.5, "text", True),
        "dtypes": [wide.to(dtype) for dtype in (torch.bfloat16, torch.float16, torch.int16, torch.complex64)],
        "scalar": torch.tensor(3.0, dtype=torch.float64),
        "empty": (torch.empty(0), torch.empty(2, 0, 3, dtype=torch.int64), (), {}),
        "views": (wide.t(), wide[:, ::2], wide[1:2].expand(3, 6)),
        "lazy": (torch.tensor([1 + 2j, 3 - 4j]).conj(), torch.tensor([1 + 2j, 3 - 4j]).conj().imag),
        "leaf": torch.nn.Parameter(torch.ones(2)),
    }


def values_of(tree: Any) -> Any:
    """The tree with every tensor as (dtype, shape, values), which `==` compares."""
    return pytree.tree_map_only(Tensor, lambda leaf: (leaf.dtype, tuple(leaf.shape), leaf.tolist()), tree)


def wait_all(pending: Iterable[Pending]) -> None:
    for each in pending:
        each.wait()


def send_in_order(transport: Transport) -> list[int]:
    if transport.rank == 0:
        pending = [transport.send(Message((index, 0, 0, 0), torch.ones(index)), 1, Lane.RELAY) for index in range(20)]
        wait_all(pending)
    return [transport.recv(0, Lane.RELAY).fields[0] for _ in range(20)] if transport.rank == 1 else []


def receive_lanes_backwards(transport: Transport) -> list[str]:
    if transport.rank == 0:
        pending = [transport.send(Message((0, 0, 0, 0), lane.name), 1, lane) for lane in Lane]
        wait_all(pending)
    return [transport.recv(0, lane).tree for lane in reversed(Lane)] if transport.rank == 1 else []


def receive_peers_backwards(transport: Transport) -> list[int]:
    if transport.rank != 1:
        transport.send(Message((transport.rank, 0, 0, 0)), 1, Lane.RELAY).wait()
        return []
    return [transport.recv(peer, Lane.RELAY).fields[0] for peer in (2, 0)]


def send_tree(transport: Transport) -> Any:
    if transport.rank == 0:
        transport.send(Message((-1, 2**40, 0, -(2**62)), make_tree()), 1, Lane.STATE).wait()
    return transport.recv(0, Lane.STATE) if transport.rank == 1 else None


def change_layouts(transport: Transport) -> list[tuple[int, int]]:
    """Ranks 0 and 1 send each other ever changing layouts, between which one comes again and again."""
    if transport.rank == 2:
        return []
    peer, seen = 1 - transport.rank, []
    for index in range(2 * NUM_LAYOUTS):
        size = 0 if index % 3 == 0 else index % NUM_LAYOUTS
        sending = transport.send(Message((0, 0, 0, 0), {"x": torch.zeros(size), "size": size}), peer, Lane.RELAY)
        tree = transport.recv(peer, Lane.RELAY).tree
        seen.append((len(tree["x"]), tree["size"]))
        sending.wait()
    return seen


def receive_in_threads(transport: Transport) -> dict[tuple[int, str], list[int]]:
    """Every rank sends to every other on every lane, and has one thread per peer and lane."""
    ways = [(peer, lane) for peer in range(NUM_RANKS) if peer != transport.rank for lane in Lane]
    seen: dict[tuple[int, str], list[int]] = {(peer, lane.name): [] for peer, lane in ways}

    def receive(peer: int, lane: Lane) -> None:
        seen[peer, lane.name] += [int(transport.recv(peer, lane).tree.sum()) for _ in range(20)]

    threads = [threading.Thread(target=receive, args=way) for way in ways]
    for thread in threads:
        thread.start()
    pending = [
        transport.send(Message((0, 0, 0, 0), torch.full((index + 1,), 1.0)), peer, lane)
        for index in range(20)
        for peer, lane in ways
    ]
    wait_all(pending)
    for thread in threads:
        thread.join()
    return seen


def receive_late(transport: Transport) -> list[bool]:
    """Rank 1 receives only what rank 0 sent later; rank 0 notes whether the first send was done by then, and after."""
    if transport.rank == 0:
        first = transport.send(Message((0, 0, 0, 0), torch.ones(3)), 1, Lane.RELAY)
        waiter = threading.Thread(target=first.wait)
        waiter.start()
        transport.send(Message((0, 0, 0, 0)), 1, Lane.STATE).wait()
        transport.recv(1, Lane.STATE)
        before = waiter.is_alive()
        transport.send(Message((0, 0, 0, 0)), 1, Lane.STATE).wait()
        waiter.join()
        return [before, waiter.is_alive()]
    if transport.rank == 1:
        transport.recv(0, Lane.STATE)
        transport.send(Message((0, 0, 0, 0)), 0, Lane.STATE).wait()
        transport.recv(0, Lane.STATE)
        transport.recv(0, Lane.RELAY)
    return []


def reduce_in_groups(transport: Transport) -> list[Any]:
    """Two reductions of one group and one of all are under way at once, and waited for last to first."""
    tensors = [torch.full((2,), transport.rank + 1.0, dtype=dtype) for dtype in (torch.float64, torch.complex64)]
    tensors.append(torch.full((3,), transport.rank + 1.0, dtype=torch.bfloat16))
    pending = [transport.all_reduce(tensors[2:], (0, 1, 2))]
    if transport.rank != 1:
        pending += [transport.all_reduce([tensor], (0, 2)) for tensor in tensors[:2]]
    wait_all(reversed(pending))
    return [values_of(tensor) for tensor in tensors]


def broadcast_leaves(transport: Transport) -> Any:
    theirs = [leaf for leaf in pytree.tree_leaves(make_tree()) if isinstance(leaf, Tensor)]
    # No `zeros_like`: it would take over the strides of an expanded view, whose elements share memory.
    mine = [leaf if transport.rank == 1 else torch.zeros(leaf.shape, dtype=leaf.dtype) for leaf in theirs]
    for leaf in mine:
        transport.broadcast(leaf, 1)
    return values_of(mine)


def broadcast_into_view(transport: Transport) -> list[list[float]]:
    whole = torch.full((2, 3), float(transport.rank))
    transport.broadcast(whole[:, 1], 2)
    return whole.tolist()


def gather_values(transport: Transport) -> list[Any]:
    mine = {"rank": transport.rank, "tensor": torch.ones(1)}
    everyone = transport.all_gather_object(mine)
    for value in everyone:
        value["tensor"] += transport.rank  # must not reach the other ranks
    return [(value["rank"], value["tensor"].item()) for value in transport.all_gather_object(mine)]


def send_in_memory_order(transport: Transport) -> tuple[int, ...] | None:
    image = torch.arange(24.0).reshape(1, 2, 3, 4).to(memory_format=torch.channels_last)
    if transport.rank == 0:
        transport.send(Message((0, 0, 0, 0), image), 1, Lane.RELAY).wait()
    if transport.rank != 1:
        return None
    received: Tensor = transport.recv(0, Lane.RELAY).tree
    assert torch.equal(received, image)
    return received.stride()


EQUALS = [True, 1, 1.0, 0, False, 0.0, -0.0, None, "", "1", True]


def send_equals(transport: Transport) -> list[str]:
    """Values that are equal, in trees that are otherwise alike; some of them again and again."""
    trees = [([value], (value,), {"x": value}) for value in [*EQUALS, *EQUALS]]
    if transport.rank == 0:
        wait_all([transport.send(Message((0, 0, 0, 0), tree), 1, Lane.RELAY) for tree in trees])
    return [repr(transport.recv(0, Lane.RELAY).tree) for _ in trees] if transport.rank == 1 else []


def count_sum_groups(transport: Transport) -> tuple[bool, int]:
    """Whether sums pass through shared memory, and how many groups of torch's there are for them."""
    if not isinstance(transport, ProcessGroupTransport):
        return True, 0
    return transport._shares_memory, sum(group is not None for group in transport._groups.values())


def measure(transport: Transport) -> Links:
    """Last, because it connects more ranks."""
    nodes = [0] * NUM_RANKS
    transport.connect(probe_edges(nodes), probe_groups(NUM_RANKS))
    return measure_links(transport, nodes, torch.device("cpu"), num_threads=1)


SCENARIOS: list[Scenario] = [
    count_sum_groups,
    send_in_order,
    receive_lanes_backwards,
    receive_peers_backwards,
    send_tree,
    change_layouts,
    receive_in_threads,
    receive_late,
    reduce_in_groups,
    broadcast_leaves,
    broadcast_into_view,
    gather_values,
    send_in_memory_order,
    send_equals,
    measure,
]


def run_scenarios(transport: Transport) -> dict[str, Any]:
    return {scenario.__name__: scenario(transport) for scenario in SCENARIOS}


def call_in_thread(rank: int, world: LocalWorld, function: Scenario) -> Any:
    return function(world.transports[rank])


def over_threads(function: Scenario) -> list[Any]:
    return run_threads(NUM_RANKS, call_in_thread, LocalWorld(NUM_RANKS), function)


def call_in_process(rank: int, function: Scenario, shares_memory: bool) -> Any:
    torch.distributed.init_process_group("gloo")
    device = torch.device("cpu")
    return function(ProcessGroupTransport(device, groups=GROUPS, edges=EDGES, shares_memory=shares_memory))


def call_on_device(rank: int, function: Scenario) -> Any:
    """Ranks on one device, which host memory stands for."""
    torch.distributed.init_process_group("gloo")
    transport = ProcessGroupTransport(torch.device("cpu"))
    transport._neighbours._memory = HostMemory()
    transport.connect(EDGES, GROUPS)
    assert all(isinstance(sender, DeviceLinkSender) for sender in transport._neighbours.senders.values())
    return function(transport)


def call_on_gpu(rank: int, function: Scenario) -> Any:
    torch.distributed.init_process_group("gloo")
    transport = ProcessGroupTransport(torch.device("cuda", 0), groups=GROUPS, edges=EDGES)
    assert all(isinstance(sender, DeviceLinkSender) for sender in transport._neighbours.senders.values())
    return function(transport)


def over_gloo(function: Scenario) -> list[Any]:
    return run_processes(NUM_RANKS, call_in_process, function, False)


def over_shared_memory(function: Scenario) -> list[Any]:
    return run_processes(NUM_RANKS, call_in_process, function, True)


class GpuTensor(Tensor):
    """Says that it is on a GPU, so that its bytes take an edge's own group."""

    is_cuda = True


class HostSide:
    """A device that has done everything when it is asked."""

    def __init__(self) -> None:
        self.num_handed_over = 0

    def mark(self) -> HostSide:
        return self

    def synchronize(self) -> None:
        pass

    @contextmanager
    def way(self, ranks: tuple[int, int]) -> Iterator[None]:
        yield

    def hand_over(self, tensor: Tensor) -> None:
        self.num_handed_over += 1


def make_gpu_tree() -> Any:
    """What a boundary on a GPU may be made of, among it types that NCCL has no name for."""
    values = torch.arange(6).reshape(2, 3)
    dtypes = (torch.float32, torch.int16, torch.bool, torch.complex64)
    leaves = [values.to(dtype).as_subclass(GpuTensor) for dtype in dtypes]
    return {"gpu": leaves, "view": leaves[0].t(), "empty": leaves[0][:0], "host": values, "text": "a"}


def send_by_edges(transport: Transport) -> Any:
    """Rank 1 gets boundaries of rank 0, while new tensors are made elsewhere than in host memory."""
    if transport.rank == 0:
        with torch.device("meta"):
            pending = [
                transport.send(Message((index, 0, 0, 0), make_tree_of(index)), 1, Lane.RELAY) for index in (0, 1)
            ]
        wait_all(pending)
    if transport.rank != 1:
        return None
    with torch.device("meta"):
        received = [transport.recv(0, Lane.RELAY) for _ in range(2)]
    assert isinstance(transport, ProcessGroupTransport)
    assert isinstance(transport._side, HostSide)
    return [(message.fields[0], values_of(message.tree)) for message in received], transport._side.num_handed_over


def make_tree_of(index: int) -> Any:
    with torch.device("cpu"):
        return make_gpu_tree() if index else None


def call_with_edges(rank: int) -> dict[str, Any]:
    torch.distributed.init_process_group("gloo")
    transport = ProcessGroupTransport(torch.device("cpu"), groups=GROUPS, shares_memory=False)
    # As between GPUs, where these groups are NCCL's.
    transport._edges = {edge: torch.distributed.new_group(sorted(edge), backend="gloo") for edge in EDGES}
    transport._side = HostSide()
    return run_scenarios(transport) | {"send_by_edges": send_by_edges(transport)}


def over_edges(function: Scenario) -> list[Any]:
    assert function is run_scenarios
    return run_processes(NUM_RANKS, call_with_edges)


def over_device_memory(function: Scenario) -> list[Any]:
    return run_processes(NUM_RANKS, call_on_device, function)


def over_one_gpu(function: Scenario) -> list[Any]:
    return run_processes(NUM_RANKS, call_on_gpu, function, timeout=180.0)


ON_GPU = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no GPU")]


@pytest.fixture(
    scope="class",
    params=[
        over_threads,
        *(
            pytest.param(over, marks=pytest.mark.spawn)
            for over in (over_gloo, over_shared_memory, over_edges, over_device_memory)
        ),
        pytest.param(over_one_gpu, marks=[pytest.mark.spawn, *ON_GPU]),
    ],
    ids=["threads", "gloo", "shared memory", "edges", "device memory", "one GPU"],
)
def seen(request: pytest.FixtureRequest) -> dict[str, list[Any]]:
    """What each rank saw in each scenario."""
    everyone = request.param(run_scenarios)
    return {name: [mine[name] for mine in everyone] for name in everyone[0]}


Seen = dict[str, list[Any]]


class TestTransport:
    def test_messages_of_a_lane_arrive_in_the_order_of_sending(self, seen: Seen) -> None:
        assert seen["send_in_order"][1] == list(range(20))

    def test_lanes_do_not_wait_for_each_other(self, seen: Seen) -> None:
        assert seen["receive_lanes_backwards"][1] == ["STATE", "METRICS", "HEADERS", "RELAY"]

    def test_peers_do_not_wait_for_each_other(self, seen: Seen) -> None:
        assert seen["receive_peers_backwards"][1] == [2, 0]

    def test_tree_arrives_with_its_structure_types_and_values(self, seen: Seen) -> None:
        fields, tree = seen["send_tree"][1]
        assert fields == (-1, 2**40, 0, -(2**62))
        assert values_of(tree) == values_of(make_tree())
        assert isinstance(tree["nested"][2], Pair)

    def test_tensors_arrive_without_gradient_and_conjugation_in_memory(self, seen: Seen) -> None:
        tree = seen["send_tree"][1].tree
        assert not tree["leaf"].requires_grad
        assert torch.view_as_real(tree["lazy"][0].resolve_conj()).tolist() == [[1, -2], [3, 4]]

    def test_more_layouts_than_are_remembered_keep_both_sides_in_step(self, seen: Seen) -> None:
        sizes = [0 if index % 3 == 0 else index % NUM_LAYOUTS for index in range(2 * NUM_LAYOUTS)]
        expected = [(size, size) for size in sizes]
        assert seen["change_layouts"] == [expected, expected, []]

    def test_every_peer_and_lane_may_have_a_thread_of_its_own(self, seen: Seen) -> None:
        for rank in range(NUM_RANKS):
            ways = {(peer, lane.name) for peer in range(NUM_RANKS) if peer != rank for lane in Lane}
            assert seen["receive_in_threads"][rank] == {way: list(range(1, 21)) for way in ways}

    def test_send_is_done_when_it_was_received_and_not_before(self, seen: Seen) -> None:
        assert seen["receive_late"][0] == [True, False]

    def test_tensor_keeps_its_order_in_memory(self, seen: Seen) -> None:
        assert seen["send_in_memory_order"] == [None, (24, 1, 8, 2), None]

    def test_values_that_are_equal_but_not_the_same_are_not_mixed_up(self, seen: Seen) -> None:
        assert seen["send_equals"][1] == [repr(([value], (value,), {"x": value})) for value in [*EQUALS, *EQUALS]]

    def test_reduction_sums_over_its_ranks_only(self, seen: Seen) -> None:
        everyone = (torch.bfloat16, (3,), [6.0] * 3)
        pair = [(torch.float64, (2,), [4.0] * 2), (torch.complex64, (2,), [4.0] * 2), everyone]
        alone = [(torch.float64, (2,), [2.0] * 2), (torch.complex64, (2,), [2.0] * 2), everyone]
        assert seen["reduce_in_groups"] == [pair, alone, pair]

    def test_sums_through_shared_memory_need_no_groups_of_torch(self, seen: Seen) -> None:
        shares_memory, num_groups = seen["count_sum_groups"][0]
        assert num_groups == (0 if shares_memory else len(GROUPS))

    def test_broadcast_overwrites_tensors_of_any_type_with_the_sources(self, seen: Seen) -> None:
        expected = [values_of(leaf) for leaf in pytree.tree_leaves(make_tree()) if isinstance(leaf, Tensor)]
        assert seen["broadcast_leaves"] == [expected] * NUM_RANKS

    def test_broadcast_writes_through_a_view_and_beside_it_nothing(self, seen: Seen) -> None:
        assert seen["broadcast_into_view"] == [[[rank, 2, rank]] * 2 for rank in range(NUM_RANKS)]

    def test_gather_gives_every_rank_values_of_its_own_in_rank_order(self, seen: Seen) -> None:
        assert seen["gather_values"] == [[(0, 1.0), (1, 1.0), (2, 1.0)]] * NUM_RANKS

    def test_links_are_measured_and_every_rank_gets_the_same(self, seen: Seen) -> None:
        first, *others = seen["measure"]
        assert others == [first] * (NUM_RANKS - 1)
        assert first.same_node.latency_ms > 0
        assert 0 < first.same_node.bytes_per_ms < float("inf")
        assert [reduce.num_ranks for reduce in first.same_node.reduces] == [2, 3]

    def test_tensors_of_a_gpu_take_the_edges_group_whatever_their_type(self, seen: Seen) -> None:
        if "send_by_edges" not in seen:
            pytest.skip("these ranks have no GPUs")
        messages, num_handed_over = seen["send_by_edges"][1]
        assert messages == [(0, None), (1, values_of(make_gpu_tree()))]
        assert num_handed_over == 5


class FakeGroups:
    """Stands for torch.distributed on three ranks, and remembers the groups."""

    def __init__(self, backend: str) -> None:
        self.group = torch.distributed.group
        self.made: list[tuple[tuple[int, ...], str, timedelta]] = []
        self.ended: list[tuple[int, ...]] = []
        self._backend = backend

    def get_rank(self) -> int:
        return 0

    def get_world_size(self) -> int:
        return NUM_RANKS

    def get_backend(self) -> str:
        return self._backend

    def new_group(self, ranks: list[int], *, timeout: timedelta, backend: str) -> Any:
        self.made.append((tuple(ranks), backend, timeout))
        return len(self.made), tuple(ranks)

    def destroy_process_group(self, group: Any) -> None:
        self.ended.append(group[1])

    def all_gather_object(self, values: list[Any], value: Any, *, group: Any) -> None:
        values[:] = [value] * len(values)


TIMEOUT = timedelta(minutes=3)


class TestGroups:
    @pytest.fixture
    def groups(self, monkeypatch: pytest.MonkeyPatch) -> FakeGroups:
        fake = FakeGroups("cpu:gloo,cuda:nccl")
        monkeypatch.setattr(transport_module, "dist", fake)
        monkeypatch.setattr(torch.cuda, "synchronize", lambda device: None)
        monkeypatch.setattr(transport_module, "CudaMemory", lambda device: None)  # would start CUDA
        return fake

    def connect(self, **options: Any) -> ProcessGroupTransport:
        return ProcessGroupTransport(torch.device("cuda", 0), timeout=TIMEOUT, **options)

    def test_edges_of_gpus_wait_as_long_as_messages_and_sums_as_long_as_collectives(self, groups: FakeGroups) -> None:
        self.connect(edges=[(1, 0)], groups=[(0, 1)])
        (_, patience), *others = [(backend, timeout) for _, backend, timeout in groups.made[1:]]
        assert others == [("nccl", patience), ("nccl", TIMEOUT)]
        assert patience >= timedelta(days=1)

    def test_gpus_send_by_nccl_only_if_the_processes_have_met_by_nccl(self, groups: FakeGroups) -> None:
        groups._backend = "gloo"
        self.connect(groups=[(0, 1)], shares_memory=False)
        assert {backend for _, backend, _ in groups.made} == {"gloo"}

    def test_layers_exchange_statistics_in_groups_of_their_own_made_once(self, groups: FakeGroups) -> None:
        transport = self.connect(groups=[(0, 1), (0, 2)])
        found = dict(transport.layer_groups([(0, 1), (0, 1)]))
        assert transport.layer_groups([(0, 1)]) == found
        assert not set(found.values()) & set(transport._groups.values())
        assert [made for made in groups.made if made[0] == (0, 1)] == [((0, 1), "nccl", TIMEOUT)] * 2

    def test_groups_that_no_plan_needs_are_ended_in_one_order_and_can_be_made_anew(self, groups: FakeGroups) -> None:
        transport = self.connect(edges=[(2, 0), (0, 1), (1, 2)], groups=[(1, 2), (0, 1), (0, 1, 2)])
        transport.keep_only([(0, 1)], [(1, 0)])
        assert groups.ended == [(1, 2), (0, 2), (0, 1, 2), (1, 2)]
        num_made = len(groups.made)
        transport.keep_only([(0, 1)], [(0, 1)])
        assert len(groups.ended) == 4
        transport.connect([(0, 1), (1, 2)], [(0, 1), (1, 2)])
        assert [ranks for ranks, _, _ in groups.made[num_made:]] == [(1, 2), (1, 2)]


def error_of(call: Callable[[], object]) -> str:
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def outlive_rank_1(transport: Transport, die: Callable[[], object]) -> dict[str, str]:
    """Rank 1 dies while rank 0 waits for it in a send and in a receive; then rank 0 turns to it again."""
    message = Message((0, 0, 0, 0), torch.ones(1))
    if transport.rank == 1:
        transport.recv(0, Lane.STATE)
        die()
        return {}
    sending = transport.send(message, 1, Lane.RELAY)
    with ThreadPoolExecutor(1) as pool:
        receiving = pool.submit(error_of, lambda: transport.recv(1, Lane.RELAY))
        transport.send(message, 1, Lane.STATE).wait()
        return {
            "receive under way": receiving.result(),
            "send under way": error_of(sending.wait),
            "send": error_of(lambda: transport.send(message, 1, Lane.RELAY).wait()),
            "receive": error_of(lambda: transport.recv(1, Lane.HEADERS)),
            "reduction": error_of(lambda: transport.all_reduce([torch.ones(1)], (0, 1)).wait()),
            "broadcast": error_of(lambda: transport.broadcast(torch.ones(1), 1)),
            "gather": error_of(lambda: transport.all_gather_object(1)),
        }


def outlive_thread(rank: int, world: LocalWorld) -> dict[str, str]:
    return outlive_rank_1(world.transports[rank], partial(world.end, 1))


def outlive_process(rank: int, path: Path) -> None:
    torch.distributed.init_process_group("gloo")
    transport = ProcessGroupTransport(torch.device("cpu"), groups=[(0, 1)], edges=[(0, 1), (1, 0)])
    errors = outlive_rank_1(transport, partial(os._exit, 7))
    path.write_bytes(pickle.dumps(errors))


class TestDeadPeer:
    def test_thread_that_has_ended_is_named_in_every_error(self) -> None:
        errors, _ = run_threads(2, outlive_thread, LocalWorld(2))
        assert all(error.startswith("TransportError: ") for error in errors.values()), errors
        assert all("rank 1" in error for error in errors.values()), errors

    @pytest.mark.spawn
    def test_process_that_has_died_is_an_error_of_the_same_kind(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("tests.helpers.ranks._GRACE_S", 30.0)
        with pytest.raises(RankError, match="Rank 1 of 2 failed: it ended with exit code 7"):
            run_processes(2, outlive_process, tmp_path / "errors")
        errors = pickle.loads((tmp_path / "errors").read_bytes())
        assert len(errors) == 7
        assert all(error.startswith("TransportError: ") for error in errors.values()), errors
