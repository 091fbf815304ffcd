"""Joint paths: the quantiles of a forecast, and how a price gets from one horizon to the next.

A coupling says in which order a step's values go with those of the other steps: S samples of G ranks. The
values themselves are the forecast's own quantile functions, so that what is read from the paths at a horizon
is what the forecast says of it (Sklar's theorem; the reordering is the Schaake shuffle of Clark et al. 2004,
with a template that a model has drawn).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from msgspec.structs import replace
from numpy.typing import NDArray

from barcast.models.forecast import Forecast, Paths, freeze
from barcast.models.window import Window

Array = NDArray[np.float64]

LONGEST = 32
"""A path over so many bars has a step at each; a longer one as many steps, and the horizons."""


@dataclass(frozen=True, slots=True, eq=False)
class Coupling:
    """How the steps of a path go together.

    `ranks` (S, G) holds in every column the numbers 0 to S - 1. `bridge` (G,) is the deviation of the prices
    within an interval, as a Brownian motion, over the deviation of the return from its start to its end.
    """

    steps: tuple[int, ...]
    ranks: NDArray[np.int64]
    bridge: Array


class Coupler(Protocol):
    """What knows couplings."""

    @property
    def path(self) -> tuple[int, ...]:
        """The steps of the paths, in bars ahead."""
        ...

    def couplings(self, windows: Sequence[Window]) -> list[Coupling]:
        """A coupling for each window, which never depends on the other windows of the call."""
        ...


def path_steps(horizons: Sequence[int]) -> tuple[int, ...]:
    """The steps of a path, in bars ahead: all up to the longest horizon, or `LONGEST` and horizons."""
    longest = max(horizons)
    if longest <= LONGEST:
        return tuple(range(1, longest + 1))
    spread = np.rint(np.arange(1, LONGEST + 1) * longest / LONGEST).astype(int).tolist()
    return tuple(sorted({*horizons, *spread}))


def between(
    quantiles: Array, levels: Sequence[float], horizons: Sequence[int], steps: Sequence[int]
) -> Array:
    """The quantiles (..., H, Q) of log returns over horizons, at the steps of a path: (..., G, Q).

    At a horizon they are its own, to the bit. Between two, and from none to the first, the median moves
    evenly, and so does the squared distance of each quantile from it. Between two levels the median is
    interpolated; beside all of them it is taken as the nearest one.
    """
    tau = np.array(levels)
    m = int(np.searchsorted(tau, 0.5))
    high, low = min(m, len(tau) - 1), max(m - 1, 0)
    share = 1.0 if high == low or tau[high] == 0.5 else (0.5 - tau[low]) / (tau[high] - tau[low])
    middle = quantiles[..., high, None]  # (..., H, 1)
    if share < 1 and low != high:
        middle = (1 - share) * quantiles[..., low, None] + share * middle
    apart = (quantiles - middle) ** 2
    side = np.where(tau < 0.5, -1.0, 1.0)
    found = np.empty((*quantiles.shape[:-2], len(steps), quantiles.shape[-1]))
    for k, step in enumerate(steps):
        j = int(np.searchsorted(horizons, step))
        if horizons[j] == step:
            found[..., k, :] = quantiles[..., j, :]
            continue
        since = horizons[j - 1] if j else 0
        w = (step - since) / (horizons[j] - since)
        at, square = w * middle[..., j, :], w * apart[..., j, :]
        if j:
            at, square = at + (1 - w) * middle[..., j - 1, :], square + (1 - w) * apart[..., j - 1, :]
        found[..., k, :] = at + side * np.sqrt(square)
    rising: Array = np.maximum.accumulate(found, -1)  # whatever is rounded
    return rising


def read(quantiles: Array, levels: Sequence[float], p: Array) -> Array:
    """The quantile functions of rising quantiles (G, Q), Q >= 2, at probabilities (S,): (G, S).

    They are those of `quantiles.moments`: linear between the levels, with exponential tails.
    """
    tau = np.array(levels)
    low = (quantiles[:, 1] - quantiles[:, 0]) / np.log(tau[1] / tau[0])
    high = (quantiles[:, -1] - quantiles[:, -2]) / np.log((1 - tau[-2]) / (1 - tau[-1]))
    inner = np.stack([np.interp(p, tau, row) for row in quantiles])
    under = low[:, None] * np.log(np.minimum(p / tau[0], 1.0))
    over = high[:, None] * np.log(np.minimum((1 - p) / (1 - tau[-1]), 1.0))
    found: Array = inner + under - over
    return found


def coupled(forecast: Forecast, coupling: Coupling) -> Paths:
    """The paths of a forecast: its quantiles, put together as a coupling says."""
    quantiles = between(forecast.quantiles, forecast.levels, forecast.horizons, coupling.steps)
    S = len(coupling.ranks)
    values = read(quantiles, forecast.levels, (np.arange(S) + 0.5) / S)  # (G, S)
    returns = np.take_along_axis(values.T, coupling.ranks, 0)
    moves = np.diff(returns, axis=1, prepend=0.0)
    bridge = coupling.bridge * moves.std(0)
    freeze(returns, bridge)
    return Paths(coupling.steps, returns, bridge)


def with_paths(coupler: Coupler, windows: Sequence[Window], forecasts: Sequence[Forecast]) -> list[Forecast]:
    """The forecasts of these windows, with paths where the quantiles are numbers."""
    good = [bool(np.isfinite(forecast.quantiles).all()) for forecast in forecasts]
    made = iter(coupler.couplings([window for window, fine in zip(windows, good, strict=True) if fine]))
    return [
        replace(forecast, paths=coupled(forecast, next(made))) if fine else forecast
        for forecast, fine in zip(forecasts, good, strict=True)
    ]
