"""A store for the processes of one start, out of a store that outlives them.

torchrun keeps one store over all restarts of a job. What an earlier start has left there (the addresses of processes
that have ended) is found by the next one: its processes then wait for dead ones. Nothing that torchrun tells them
numbers the starts alike on all machines, so the processes find out by themselves which of them belong together.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store  # type: ignore[attr-defined]  # documented, not in the stubs

__all__ = ["agent_address", "store_of_start"]

_POLL_S = 0.05


def agent_address() -> tuple[str, int] | None:
    """Give host and port of the store that torchrun's agent keeps over restarts; ``None`` without one."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        return None
    return os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])


def store_of_start(store: Store, rank: int, num_ranks: int, limit: timedelta) -> Store:
    """**Collective** over all ranks: give a part of the store that no earlier start has written to.

    Every process announces itself by a token of its own. Rank 0 lists the tokens that it finds, which may be those of
    dead processes, and lists them anew whenever one changes. A process confirms the list that has its token; when all
    have confirmed one list, these processes are all alive, and its name is their store's.

    Args:
        store: Reaches all processes.
        rank: This process.
        num_ranks: Processes of this start.
        limit: How long to wait.

    Raises:
        TimeoutError: Not all processes have come in time.
    """
    store = PrefixStore(f"pipebd/{num_ranks}", store)
    token = os.urandom(8).hex()
    store.set(f"token/{rank}", token)
    deadline = time.monotonic() + limit.total_seconds()
    confirmed = ""
    while True:
        if rank == 0:
            confirmed = _list_tokens(store, token, num_ranks)
        listed = _read(store, "list")
        if listed and json.loads(listed)[rank] == token:
            if rank > 0:
                store.set(f"confirmed/{rank}", listed)
                confirmed = listed
            if confirmed and _read(store, "complete") == confirmed:
                return PrefixStore(f"start/{hashlib.sha256(confirmed.encode()).hexdigest()}", store)
        if time.monotonic() > deadline:
            raise TimeoutError(
                f"All {num_ranks} processes must start within {limit}, but rank {rank} waits for others."
            )
        time.sleep(_POLL_S)


def _list_tokens(store: Store, own: str, num_ranks: int) -> str:
    """Do rank 0's part once: list the tokens, and say whether all have confirmed the list; give it."""
    tokens: Sequence[str] = [own, *(_read(store, f"token/{rank}") for rank in range(1, num_ranks))]
    if not all(tokens):
        return ""
    listed = json.dumps(tokens)
    store.set("list", listed)
    if all(_read(store, f"confirmed/{rank}") == listed for rank in range(1, num_ranks)):
        store.set("complete", listed)
    return listed


def _read(store: Store, key: str) -> str:
    return store.get(key).decode() if store.check([key]) else ""
