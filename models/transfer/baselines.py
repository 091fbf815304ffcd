"""Scenarios without a network: what one that is learnt has to beat."""

import numpy as np
from numpy.random import Generator
from numpy.typing import NDArray

from barcast.models.transfer.statistics import realised_volatility

Array = NDArray[np.float64]

BLOCK = 16
"""Bars of a block."""


def rescaled(r: Array, target: Array, generator: Generator) -> Array:
    """Returns (n, N) made as volatile as windows (m, N) of the target regime, each as one that is drawn."""
    wanted = realised_volatility(target[generator.integers(len(target), size=len(r))])
    return np.asarray(r * (wanted / realised_volatility(r))[:, None])


def bootstrapped(r: Array, target: Array, generator: Generator) -> Array:
    """As many returns (n, N), in blocks that are drawn from windows (m, N) of the target regime."""
    n, N = r.shape
    count = -(-N // BLOCK)
    window = generator.integers(len(target), size=(n, count))[..., None]
    start = generator.integers(N - BLOCK + 1, size=(n, count))[..., None]
    return np.asarray(target[window, start + np.arange(BLOCK)].reshape(n, -1)[:, :N])
