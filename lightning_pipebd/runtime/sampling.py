"""Repeated measurements: medians, how sure they are, and when it is enough."""

from __future__ import annotations

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from itertools import pairwise
from math import hypot, pi, sqrt

import torch

__all__ = ["Samples", "device_clock", "median_ms", "uncertainty_ms"]

#: Returns the present time in ms, after everything that was begun on the device.
Clock = Callable[[], float]

#: What is measured: its kind, the block, the rows.
Key = tuple[str, int, int]

# Quartiles of a normal distribution lie this many standard deviations apart; the standard error of a median is larger
# than that of a mean by this factor; and 95 % of a normal distribution lie within this many standard deviations.
_QUARTILES, _MEDIAN, _CONFIDENCE = 1.349, 1.2533, 1.96


def device_clock(device: torch.device) -> Clock:
    """Give a clock that waits for the device before it is read."""

    def now_ms() -> float:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return time.perf_counter() * 1000

    return now_ms


def median_ms(values: Sequence[float]) -> float:
    """Give the median, which a few disturbed measurements do not move."""
    return statistics.median(values)


def uncertainty_ms(values: Sequence[float]) -> float:
    """Give half the width of the median's 95 % confidence interval, from the quartiles.

    Example:
        >>> uncertainty_ms([2.0] * 9), uncertainty_ms([2.0]) == float("inf")
        (0.0, True)
    """
    if len(values) < 2:
        return float("inf")
    low, _, high = statistics.quantiles(values, n=4, method="inclusive")
    return _CONFIDENCE * _MEDIAN * (high - low) / _QUARTILES / sqrt(len(values))


class Samples:
    """Times of several things, measured in rounds, so that a disturbance hits all of them alike.

    Args:
        now_ms: The clock.
        tolerance: Relative uncertainty of the sum of all medians that is good enough.
        min_rounds: Rounds that are measured in any case; the first is thrown away before (it warms up).
        max_rounds: Most rounds.
        budget_ms: Time after which no further round begins, once there are `min_rounds`.
    """

    def __init__(
        self,
        now_ms: Clock,
        *,
        tolerance: float = 0.02,
        min_rounds: int = 4,
        max_rounds: int = 30,
        budget_ms: float = 8000.0,
    ) -> None:
        self.now_ms = now_ms
        self.values: defaultdict[Key, list[float]] = defaultdict(list)
        self._tolerance = tolerance
        self._min_rounds = min_rounds
        self._max_rounds = max_rounds
        self._budget_ms = budget_ms

    def take(self, key: Key, work: Callable[[], object]) -> None:
        """Do a piece of work once and note its time."""
        start = self.now_ms()
        work()
        self.values[key].append(self.now_ms() - start)

    def repeat(self, measure_round: Callable[[], object]) -> int:
        """Measure rounds until the medians are sure enough or the time is up.

        Returns:
            The number of rounds that count.
        """
        deadline = self.now_ms() + self._budget_ms
        measure_round()
        self.values.clear()
        num_rounds = 0
        while num_rounds < self._max_rounds:
            measure_round()
            num_rounds += 1
            if num_rounds >= self._min_rounds and (self.uncertainty() <= self._tolerance or self.now_ms() >= deadline):
                break
        return num_rounds

    def median_ms(self, key: Key) -> float:
        """Give the median time of one thing."""
        return median_ms(self.values[key])

    def jitter_ms(self) -> float:
        """Give the variance of the time of work by the ms that it takes; 0 if there were not two rounds.

        One round is compared with the next, since ranks that slow down together do not wait for each other; and by
        the amount of the difference, not by its square, in which a single long disturbance would count for all. What
        is measured with the fewest rows counts: so few has a rank that shares the blocks with all others.
        """
        least = min((rows for _, _, rows in self.values), default=0)
        measured = (values for (_, _, rows), values in self.values.items() if rows == least)
        totals = [sum(values) for values in zip(*measured, strict=True)]
        if len(totals) < 2 or not sum(totals):
            return 0.0
        # The expected difference of two draws from a normal distribution is 2 / sqrt(pi) of its standard deviation.
        deviation_ms = statistics.fmean(abs(one - other) for one, other in pairwise(totals)) * sqrt(pi) / 2
        return deviation_ms**2 / statistics.fmean(totals)

    def noise(self) -> float:
        """Give the relative uncertainty of a single median, long ones weighing more."""
        total = hypot(*map(median_ms, self.values.values()))
        return hypot(*map(uncertainty_ms, self.values.values())) / total if total else 0.0

    def uncertainty(self) -> float:
        """Give the relative uncertainty of the sum of all medians, if they err independently of each other."""
        total = sum(map(median_ms, self.values.values()))
        return hypot(*map(uncertainty_ms, self.values.values())) / total if total else 0.0
