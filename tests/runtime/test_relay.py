from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan, Rows
from lightning_pipebd.runtime.executor import Executor
from lightning_pipebd.runtime.gradients import GradientReducer
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.relay import Relay, RelayError
from lightning_pipebd.runtime.row_trees import RowTree
from lightning_pipebd.runtime.transport import Lane, Message, Pending, TransportError
from tests.helpers.ranks import RankError, run_threads

#: How long a thread that must be waiting is given to show that it is not.
PROBE_S = 0.1
JOIN_S = 20.0

ROWS = Rows(0, 2)


def piece(value: float, rows: Rows = ROWS) -> RowTree:
    return RowTree(rows, {"x": torch.full((rows.num_rows, 1), value)}, (True,))


def value_of(arrived: RowTree) -> float:
    return float(arrived.tree["x"][0, 0])


def relays(world: LocalWorld, edges: list[tuple[int, int]], *, max_in_flight: int = 2) -> list[Relay]:
    """One relay per rank, for these pairs of sender and receiver."""
    return [
        Relay(
            transport,
            sources=[sender for sender, receiver in edges if receiver == transport.rank],
            destinations=[receiver for sender, receiver in edges if sender == transport.rank],
            max_in_flight=max_in_flight,
        )
        for transport in world.transports
    ]


def close_all(relays: list[Relay]) -> None:
    run_threads(len(relays), lambda rank: relays[rank].close())


@contextmanager
def thread(function: Callable[[], object]) -> Iterator[threading.Thread]:
    running = threading.Thread(target=function, daemon=True)
    running.start()
    yield running
    running.join(JOIN_S)
    assert not running.is_alive()


class Sender:
    """Sends one boundary per step in a thread of its own, and counts the sends that have returned."""

    def __init__(self, relay: Relay, num_steps: int, *, per_step: int = 1) -> None:
        self.num_done = 0
        self._changed = threading.Condition()
        self._thread = threading.Thread(target=self._run, args=(relay, num_steps, per_step), daemon=True)
        self._thread.start()

    def _run(self, relay: Relay, num_steps: int, per_step: int) -> None:
        for index in range(num_steps * per_step):
            relay.send(index // per_step, 1 + index % per_step, piece(float(index)), 1)
            with self._changed:
                self.num_done += 1
                self._changed.notify_all()

    def waits_after(self, num_sends: int) -> bool:
        """Tell whether exactly so many sends return."""
        with self._changed:
            reached = self._changed.wait_for(lambda: self.num_done >= num_sends, JOIN_S)
            return reached and not self._changed.wait_for(lambda: self.num_done > num_sends, PROBE_S)

    def join(self) -> None:
        self._thread.join(JOIN_S)
        assert not self._thread.is_alive()


class TestArrival:
    def test_boundaries_arrive_whatever_the_order_of_asking(self) -> None:
        sender, receiver = pair = relays(LocalWorld(2), [(0, 1)])
        halves = [ROWS, Rows(2, 4)]
        keys = [(step, boundary, rows) for step in (0, 1) for boundary in (1, 2) for rows in halves]
        for index, (step, boundary, rows) in enumerate(keys):
            sender.send(step, boundary, piece(index, rows), 1)
        seen = [value_of(receiver.recv(*key, 0)) for key in reversed(keys)]
        close_all(pair)
        assert seen == list(range(len(keys)))[::-1]

    def test_equal_boundaries_of_two_peers_are_told_apart(self) -> None:
        everyone = relays(LocalWorld(3), [(0, 2), (1, 2)])
        for rank in (0, 1):
            everyone[rank].send(0, 1, piece(rank), 2)
        seen = [value_of(everyone[2].recv(0, 1, ROWS, peer)) for peer in (1, 0)]
        close_all(everyone)
        assert seen == [1, 0]

    @pytest.mark.parametrize("row_leaves", [None, (True, False), ()])
    def test_row_leaves_arrive_with_the_tree(self, row_leaves: tuple[bool, ...] | None) -> None:
        sender, receiver = pair = relays(LocalWorld(2), [(0, 1)])
        tree = (torch.zeros(2, 1), None)[: 2 if row_leaves is None else len(row_leaves)]
        sender.send(0, 1, RowTree(Rows(3, 5), tree, row_leaves), 1)
        arrived = receiver.recv(0, 1, Rows(3, 5), 0)
        close_all(pair)
        assert (arrived.rows, arrived.row_leaves, len(arrived.tree)) == (Rows(3, 5), row_leaves, len(tree))

    def test_receive_waits_for_a_boundary_sent_later(self) -> None:
        sender, receiver = pair = relays(LocalWorld(2), [(0, 1)])
        seen: list[float] = []
        with thread(lambda: seen.append(value_of(receiver.recv(0, 1, ROWS, 0)))):
            sender.send(0, 2, piece(2.0), 1)
            sender.send(0, 1, piece(1.0), 1)
        close_all(pair)
        assert seen == [1.0]


class TestRunningAhead:
    @pytest.mark.parametrize("max_in_flight", [1, 2, 3])
    def test_receiver_that_stays_at_a_step_lets_two_queues_and_one_message_pass(self, max_in_flight: int) -> None:
        # A queue on the receiver's shelf, one message in its hand, a queue under way from the sender.
        pair = relays(LocalWorld(2), [(0, 1)], max_in_flight=max_in_flight)
        pair[1].begin_step(0)
        allowed = 2 * max_in_flight + 1
        sender = Sender(pair[0], num_steps=allowed + 3)
        assert sender.waits_after(allowed)
        pair[1].begin_step(2)
        assert sender.waits_after(allowed + 2)
        pair[1].begin_step(3)
        sender.join()
        pair[1].begin_step(allowed + 3)
        close_all(pair)

    def test_bound_counts_steps_not_messages(self) -> None:
        pair = relays(LocalWorld(2), [(0, 1)], max_in_flight=2)
        sender = Sender(pair[0], num_steps=6, per_step=3)
        assert sender.waits_after(4 * 3)
        pair[1].begin_step(6)
        sender.join()
        close_all(pair)

    def test_steps_without_a_message_do_not_count(self) -> None:
        pair = relays(LocalWorld(2), [(0, 1)], max_in_flight=1)
        for step in (0, 1000, 2000):
            pair[0].send(step, 1, piece(step), 1)
        pair[1].begin_step(2000)
        assert [value_of(pair[1].recv(step, 1, ROWS, 0)) for step in (0, 1000, 2000)] == [0, 1000, 2000]
        close_all(pair)

    def test_slow_receiver_does_not_hold_up_messages_to_another(self) -> None:
        everyone = relays(LocalWorld(3), [(0, 1), (0, 2)], max_in_flight=1)
        sender = Sender(everyone[0], num_steps=10)
        assert sender.waits_after(3)
        everyone[2].begin_step(20)
        for step in range(20):
            # From another thread than the one that waits for rank 1.
            everyone[0].send(step, 1, piece(step), 2)
        everyone[1].begin_step(20)
        sender.join()
        close_all(everyone)

    def test_ranks_that_send_to_each_other_never_wait_in_a_circle(self) -> None:
        pair = relays(LocalWorld(2), [(0, 1), (1, 0)], max_in_flight=1)

        def work(rank: int) -> list[float]:
            seen = []
            for step in range(50):
                pair[rank].begin_step(step)
                pair[rank].send(step, 1, piece(step), 1 - rank)
                seen.append(value_of(pair[rank].recv(step, 1, ROWS, 1 - rank)))
            pair[rank].close()
            return seen

        assert run_threads(2, work) == [list(range(50))] * 2


class TestTheEnd:
    def test_dead_peer_ends_a_receive_with_an_error_that_names_the_boundary(self) -> None:
        world = LocalWorld(2)
        _, receiver = relays(world, [(0, 1)])
        errors: list[str] = []

        def receive() -> None:
            with pytest.raises(RelayError) as raised:
                receiver.recv(3, 1, ROWS, 0)
            errors.append(str(raised.value))

        with thread(receive):
            world.end(0)
        assert errors[0].startswith("boundary 1 (rows 0:2) of step 3 will not arrive from rank 0: ")

    def test_what_arrived_before_the_peer_died_is_still_given(self) -> None:
        world = LocalWorld(2)
        sender, receiver = relays(world, [(0, 1)])
        sender.send(0, 1, piece(5.0), 1)
        world.end(0)
        assert value_of(receiver.recv(0, 1, ROWS, 0)) == 5.0
        with pytest.raises(RelayError, match="of step 1 will not arrive from rank 0"):
            receiver.recv(1, 1, ROWS, 0)

    def test_any_dead_source_ends_the_wait_for_another(self) -> None:
        world = LocalWorld(3)
        everyone = relays(world, [(0, 2), (1, 2)])
        world.end(0)
        with pytest.raises(RelayError, match=r"will not arrive from rank 1: .*rank 0"):
            everyone[2].recv(0, 1, ROWS, 1)
        world.end(1)

    def test_dead_peer_ends_a_send_that_waits_for_it(self) -> None:
        world = LocalWorld(2)
        sender = Relay(world.transports[0], sources=[], destinations=[1], max_in_flight=1)
        sender.send(0, 1, piece(0), 1)

        def send_on(rank: int) -> None:
            sender.send(1, 1, piece(1), 1)

        with thread(lambda: world.end(1)), pytest.raises(RankError, match="RelayError: sending from rank 0 to rank 1"):
            run_threads(1, send_on)

    def test_connection_lost_when_a_send_begins_is_the_same_error(self, monkeypatch: pytest.MonkeyPatch) -> None:
        world = LocalWorld(2)
        sender, _ = pair = relays(world, [(0, 1)])

        def refuse(message: Message, peer: int, lane: Lane) -> Pending:
            raise TransportError("sending from rank 0 to rank 1 failed: reset")

        with monkeypatch.context() as patch:
            patch.setattr(world.transports[0], "send", refuse)
            with pytest.raises(RelayError, match="sending from rank 0 to rank 1 failed: reset"):
                sender.send(0, 1, piece(0), 1)
        close_all(pair)

    def test_boundary_asked_of_a_peer_that_has_closed_is_an_error_not_a_wait(self) -> None:
        pair = relays(LocalWorld(2), [(0, 1)])
        pair[0].close()
        with pytest.raises(RelayError, match="of step 0 will not arrive from rank 0: it has closed its relay"):
            pair[1].recv(0, 1, ROWS, 0)
        pair[1].close()

    def test_close_hands_over_everything_and_ends_the_threads(self) -> None:
        before = threading.active_count()
        pair = relays(LocalWorld(2), [(0, 1), (1, 0)])
        for rank in (0, 1):
            pair[rank].send(0, 1, piece(rank), 1 - rank)
        close_all(pair)
        assert threading.active_count() == before
        assert [value_of(pair[rank].recv(0, 1, ROWS, 1 - rank)) for rank in (0, 1)] == [1, 0]

    def test_close_reports_a_peer_that_died_before_it_had_everything(self) -> None:
        world = LocalWorld(2)
        sender = Relay(world.transports[0], sources=[], destinations=[1])
        sender.send(0, 1, piece(0), 1)
        world.end(1)
        with pytest.raises(RelayError, match="sending from rank 0 to rank 1 failed"):
            sender.close()

    def test_close_that_fails_lets_senders_go_on(self) -> None:
        world = LocalWorld(3)
        first = Relay(world.transports[0], sources=[], destinations=[1], max_in_flight=1)
        middle = Relay(world.transports[1], sources=[0], destinations=[2], max_in_flight=1)
        sender = Sender(first, num_steps=20)
        assert sender.waits_after(3)
        world.end(2)
        with pytest.raises(RelayError, match="sending from rank 1 to rank 2 failed"):
            middle.close()
        sender.join()
        first.close()

    def test_abandon_waits_for_nobody_and_lets_senders_go_on(self) -> None:
        pair = relays(LocalWorld(2), [(0, 1)], max_in_flight=1)
        sender = Sender(pair[0], num_steps=20)
        assert sender.waits_after(3)
        pair[1].abandon()
        sender.join()
        pair[0].close()

    def test_abandon_does_not_wait_for_sends_under_way(self) -> None:
        sender = Relay(LocalWorld(2).transports[0], sources=[], destinations=[1])
        sender.send(0, 1, piece(0), 1)
        with thread(sender.abandon):
            pass


class Steps:
    """The jobs of a rank that learns nothing but how many steps it did; its learner may be blocked."""

    is_full = False

    def __init__(self) -> None:
        self.may_learn = threading.Event()
        self.may_learn.set()

    def teach(self, block: int, boundary: Tensor) -> Tensor:
        return boundary + 1

    def learn(self, block: int, boundary: Any, target: Any, labels: Any, rows: Rows, num_rows: int) -> Tensor:
        assert self.may_learn.wait(JOIN_S)
        loss: Tensor = (target - boundary).sum()
        return loss

    def settle(self) -> None:
        pass


@pytest.mark.parametrize("max_in_flight", [1, 2])
def test_slowed_last_rank_does_not_hold_up_the_first_ranks_updates_beyond_the_queues(max_in_flight: int) -> None:
    # Rank 2 stands at step 0. Rank 1 gets stuck when it sends for step 2 * max_in_flight + 1, and rank 0 completes
    # 2 * max_in_flight more steps after that one.
    num_free = 2 * (2 * max_in_flight + 1)
    num_steps = num_free + 3
    plan, world = Plan.straight([1, 1, 1]), LocalWorld(3)
    ranks = relays(world, [(0, 1), (1, 2)], max_in_flight=max_in_flight)
    jobs = [Steps() for _ in ranks]
    jobs[2].may_learn.clear()
    num_done = 0
    changed = threading.Condition()

    def work(rank: int) -> None:
        nonlocal num_done
        executor = Executor(jobs[rank], ranks[rank], GradientReducer(world.transports[rank], {}), cuts_rows=False)
        program = compile_programs(plan, 2)[rank]
        for step in range(num_steps):
            executor.run(program, step, {0: RowTree(ROWS, torch.zeros(2, 1))} if rank == 0 else {})
            with changed:
                num_done += rank == 0
                changed.notify_all()
        ranks[rank].close()

    with thread(lambda: run_threads(3, work)):
        with changed:
            is_reached = changed.wait_for(lambda: num_done >= num_free, JOIN_S)
            is_exceeded = changed.wait_for(lambda: num_done > num_free, PROBE_S)
        jobs[2].may_learn.set()
    assert (is_reached, is_exceeded, num_done) == (True, False, num_steps)
