"""The most memory that a piece of work holds beside what was there before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["peak_and_held_bytes", "peak_bytes"]


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """Run a piece of work and give the most bytes that tensors made by it held at one time.

    On GPUs the allocator is asked; elsewhere every operation's new memory is followed until it is freed.

    Args:
        work: What to run.
        device: Where it computes.

    Example:
        >>> peak_bytes(lambda: torch.ones(1000).mul(2).sum(), torch.device("cpu")) >= 8000
        True
    """
    return peak_and_held_bytes(work, device)[0]


def peak_and_held_bytes(work: Callable[[], Any], device: torch.device) -> tuple[int, int]:
    """Give the peak of :func:`peak_bytes`, and what is still held afterwards: by the result, or by what it was kept in.

    Args:
        work: What to run.
        device: Where it computes.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        result = work()
        torch.cuda.synchronize(device)
        held = torch.cuda.memory_allocated(device) - before
        del result
        return max(0, torch.cuda.max_memory_allocated(device) - before), max(0, held)
    follower = _Follower()
    with follower:
        result = work()
    held = follower.held
    del result
    return follower.peak, held


class _Follower(TorchDispatchMode):
    """Counts the memory of the tensors that operations make, while it is alive."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # torch's own class
        self.peak = 0
        self.held = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        for leaf in pytree.tree_leaves((args, kwargs)):
            if isinstance(leaf, Tensor):
                self._note(leaf, is_new=False)
        output = func(*args, **(kwargs or {}))
        for leaf in pytree.tree_leaves(output):
            if isinstance(leaf, Tensor):
                self._note(leaf, is_new=True)
        self.peak = max(self.peak, self.held)
        return output

    def _note(self, tensor: Tensor, *, is_new: bool) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes() if is_new else 0
        self.held += size

        def forget(_: Any) -> None:
            self.held -= size
            self._known.pop(key, None)

        self._known[key] = weakref.ref(storage, forget)
