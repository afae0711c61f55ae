"""Repeated measurements: taken in turn, reduced to medians with their spread, and printed as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple, TypeVar

__all__ = ["Spread", "interleave", "markdown_table", "ratios", "spread"]

T = TypeVar("T")


class Spread(NamedTuple):
    """A median, and what lay farthest from it on either side.

    Example:
        >>> f"{Spread(102.41, 95.0, 121.7):.1f}"
        '102.4 (95.0-121.7)'
    """

    median: float
    least: float
    most: float

    def __format__(self, spec: str) -> str:
        return f"{self.median:{spec}} ({self.least:{spec}}-{self.most:{spec}})"


def spread(values: Sequence[float]) -> Spread:
    """Give the median of measurements, the least and the greatest."""
    return Spread(statistics.median(values), min(values), max(values))


def ratios(numerators: Sequence[float], denominators: Sequence[float]) -> Spread:
    """Give the spread of the ratios round by round: what slows down a whole round does not count.

    Example:
        >>> ratios([2.0, 4.0, 6.0], [1.0, 2.0, 2.0])
        Spread(median=2.0, least=2.0, most=3.0)
    """
    return spread([above / below for above, below in zip(numerators, denominators, strict=True)])


def interleave(names: Iterable[str], repeats: int, measure: Callable[[str], T]) -> dict[str, list[T]]:
    """Measure everything once, then once more, and so on, because a machine's speed drifts; give all per name.

    Every second round goes backwards, so that nobody always comes after the same one.
    """
    found: dict[str, list[T]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name in reversed(found) if repeat % 2 else found:
            found[name].append(measure(name))
    return found


def markdown_table(header: Sequence[str], rows: Iterable[Mapping[str, str] | Sequence[str]]) -> str:
    """Give a table as Markdown; rows may leave out columns if they name theirs.

    Example:
        >>> print(markdown_table(["plan", "ms"], [["joint", "3"], {"plan": "straight"}]))
        | plan | ms |
        |---|---|
        | joint | 3 |
        | straight |  |
    """
    cells = [[row.get(name, "") for name in header] if isinstance(row, Mapping) else list(row) for row in rows]
    # A bar in a cell would end it.
    lines = [[cell.replace("|", "\\|") for cell in row] for row in [list(header), *cells]]
    texts = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([texts[0], "|---" * len(header) + "|", *texts[1:]])
