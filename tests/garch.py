"""Seeded bars from a regime-switching GARCH-t process whose quantiles are known."""

from dataclasses import dataclass
from math import sqrt

import numpy as np
from numpy.typing import NDArray
from scipy.stats import t as student

from barcast.models import Window

Array = NDArray[np.float64]

HOUR = 3_600_000_000_000
START = 1_704_067_200_000_000_000  # 2024-01-01T00:00Z, a Monday
DEGREES = 5.0  # of freedom of the innovations
ALPHA, BETA = 0.06, 0.92
LEVELS = (0.0018, 0.0036)  # long-run volatility of one bar, calm and busy
SWITCH = 0.005  # probability of a change of regime
TICKS = 12  # of a bar's path, for its high and low
AT_ONCE = 100  # origins whose paths are simulated together


@dataclass(frozen=True, slots=True)
class Simulation:
    """The bars of one symbol, and the true state that follows each.

    `ahead` (N,) is the volatility of the return to come, `variance` (N,) its square before the season,
    `regime` (N,) the one that led to it; `factor` (P,) is the season of bars k, k + P and so on.
    """

    window: Window
    ahead: Array
    variance: Array
    regime: NDArray[np.int64]
    factor: Array

    def quantiles(self, levels: tuple[float, ...]) -> Array:
        """True quantiles of the log return from each close to the next, (N, Q)."""
        unit = student.ppf(np.array(levels), DEGREES) / sqrt(DEGREES / (DEGREES - 2))
        return np.asarray(self.ahead[:, None] * unit)

    def outlook(
        self, at: NDArray[np.int64], horizons: tuple[int, ...], levels: tuple[float, ...], paths: int = 4000
    ) -> tuple[Array, Array]:
        """True quantiles (n, H, Q) and deviations (n, H) of log returns from the bars `at` (n,).

        They are those of paths from the true state, each with its mirror image; every step's shocks are at
        even levels in an order of its own, the same for every bar.
        """
        rng, reach = np.random.default_rng(0), max(horizons)
        even = (np.array([rng.permutation(paths) for _ in range(reach)]) + 0.5) / paths
        eps = student.ppf(even, DEGREES) / sqrt(DEGREES / (DEGREES - 2))
        switch = rng.random((reach, paths)) < SWITCH
        p, level2 = np.array(levels), np.square(LEVELS)
        factor = self.factor
        q, sd = np.empty((len(at), len(horizons), len(p))), np.empty((len(at), len(horizons)))
        for i in range(0, len(at), AT_ONCE):
            k = at[i : i + AT_ONCE]
            v = np.repeat(self.variance[k, None], paths, 1)
            regime = self.regime[k, None] % 2
            total = np.zeros_like(v)
            for j in range(reach):
                total += np.sqrt(v) * factor[(k + 1 + j) % len(factor), None] * eps[j]
                regime = regime ^ switch[j]
                v = (1 - ALPHA - BETA) * level2[regime] + v * (ALPHA * eps[j] ** 2 + BETA)
                if j + 1 in horizons:
                    h = horizons.index(j + 1)
                    q[i : i + AT_ONCE, h] = np.sign(p - 0.5) * np.quantile(abs(total), abs(2 * p - 1), 1).T
                    sd[i : i + AT_ONCE, h] = np.sqrt((total**2).mean(1))
        return q, sd


def simulate(
    symbol: str,
    bars: int,
    seed: int,
    season: bool = False,
    step: int = HOUR,
    levels: tuple[float, float] = LEVELS,
    switch: float = SWITCH,
) -> Simulation:
    """Draw `bars` bars that follow each other every `step` nanoseconds, around the clock.

    Given the past, a return is Student-t with 5 degrees of freedom times sigma_t, with
    sigma_t^2 = (1 - alpha - beta) level^2 + alpha r^2 + beta sigma^2 before the season; the level switches
    between two regimes, by the chance `switch` at each bar; the truth to come is known for the default
    regimes alone. With `season`, sigma_t follows the hour of the day by a factor of up to 2.
    """
    rng = np.random.default_rng([seed, sum(symbol.encode())])
    times = START + step * np.arange(1, bars + 1, dtype=np.int64)
    hour = (np.arange(bars + 1) * step // HOUR) % 24
    factor = np.exp(0.7 * np.sin(2 * np.pi * hour / 24)) if season else np.ones(bars + 1)
    day = factor[: max(1, 24 * HOUR // step)]  # after which it repeats itself
    regime = np.cumsum(rng.random(bars + 1) < switch) % 2
    eps = rng.standard_t(DEGREES, bars) / sqrt(DEGREES / (DEGREES - 2))
    variance = np.empty(bars + 1)
    variance[0] = levels[0] ** 2
    for k in range(bars):
        r2 = variance[k] * eps[k] ** 2
        level2 = levels[regime[k]] ** 2
        variance[k + 1] = (1 - ALPHA - BETA) * level2 + ALPHA * r2 + BETA * variance[k]
    sigma = np.sqrt(variance) * factor
    r = sigma[:-1] * eps
    close = np.log(100.0) + np.cumsum(r)
    open_ = np.concatenate([[np.log(100.0)], close[:-1]])

    steps = rng.standard_normal((bars, TICKS)) * sigma[:-1, None] / sqrt(TICKS)
    path = np.cumsum(steps, 1)
    bridge = path + np.arange(1, TICKS + 1) / TICKS * (r - path[:, -1])[:, None]
    high = open_ + np.maximum(bridge.max(1), 0)
    low = open_ + np.minimum(bridge.min(1), 0)
    volume = 1000 * np.exp(0.5 * np.log(sigma[:-1] / levels[0]) + 0.3 * rng.standard_normal(bars))
    high, low = np.maximum(high, np.maximum(open_, close)), np.minimum(low, np.minimum(open_, close))
    values = np.column_stack([np.exp(open_), np.exp(high), np.exp(low), np.exp(close), volume])
    return Simulation(Window(symbol, times, values), sigma[1:], variance[1:], regime[:-1], day)


def windows(symbols: int, bars: int, seed: int = 0, season: bool = False) -> list[Window]:
    """Whole histories of several symbols."""
    return [simulate(f"SYM{i}", bars, seed, season).window for i in range(symbols)]
