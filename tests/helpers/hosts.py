"""Two hosts on one machine: network namespaces with addresses of their own, and a cable between them."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from lightning_pipebd.runtime import shared_memory

__all__ = ["Hosts", "be_on_host", "joined_hosts", "move_to", "why_not"]

_CLONE_NEWNET = 0x40000000


class Hosts(NamedTuple):
    """Two namespaces.

    Args:
        names: As ``ip netns`` knows them.
        addresses: Of the two ends of the cable.
        cables: The two ends.
    """

    names: tuple[str, str]
    addresses: tuple[str, str]
    cables: tuple[str, str]

    def cut(self) -> None:
        """Pull the plug: nothing arrives any more, and nobody is told."""
        _ip("-n", self.names[0], "link", "set", self.cables[0], "down")


@contextmanager
def joined_hosts() -> Iterator[Hosts]:
    """Have two hosts inside the context.

    Raises:
        OSError: The system does not permit it; the text says why.
    """
    number = os.getpid() % 2**16
    subnet = f"10.{200 + number % 50}.{number // 256}"
    hosts = Hosts(
        (f"pbd{number}a", f"pbd{number}b"), (f"{subnet}.1", f"{subnet}.2"), (f"pbd{number}-0", f"pbd{number}-1")
    )
    try:
        for name in hosts.names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        _ip("link", "add", hosts.cables[0], "netns", hosts.names[0], "type", "veth", "peer", "name", hosts.cables[1])
        _ip("link", "set", hosts.cables[1], "netns", hosts.names[1])
        for name, address, cable in zip(*hosts, strict=True):
            _ip("-n", name, "address", "add", f"{address}/24", "dev", cable)
            _ip("-n", name, "link", "set", cable, "up")
        yield hosts
    finally:
        for name in hosts.names:
            if Path("/run/netns", name).exists():
                _ip("netns", "delete", name)


def why_not() -> str:
    """Say why there can be no two hosts here; nothing if there can."""
    if shutil.which("ip") is None:
        return "the command `ip` is not there"
    try:
        with joined_hosts():
            return ""
    except OSError as error:
        return f"network namespaces are not permitted: {error}"


def move_to(name: str) -> None:
    """Have this thread, and what it starts, on a host."""
    with Path("/run/netns", name).open() as file:
        library = ctypes.CDLL(None, use_errno=True)
        if library.setns(file.fileno(), _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"cannot enter {name}")


def be_on_host(host: int, hosts: Hosts) -> None:
    """Be a process of another machine: behind the cable, and without memory to share with the other host."""
    move_to(hosts.names[host])
    # The name of this machine stands for itself alone on either host.
    os.environ.update(MASTER_ADDR=hosts.addresses[0], GLOO_SOCKET_IFNAME=hosts.cables[host])
    shared_memory._boot = lambda: f"host-{host}"


def _ip(*words: str) -> None:
    done = subprocess.run(["ip", *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise OSError(f"`ip {' '.join(words)}`: {done.stderr.strip()}")
