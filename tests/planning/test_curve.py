from __future__ import annotations

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lightning_pipebd.planning.curve import CostError, Curve

points = st.dictionaries(st.integers(1, 99), st.floats(0, 100), min_size=1, max_size=5).map(lambda d: Curve(d.items()))
#: Time and rate of such curves: no faster than the fixed time allows, no slower than proportional.
fixed_and_rate = st.tuples(st.floats(0, 100), st.floats(0, 10))


def test_points_are_sorted_so_that_equal_measurements_are_equal_curves() -> None:
    assert Curve([(64, 2), (32, 1)]) == Curve([[32, 1.0], [64, 2.0]])
    assert hash(Curve([(64, 2), (32, 1)])) == hash(Curve([[32, 1.0], [64, 2.0]]))


@given(points)
def test_curve_goes_through_its_points(curve: Curve) -> None:
    assert [curve.at(rows) for rows, _ in curve] == pytest.approx([ms for _, ms in curve])


@given(points)
def test_no_rows_take_no_time(curve: Curve) -> None:
    assert curve.at(0) == 0


@given(points, st.integers(1, 200))
def test_fewer_rows_than_measured_run_at_no_better_rate(curve: Curve, rows: int) -> None:
    first_rows, first_ms = curve[0]
    assert curve.at(min(rows, first_rows)) >= first_ms / first_rows * min(rows, first_rows) * (1 - 1e-9)


@given(points, st.integers(100, 200))
def test_more_rows_than_measured_take_no_less_time(curve: Curve, rows: int) -> None:
    assert curve.at(rows) >= curve[-1][1] * (1 - 1e-9)


@given(fixed_and_rate, st.integers(1, 300))
def test_affine_curve_is_affine_everywhere(fixed: tuple[float, float], rows: int) -> None:
    assert Curve.affine(*fixed).at(rows) == pytest.approx(fixed[0] + fixed[1] * rows)


def test_falling_measurements_do_not_fall_on_outside() -> None:
    noisy = Curve([(10, 5.0), (20, 4.0)])
    assert [noisy.at(rows) for rows in (1, 5, 10, 15, 20, 30)] == [5.0, 5.0, 5.0, 4.5, 4.0, 4.0]


def test_steep_measurements_start_at_nothing() -> None:
    assert Curve([(10, 1.0), (20, 10.0)]).at(5) == 0.5


@given(points, st.integers(1, 120))
def test_least_rate_is_the_best_of_all_row_counts(curve: Curve, most: int) -> None:
    expected = min(curve.at(rows) / rows for rows in range(1, most + 1))
    assert curve.least_rate(most) == pytest.approx(expected)


@given(points, st.integers(1, 120), st.integers(1, 120))
def test_least_time_is_the_best_of_the_range(curve: Curve, one: int, other: int) -> None:
    least, most = sorted((one, other))
    assert curve.least_time(least, most) == pytest.approx(min(map(curve.at, range(least, most + 1))))


@given(st.floats(0, 10), st.floats(0, 10), st.integers(1, 64))
def test_rate_of_an_affine_curve_improves_with_rows(fixed: float, rate: float, most: int) -> None:
    curve = Curve.affine(fixed, rate)
    rates = [curve.at(rows) / rows for rows in range(1, most + 2)]
    assert all(later <= earlier * (1 + 1e-9) for earlier, later in pairwise(rates))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ([], "`points` must have at least one measurement, but is empty"),
        ([(1,)], r"`points` must be pairs of numbers, but contains \(1,\)"),
        ([(1, "2")], r"`points` must be pairs of numbers, but contains \(1, '2'\)"),
        ([(0, 1)], r"`points` must have finite amounts above 0 .* but contains \(0, 1\)"),
        ([(1, -1)], r"`points` must have finite amounts above 0 and times not below 0, but contains \(1, -1\)"),
        ([(1, float("nan"))], r"`points` must have finite amounts above 0 .* but contains \(1, nan\)"),
        ([(1, 2), (1, 3)], "`points` must have every amount once, but has 1 twice"),
    ],
)
def test_impossible_points_are_refused(bad: list[tuple[float, float]], message: str) -> None:
    with pytest.raises(CostError, match=message):
        Curve(bad)
