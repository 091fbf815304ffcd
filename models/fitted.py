"""Baselines that fit some numbers to the window's own past: HAR, and any of them with a time-of-week factor.

What is fitted depends on the bars that closed by a boundary, one of a grid in time that is fixed for each
symbol, and so changes rarely. It is kept until the bars it was fitted to are others.
"""

import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from math import log
from statistics import NormalDist
from typing import Generic, TypeVar
from zlib import crc32

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from barcast.models.baselines import (
    DECAY,
    LEAST,
    MEMORY,
    RETURNS,
    STILL,
    card_of,
    figures,
    least_volatility,
    volatility,
)
from barcast.models.errors import ConfigError
from barcast.models.forecast import Card, Forecast, forecast_from
from barcast.models.season import HOUR, PRIOR, Ints, choose_zone, clipped, slot_means, slots
from barcast.models.window import Window, check_long_enough

Array = NDArray[np.float64]
Fit = TypeVar("Fit")

VERSION = 2  # of the arithmetic: ids differ where bits may
GAIN_PRIOR = 1.0  # bars that a gain of 1 counts as
FLOOR = 1e-3  # of the mean variance: keeps the logarithm of a quiet bar finite
TINY = 1e-12  # the same in bars that stand still, in (log return)²
RIDGE = 1e-6  # squared coefficients weigh this much beside the mean squared error: some bars teach no slope
SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86_400}


@dataclass(frozen=True, slots=True)
class Reach:
    """How far back the baselines look, in bars."""

    har: tuple[int, ...]  # of the means of the variance (Corsi 2009)
    outcomes: int  # behind the quantiles of `har`, `fhs-s` and `garch`
    fit: int  # that are fitted to
    least: int  # that are fitted to while a window is short
    refit: int  # between two boundaries


INTRADAY = Reach((1, 4, 16, 96, 480), 2000, fit=5000, least=200, refit=480)
DAILY = Reach((1, 5, 22, 66), 750, fit=1000, least=150, refit=20)


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """What each of n bars says with the one before it. `price` is (n + 1,), the others (n,)."""

    close_times: Ints
    price: Array  # log close, the first one that of the bar before
    returns: Array  # log close to log close
    variance: Array  # by Parkinson (1980), plus the squared opening gap

    @classmethod
    def of(cls, close_times: Ints, values: Array) -> "Series":
        """The series of n + 1 bars: their closes in nanoseconds and values (n + 1, 5)."""
        o, h, low, c = np.log(values[:, :4]).T
        variance = (h[1:] - low[1:]) ** 2 / (4 * log(2)) + (o[1:] - c[:-1]) ** 2
        return cls(close_times[1:], c, np.diff(c), variance)


@dataclass(frozen=True, slots=True, eq=False)
class Season:
    """How much more than usual the price moves in each hour of the week by the clock of `zone`.

    `factor` (168,) is that of a bar; `gain` (H, 168) that of the bars over each horizon after one.
    """

    zone: str
    factor: Array
    gain: Array

    @classmethod
    def of(cls, s: Series, horizons: Sequence[int]) -> "Season":
        """Learn it from a series: mean absolute returns, the hours of the week shrunk to those of the day,
        and these to 1, which counts as 30 hours of bars in each.

        The gain is the root mean square of the factors of the bars that followed.
        """
        zone = choose_zone([(s.close_times, np.abs(s.returns))])
        slot, size = slots(s.close_times, zone), clipped(np.abs(s.returns))
        hours = len(np.unique((s.close_times - 1) // HOUR))
        prior = PRIOR * len(slot) / hours  # the bars within an hour are much alike: hours are counted
        day = slot_means(slot % 24, size, 24, prior)
        factor = np.tile(day, 7) * slot_means(slot, size / day[slot % 24], prior=prior)
        gain = []
        for h in horizons:
            ahead = _sums(factor[slot] ** 2, h)[1:] / h
            from_, n = slot[: len(ahead)], np.bincount(slot[: len(ahead)], minlength=len(factor))
            total = np.bincount(from_, ahead, minlength=len(factor))
            gain.append(np.sqrt((total + GAIN_PRIOR) / (n + GAIN_PRIOR)))
        return cls(zone, factor, np.array(gain))


@dataclass(frozen=True, slots=True, eq=False)
class Flat:
    """A series without its season: returns and variances (n,) in units of their hour, and the gain (H, n)."""

    returns: Array
    variance: Array
    gain: Array

    @classmethod
    def of(cls, s: Series, season: Season | None, horizons: Sequence[int]) -> "Flat":
        """Take a season out; None leaves all as it is."""
        if season is None:
            return cls(s.returns, s.variance, np.ones((len(horizons), len(s.returns))))
        slot = slots(s.close_times, season.zone)
        factor = season.factor[slot]
        return cls(s.returns / factor, s.variance / factor**2, season.gain[:, slot])


class Fitted(ABC, Generic[Fit]):
    """A forecaster that is a pure function of the window and fits something to a part of it.

    It is fitted to the last `reach.fit` bars that closed by the last boundary before the window's end; while
    those are fewer than `reach.least`, to the first so many of the window; when they all close at one price,
    to the whole window. Boundaries are `reach.refit` timeframes apart, at other times for each symbol: they
    need not all be fitted at once.

    The state is the newest fit of each symbol with the digest of the bars it was made of. It saves work and
    changes no bit.
    """

    def __init__(self, card: Card, reach: Reach) -> None:
        self.card = card
        self.reach = reach
        self._every = reach.refit * _nanoseconds(card.timeframe)
        self._fits: dict[str, tuple[bytes, Fit]] = {}

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        return [self._forecast(window) for window in windows]

    @abstractmethod
    def _fit(self, s: Series) -> Fit:
        """What there is to learn from a series."""

    @abstractmethod
    def _figures(self, close_times: Ints, values: Array, fit: Fit) -> tuple[Array, ...]:
        """Quantiles (H, Q), mean, standard deviation and the probability of a rise (H,), from those bars."""

    def _forecast(self, window: Window) -> Forecast:
        card = self.card
        check_long_enough(window, card.min_window)
        times, values = window.close_times[-card.window :], window.values[-card.window :]
        prices = values[:, :4]
        if prices.min() > 0 and prices.max() < np.inf:  # neither holds when one is not a number
            fit = self._fitted(window.symbol, times, values)
            quantiles, mean, std, rise = self._figures(times, values, fit)
        else:
            quantiles = np.full((len(card.horizons), len(card.levels)), np.nan)
            mean, std, rise = np.full((3, len(card.horizons)), np.nan)
        return forecast_from(card, window, quantiles, mean, std, rise)

    def _fitted(self, symbol: str, times: Ints, values: Array) -> Fit:
        phase = crc32(symbol.encode()) * self._every >> 32
        boundary = (int(times[-1]) - phase) // self._every * self._every + phase
        stop = int(np.searchsorted(times, boundary, side="right"))
        start = max(0, stop - self.reach.fit)
        if stop < self.reach.least:
            start, stop = 0, self.reach.least
        closes = values[start:stop, 3]
        if closes.min() == closes.max():
            start, stop = 0, len(times)
        content = sha256(np.ascontiguousarray(times[start:stop]).data)
        content.update(np.ascontiguousarray(values[start:stop]).data)
        digest = content.digest()
        known = self._fits.get(symbol)
        if known is None or known[0] != digest:
            known = self._fits[symbol] = digest, self._fit(Series.of(times[start:stop], values[start:stop]))
        return known[1]


@dataclass(frozen=True, slots=True, eq=False)
class Har:
    """Log variance over each horizon by logs of past means: coefficients (H, J + 1), the constant first."""

    floor: float  # added to every variance
    coefficients: Array

    @classmethod
    def of(cls, variance: Array, windows: Sequence[int], horizons: Sequence[int]) -> "Har":
        """Ordinary least squares over the variances (n,) of a series, Corsi (2009)."""
        n = len(variance)
        floor = max(FLOOR * float(variance.mean()), TINY)
        past = _log_means(variance, windows, floor)
        first = min(windows[-1], n // 2)
        rows = []
        for h in horizons:
            ahead = np.log(_sums(variance, h)[1 + first :] / h + floor)
            rows.append(_least_squares(past[:, first : n - h], ahead))
        return cls(floor, np.array(rows))

    def volatility(self, variance: Array, windows: Sequence[int]) -> Array:
        """The volatility per bar expected after each bar, over each horizon, (H, n)."""
        past = _log_means(variance, windows, self.floor)
        found = np.empty((len(self.coefficients), len(variance)))
        for row, b in zip(found, self.coefficients, strict=True):
            row[:] = b[0]
            for slope, x in zip(b[1:], past, strict=True):
                row += slope * x
        return np.exp(0.5 * found)


class Scaled(Fitted[tuple[Season | None, Har | None]]):
    """Outcomes over a scale of then, times the scale of now; the scale is made of up to three things.

    `name` is that of the volatility per bar: none (`hs-s`), the exponentially weighted one over the last 128
    bars (`ewma`, `fhs-s`; J.P. Morgan, RiskMetrics, 1996), or the log-HAR regression (`har`; Corsi 2009) on
    ranges; -s adds the season. `har` and `fhs-s` take the quantiles of the last 2,000 outcomes (daily 750),
    `hs-s` of the last 500, `ewma` those of the normal distribution.

    A window that is not full is warming: means, outcomes and fits take the bars that are there.
    Raises `ConfigError` for a name with -s on daily bars.
    """

    def __init__(self, name: str, timeframe: str, horizons: Sequence[int], levels: Sequence[float]) -> None:
        self._kind, self._seasonal, reach = parse(name, timeframe, horizons)
        fits = self._seasonal or self._kind == "har"
        past = {"hs": 0, "ewma": MEMORY, "fhs": MEMORY, "har": reach.har[-1]}[self._kind]
        self._burn = min(past, reach.har[-2]) if self._kind == "har" else past  # bars without an outcome
        self._outcomes = {"hs": RETURNS, "ewma": 0}.get(self._kind, reach.outcomes)
        far = max(horizons) if self._outcomes else 0
        self._need = past + self._outcomes + far + 1
        least = self._burn + min(self._outcomes, LEAST) + far + 1
        super().__init__(
            card_of(
                name,
                timeframe,
                horizons,
                levels,
                max(self._need, reach.fit + reach.refit) if fits else self._need,
                max(least, reach.least) if fits else least,
                {
                    "version": VERSION,
                    "outcomes": self._outcomes,
                    "decay": DECAY,
                    "memory": MEMORY,
                    "still": STILL,
                    "floor": FLOOR,
                    "season": (PRIOR, GAIN_PRIOR),
                    **asdict(reach),
                },
            ),
            reach,
        )
        self._normal = np.array([NormalDist().inv_cdf(level) for level in levels])

    def _fit(self, s: Series) -> tuple[Season | None, Har | None]:
        horizons = self.card.horizons
        season = Season.of(s, horizons) if self._seasonal else None
        if self._kind != "har":
            return season, None
        return season, Har.of(Flat.of(s, season, horizons).variance, self.reach.har, horizons)

    def _figures(
        self, close_times: Ints, values: Array, fit: tuple[Season | None, Har | None]
    ) -> tuple[Array, ...]:
        season, har = fit
        H = self.card.horizons
        s = Series.of(close_times[-self._need :], values[-self._need :])
        flat = Flat.of(s, season, H)
        if har is not None:
            scale = har.volatility(flat.variance, self.reach.har)
        else:
            scale = self._volatility(flat.returns)
        scale = scale * flat.gain * np.sqrt(H)[:, None]
        if self._kind == "ewma":
            now = scale[:, -1]
            return now[:, None] * self._normal, np.zeros(len(H)), now, np.full(len(H), 0.5)
        outcomes, n = np.zeros((1, len(H), self._outcomes)), []
        price = s.price[1:]
        first = max(self._burn - 1, 0)
        for h, row, then in zip(H, outcomes[0], scale, strict=True):
            found = np.sort(((price[h:] - price[:-h]) / then[:-h])[first:][-self._outcomes :])
            row[: len(found)] = found
            n.append(len(found))
        return tuple(f[0] for f in figures(outcomes, np.array([n]), self.card.levels, scale[None, :, -1]))

    def _volatility(self, returns: Array) -> Array:
        """The volatility per bar (n,); that of the first 127 bars is not known, and is 1."""
        known = np.ones(len(returns))
        if self._kind != "hs":
            rolling = volatility(sliding_window_view(returns * returns, MEMORY))
            known[MEMORY - 1 :] = np.maximum(rolling, least_volatility(returns))
        return known


def parse(name: str, timeframe: str, horizons: Sequence[int]) -> tuple[str, bool, Reach]:
    """The kind of a baseline, whether it has a season, and its reach.

    Four times the longest horizon is the least that is fitted to: an outcome is to leave bars to learn from.
    Raise `ConfigError` for a season on daily bars, and for a timeframe that is unknown.
    """
    kind, seasonal = name.removesuffix("-s"), name.endswith("-s")
    daily = _nanoseconds(timeframe) >= SECONDS["d"] * 10**9
    if seasonal and daily:
        raise ConfigError(
            f"model {name!r} needs hours of the week, which {timeframe!r} bars do not have; take {kind!r}"
        )
    reach = DAILY if daily else INTRADAY
    least = max(reach.least, 4 * max(horizons))
    return kind, seasonal, replace(reach, least=least, fit=max(reach.fit, least))


def _nanoseconds(timeframe: str) -> int:
    match = re.fullmatch(r"([1-9]\d*)([smhd])", "1d" if timeframe == "session" else timeframe)
    if match is None:
        raise ConfigError(f"timeframe {timeframe!r} is unknown: write a count and s, m, h or d, or 'session'")
    return int(match[1]) * SECONDS[match[2]] * 10**9


def _sums(x: Array, w: int) -> Array:
    """The sums (n - w + 1,) of every w entries of x (n,) in a row."""
    total = np.concatenate([[0.0], np.cumsum(x)])
    sums: Array = total[w:] - total[:-w]
    return sums


def _log_means(x: Array, windows: Sequence[int], floor: float) -> Array:
    """The logs (J, n) of the means of the last entries of x (n,), of as many as there are, plus a floor."""
    total = np.concatenate([[0.0], np.cumsum(x)])
    means = np.empty((len(windows), len(x)))
    for row, w in zip(means, windows, strict=True):
        row[:w] = total[1 : w + 1] / np.arange(1, min(w, len(x)) + 1)
        row[w:] = (total[w + 1 :] - total[1:-w]) / w
    return np.log(means + floor)


def _least_squares(X: Array, y: Array) -> Array:
    """The constant and coefficients (J + 1,) of y (n,) on X (J, n), by sums that no thread can change."""
    mean, level = X.mean(1), float(y.mean())
    X, y = X - mean[:, None], y - level
    J = range(len(X))
    gram = np.array([[(X[i] * X[j]).mean() for j in J] for i in J]) + RIDGE * np.eye(len(X))
    slopes = solve(gram, np.array([(X[i] * y).mean() for i in J]))
    return np.concatenate([[level - float((slopes * mean).sum())], slopes])


def solve(A: Array, b: Array) -> Array:
    """The x (n,) of A x = b for a small A (n, n), by Gaussian elimination with row pivots.

    It goes number by number, as the bits of LAPACK depend on the kernels that BLAS has for the processor.
    Raise `LinAlgError` for a singular A.
    """
    rows = np.column_stack([A, b]).tolist()
    n = len(rows)
    for k in range(n):
        rows[k:] = sorted(rows[k:], key=lambda row: -abs(row[k]))
        if rows[k][k] == 0:
            raise np.linalg.LinAlgError("singular matrix")
        for row in rows[k + 1 :]:
            factor = row[k] / rows[k][k]
            for j in range(k + 1, n + 1):
                row[j] -= factor * rows[k][j]
    x = np.empty(n)
    for k in reversed(range(n)):
        rest = rows[k][n]
        for j in range(k + 1, n):
            rest -= rows[k][j] * x.item(j)
        x[k] = rest / rows[k][k]
    return x
