"""Regimes: what a market was like over its last bars, by a rule that sees no later one."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from barcast.models.errors import ConfigError, DataError
from barcast.models.window import Window

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

REGIMES = ("calm", "trend", "volatile", "crisis")
"""By their numbers, 0 to 3."""
BARS = 256
"""Bars of a window: those that a regime is said of, and those of a latent."""
REFERENCE, LEAST = 2048, 1024
"""Bars before a window whose volatility is what is usual, at most and at least."""
EVERY = 16  # bars from one volatility to the next in the median of those before
BUSY, WILD, STEEP, FALLEN = 0.7, 0.85, 0.75, 0.5
"""Quantiles of what is learnt from: of the volatility of volatile windows and of crises, of the way of trends
and of the fall of crises."""
PIECE = 4096  # windows that are measured at once


@dataclass(frozen=True, slots=True, eq=False)
class Measures:
    """What the rule sees of n windows.

    `usual` (n,) is the median volatility of a bar before the window, `level` (n,) the logarithm of the
    window's own volatility over it; `way` (n,) how far it went and `fall` (n,) how far its end is below its
    top, both in deviations of a walk of as many steps as volatile as the window.
    """

    usual: Array
    level: Array
    way: Array
    fall: Array

    def __len__(self) -> int:
        return len(self.level)

    def only(self, keep: NDArray[np.bool_]) -> "Measures":
        """Some of the windows."""
        return Measures(self.usual[keep], self.level[keep], self.way[keep], self.fall[keep])


def first_end() -> int:
    """The first bar that a window which can be measured may end at, from 0."""
    return BARS + LEAST


def measured(window: Window, ends: Ints) -> Measures:
    """Measure the windows of `BARS` bars that end at some bars (n,) of a history, from `first_end()` on.

    Each number follows from bars up to its end alone. Where nothing moved, volatilities are 0 and the rest
    is not finite: see `usable`.
    """
    price = np.log(window.values[:, 3])
    squares = np.concatenate([[0.0, 0.0], np.cumsum(np.diff(price) ** 2)])  # (T + 1,): before each bar
    volatility = np.sqrt(np.maximum(squares[BARS + 1 :] - squares[1:-BARS], 0) / BARS)  # of ends from BARS on
    found = []
    with np.errstate(divide="ignore", invalid="ignore"):
        for k in (ends[i : i + PIECE] for i in range(0, len(ends), PIECE)):
            before = k[:, None] - BARS - EVERY * np.arange((REFERENCE - BARS) // EVERY + 1)  # (n, m)
            known = np.where(before >= BARS, volatility[np.maximum(before - BARS, 0)], np.nan)
            usual, own = np.nanmedian(known, 1), volatility[k - BARS]
            ways = sliding_window_view(price, BARS + 1)[k - BARS]  # (n, BARS + 1)
            walk = own * np.sqrt(BARS)
            moved, fallen = ways[:, -1] - ways[:, 0], ways.max(1) - ways[:, -1]
            found.append((usual, np.log(own / usual), np.abs(moved) / walk, fallen / walk))
    if not found:
        return Measures(*(np.zeros(0) for _ in range(4)))
    return Measures(*(np.concatenate(column) for column in zip(*found, strict=True)))


def usable(measures: Measures) -> NDArray[np.bool_]:
    """Which windows move, as the bars before them did, (n,)."""
    return np.isfinite(measures.level) & np.isfinite(measures.way) & (measures.usual > 0)


@dataclass(frozen=True, slots=True)
class RegimeRule:
    """Which regime a window is of: thresholds of `Measures`, learnt from older bars and then fixed."""

    busy: float  # level from which a window is volatile
    wild: float  # level from which it is a crisis, if it has fallen
    fallen: float  # fall from which it has
    steep: float  # way from which a window that is not volatile is a trend

    def __post_init__(self) -> None:
        for name in ("busy", "wild", "fallen", "steep"):
            if not np.isfinite(getattr(self, name)):
                raise ConfigError(f"rule.{name} is {getattr(self, name)}, not a number: train again")

    @classmethod
    def fit(cls, measures: Sequence[Measures]) -> "RegimeRule":
        """The thresholds by quantiles of all windows of some histories; raise `DataError` without any."""
        if not sum(map(len, measures)):
            raise DataError(
                f"no window of {BARS} bars that move has {LEAST} bars before it: give longer histories"
            )
        level, fall, way = (
            np.concatenate([getattr(m, x) for m in measures]) for x in ("level", "fall", "way")
        )
        busy, wild = np.quantile(level, [BUSY, WILD])
        fallen, steep = np.quantile(fall, FALLEN), np.quantile(way, STEEP)
        return cls(float(busy), float(wild), float(fallen), float(steep))

    def labels(self, measures: Measures) -> Ints:
        """The regime of each window as its place in `REGIMES`, (n,)."""
        crisis = (measures.level >= self.wild) & (measures.fall >= self.fallen)
        busy, steep = measures.level >= self.busy, measures.way >= self.steep
        return np.select([crisis, busy, steep], [3, 2, 1], 0).astype(np.int64)


def regime_id(name: str) -> int:
    """The number of a regime; raise `ConfigError` for a name that there is not."""
    if name not in REGIMES:
        raise ConfigError(f"regime {name!r} is unknown: take one of {', '.join(REGIMES)}")
    return REGIMES.index(name)
