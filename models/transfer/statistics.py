"""What the texture of windows is, and whether two go the same way: by which scenarios are judged."""

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]

LAGS = 10
"""Bars apart at which squares are compared, at most."""


def realised_volatility(r: Array) -> Array:
    """The root of the mean square of returns (n, N), (n,)."""
    return np.asarray(np.sqrt((r**2).mean(1)))


def tail_ratio(r: Array) -> Array:
    """How heavy the tails of returns (n, N) are, (n,): a kurtosis by quantiles (Crow and Siddiqui 1967).

    The range of the middle 95 % over that of the middle half; 2.91 for normal returns.
    """
    low, first, third, high = np.quantile(r, [0.025, 0.25, 0.75, 0.975], axis=1)
    return np.asarray((high - low) / (third - first))


def square_correlations(r: Array) -> Array:
    """The autocorrelation of squared returns (n, N) within each window at 1 to `LAGS` bars, (n, LAGS)."""
    z = r**2 - (r**2).mean(1, keepdims=True)
    variance = (z**2).mean(1)
    N = r.shape[1]
    return np.stack([(z[:, k:] * z[:, :-k]).sum(1) / N / variance for k in range(1, LAGS + 1)], 1)


def rank_correlation(r: Array, other: Array) -> Array:
    """Spearman's correlation of the ways that returns (n, N) sum up to, with those of others, (n,)."""
    a, b = (x.cumsum(1).argsort(1).argsort(1).astype(np.float64) for x in (r, other))
    a, b = a - a.mean(1, keepdims=True), b - b.mean(1, keepdims=True)
    return np.asarray((a * b).sum(1) / np.sqrt((a**2).sum(1) * (b**2).sum(1)))
