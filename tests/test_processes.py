"""By which backend the processes meet."""

from __future__ import annotations

import pytest
import torch

from lightning_pipebd.lightning_internals.processes import choose_backend

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.mark.parametrize(
    ("given", "devices", "backend"),
    [
        (None, [CPU, CPU], "gloo"),
        (None, [FIRST], "nccl"),
        (None, [FIRST, SECOND], "nccl"),
        (None, [FIRST, SECOND, FIRST], "gloo"),
        ("gloo", [FIRST, SECOND], "gloo"),
        ("gloo", [FIRST, FIRST], "gloo"),
        ("cpu:gloo,cuda:nccl", [FIRST, SECOND], "cpu:gloo,cuda:nccl"),
    ],
)
def test_processes_meet_by_nccl_if_each_has_a_gpu_of_its_own(
    given: str | None, devices: list[torch.device], backend: str
) -> None:
    assert choose_backend(given, devices) == backend


@pytest.mark.parametrize("given", ["nccl", "cpu:gloo,cuda:nccl"])
def test_nccl_is_refused_where_processes_share_a_gpu(given: str) -> None:
    with pytest.raises(ValueError, match=r"`process_group_backend` must be 'gloo' .* Leave it out"):
        choose_backend(given, [FIRST, FIRST])
