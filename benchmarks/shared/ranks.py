"""Real processes as ranks, started quickly: a server that has imported everything forks them."""

from __future__ import annotations

import multiprocessing
import os
import select
import socket
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

__all__ = ["run_ranks", "run_side_by_side"]

T = TypeVar("T")

_CONTEXT = multiprocessing.get_context("forkserver")
_TAIL = 4000
_PATIENCE_S = 120


def run_ranks(function: Callable[..., T], num_ranks: int, *args: Any) -> list[T]:
    """Call a function in each of some new processes, which a distributed strategy takes for its ranks.

    Args:
        function: A module's function.
        num_ranks: Number of processes.
        args: Of the function.

    Returns:
        What every rank's function gave.

    Raises:
        RuntimeError: A process failed; the message ends with what it printed.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environments = [
        {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "NODE_RANK": "0", "LOCAL_RANK": str(rank)}
        for rank in range(num_ranks)
    ]
    return _run([(function, args, environment) for environment in environments])


def run_side_by_side(function: Callable[..., T], argument_lists: list[tuple[Any, ...]]) -> list[T]:
    """Call a function with each of some arguments, in processes that know nothing of each other."""
    return _run([(function, args, {}) for args in argument_lists])


def _run(calls: list[tuple[Callable[..., T], tuple[Any, ...], dict[str, str]]]) -> list[T]:
    # The server forks what it has imported: a process starts in a moment, and shares no state with the one before.
    _CONTEXT.set_forkserver_preload(["lightning_pipebd", "torchvision.models"])
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as folder:
        gate = _CONTEXT.Barrier(len(calls))
        started: list[tuple[BaseProcess, Connection, Path]] = []
        for index, call in enumerate(calls):
            receiver, sender = _CONTEXT.Pipe(duplex=False)
            log = Path(folder, f"{index}.txt")
            process: BaseProcess = _CONTEXT.Process(target=_call, args=(*call, gate, str(log), sender))
            process.start()
            sender.close()
            started.append((process, receiver, log))
        try:
            return _collect(started)
        finally:
            for process, _, _ in started:
                process.kill()
                process.join()


def _collect(started: list[tuple[BaseProcess, Connection, Path]]) -> list[Any]:
    results: dict[Connection, Any] = {}
    waiting = {receiver: (process, log) for process, receiver, log in started}
    while waiting:
        for receiver in wait(list(waiting)):
            assert isinstance(receiver, Connection)
            process, log = waiting.pop(receiver)
            try:
                results[receiver] = receiver.recv()
            except EOFError:
                process.join()
                raise RuntimeError(f"A process failed ({process.exitcode}).\n{log.read_text()[-_TAIL:]}") from None
    return [results[receiver] for _, receiver, _ in started]


def _end_with_reader(sender: Connection) -> None:
    """End this process when nobody is left to read its result, because the benchmark was killed."""
    ends = select.poll()
    ends.register(sender.fileno(), select.POLLERR)
    ends.poll()
    os._exit(1)


def _call(
    function: Callable[..., Any],
    args: tuple[Any, ...],
    environment: dict[str, str],
    gate: threading.Barrier,
    log: str,
    sender: Connection,
) -> None:
    threading.Thread(target=_end_with_reader, args=(sender,), daemon=True).start()
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ.update(environment)
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    try:
        # Together, also where nobody knows of the others: they shall share the machine all the time.
        gate.wait(_PATIENCE_S)
        sender.send(function(*args))
    except BaseException:
        traceback.print_exc()
        # Whatever still waits for another rank must not keep this process.
        os._exit(1)
    if dist.is_initialized():
        dist.destroy_process_group()
