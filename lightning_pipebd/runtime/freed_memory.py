"""What the C library does with memory that a step has freed: keeps it for the next step, while training on CPU.

By default it hands most of it back to the system at the end of every step, and every page is taken, zeroed and mapped
again in the next one: some thousand page faults a step, up to a tenth of its time.
"""

from __future__ import annotations

import ctypes
import os

import torch

__all__ = ["give_memory_back", "keep_freed_memory"]

# Names and numbers of mallopt(3).
_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
_NEVER = 2**31 - 1
# The most that the C library takes; a block above it is a mapping of its own, and goes when it is freed.
_MOST_FROM_HEAP = 32 * 2**20
# What its own adaptation ends at, once a block of that size was freed.
_ADAPTED_TRIM = 2 * _MOST_FROM_HEAP
_SETTINGS = ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES")


def keep_freed_memory(device: torch.device) -> bool:
    """Keep freed memory in this process; tell whether that was done.

    It is not where another device computes, where the C library is not glibc, and where an environment variable
    (``MALLOC_TRIM_THRESHOLD_``, ``MALLOC_MMAP_THRESHOLD_``, ``GLIBC_TUNABLES``) says what to do.
    """
    return _set(device, _NEVER)


def give_memory_back(device: torch.device) -> bool:
    """Give what is free back to the system, and do so again from now on; tell whether that was done."""
    if not _set(device, _ADAPTED_TRIM):
        return False
    ctypes.CDLL(None).malloc_trim(0)
    return True


def _set(device: torch.device, trim_threshold: int) -> bool:
    if device.type != "cpu" or any(name in os.environ for name in _SETTINGS):
        return False
    library = ctypes.CDLL(None)
    if not hasattr(library, "mallopt") or not hasattr(library, "malloc_trim"):
        return False
    is_mmap_set = library.mallopt(_MMAP_THRESHOLD, _MOST_FROM_HEAP)
    return bool(is_mmap_set and library.mallopt(_TRIM_THRESHOLD, trim_threshold))
