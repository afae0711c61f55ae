"""Where the overhead comes from: loops that differ in one thing each, step by step in turn, in one process.

    python -m benchmarks.overhead.causes

Every variant has a thread of its own, and one of them at a time makes one step. So all of them meet the same machine,
the same caches and the same memory of the C library, and differences of a hundredth can be seen on a machine that is
loaded. Time is that of the thread (`time.thread_time`); page faults are counted for each thread as well.

*Cold* are tiny blocks that read 8 MiB each, as large blocks do: what is computed beside them is that of tiny blocks,
but no code and no object of Python's is in the processor's second cache any more.
"""

from __future__ import annotations

import argparse
import ctypes
import logging
import math
import random
import resource
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from benchmarks.overhead.main import WORKLOADS, ByHand, Clock, Distil, fit, make_models, sum_of_losses
from benchmarks.shared.tables import markdown_table
from lightning_pipebd.runtime.freed_memory import keep_freed_memory

_NUM_WARM_UP = 8
_ARENA_MAX = -8  # of mallopt(3)
_RUSAGE_THREAD = 1
_READ = torch.zeros(2 * 2**20)
_SHAPES = {name: (width, rows) for name, (width, rows, _) in WORKLOADS.items()} | {"cold": (16, 16)}


class Reading(nn.Module):
    """Gives its input, after it has read more than the second cache holds."""

    def forward(self, hidden: Tensor) -> Tensor:
        _READ.sum()
        return hidden


class Turns:
    """One step of one variant at a time, in a new random order every round."""

    def __init__(self, names: list[str], num_rounds: int) -> None:
        self._changed = threading.Condition()
        self._ready: set[str] = set()
        self._now = ""
        self._num_rounds = num_rounds
        self.ms: dict[str, list[float]] = {name: [] for name in names}
        self.faults: dict[str, list[int]] = {name: [] for name in names}

    def conduct(self) -> None:
        """Wait until all variants have begun, and then let them take turns."""
        with self._changed:
            self._changed.wait_for(lambda: self._ready == self.ms.keys())
        for _ in range(self._num_rounds):
            for name in random.sample(list(self.ms), len(self.ms)):
                with self._changed:
                    self._now = name
                    self._changed.notify_all()
                    self._changed.wait_for(lambda: not self._now)

    def await_ready(self, name: str) -> None:
        """Wait until a variant has begun."""
        with self._changed:
            self._changed.wait_for(lambda: name in self._ready)

    def step_done(self, name: str) -> None:
        """Hand over to the next one, and wait for the next turn."""
        with self._changed:
            self._ready.add(name)
            if self._now == name:
                self._now = ""
            self._changed.notify_all()
            if len(self.ms[name]) < self._num_rounds:
                self._changed.wait_for(lambda: self._now == name)


class TurnClock(Clock):
    """Marks steps, and waits after each for the next turn."""

    def __init__(self, turns: Turns, name: str) -> None:
        super().__init__()
        self._turns, self._name = turns, name
        self._start: tuple[float, int] | None = None

    def mark(self) -> None:
        """Note that a step has ended."""
        if self._start is not None:
            self._turns.ms[self._name].append((time.thread_time() - self._start[0]) * 1000)
            self._turns.faults[self._name].append(_page_faults() - self._start[1])
        self._turns.step_done(self._name)
        self._start = (time.thread_time(), _page_faults())


def _page_faults() -> int:
    return resource.getrusage(_RUSAGE_THREAD).ru_minflt


def by_hand(
    models: tuple[nn.Sequential, nn.Sequential],
    loader: DataLoader[Any],
    clock: Clock,
    *,
    ahead: bool = False,
    at_once: bool = False,
    sums: bool = False,
) -> None:
    """Train without Lightning.

    Args:
        models: Teacher and student.
        loader: Gives the batches.
        clock: Is told of the end of every step.
        ahead: Whether the next batch is loaded before a step.
        at_once: Whether all losses have one backward pass, after the gradients of the step before are thrown away.
        sums: Whether gradients are summed up, to find those that are not finite.
    """
    teacher, student = models
    teacher.eval().requires_grad_(False)
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3)
    for (boundary,) in _one_ahead(loader) if ahead else loader:
        if at_once:
            loss = sum_of_losses(teacher, student, boundary)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
        else:
            optimizer.zero_grad()
            for theirs, mine in zip(teacher, student, strict=True):
                with torch.no_grad():
                    output = theirs(boundary)
                torch.autograd.backward(nn.functional.mse_loss(mine(boundary), output))
                boundary = output
        if sums:
            gradients = (own.grad for own in student.parameters() if own.grad is not None)
            assert all(math.isfinite(gradient.sum().item()) for gradient in gradients)
        optimizer.step()
        clock.mark()


Variant = Callable[[tuple[nn.Sequential, nn.Sequential], "DataLoader[Any]", Clock], None]

VARIANTS: dict[str, Variant] = {
    "by hand": by_hand,
    "by hand, once more": by_hand,
    "by hand, next batch loaded before the step": partial(by_hand, ahead=True),
    "by hand, one backward pass": partial(by_hand, at_once=True),
    "by hand, looks for what is not finite": partial(by_hand, sums=True),
    "Lightning": lambda models, loader, clock: fit(ByHand(*models), "auto", loader, clock),
    "module": lambda models, loader, clock: fit(Distil(*models), "auto", loader, clock),
    "pipebd": lambda models, loader, clock: fit(Distil(*models), "pipebd", loader, clock),
}


def _one_ahead(loader: DataLoader[Any]) -> Any:
    batches = iter(loader)
    batch = next(batches)
    for following in batches:
        yield batch
        batch = following
    yield batch


def measure(workload: str, num_rounds: int) -> str:
    """Have all variants take turns, and give the table."""
    width, rows = _SHAPES[workload]
    # Under pipebd it is, and all variants share it; a fit that ends sets it back.
    keep_freed_memory(torch.device("cpu"))
    turns = Turns(list(VARIANTS), num_rounds + _NUM_WARM_UP)
    # The last steps are begun by nobody's turn, and Lightning loads a batch ahead.
    data = TensorDataset(torch.randn(rows * (num_rounds + _NUM_WARM_UP + 3), width))

    def run(name: str) -> None:
        models = make_models(width, *([Reading()] if workload == "cold" else []))
        VARIANTS[name](models, DataLoader(data, batch_size=rows), TurnClock(turns, name))

    # Fits begin one after another; the last one, in the main thread, handles signals.
    *others, last = VARIANTS
    threads = [threading.Thread(target=run, args=(name,), daemon=True) for name in others]
    for name, thread in zip(others, threads, strict=True):
        thread.start()
        turns.await_ready(name)
    threading.Thread(target=turns.conduct, daemon=True).start()
    run(last)
    for thread in threads:
        thread.join()
    ms = {name: values[_NUM_WARM_UP:] for name, values in turns.ms.items()}
    return markdown_table(
        [workload, "ms per step", "over by hand, ms", "/ by hand", "page faults"],
        [
            [
                name,
                f"{statistics.median(values):.2f}",
                f"{statistics.median(mine - base for mine, base in zip(values, ms['by hand'], strict=True)):+.2f}",
                _ratio(values, ms["by hand"]),
                f"{statistics.median(turns.faults[name][_NUM_WARM_UP:]):.0f}",
            ]
            for name, values in ms.items()
        ],
    )


def _ratio(values: list[float], base: list[float]) -> str:
    """Give the median of the ratios within a round, and its standard error from their quartiles."""
    found = [mine / other for mine, other in zip(values, base, strict=True)]
    low, _, high = statistics.quantiles(found, n=4)
    return f"{statistics.median(found):.3f} ± {0.93 * (high - low) / math.sqrt(len(found)):.3f}"


def main() -> None:
    """Print a table for each workload."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=150)
    parser.add_argument("--workloads", nargs="+", choices=list(_SHAPES), default=list(_SHAPES))
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    # Otherwise each thread would have memory of its own.
    ctypes.CDLL(None).mallopt(_ARENA_MAX, 1)
    for workload in arguments.workloads:
        sys.stdout.write(f"\n{measure(workload, arguments.rounds)}\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
