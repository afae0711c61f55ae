"""Random streams that belong to a block and a batch, not to a rank."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

__all__ = ["borrowed_random_states", "random_states", "random_stream", "set_random_states", "stream_key"]


def stream_key(seed: int, *coordinates: int) -> int:
    """Mix a seed and coordinates (epoch, batch, block, first row) into one 63-bit seed.

    Args:
        seed: The run's seed.
        coordinates: Integers that name the stream; another order names another stream.

    Example:
        >>> stream_key(7, 0, 3) == stream_key(7, 0, 3), stream_key(7, 0, 3) == stream_key(7, 3, 0)
        (True, False)
    """
    text = ",".join(str(number) for number in (seed, *coordinates))
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


@contextmanager
def random_stream(key: int, device: torch.device, *, with_python: bool = True) -> Iterator[None]:
    """Draw from a stream of its own inside the context; outside, the generators go on as if nothing was drawn.

    Covers torch's generators of the CPU and of ``device``, and Python's :mod:`random` (supernets draw their
    paths from it). Random numbers of NumPy are not covered.

    Args:
        key: Seed of the stream, see :func:`stream_key`.
        device: Where the block computes.
        with_python: Whether :mod:`random` is covered, which takes three times as long as the rest.

    Example:
        >>> with random_stream(stream_key(1, 2), torch.device("cpu")):
        ...     first = torch.rand(3)
        >>> with random_stream(stream_key(1, 2), torch.device("cpu")):
        ...     second = torch.rand(3)
        >>> torch.equal(first, second)
        True
    """
    # Not `fork_rng` alone: it costs more than a small block, and every block of every step draws from a stream.
    generator, python_state = torch.default_generator, random.getstate() if with_python else None
    state = generator.get_state()
    generator.manual_seed(key)
    if with_python:
        random.seed(key)
    try:
        if device.type != "cuda":
            yield
            return
        with torch.random.fork_rng(devices=[device]):
            torch.cuda.manual_seed(key)
            yield
    finally:
        if python_state is not None:
            random.setstate(python_state)
        generator.set_state(state)


def random_states() -> dict[str, Any]:
    """Give the state of torch's CPU generator, of :mod:`random` and of NumPy (where it is loaded)."""
    states: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    if "numpy" in sys.modules:
        states["numpy"] = sys.modules["numpy"].random.get_state()
    return states


def set_random_states(states: dict[str, Any]) -> None:
    """Put the generators back into states that :func:`random_states` gave."""
    torch.set_rng_state(states["torch"])
    random.setstate(states["python"])
    if "numpy" in states and "numpy" in sys.modules:
        sys.modules["numpy"].random.set_state(states["numpy"])


@contextmanager
def borrowed_random_states(states: dict[str, Any]) -> Iterator[None]:
    """Use another rank's random states inside the context; this rank's own go on afterwards as if nothing was drawn."""
    own = random_states()
    set_random_states(states)
    try:
        yield
    finally:
        set_random_states(own)
