"""Scores of quantiles, samples and probabilities, and how sure one can be of their means."""

from math import ceil, nan, sqrt
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

THIRDS = ("calm", "middle", "volatile")
"""The names of `thirds` by the width of an interval."""


class Estimate(NamedTuple):
    """A value and its standard error, in the same unit."""

    value: float
    error: float


def pinball(outcome: ArrayLike, quantiles: ArrayLike, levels: ArrayLike) -> NDArray[np.float64]:
    """Pinball loss of each outcome, averaged over the levels (Koenker and Bassett 1978).

    `outcome` is (...,), `quantiles` (..., Q), `levels` (Q,); the result is (...,) in the outcome's unit.
    """
    q, tau = np.asarray(quantiles, float), np.asarray(levels, float)
    miss = np.asarray(outcome, float)[..., None] - q
    loss: NDArray[np.float64] = np.maximum(tau * miss, (tau - 1) * miss).mean(-1)
    return loss


def crps(outcome: ArrayLike, quantiles: ArrayLike, levels: ArrayLike) -> NDArray[np.float64]:
    """Continuous ranked probability score on the grid of levels: twice the mean pinball loss."""
    return 2 * pinball(outcome, quantiles, levels)


def brier(outcome: ArrayLike, probability: ArrayLike) -> NDArray[np.float64]:
    """Brier score of a forecast probability: (p - y)^2, y being 1 where it happened, else 0 (Brier 1950)."""
    miss = np.asarray(probability, float) - np.asarray(outcome, float)
    score: NDArray[np.float64] = miss * miss
    return score


def energy(outcome: ArrayLike, samples: ArrayLike) -> NDArray[np.float64]:
    """Energy score of vectors, in their unit: E|X - y| - E|X - X'| / 2 (Gneiting and Raftery 2007, eq. 22).

    `outcome` is (..., G), `samples` (..., S, G), S >= 2; the result is (...,). Fair: the second mean is over
    pairs of different samples, S (S - 1) of them, so that its expectation does not depend on S.
    """
    x = np.asarray(samples, float)
    y = np.asarray(outcome, float)
    S, G = x.shape[-2:]
    far = np.sqrt(np.square(x - y[..., None, :]).sum(-1)).mean(-1)
    flat = np.ascontiguousarray(x).reshape(-1, S, G)
    apart = np.empty(len(flat))
    for k, own in enumerate(flat):  # one at a time: S x S numbers stay in the cache
        own = own - own.mean(0)
        squares = np.square(own).sum(-1)
        between = squares[:, None] + squares - 2 * (own @ own.T)
        np.fill_diagonal(between, 0)
        apart[k] = np.sqrt(np.maximum(between, 0, out=between), out=between).sum()
    score: NDArray[np.float64] = far - apart.reshape(far.shape) / (2 * S * (S - 1))
    return score


def variogram(outcome: ArrayLike, samples: ArrayLike, p: float = 0.5) -> NDArray[np.float64]:
    """Variogram score of order p: the sum over i, j of (|y_i - y_j|^p - E|X_i - X_j|^p)^2.

    Scheuerer and Hamill (2015), eq. 4 with all weights 1. Shapes are those of `energy`; the unit is that of
    the outcome to the power 2p. It sees dependence better than the energy score, and no common shift at all.
    """
    x, y = np.asarray(samples, float), np.asarray(outcome, float)
    G = y.shape[-1]
    score = np.zeros(y.shape[:-1])
    for i in range(G - 1):
        expected = (np.abs(x[..., i + 1 :] - x[..., i, None]) ** p).mean(-2)
        seen = np.abs(y[..., i + 1 :] - y[..., i, None]) ** p
        score += 2 * np.square(seen - expected).sum(-1)
    return score


def lag(horizon: int, stride: int, times: int) -> int:
    """Over how many origin times errors are taken as correlated: max(2 ceil(h / stride), T^(1/3)).

    Outcomes over `horizon` bars overlap while origins, `stride` bars apart, are less than that away; the cube
    root of the number of times T lets volatility cluster.
    """
    return max(2 * ceil(horizon / stride), int(times ** (1 / 3)))


def newey_west(series: ArrayLike, lags: int) -> float:
    """Standard error of the mean of an autocorrelated series (T,); nan for fewer than two values.

    Newey and West (1987): autocovariances up to `lags` with the weights 1 - k / (lags + 1).
    """
    x = np.asarray(series, float)
    n = len(x)
    if n < 2:
        return nan
    d = x - x.mean()
    variance = float(d @ d) / n
    for k in range(1, min(lags, n - 1) + 1):
        variance += 2 * (1 - k / (lags + 1)) * float(d[k:] @ d[:-k]) / n
    return sqrt(max(variance, 0.0) / n)


def mean(values: ArrayLike, at: ArrayLike, times: int, lags: int) -> Estimate:
    """The mean of values (n,) of several symbols, with an error that holds when they move together.

    `at` (n,) numbers the time of each value, from 0 to `times` - 1. Deviations are summed over the symbols of
    a time, and the error is that of `newey_west` over the series of times: with equally many symbols at every
    time, the error of the series of averages. Times without a value count as zero deviation.
    """
    x = np.asarray(values, float)
    if not len(x):
        return Estimate(nan, nan)
    value = float(x.mean())
    sums = np.bincount(np.asarray(at), x - value, minlength=times)
    return Estimate(value, newey_west(sums, lags) * times / len(x))


def gain(mine: ArrayLike, others: ArrayLike, at: ArrayLike, times: int, lags: int) -> Estimate:
    """By what share the losses (n,) of one model are below those of another at the same origins.

    1 - mean(mine) / mean(others), with the error of the paired difference over mean(others); arguments and
    errors as in `mean`.
    """
    theirs = np.asarray(others, float)
    saved = mean(theirs - np.asarray(mine, float), at, times, lags)
    size = float(theirs.mean()) if len(theirs) else nan
    return Estimate(saved.value / size, saved.error / size) if size else Estimate(nan, nan)


def pit(below: ArrayLike) -> NDArray[np.float64]:
    """The share of outcomes in each bin between levels, (Q + 1,), from the shares at or below each (Q,).

    The bins of the probability integral transform; calibrated ones hold as much as they are wide.
    """
    return np.diff(np.concatenate([[0.0], np.asarray(below, float), [1.0]]))


def thirds(values: ArrayLike, groups: ArrayLike) -> NDArray[np.intp]:
    """0, 1 or 2 for the lowest, middle and highest third of values (n,) within each group (n,)."""
    x, names = np.asarray(values, float), np.asarray(groups)
    third = np.empty(len(x), np.intp)
    for name in np.unique(names):
        own = names == name
        third[own] = np.searchsorted(np.quantile(x[own], [1 / 3, 2 / 3]), x[own])
    return third
