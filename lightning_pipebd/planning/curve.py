"""The curve: a measured time as a function of rows, or of bytes."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import pairwise
from math import isfinite

__all__ = ["CostError", "Curve"]


class CostError(ValueError):
    """Costs, or the data that describes them, cannot be what was measured."""


class Curve(tuple[tuple[float, float], ...]):
    """Measured points (amount, time in ms), and the time of every other amount by straight lines.

    * Nothing takes no time: no call is made for 0 rows.
    * Between two points the time is interpolated.
    * Outside, the line through the two nearest points goes on, but never downwards, and below the first point it never
      falls under the line to nothing: fewer rows do not run at a better rate than was measured.
    * One point alone is a rate: twice the amount takes twice the time.

    Args:
        points: Amounts with their times, in any order; amounts above 0, each once, times not below 0.

    Raises:
        CostError: A law above is broken.

    Example:
        >>> curve = Curve([(32, 2.0), (64, 3.0)])
        >>> [curve.at(rows) for rows in (0, 16, 32, 48, 64, 128)]
        [0.0, 1.5, 2.0, 2.5, 3.0, 5.0]
        >>> Curve([(32, 2.0)]).at(48)
        3.0
    """

    __slots__ = ()

    def __new__(cls, points: Iterable[Sequence[float]] = ()) -> Curve:
        """Sort the points, so that equal measurements are equal curves."""
        pairs = [tuple(point) for point in points]
        if not pairs:
            raise CostError("`points` must have at least one measurement, but is empty. Measure one number of rows.")
        for pair in pairs:
            if len(pair) != 2 or not all(isinstance(value, (int, float)) for value in pair):
                raise CostError(f"`points` must be pairs of numbers, but contains {pair!r}. Write `[rows, ms]`.")
            if not (pair[0] > 0 and pair[1] >= 0 and all(map(isfinite, pair))):
                raise CostError(
                    f"`points` must have finite amounts above 0 and times not below 0, but contains {pair!r}. "
                    "Leave the point out or measure it again."
                )
        pairs.sort()
        for (amount, _), (next_amount, _) in pairwise(pairs):
            if amount == next_amount:
                raise CostError(f"`points` must have every amount once, but has {amount:g} twice. Give one time each.")
        return super().__new__(cls, ((float(amount), float(time)) for amount, time in pairs))

    @classmethod
    def affine(cls, fixed_ms: float, per_row_ms: float) -> Curve:
        """Give the curve of a fixed time plus a time for each row.

        Example:
            >>> Curve.affine(2, 0.5).at(64)
            34.0
        """
        return cls([(1, fixed_ms + per_row_ms), (2, fixed_ms + 2 * per_row_ms)])

    @property
    def amounts(self) -> tuple[float, ...]:
        """The measured amounts, ascending."""
        return tuple(amount for amount, _ in self)

    def at(self, amount: float) -> float:
        """Give the time of an amount in ms; see the class for what lies between and outside the points."""
        if amount <= 0:
            return 0.0
        if len(self) == 1:
            return amount * self[0][1] / self[0][0]
        # The segment that the amount lies in, or the outermost one if it lies outside.
        right = min(max(bisect_left(self.amounts, amount), 1), len(self) - 1)
        (low, low_ms), (high, high_ms) = self[right - 1], self[right]
        slope = (high_ms - low_ms) / (high - low)
        if amount < low:
            return max(low_ms - max(slope, 0.0) * (low - amount), low_ms * amount / low)
        if amount > high:
            return high_ms + max(slope, 0.0) * (amount - high)
        return low_ms + slope * (amount - low)

    def least_rate(self, most: int) -> float:
        """Give the least time per unit over the whole amounts from 1 to `most`: what balance can reach at best.

        On a straight line the rate is monotone, so only points and the two ends can be best.
        """
        return min(self.at(amount) / amount for amount in self._corners(1, most))

    def least_time(self, least: int, most: int) -> float:
        """Give the least time over the whole amounts from `least` to `most`."""
        return min(map(self.at, self._corners(least, most)))

    def _corners(self, least: int, most: int) -> set[float]:
        return {float(least), float(most), *(amount for amount in self.amounts if least < amount < most)}
