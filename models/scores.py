"""Scores of quantile forecasts."""

import numpy as np
from numpy.typing import ArrayLike, NDArray


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


def coverage(outcome: ArrayLike, lower: ArrayLike, upper: ArrayLike) -> float:
    """The share of outcomes inside [lower, upper]."""
    y = np.asarray(outcome, float)
    return float(((y >= np.asarray(lower)) & (y <= np.asarray(upper))).mean())
