"""Scores and their errors, against values worked out by hand and against a truth that is known."""

from math import isnan, sqrt

import numpy as np
import pytest
import scoringrules

from barcast.models.scores import brier, energy, gain, lag, mean, newey_west, pit, thirds, variogram


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


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
@pytest.mark.parametrize("size", [(2, 1), (7, 5), (64, 16)])
def test_scores_of_samples_are_those_of_scoringrules(shape: tuple[int, ...], size: tuple[int, int]) -> None:
    """Energy (fair) and variogram scores, to nine digits, in any shape and around any place."""
    S, G = size
    rng = np.random.default_rng(S)
    for place, scale in ((0.0, 1.0), (3.0, 0.01)):
        y = place + scale * rng.standard_normal((*shape, G)).cumsum(-1)
        x = place + scale * rng.standard_normal((*shape, S, G)).cumsum(-1)
        fair = scoringrules.es_ensemble(y, x, estimator="fair", backend="numpy")
        np.testing.assert_allclose(energy(y, x), fair, rtol=1e-9, atol=1e-9 * scale)
        for p in (0.5, 1.0):
            known = scoringrules.vs_ensemble(y, x, p=p, backend="numpy")
            np.testing.assert_allclose(variogram(y, x, p), known, rtol=1e-9, atol=1e-12)


def test_brier_is_that_of_scoringrules() -> None:
    """The squared distance; an outcome that counts half is at its own distance."""
    rng = np.random.default_rng(1)
    p, y = rng.random(20), rng.integers(0, 2, 20)
    np.testing.assert_allclose(brier(y, p), scoringrules.brier_score(y, p), rtol=1e-12)
    assert brier(0.5, 0.2) == pytest.approx(0.09)


def test_same_samples_score_no_spread() -> None:
    """Samples that are all one point are judged by their distance alone, whatever is rounded."""
    x = np.full((5, 3), 0.1)
    assert energy(np.zeros(3), x) == pytest.approx(0.1 * sqrt(3), rel=1e-9)
    assert variogram([0.0, 1.0, 1.0], x) == pytest.approx(4)


def test_the_truth_has_the_best_scores() -> None:
    """Brownian paths are judged better than the same marginals coupled otherwise."""
    rng = np.random.default_rng(0)
    y, x = (rng.standard_normal((300, *n, 8)).cumsum(-1) for n in ((), (64,)))
    apart, together = rng.permuted(x, axis=1), np.sort(x, axis=1)
    for score in (energy, variogram):
        mine = score(y, x)
        for other in (apart, together):
            worse = score(y, other) - mine
            assert worse.mean() > 3 * worse.std() / sqrt(300)
