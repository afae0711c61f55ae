"""The processes of one start find each other in a store that is full of what earlier starts have left."""

from __future__ import annotations

import threading
from datetime import timedelta

import pytest
from torch.distributed import HashStore, Store

from lightning_pipebd.runtime.rendezvous import agent_address, store_of_start
from tests.helpers.ranks import run_threads

LIMIT = timedelta(seconds=20)


def test_every_start_has_a_store_of_its_own() -> None:
    store = HashStore()

    def start(rank: int, round_: int) -> bytes:
        own = store_of_start(store, rank, 3, LIMIT)
        assert not own.check(["address"]) or own.get("address") == str(round_).encode()
        own.set("address", str(round_))
        return bytes(own.get("address"))

    for round_ in range(4):
        assert run_threads(3, start, round_) == [str(round_).encode()] * 3


def test_processes_of_another_number_are_another_start() -> None:
    store = HashStore()
    first = run_threads(2, lambda rank: store_of_start(store, rank, 2, LIMIT))
    first[0].set("key", "of two")
    (alone,) = run_threads(1, lambda rank: store_of_start(store, rank, 1, LIMIT))
    assert not alone.check(["key"])


def test_a_process_that_died_before_the_others_came_is_not_waited_for() -> None:
    store = HashStore()
    with pytest.raises(TimeoutError, match=r"All 2 processes must start within .* rank 1 waits for others"):
        store_of_start(store, 1, 2, timedelta(seconds=0.01))
    found: dict[int, Store] = {}

    def start(rank: int) -> None:
        found[rank] = store_of_start(store, rank, 2, LIMIT)

    # Rank 0 comes first, and lists the token of the dead process, until the living one comes.
    threads = [threading.Thread(target=start, args=(rank,)) for rank in range(2)]
    threads[0].start()
    threads[0].join(0.2)
    assert not found
    threads[1].start()
    for thread in threads:
        thread.join(20)
    found[0].set("key", "value")
    assert found[1].get("key") == b"value"


def test_only_an_agent_keeps_a_store(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TORCHELASTIC_USE_AGENT_STORE", raising=False)
    assert agent_address() is None
    for name, value in (("TORCHELASTIC_USE_AGENT_STORE", "True"), ("MASTER_ADDR", "node-1"), ("MASTER_PORT", "77")):
        monkeypatch.setenv(name, value)
    assert agent_address() == ("node-1", 77)
