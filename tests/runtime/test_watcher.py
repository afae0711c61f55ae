"""The watcher over ranks that are threads: what it hears, whom it blames, and when it ends the process."""

from __future__ import annotations

import errno
import queue
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Program
from lightning_pipebd.planning.standing import Standing
from lightning_pipebd.runtime import watcher as watching
from lightning_pipebd.runtime.heartbeats import Heartbeats
from lightning_pipebd.runtime.local_transport import LocalWorld
from lightning_pipebd.runtime.progress import NUM_WARM_UP_STEPS, Progress
from lightning_pipebd.runtime.relay import RelayError
from lightning_pipebd.runtime.watcher import Bounds, Watcher
from tests.helpers.ranks import run_threads

PROGRAMS = compile_programs(Plan.straight([1, 1]), 8)


def programs(num_rows: int, is_update: bool) -> Sequence[Program]:
    return compile_programs(Plan.straight([1, 1]), num_rows, update=is_update)


class Rank:
    """A rank without an executor of its own: the test says where it stands."""

    def __init__(self, world: LocalWorld, rank: int, bounds: Bounds) -> None:
        self.progress = Progress()
        self.executor: Any = SimpleNamespace(current=None, num_done=0)
        self.ended: queue.SimpleQueue[int] = queue.SimpleQueue()
        self.watcher = Watcher(
            world.transports[rank],
            self.progress,
            self.executor,
            bounds,
            blocks=str(rank),
            programs=programs,
            towards="127.0.0.1",
            end=self.ended.put,
        )

    def stand_at(self, rank: int, position: int) -> None:
        """Be in a program, behind the first steps."""
        self.progress.num_steps = NUM_WARM_UP_STEPS
        self.progress.step, self.progress.num_rows, self.progress.is_training = 7, 8, True
        self.executor.current = (PROGRAMS[rank], position)
        self.executor.num_done += 1


@contextmanager
def two_ranks(bounds: Bounds) -> Iterator[list[Rank]]:
    world = LocalWorld(2)
    ranks = run_threads(2, lambda rank: Rank(world, rank, bounds))
    try:
        yield ranks
    finally:
        for rank in ranks:
            rank.watcher.close()


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(watching, "_TICK_S", 0.02)


def test_a_stalled_rank_is_named_by_all_with_its_action_and_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    with two_ranks(Bounds(0.2, 60.0, grace_s=0.1)) as (zero, one):
        zero.stand_at(0, 3)
        one.stand_at(1, 0)
        assert (zero.ended.get(timeout=20), one.ended.get(timeout=20)) == (0, 0)
    report = capsys.readouterr().err
    assert "ends, because rank 0 has made no progress for 0." in report
    assert "step 7: LEARN block=0 rows=0:8" in report
    assert "step 7: RECV boundary=1 rows=0:8 from=0, waits for rank 0" in report
    assert "LEARN 0 0:8 <--" in report
    assert "raise `stall_timeout` of PipeBDStrategy" in report
    assert "Rank 0 is stuck here (most recent call last)" in report


def test_a_rank_that_goes_on_is_left_alone() -> None:
    with two_ranks(Bounds(0.3, 60.0)) as (zero, one):
        stop = threading.Event()
        for _ in range(40):
            zero.stand_at(0, 3)
            one.stand_at(1, 0)
            stop.wait(0.02)
        assert zero.ended.empty()
        assert one.ended.empty()


def test_hooks_and_evaluation_have_a_bound_of_their_own() -> None:
    with two_ranks(Bounds(0.1, 60.0)) as (zero, one):
        zero.progress.mark("evaluating")
        one.stand_at(1, 0)
        with pytest.raises(queue.Empty):
            one.ended.get(timeout=0.6)
        assert zero.ended.empty()


def test_a_rank_that_was_never_heard_is_blamed_by_a_rank_that_waits(capsys: pytest.CaptureFixture[str]) -> None:
    world = LocalWorld(2)

    def start(rank: int) -> Any:
        if rank == 0:
            return Rank(world, rank, Bounds(0.2, 60.0))
        silent = Heartbeats(rank)
        world.transports[rank].all_gather_object((silent.introduce(), Standing(rank)))
        silent.close()
        return None

    zero = run_threads(2, start)[0]
    for _ in range(20):
        zero.stand_at(0, 3)
        time.sleep(0.02)
    assert zero.ended.empty(), "nobody is missed while this rank gets on"
    zero.stand_at(0, 2)
    assert zero.ended.get(timeout=20) == 1
    zero.watcher.close()
    assert "ends, because rank 1 has not been heard of for 0." in capsys.readouterr().err


def test_a_failure_is_told_to_the_others_who_end_if_they_cannot_by_themselves() -> None:
    with two_ranks(Bounds(60.0, 60.0, grace_s=0.1)) as (zero, one):
        zero.stand_at(0, 3)
        report = zero.watcher.fail(ArithmeticError("does not converge"))
        assert "because rank 0 failed: ArithmeticError: does not converge" in report
        assert "LEARN 0 0:8 <--" in report
        assert one.ended.get(timeout=20) == 0


def test_an_echo_names_the_rank_that_failed_first() -> None:
    with two_ranks(Bounds(60.0, 60.0, grace_s=60.0)) as (zero, one):
        zero.watcher.fail(ArithmeticError("does not converge"))
        one.stand_at(1, 0)
        report = one.watcher.fail(RelayError("will not arrive from rank 0"))
        assert "Rank 1" in report.splitlines()[0]
        assert "because rank 0 failed: ArithmeticError: does not converge" in report


def test_a_rank_that_died_without_a_word_is_named_by_the_one_that_waited_for_it() -> None:
    with two_ranks(Bounds(60.0, 60.0)) as (_, one):
        one.stand_at(1, 0)
        report = one.watcher.fail(RelayError("will not arrive from rank 0"))
        assert "because rank 0 has closed its connections without a word" in report


def test_a_rank_that_meets_all_others_while_one_of_them_waits_for_it_is_named(
    capsys: pytest.CaptureFixture[str],
) -> None:
    with two_ranks(Bounds(0.2, 60.0, grace_s=0.1)) as (zero, one), zero.progress.meeting((1,)):
        one.stand_at(1, 0)
        assert zero.ended.get(timeout=20) == one.ended.get(timeout=20)
    report = capsys.readouterr().err
    assert "wait for each other" in report
    assert "step -1: meeting all ranks, waits for rank 1" in report


def test_a_collective_is_a_meeting() -> None:
    world, progress = LocalWorld(2), Progress()
    world.transports[0].meeting = partial(progress.meeting, (1,))
    mine = threading.Thread(target=world.transports[0].all_gather_object, args=(0,))
    mine.start()
    while 1 not in progress.waits_for:
        time.sleep(0.01)
    world.transports[1].all_gather_object(1)
    mine.join(20)
    assert not progress.waits_for


def test_after_the_end_nothing_is_said_and_nothing_is_waited_for() -> None:
    with two_ranks(Bounds(60.0, 60.0)) as (zero, _):
        zero.watcher.close()
        assert zero.watcher.fail(ArithmeticError("in a validation after the training")) == ""


def test_a_rank_ends_even_if_its_report_cannot_be_written(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(text: str) -> None:
        raise BrokenPipeError

    monkeypatch.setattr("sys.stderr", SimpleNamespace(write=refuse, flush=lambda: None))
    monkeypatch.setattr(threading, "excepthook", lambda args: None)
    with two_ranks(Bounds(0.2, 60.0, grace_s=0.1)) as (zero, one):
        zero.stand_at(0, 3)
        one.stand_at(1, 0)
        assert (zero.ended.get(timeout=20), one.ended.get(timeout=20)) == (0, 0)


def test_the_bound_grows_with_slow_steps_and_is_wide_at_the_start() -> None:
    bounds = Bounds(stall_s=60.0, other_s=1800.0)
    assert bounds.while_training(num_steps=0, slowest_s=0.0) == 300.0
    assert bounds.while_training(num_steps=NUM_WARM_UP_STEPS, slowest_s=1.0) == 60.0
    assert bounds.while_training(num_steps=NUM_WARM_UP_STEPS, slowest_s=9.0) == 90.0


def test_heartbeats_of_another_run_are_not_believed() -> None:
    mine, other = Heartbeats(0), Heartbeats(1)
    introductions = [mine.introduce(), other.introduce()]
    mine.connect(introductions)
    other.connect([("127.0.0.1", introductions[0][1], "another run"), introductions[1]])
    other.send(Standing(1))
    other.connect(introductions)
    other.send(Standing(1, place="LEARN"))
    received: list[Standing] = []
    while not received:
        received = mine.receive()
    assert received == [Standing(1, place="LEARN")]
    mine.close()
    other.close()


def test_a_rank_that_knows_itself_by_a_loopback_address_alone_reaches_other_machines() -> None:
    mine = Heartbeats(0, "127.0.0.1")
    mine.connect([mine.introduce(), ("192.0.2.77", 9, "")])
    try:
        mine._socket.sendto(b"", ("192.0.2.77", 9))
    except OSError as error:
        if error.errno in (errno.ENETUNREACH, errno.EHOSTUNREACH):
            pytest.skip("this machine has no network")
        raise
    finally:
        mine.close()


def test_heartbeats_are_heard_from_a_rank_whose_name_cannot_be_resolved() -> None:
    mine, other = Heartbeats(0), Heartbeats(1, "no such host.invalid")
    introductions = [mine.introduce(), other.introduce()]
    for each in (mine, other):
        each.connect(introductions)
    other.send(Standing(1, place="LEARN"))
    received: list[Standing] = []
    while not received:
        received = mine.receive()
    assert received == [Standing(1, place="LEARN")]
    for each in (mine, other):
        each.close()
        assert each.receive() == []


def test_progress_measures_steps_and_loading_after_the_first_ones() -> None:
    progress = Progress()
    for step in range(NUM_WARM_UP_STEPS):
        with progress.program(step, 8, is_update=True):
            assert progress.is_training
    assert progress.slowest_s == 0.0
    assert list(progress.loading(iter([1, 2]), waits_for=(0,))) == [1, 2]
    assert progress.slowest_s > 0.0
    assert not progress.is_training
