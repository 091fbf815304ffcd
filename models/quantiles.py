"""Mean, spread and direction of a distribution that is known by a few quantiles."""

from collections.abc import Sequence
from math import exp

import numpy as np
from numpy.typing import NDArray

from barcast.models.forecast import Card, Coverage, Forecast, forecast_from
from barcast.models.window import Window

Array = NDArray[np.float64]


def forecast_of(
    card: Card,
    window: Window,
    quantiles: Array,
    coverage: Coverage | None = None,
    warming: bool | None = None,
) -> Forecast:
    """The forecast of rising quantiles (H, Q) of a window's log returns; see `forecast_from`."""
    return forecast_from(card, window, quantiles, *moments(quantiles, card.levels), coverage, warming)


def central(levels: Sequence[float]) -> list[tuple[int, int]]:
    """The pairs of levels that bound central intervals, the widest first."""
    pairs = [(i, len(levels) - 1 - i) for i in range(len(levels) // 2)]
    return [(i, j) for i, j in pairs if abs(levels[i] + levels[j] - 1) < 1e-9]


def moments(quantiles: Array, levels: Sequence[float]) -> tuple[Array, Array, Array]:
    """Mean, standard deviation and probability above zero, each (n,), of rising quantiles (n, Q), Q >= 2.

    The quantile function is linear between the levels. Beyond the outermost ones it has exponential tails,
    Q(x) = q_1 + b ln(x / p_1) below p_1, mirrored above p_Q; b is such that the tail, drawn on, meets the
    level next to it.
    """
    p = np.array(levels)
    apart = np.diff(p)
    low = (quantiles[:, 1] - quantiles[:, 0]) / np.log(p[1] / p[0])  # b of the lower tail, (H,)
    high = (quantiles[:, -1] - quantiles[:, -2]) / np.log((1 - p[-2]) / (1 - p[-1]))
    first, last = quantiles[:, 0], quantiles[:, -1]
    mean = p[0] * (first - low) + (1 - p[-1]) * (last + high)
    mean = mean + ((quantiles[:, :-1] + quantiles[:, 1:]) / 2 * apart).sum(1)

    q = quantiles - mean[:, None]
    a, b = q[:, :-1], q[:, 1:]
    variance = ((a * a + a * b + b * b) / 3 * apart).sum(1)
    variance += p[0] * ((q[:, 0] - low) ** 2 + low**2)
    variance += (1 - p[-1]) * ((q[:, -1] + high) ** 2 + high**2)

    below = np.array([np.interp(0.0, row, p) for row in quantiles])
    tiny = 1e-300  # of a tail that has no width
    for k in np.flatnonzero(first > 0):  # one by one: the last bit of an array's exp may depend on its length
        below[k] = p[0] * exp(-first[k] / max(low[k], tiny))
    for k in np.flatnonzero(last < 0):
        below[k] = 1 - (1 - p[-1]) * exp(last[k] / max(high[k], tiny))
    return mean, np.sqrt(variance), 1 - below
