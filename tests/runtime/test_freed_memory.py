"""Freed memory stays with the process while it trains; what a process does with memory is seen in one of its own."""

from __future__ import annotations

import platform
import subprocess
import sys

import pytest
import torch

from lightning_pipebd.runtime.freed_memory import give_memory_back, keep_freed_memory

COUNT_FAULTS = """
import resource, torch
from lightning_pipebd.runtime.freed_memory import give_memory_back, keep_freed_memory
cpu = torch.device("cpu")

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    tensors = [torch.ones(2**20) for _ in range(20)]
    del tensors
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

by_default = [faults() for _ in range(2)]
done = [keep_freed_memory(cpu)]
kept = [faults() for _ in range(3)]
done.append(give_memory_back(cpu))
print(all(done), by_default[-1], kept[-1], faults())
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_pages_are_taken_once_until_memory_is_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_", "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    output = subprocess.run([sys.executable, "-c", COUNT_FAULTS], check=True, capture_output=True, text=True).stdout
    done, by_default, kept, given_back = output.split()
    # 20 tensors of 4 MiB are 20480 pages of 4 KiB.
    assert done == "True"
    assert int(by_default) > 10_000
    assert int(kept) < 5_000
    assert int(given_back) > 10_000


def test_users_own_setting_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MALLOC_TRIM_THRESHOLD_", "131072")
    assert not keep_freed_memory(torch.device("cpu"))
    assert not give_memory_back(torch.device("cpu"))


def test_memory_of_other_devices_is_not_the_c_librarys() -> None:
    assert not keep_freed_memory(torch.device("cuda"))
