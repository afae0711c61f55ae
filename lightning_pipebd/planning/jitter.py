"""Jitter: by how much the last of several ranks is later than each of them, because none keeps exact time.

Work that takes `t` ms takes a little more or less every time. What disturbs it comes and goes by itself, so its
variance is proportional to `t`; the factor, in ms, is the jitter. A rank alone is on time in the mean, but ranks that
sum their gradients go on with the last of them. When that is to be expected, Clark told for normal variables that are
taken two by two ("The Greatest of a Finite Set of Random Variables").
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache
from math import sqrt
from statistics import NormalDist

__all__ = ["expected_latest_ms", "lateness"]

_NORMAL = NormalDist()


def expected_latest_ms(arrivals: Iterable[tuple[float, float]]) -> float:
    """Give the expected time at which the last of some ranks arrives.

    Args:
        arrivals: For each rank the mean and the variance of its time of arrival, independent of the others'; at least
            one.

    Example:
        >>> expected_latest_ms([(3.0, 0.0), (5.0, 0.0)])
        5.0
        >>> round(expected_latest_ms([(5.0, 2.0), (5.0, 2.0)]), 3)
        5.798
    """
    # In the order of time, so that the same arrivals always give the same number, and counted from the last one, so
    # that squares keep their digits.
    ordered = sorted(arrivals)
    origin = ordered[-1][0]
    (first, variance), others = ordered[0], ordered[1:]
    mean = first - origin
    for time, other_variance in others:
        other = time - origin
        spread = sqrt(variance + other_variance)
        if not spread:
            mean = max(mean, other)
            continue
        alpha = (mean - other) / spread
        weight, density = _NORMAL.cdf(alpha), spread * _NORMAL.pdf(alpha)
        latest = mean * weight + other * (1 - weight) + density
        square = (mean**2 + variance) * weight + (other**2 + other_variance) * (1 - weight) + (mean + other) * density
        # Rounding must bring neither a rank before its time nor a variance below nothing.
        mean, variance = max(latest, mean, other), max(square - latest**2, 0.0)
    return origin + mean


@lru_cache(maxsize=256)
def lateness(num_ranks: int) -> float:
    """Give by how many standard deviations the last of some equal ranks is later than each of them.

    Example:
        >>> [round(lateness(num_ranks), 2) for num_ranks in (1, 2, 4, 8)]
        [0.0, 0.56, 1.03, 1.42]
    """
    return expected_latest_ms([(0.0, 1.0)] * num_ranks)
