"""Heartbeats: every rank tells every other where it stands, without ever waiting for one.

They go as datagrams, beside the process group: a rank that is stopped, dead or cut off must not be able to hold up the
ones that want to say so. Losing one does no harm, the next comes soon. They only inform: a network that drops them
takes the names out of a report, no more.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict
from typing import Any

from lightning_pipebd.planning.standing import Standing

__all__ = ["Heartbeats"]

_MAX_BYTES = 65_507


class Heartbeats:
    """One rank's socket for heartbeats.

    Args:
        rank: This rank.
        towards: Address by which the machines reach each other, such as that of the first rank; decides which of this
            machine's own addresses the others are told.
    """

    def __init__(self, rank: int, towards: str = "127.0.0.1") -> None:
        self._rank = rank
        family, self._host = _find_own_address(towards)
        self._socket = socket.socket(family, socket.SOCK_DGRAM)
        # To all addresses of this machine: one that it alone knows itself by (127.0.1.1) can send to no other machine.
        self._socket.bind(("", 0))
        self._socket.setblocking(False)
        self._token = ""
        self._peers: dict[int, Any] = {}

    def introduce(self) -> tuple[str, int, str]:
        """Give the host and port that the others send to, and a secret that may become the run's."""
        return self._host, self._socket.getsockname()[1], os.urandom(8).hex()

    def connect(self, addresses: Sequence[tuple[str, int, str]]) -> None:
        """Learn what every rank introduced itself with, in rank order.

        The first rank's secret marks the run's heartbeats: those of another run, late or misled, are not believed.
        """
        self._token = addresses[0][2]
        self._peers = {rank: address[:2] for rank, address in enumerate(addresses) if rank != self._rank}

    def send(self, standing: Standing) -> None:
        """Tell all other ranks; whoever cannot be reached now is not told."""
        payload = json.dumps({"token": self._token, **asdict(standing)}).encode()
        for address in self._peers.values():
            with suppress(OSError):
                self._socket.sendto(payload, address)

    def receive(self) -> list[Standing]:
        """Take what has arrived, in the order of arrival; nothing after :meth:`close`."""
        received: list[Standing] = []
        while self._socket.fileno() >= 0:
            try:
                payload, address = self._socket.recvfrom(_MAX_BYTES)
            except BlockingIOError:
                return received
            except OSError:
                # A peer that has ended refuses what was sent to it, and the refusal is reported here.
                continue
            standing = self._read(payload)
            if standing is not None:
                # A machine may know itself by an address that others cannot use; its own heartbeats show the right one.
                self._peers[standing.rank] = address
                received.append(standing)
        return received

    def close(self) -> None:
        """Close the socket."""
        self._socket.close()

    def _read(self, payload: bytes) -> Standing | None:
        try:
            fields = json.loads(payload)
            if fields.pop("token") != self._token or fields["rank"] not in self._peers:
                return None
            return Standing(**{**fields, "waits_for": tuple(fields["waits_for"])})
        except (ValueError, KeyError, TypeError, AttributeError):
            return None


def _find_own_address(towards: str) -> tuple[socket.AddressFamily, str]:
    with suppress(OSError):
        for family, kind, _, _, address in socket.getaddrinfo(towards, 1, type=socket.SOCK_DGRAM):
            # A name may stand for addresses of a family that this machine has switched off.
            with suppress(OSError), socket.socket(family, kind) as probe:
                probe.connect(address)  # sends nothing, but chooses the way
                return family, str(probe.getsockname()[0])
    # The others learn from this rank's heartbeats where it is.
    return socket.AF_INET, "127.0.0.1"
