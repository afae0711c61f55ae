"""torchrun starts a job again after a rank was killed, on as many machines as are left."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from tests.helpers.hosts import joined_hosts, why_not
from tests.helpers.ranks import find_free_port
from tests.helpers.resuming import Leg, run_leg
from tests.helpers.training import assert_same_checkpoint

__all__ = ["ELASTIC", "Restart", "format_restarts", "try_restart"]

ROOT = Path(__file__).parents[1]
SCRIPT = Path(__file__).with_name("elastic_script.py")
PATIENCE_S = 200.0


class Restart(NamedTuple):
    """What was seen of one job.

    Args:
        name: Its name.
        starts: Ranks and step of every start.
        is_complete: Whether torchrun ended with status 0.
        is_equal: Whether the student is the one of one uninterrupted process.
    """

    name: str
    starts: list[tuple[int, int]]
    is_complete: bool
    is_equal: bool


def try_restart(name: str) -> Restart | None:
    """Run a job of torchrun, disturb it, and compare what comes out; nothing where hosts cannot be had."""
    if ELASTIC[name] is _two_hosts and why_not():
        return None
    with tempfile.TemporaryDirectory() as text:
        directory = Path(text)
        is_complete = ELASTIC[name](directory)
        lines = (directory / "starts.txt").read_text().split("\n")[:-1] if (directory / "starts.txt").exists() else []
        starts = [(int(line.split()[0]), int(line.split()[1])) for line in lines]
        return Restart(name, starts, is_complete, is_complete and _is_equal(directory))


def format_restarts(restarts: list[Restart]) -> str:
    """Make a table of the jobs."""
    lines = ["| job | starts (ranks at step) | ended | student as of one process |", "|---|---|---|---|"]
    for restart in restarts:
        starts = ", ".join(f"{num_ranks} at {step}" for num_ranks, step in restart.starts)
        ended, equal = ("yes" if flag else "NO" for flag in (restart.is_complete, restart.is_equal))
        lines.append(f"| {restart.name} | {starts} | {ended} | {equal} |")
    reason = why_not()
    return "\n".join([*lines, "", *([f"Two hosts were not tried: {reason}.", ""] if reason else [])])


def _kill_ranks(directory: Path) -> bool:
    """Kill one rank, and after the restart the other."""
    options = ["--standalone", "--nproc_per_node=2", "--max-restarts=2"]
    agent = _torchrun("only", directory, options, kills=["1:8", "0:17"])
    return _ends_well("only", agent, directory)


def _lose_machine(directory: Path) -> bool:
    """Kill one of two agents with its rank; the other goes on with one rank."""
    endpoint = f"127.0.0.1:{find_free_port()}"
    options = ["--nnodes=1:2", "--nproc_per_node=1", "--max-restarts=3", "--rdzv-backend=c10d"]
    options += [f"--rdzv-endpoint={endpoint}", "--rdzv-id=job"]

    def start(name: str, *, is_host: bool) -> subprocess.Popen[bytes]:
        # On one machine both agents take the endpoint for theirs, and the quicker one would host.
        settings = f"--rdzv-conf=last_call_timeout=5,is_host={is_host}"
        return _torchrun(name, directory, [*options, settings], kills=[])

    # The agent that hosts what they agree by must be the one that stays.
    stays, goes = start("first", is_host=True), start("second", is_host=False)
    try:
        _wait_for(directory / "last.ckpt", stays)
    finally:
        _kill("second", goes, directory)
    return _ends_well("first", stays, directory)


def _two_hosts(directory: Path) -> bool:
    """Train on two hosts, an agent on each."""
    with joined_hosts() as hosts:
        options = ["--nnodes=2", "--nproc_per_node=1", f"--master-addr={hosts.addresses[0]}", "--master-port=29500"]
        agents = [
            _torchrun(
                name,
                directory,
                [*options, f"--node-rank={rank}"],
                kills=[],
                prefix=["ip", "netns", "exec", name],
                variables={"GLOO_SOCKET_IFNAME": hosts.cables[rank], "HOST": name},
            )
            for rank, name in enumerate(hosts.names)
        ]
        # All are waited for, also behind one that ended badly.
        ended_well = [_ends_well(name, agent, directory) for name, agent in zip(hosts.names, agents, strict=True)]
        return all(ended_well)


ELASTIC: dict[str, Callable[[Path], bool]] = {
    "`--max-restarts=2`, each rank killed once": _kill_ranks,
    "`--nnodes=1:2`, one machine lost for good": _lose_machine,
    "`--nnodes=2`, each agent on a host with an address of its own": _two_hosts,
}


def _torchrun(
    name: str,
    directory: Path,
    options: list[str],
    kills: list[str],
    *,
    prefix: Sequence[str] = (),
    variables: Mapping[str, str] = MappingProxyType({}),
) -> subprocess.Popen[bytes]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "AGENT": name, **variables}
    command = [*prefix, sys.executable, "-m", "torch.distributed.run", *options, str(SCRIPT), str(directory), *kills]
    with (directory / f"{name}.txt").open("ab") as log:
        return subprocess.Popen(command, env=environment, stdout=log, stderr=log)


def _ends_well(name: str, agent: subprocess.Popen[bytes], directory: Path) -> bool:
    try:
        return agent.wait(PATIENCE_S) == 0
    except subprocess.TimeoutExpired:
        return False
    finally:
        _kill(name, agent, directory)


def _kill(name: str, agent: subprocess.Popen[bytes], directory: Path) -> None:
    """Kill an agent with its ranks, which are sessions of their own, as if the machine were gone."""
    agent.kill()
    agent.wait()
    for path in directory.glob(f"pid-{name}-*"):
        with contextlib.suppress(ProcessLookupError):
            os.kill(int(path.name.rpartition("-")[2]), signal.SIGKILL)


def _wait_for(path: Path, agent: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not path.exists() and agent.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)


def _is_equal(directory: Path) -> bool:
    with tempfile.TemporaryDirectory() as other:
        reference: Any = run_leg(Leg(plan=None, num_ranks=1, module="dropout"), Path(other))
    try:
        assert_same_checkpoint(reference, torch.load(directory / "states.pt", weights_only=False))
    except AssertionError:
        return False
    return True
