"""Run one function on several ranks: as threads for behaviour, as processes for truth.

Both ways have one signature: ``function(rank, *args)`` runs once per rank, the results come back in rank order, and
the first failure is raised in the caller as a `RankError` that names its rank.
"""

from __future__ import annotations

import contextlib
import faulthandler
import functools
import multiprocessing
import os
import pickle
import queue
import random
import signal
import socket
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed

__all__ = ["SEED", "RankError", "find_free_port", "run_processes", "run_threads", "seed_generators"]

#: Every test and every rank starts from this seed.
SEED = 1234

#: Once one rank has failed, how long the others may still report what they saw of it.
_GRACE_S = 1.0

#: How long a rank may need to end after its function has returned.
_EXIT_S = 15.0

_NUM_PORT_ATTEMPTS = 3


class RankError(RuntimeError):
    """A rank raised, died or did not end; ``__cause__`` is its exception where it could be carried over.

    Args:
        rank: The rank that failed first.
        num_ranks: How many ranks there were.
        detail: Traceback or exit status, and what the other ranks saw.
    """

    def __init__(self, rank: int, num_ranks: int, detail: str) -> None:
        super().__init__(f"Rank {rank} of {num_ranks} failed: {detail}")
        self.rank = rank


@dataclass(frozen=True)
class _Outcome:
    """What one rank came to: `failure` is `None`, or the text of its traceback or exit status."""

    rank: int
    result: Any = None
    failure: str | None = None
    error: BaseException | None = None
    time_s: float = 0.0


@dataclass(frozen=True)
class _Child:
    rank: int
    process: ForkServerProcess
    pipe: Connection
    stack_path: Path


def seed_generators(seed: int = SEED) -> None:
    """Put every random generator of this process into a known state, without leaving a trace in the environment."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_threads(num_ranks: int, function: Callable[..., Any], *args: object, timeout: float = 30.0) -> list[Any]:
    """Call ``function(rank, *args)`` in one thread per rank and give the results in rank order.

    The threads share one random generator; what depends on it needs `run_processes`.

    Args:
        num_ranks: How many threads to start, at least 1.
        function: Called once per rank, with the rank first.
        args: Handed to every rank as they are, not copied.
        timeout: Seconds after which a missing result is an error.

    Raises:
        RankError: A rank raised; the first in time is named and is the cause.
        TimeoutError: A rank neither returned nor raised in time; the message shows where it stands.
    """
    done: queue.SimpleQueue[_Outcome] = queue.SimpleQueue()

    def run(rank: int) -> None:
        done.put(_call(rank, function, args))

    threads = [
        threading.Thread(target=run, args=(rank,), name=f"rank-{rank}", daemon=True) for rank in range(num_ranks)
    ]
    for thread in threads:
        thread.start()
    outcomes: dict[int, _Outcome] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < num_ranks:
        try:
            outcome = done.get(timeout=max(0.0, deadline - time.monotonic()))
        except queue.Empty:
            break
        outcomes[outcome.rank] = outcome
        if outcome.failure is not None:
            deadline = min(deadline, time.monotonic() + _GRACE_S)
    _raise_first_failure(outcomes, num_ranks)
    missing = {rank: _thread_stack(threads[rank]) for rank in range(num_ranks) if rank not in outcomes}
    _raise_timeout("run_threads", missing, num_ranks, timeout)
    for thread in threads:
        thread.join()
    return [outcomes[rank].result for rank in range(num_ranks)]


def run_processes(num_ranks: int, function: Callable[..., Any], *args: object, timeout: float = 60.0) -> list[Any]:
    """Call ``function(rank, *args)`` in one process per rank and give the results in rank order.

    Every process finds the environment that an external launcher leaves (`RANK`, `WORLD_SIZE`, `LOCAL_RANK`,
    `MASTER_ADDR`, a free `MASTER_PORT`, ...), so ``init_process_group("gloo")`` and a Lightning `Trainer` need nothing
    else. No rank exits before all have returned; a process group still open then is destroyed. Nothing outlives the
    call: after a failure the remaining ranks are ended.

    Args:
        num_ranks: How many processes to start, at least 1.
        function: Called once per rank, with the rank first; must be importable from its module.
        args: Copied to every rank by pickling.
        timeout: Seconds from the start of the last process after which a missing result is an error.

    Returns:
        What each rank returned, copied by pickling: a tensor arrives as a tensor with memory of its own.

    Raises:
        RankError: A rank raised, died without a result, or did not end after its result.
        TimeoutError: A rank neither returned nor raised in time; the message shows where it stands.
    """
    return _run_processes(num_ranks, pickle.dumps((function, args)), timeout, _NUM_PORT_ATTEMPTS)


def _run_processes(num_ranks: int, payload: bytes, timeout: float, num_attempts: int) -> list[Any]:
    try:
        return _run_processes_once(num_ranks, payload, timeout)
    except RankError as error:
        # Between finding a free port and listening on it, another process may take it.
        if num_attempts == 1 or "address already in use" not in str(error).lower():
            raise
    return _run_processes(num_ranks, payload, timeout, num_attempts - 1)


def _run_processes_once(num_ranks: int, payload: bytes, timeout: float) -> list[Any]:
    environment = {**os.environ, **_launcher_environment(num_ranks, find_free_port())}
    children: list[_Child] = []
    with tempfile.TemporaryDirectory() as directory:
        try:
            # Extended one by one, so that a start that fails leaves the earlier ones to be ended.
            children.extend(_start(rank, payload, environment, Path(directory)) for rank in range(num_ranks))
            outcomes = _collect(children, timeout)
            _raise_first_failure(outcomes, num_ranks)
            missing = {child.rank: _process_stack(child) for child in children if child.rank not in outcomes}
            _raise_timeout("run_processes", missing, num_ranks, timeout)
            _let_exit(children)
        finally:
            _end(children)
    return [outcomes[rank].result for rank in range(num_ranks)]


@functools.cache
def _context() -> ForkServerContext:
    """Give the context whose one server imports the heavy packages once and forks every rank from there."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "lightning", "lightning_pipebd", "pytest", "tests.helpers.ranks"])
    return context


def find_free_port() -> int:
    """Give a port of this machine that nobody listens on now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port


def _launcher_environment(num_ranks: int, port: int) -> dict[str, str]:
    return {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "WORLD_SIZE": str(num_ranks),
        "LOCAL_WORLD_SIZE": str(num_ranks),
        "NODE_RANK": "0",
        "GROUP_RANK": "0",
        "OMP_NUM_THREADS": "1",
    }


def _start(rank: int, payload: bytes, environment: dict[str, str], directory: Path) -> _Child:
    ours, theirs = _context().Pipe()
    stack_path = directory / f"rank-{rank}.txt"
    environment = {**environment, "RANK": str(rank), "LOCAL_RANK": str(rank)}
    process = _context().Process(
        target=_serve_rank, args=(rank, payload, environment, theirs, stack_path), name=f"rank-{rank}"
    )
    process.start()
    theirs.close()
    return _Child(rank, process, ours, stack_path)


def _serve_rank(rank: int, payload: bytes, environment: dict[str, str], pipe: Connection, stack_path: Path) -> None:
    os.environ.clear()
    os.environ.update(environment)
    # Back to the platform's way to start processes, as in a user's script. A rank inherits the fork server's, by which
    # every worker of a loader would start a server of its own and import everything anew.
    multiprocessing.set_start_method(None, force=True)  # type: ignore[arg-type]  # documented, not in the stubs
    torch.set_num_threads(1)
    seed_generators()
    with stack_path.open("w") as stack_file:
        faulthandler.register(signal.SIGUSR2, file=stack_file)
        try:
            function, args = pickle.loads(payload)
        except Exception as error:
            outcome = _failed(rank, error)
        else:
            outcome = _call(rank, function, args)
        pipe.send_bytes(_pickle_outcome(outcome))
        if outcome.failure is not None:
            # Its peers may be waiting for this rank: closing its sockets by ending at once is what releases them.
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(1)
        pipe.recv_bytes()
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
        faulthandler.unregister(signal.SIGUSR2)


def _call(rank: int, function: Callable[..., Any], args: tuple[object, ...]) -> _Outcome:
    try:
        return _Outcome(rank, result=function(rank, *args))
    except BaseException as error:
        return _failed(rank, error)


def _failed(rank: int, error: BaseException) -> _Outcome:
    return _Outcome(rank, failure="\n" + traceback.format_exc(), error=error, time_s=time.monotonic())


def _pickle_outcome(outcome: _Outcome) -> bytes:
    """Pickle with plain `pickle`, which copies tensors; multiprocessing's own would share their memory."""
    try:
        payload = pickle.dumps(outcome)
        pickle.loads(payload)
    except Exception as error:
        if outcome.failure is not None:
            return pickle.dumps(replace(outcome, error=None))
        return pickle.dumps(replace(_failed(outcome.rank, error), error=None))
    return payload


def _collect(children: list[_Child], timeout: float) -> dict[int, _Outcome]:
    outcomes: dict[int, _Outcome] = {}
    deadline = time.monotonic() + timeout
    while len(outcomes) < len(children):
        pending = [child for child in children if child.rank not in outcomes]
        handles = [handle for child in pending for handle in (child.pipe, child.process.sentinel)]
        ready = wait(handles, max(0.0, deadline - time.monotonic()))
        if not ready:
            break
        for child in pending:
            if child.pipe in ready or child.process.sentinel in ready:
                outcomes[child.rank] = outcome = _receive(child)
                if outcome.failure is not None:
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
    return outcomes


def _receive(child: _Child) -> _Outcome:
    try:
        if child.pipe.poll():
            outcome: _Outcome = pickle.loads(child.pipe.recv_bytes())
            return outcome
    except (EOFError, ConnectionError):
        pass
    child.process.join(_EXIT_S)
    return _Outcome(child.rank, failure=f"it ended with exit code {child.process.exitcode} and no result.")


def _raise_first_failure(outcomes: dict[int, _Outcome], num_ranks: int) -> None:
    # A rank that died could not say when; what the others report is then its echo, so it comes first (time 0).
    failed = sorted((outcome for outcome in outcomes.values() if outcome.failure), key=lambda outcome: outcome.time_s)
    if failed:
        first, *others = failed
        echoes = [f"\nThen rank {other.rank} failed: {other.failure}" for other in others]
        raise RankError(first.rank, num_ranks, f"{first.failure}{''.join(echoes)}") from first.error


def _raise_timeout(caller: str, stacks: dict[int, str], num_ranks: int, timeout: float) -> None:
    if stacks:
        places = "".join(f"\nRank {rank} stands at\n{stack}" for rank, stack in stacks.items())
        raise TimeoutError(
            f"`{caller}` must have the results of {num_ranks} ranks within {timeout:g} s, "
            f"but rank(s) {', '.join(map(str, stacks))} gave none.{places}"
        )


def _thread_stack(thread: threading.Thread) -> str:
    frame = sys._current_frames().get(thread.ident or 0)
    return "".join(traceback.format_stack(frame)) if frame is not None else "(ended)"


def _process_stack(child: _Child) -> str:
    assert child.process.pid is not None
    with contextlib.suppress(ProcessLookupError):
        os.kill(child.process.pid, signal.SIGUSR2)
    deadline = time.monotonic() + _GRACE_S
    stack, previous = "", None
    # The other process writes line by line and leaves no end mark: what has stopped growing is complete.
    while time.monotonic() < deadline and not (stack and stack == previous):
        child.process.join(0.05)
        stack, previous = child.stack_path.read_text(), stack
    return stack


def _let_exit(children: list[_Child]) -> None:
    for child in children:
        child.pipe.send_bytes(b"all ranks have returned")
    deadline = time.monotonic() + _EXIT_S
    for child in children:
        child.process.join(max(0.0, deadline - time.monotonic()))
        if child.process.is_alive():
            detail = f"it returned but did not end within {_EXIT_S:g} s; it stands at\n{_process_stack(child)}"
            raise RankError(child.rank, len(children), detail)
        if child.process.exitcode != 0:
            detail = f"it returned but then ended with exit code {child.process.exitcode}."
            raise RankError(child.rank, len(children), detail)


def _end(children: list[_Child]) -> None:
    for child in children:
        child.process.terminate()
    deadline = time.monotonic() + _GRACE_S
    for child in children:
        child.process.join(max(0.0, deadline - time.monotonic()))
        if child.process.is_alive():
            # Lightning answers SIGTERM by finishing its batch, which a stalled rank never does.
            child.process.kill()
            child.process.join()
        child.process.close()
        child.pipe.close()
