"""Divide a chain of weights into consecutive parts whose heaviest is as light as possible."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["balanced_sizes"]


def balanced_sizes(weights: Sequence[float], num_parts: int) -> list[int]:
    """Give the sizes of consecutive parts so that the heaviest part is as light as possible.

    Exact, by dynamic programming over (weights taken, parts used), ``O(len(weights)**2 * num_parts)``. Ties go to
    earlier cuts. With more parts than weights the last parts are empty.

    Args:
        weights: One non-negative weight per block.
        num_parts: Parts to make, at least 1.

    Example:
        >>> balanced_sizes([1, 1, 1, 3], 2)
        [3, 1]
        >>> balanced_sizes([5, 1], 3)
        [1, 1, 0]
    """
    num_used = min(num_parts, len(weights))
    prefix = [0.0]
    for weight in weights:
        prefix.append(prefix[-1] + weight)
    heaviest = {(end, 1): (prefix[end], 0) for end in range(1, len(weights) + 1)}
    for parts in range(2, num_used + 1):
        for end in range(parts, len(weights) + 1):
            heaviest[end, parts] = min(
                (max(heaviest[cut, parts - 1][0], prefix[end] - prefix[cut]), cut) for cut in range(parts - 1, end)
            )
    sizes: list[int] = []
    end = len(weights)
    for parts in range(num_used, 0, -1):
        cut = heaviest[end, parts][1]
        sizes.insert(0, end - cut)
        end = cut
    return sizes + [0] * (num_parts - num_used)
