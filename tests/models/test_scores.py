"""Scores and their errors, against values worked out by hand and against a truth that is known."""

from math import isnan, sqrt

import numpy as np
import pytest

from barcast.models.scores import gain, lag, mean, newey_west, pit, thirds


def test_newey_west_by_hand() -> None:
    """1, 2, 3, 4: variance 1.25, first autocovariance 0.3125 with weight 1/2 on both sides."""
    assert newey_west([1, 2, 3, 4], 0) == pytest.approx(sqrt(1.25 / 4))
    assert newey_west([1, 2, 3, 4], 1) == pytest.approx(0.625)
    assert newey_west([1, 2, 3, 4], 2) == pytest.approx(sqrt((1.25 + 4 / 3 * 0.3125 - 2 / 3 * 0.375) / 4))
    assert newey_west([5, 5, 5], 2) == 0
    assert isnan(newey_west([1.0], 3))


@pytest.mark.parametrize(
    ("horizon", "stride", "times", "lags"),
    [(1, 5, 100, 4), (16, 5, 100, 8), (20, 1, 100, 40), (1, 1, 1400, 11)],
)
def test_lag_covers_the_overlap(horizon: int, stride: int, times: int, lags: int) -> None:
    """At least twice the origins whose outcomes overlap, and the cube root of the times."""
    assert lag(horizon, stride, times) == lags


def test_symbols_of_a_time_count_as_one() -> None:
    """With two symbols at each time the error is that of the averages; twice the symbols add nothing."""
    found = mean([1, 3, 5, 7], [0, 0, 1, 1], 2, 0)
    assert found == (4, pytest.approx(newey_west([2, 6], 0)))
    assert mean([2, 2, 6, 6], [0, 0, 1, 1], 2, 0).error == pytest.approx(mean([2, 6], [0, 1], 2, 0).error)


def test_mean_with_unequal_times_by_hand() -> None:
    """0 and 2 at one time, 4 at another, nothing at a third: deviations -2, 2 and 0 from the mean 2."""
    found = mean([0, 2, 4], [0, 0, 1], 3, 0)
    assert found.value == 2
    assert found.error == pytest.approx(sqrt(8) / 3)
    assert all(map(isnan, mean([], [], 3, 0)))


def test_gain_by_hand() -> None:
    """Losses of 1 and 2 against 2 and 4 are half as large; the saved 1 and 2 have an error of sqrt(1/8)."""
    found = gain([1, 2], [2, 4], [0, 1], 2, 0)
    assert found.value == pytest.approx(0.5)
    assert found.error == pytest.approx(sqrt(1 / 8) / 3)
    assert gain([2, 4], [2, 4], [0, 1], 2, 0) == (0, 0)


def test_errors_hold_for_overlapping_outcomes_of_symbols_that_move_together() -> None:
    """Sums over 4 bars of shocks that two symbols share: the error is the known one, and holds as often."""
    rng = np.random.default_rng(3)
    h, T, inside, errors = 4, 600, 0, []
    at = np.repeat(np.arange(T), 2)
    for _ in range(200):
        shocks = rng.standard_normal(T + h - 1)
        series = np.convolve(shocks, np.ones(h), "valid")
        found = mean(np.repeat(series, 2), at, T, lag(h, 1, T))
        inside += abs(found.value) < 2 * found.error
        errors.append(found.error)
    assert np.mean(errors) == pytest.approx(h / sqrt(T), rel=0.15)
    assert 0.88 <= inside / 200 <= 0.98
    assert newey_west(np.repeat(series, 2), 0) < 0.5 * h / sqrt(T)


def test_bins_of_the_integral_transform() -> None:
    """Shares below rising quantiles become shares between them."""
    np.testing.assert_allclose(pit([0.1, 0.5, 0.8]), [0.1, 0.4, 0.3, 0.2])


def test_thirds_are_taken_within_each_group() -> None:
    """A symbol that is always more volatile than another has calm times of its own."""
    values = np.array([1, 2, 3, 30, 20, 10.0])
    assert thirds(values, list("aaabbb")).tolist() == [0, 1, 2, 2, 1, 0]
