"""How processes end together: a start that not all reach, a rank that stalls, processes that outlive their launcher."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta

from lightning_pipebd.lightning_internals.processes import LAUNCHER, ProcessGroupStrategy, launched_processes
from lightning_pipebd.planning.compiler import compile_programs
from lightning_pipebd.planning.plan import Plan
from lightning_pipebd.planning.program import Program
from lightning_pipebd.runtime.progress import Progress
from lightning_pipebd.runtime.transport import Transport
from lightning_pipebd.runtime.watcher import Bounds, Runner, Watcher

__all__ = ["check_time_limit", "report_failure", "start_limit", "start_watcher", "tie_to_launcher", "watch_plan"]

_PR_SET_PDEATHSIG = 1
_STATUS = 1
_EXIT_S = 20


def check_time_limit(name: str, value: timedelta | None) -> None:
    """Refuse what is no time to wait.

    Raises:
        ValueError: The time is not above 0.
    """
    if value is not None and value <= timedelta(0):
        raise ValueError(f"`{name}` must be above 0, but is {value}. Use the default.")


@contextmanager
def start_limit(strategy: ProcessGroupStrategy, limit: timedelta) -> Iterator[None]:
    """End this process, and those it launched, unless all processes of the run have met before the limit."""
    environment = strategy.cluster_environment
    assert environment is not None
    tie_to_launcher(is_tied=True)

    def end() -> None:
        total = strategy.num_nodes * strategy.num_processes
        _say(
            f"All {total} processes must start within `start_timeout` ({limit}), but rank {strategy.global_rank} on "
            f"{socket.gethostname()} still waits for others at {environment.main_address}:{environment.main_port}. See "
            "which process has not started and why; or raise `start_timeout` of PipeBDStrategy."
        )
        for process in launched_processes(strategy):
            process.kill()
        os._exit(_STATUS)

    timer = threading.Timer(limit.total_seconds(), end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def tie_to_launcher(*, is_tied: bool) -> None:
    """Have the system end this process with the one that launched it, or not any more; on Linux only.

    Lightning's launcher is the process of rank 0. When that ends, nobody is left to end a process that is stopped.
    """
    if _is_launched() and sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL if is_tied else 0)


def watch_plan(
    strategy: ProcessGroupStrategy,
    transport: Transport,
    progress: Progress,
    runner: Runner,
    plan: Plan,
    target_blocks: frozenset[int],
    limits: tuple[timedelta | None, timedelta],
    *,
    tells_programs: bool = True,
) -> Watcher:
    """**Collective** over all ranks: watch over a fit of blocks that learn by themselves.

    Args:
        strategy: The strategy whose fit it is.
        transport: Reaches the other ranks.
        progress: Written by the main thread.
        runner: Runs the programs.
        plan: The plan of the fit.
        target_blocks: Blocks that want labels.
        limits: Times without progress: in steps (``None``: any), and elsewhere.
        tells_programs: Whether the programs of a batch follow from its rows, so that a report can lay them out.
    """
    jobs = [
        block
        for block in range(plan.num_blocks)
        if transport.rank in plan.student_ranks(block) or transport.rank in plan.teacher_ranks(block)
    ]

    def programs(num_rows: int, is_update: bool) -> Sequence[Program]:
        if not tells_programs:
            return ()
        return compile_programs(plan, num_rows, target_blocks=target_blocks, update=is_update)

    return start_watcher(strategy, transport, progress, runner, jobs, programs, limits)


def start_watcher(
    strategy: ProcessGroupStrategy,
    transport: Transport,
    progress: Progress,
    runner: Runner,
    blocks: Sequence[int],
    programs: Callable[[int, bool], Sequence[Program]],
    limits: tuple[timedelta | None, timedelta],
) -> Watcher:
    """**Collective** over all ranks: watch over a fit.

    Args:
        strategy: The strategy whose fit it is.
        transport: Reaches the other ranks.
        progress: Written by the main thread.
        runner: Runs the programs.
        blocks: This rank's blocks.
        programs: Gives all ranks' programs for a batch; none if they cannot be told again.
        limits: Times without progress: in steps (``None``: any), and elsewhere.
    """
    rank, environment = transport.rank, strategy.cluster_environment

    def end(culprit: int) -> None:
        if _is_launched() and culprit == rank - strategy.local_rank:
            # The process that launched this one is the one that is stopped: nobody else will end it.
            with suppress(ProcessLookupError):
                os.kill(os.getppid(), signal.SIGKILL)
        os._exit(_STATUS)

    stall, other = limits
    return Watcher(
        transport,
        progress,
        runner,
        Bounds(float("inf") if stall is None else stall.total_seconds(), other.total_seconds()),
        blocks=",".join(map(str, blocks)),
        programs=programs,
        towards=environment.main_address if environment is not None else "127.0.0.1",
        end=end,
    )


def _is_launched() -> bool:
    return os.environ.get(LAUNCHER) == str(os.getppid())


def report_failure(error: BaseException, report: str) -> None:
    """Print the report of a failed run above the traceback, with the original traceback where it is this rank's own."""
    if report and not isinstance(error, KeyboardInterrupt):
        _say(report)
    # Twice is once: a process whose user catches the error may fail again.
    atexit.unregister(_limit_exit)
    atexit.register(_limit_exit)


def _limit_exit() -> None:
    # After a failure the libraries' own threads may wait for peers that are gone, when nothing in Python runs any more.
    # The system's alarm still ends the process.
    if hasattr(signal, "alarm") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(_EXIT_S)


def _say(text: str) -> None:
    # Nobody may read it any more; what has to be done after it must be done all the same.
    with suppress(OSError, ValueError):
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
