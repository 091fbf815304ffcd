"""Classical forecasters behind the same protocol: no training, numpy only, a pure function of the window."""

import json
from abc import ABC, abstractmethod
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from hashlib import sha256
from math import isfinite, sqrt

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from barcast.models.forecast import Card, Forecast, forecast_from
from barcast.models.window import Window, check_long_enough

Array = NDArray[np.float64]

RETURNS = 500  # realised outcomes behind the quantiles
LEAST = 100  # realised outcomes below which nothing is forecast
DECAY = 0.94  # of the variance, RiskMetrics (1996)
MEMORY = 128  # bars of the variance; the weight beyond is DECAY**MEMORY = 0.0004
STILL = 0.3  # of the root mean square return of the window: the least volatility that outcomes are divided by
TINY = 1e-6  # volatility per bar of a window that stands still: 0.01 bp
WEIGHT = DECAY ** np.arange(MEMORY - 1, -1, -1)  # of the squared returns in the variance
TOTAL = float(WEIGHT.sum())
CHUNK = 64  # windows worked on at once: their outcomes fit a core's cache
VERSION = 3  # of the arithmetic: ids differ where bits may


class _Simulation(ABC):
    """Quantiles of the last 500 outcomes: log returns over their scale of then, times the scale of now.

    The state is the `_Past` of each symbol's last window. It saves work and changes no bit: a window that
    follows that one by a bar is known by its prices, any other starts afresh, and the sorted outcomes, which
    all figures are taken from, are the same either way.
    """

    def __init__(self, card: Card) -> None:
        self.card = card
        self._pasts: dict[str, _Past] = {}

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        return [f for i in range(0, len(windows), CHUNK) for f in self._forecast(windows[i : i + CHUNK])]

    @abstractmethod
    def _scales(self, price: Array, known: Array | None) -> Array:
        """The scale of every bar that an outcome can begin at; `known` ends with all but the newest."""

    def _least(self, price: Array) -> float:
        """The scale below which none counts, in a window of these log prices."""
        return 0.0

    def _forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        card = self.card
        outcomes = np.empty((len(windows), len(card.horizons), RETURNS))
        bars, scale = [], []
        for room, window in zip(outcomes, windows, strict=True):
            past = self._past(window)
            least = 0.0 if past is None else self._least(past.price)
            room[:] = np.nan if past is None else past.outcomes_over(least)
            bars.append(card.window if past is None else len(past.scale))
            scale.append(1.0 if past is None else max(past.scale.item(-1), least))
        n = np.minimum(RETURNS, np.array(bars)[:, None] - card.horizons)
        found = figures(outcomes, n, card.levels, np.array(scale)[:, None])
        return [forecast_from(card, window, *told) for window, *told in zip(windows, *found, strict=True)]

    def _past(self, window: Window) -> "_Past | None":
        card = self.card
        check_long_enough(window, card.min_window)
        price: Array = np.log(window.values[-card.window :, 3])
        past = self._pasts.pop(window.symbol, None)  # kept again once it is whole
        if past is not None and past.precedes(price):
            past.follow(price, self._scales(price, past.scale))
        elif np.isfinite(price).all():
            past = _Past(price, self._scales(price, None), card.horizons)
        else:
            return None
        self._pasts[window.symbol] = past
        return past


class HistoricalSimulation(_Simulation):
    """The quantiles of the last 500 returns over each horizon."""

    def __init__(self, timeframe: str, horizons: Sequence[int], levels: Sequence[float]) -> None:
        reach = max(horizons) + 1
        parameters = {"version": VERSION, "returns": RETURNS, "least": LEAST}
        super().__init__(
            card_of("hs", timeframe, horizons, levels, RETURNS + reach, LEAST + reach, parameters)
        )
        self._ones = np.ones(self.card.window)

    def _scales(self, price: Array, known: Array | None) -> Array:
        return self._ones[: len(price)]


class FilteredHistoricalSimulation(_Simulation):
    """Quantiles of past outcomes over the volatility of their time, times the volatility of today.

    Barone-Adesi, Giannopoulos and Vosper (1999), with an exponentially weighted variance over the last 128
    returns and the square root of the horizon, which cancels. After a standstill that variance is next to
    nothing and the first moves would be thousands of times its root: no volatility counts as less than 0.3
    times the root mean square return of the window.
    """

    def __init__(self, timeframe: str, horizons: Sequence[int], levels: Sequence[float]) -> None:
        reach = max(horizons) + MEMORY + 1
        parameters = {
            "version": VERSION,
            "returns": RETURNS,
            "least": LEAST,
            "decay": DECAY,
            "memory": MEMORY,
            "still": STILL,
        }
        super().__init__(
            card_of("fhs", timeframe, horizons, levels, RETURNS + reach, LEAST + reach, parameters)
        )

    def _scales(self, price: Array, known: Array | None) -> Array:
        if known is None:
            squares = np.square(np.diff(price))
            return volatility(sliding_window_view(squares, MEMORY))
        squares = np.square(price[-MEMORY:] - price[-MEMORY - 1 : -1])
        return np.concatenate((known[MEMORY + 1 - len(price) :], volatility(squares[None])))

    def _least(self, price: Array) -> float:
        return least_volatility(price[1:] - price[:-1])


def volatility(squares: Array) -> Array:
    """The exponentially weighted volatility (n,), above 0, after each row of squared returns (n, 128)."""
    root: Array = np.maximum(np.sqrt(np.add.reduce(squares * WEIGHT, -1) / TOTAL), TINY)
    return root


def least_volatility(returns: Array) -> float:
    """The volatility per bar below which none counts among these returns (n,)."""
    return max(STILL * sqrt(float(np.add.reduce(returns * returns)) / len(returns)), TINY)


class _Past:
    """The log prices of a window (N,), the scales of its last bars, and its outcomes over each horizon.

    `outcomes` is (H, 500), each row rising, and filled up with zeros while the symbol is warming.
    """

    __slots__ = ("_flat", "_horizons", "outcomes", "price", "scale")

    def __init__(self, price: Array, scale: Array, horizons: Sequence[int]) -> None:
        self.price, self.scale = price, scale
        self.outcomes = np.zeros((len(horizons), RETURNS))
        self._horizons = horizons
        self._flat = self.outcomes.data.cast("B").cast("d")  # its slices move faster than an array's
        self._sort(self.outcomes, scale)

    def outcomes_over(self, least: float) -> Array:
        """The outcomes, where no scale is less than that."""
        if self.scale.min() >= least:
            return self.outcomes
        outcomes = np.zeros_like(self.outcomes)
        self._sort(outcomes, np.maximum(self.scale, least))
        return outcomes

    def _sort(self, outcomes: Array, scale: Array) -> None:
        known = self.price[-len(scale) :]
        for h, row in zip(self._horizons, outcomes, strict=True):
            found = ((known[h:] - known[:-h]) / scale[:-h])[-RETURNS:]
            row[: len(found)] = np.sort(found)

    def precedes(self, price: Array) -> bool:
        """Whether these log prices are the same ones with a new one, and perhaps without the oldest one."""
        n = len(price) - 1
        return (
            n <= len(self.price) <= n + 1
            and price[:-1].tobytes() == self.price[-n:].tobytes()
            and isfinite(price.item(-1))
        )

    def follow(self, price: Array, scale: Array) -> None:
        """Become the past of a window that this one precedes: the newest outcomes replace the oldest."""
        values, gone, gone_scale = self._flat, self.price, self.scale
        close = price.item(-1)
        for row, h in enumerate(self._horizons):
            n = min(RETURNS, len(gone_scale) - h)
            start = row * RETURNS
            free = stop = start + n
            if n == RETURNS or len(scale) == len(gone_scale):
                oldest = (gone.item(-n) - gone.item(-n - h)) / gone_scale.item(-n - h)
                free = bisect_left(values, oldest, start, stop)
            newest = (close - price.item(-1 - h)) / scale.item(-1 - h)
            at = bisect_left(values, newest, start, stop)
            if at > free:
                at -= 1
                values[free:at] = values[free + 1 : at + 1]
            else:
                values[at + 1 : free + 1] = values[at:free]
            values[at] = newest
        self.price, self.scale = price, scale


def figures(outcomes: Array, n: NDArray[np.intp], levels: Sequence[float], scale: Array) -> tuple[Array, ...]:
    """Quantiles (B, H, Q), mean, standard deviation and the share above zero (B, H) of sorted outcomes.

    `outcomes` is (B, H, R), overwritten, with n (B, H) of them in use and zeros behind; `scale`, (B, H) or
    (B, 1), is what they are multiplied by. All is elementwise or a sum along a row, so that no window touches
    another's bits.
    """
    position = (n - 1)[..., None] * np.array(levels)
    floor = np.floor(position)
    place = floor.astype(np.intp)
    low = np.take_along_axis(outcomes, place, -1)
    high = np.take_along_axis(outcomes, np.minimum(place + 1, (n - 1)[..., None]), -1)
    # numpy's `linear` method, and rising along the levels whatever is rounded
    quantiles = np.minimum(low + (high - low) * (position - floor), high)
    above = np.add.reduce(outcomes > 0, -1, dtype=np.int16) / n
    mean = np.add.reduce(outcomes, -1) / n
    outcomes -= mean[..., None]
    most = outcomes.shape[-1]
    if n.min() < most:
        outcomes[np.arange(most) >= n[..., None]] = 0
    outcomes *= outcomes
    std = np.sqrt(np.add.reduce(outcomes, -1) / n)
    return quantiles * scale[..., None], mean * scale, std * scale, above


def card_of(
    kind: str,
    timeframe: str,
    horizons: Sequence[int],
    levels: Sequence[float],
    window: int,
    min_window: int,
    parameters: Mapping[str, object],
) -> Card:
    """The card of a baseline, whose id depends on its parameters."""
    body = {"kind": kind, "timeframe": timeframe, "horizons": list(horizons), "levels": list(levels)}
    content = json.dumps(body | dict(parameters), sort_keys=True, separators=(",", ":"))
    return Card(
        model=f"{kind}-{sha256(content.encode()).hexdigest()[:16]}",
        kind=kind,
        timeframe=timeframe,
        horizons=tuple(horizons),
        levels=tuple(levels),
        window=window,
        min_window=min_window,
        sampler="none",
        steps=0,
        samples=0,
        fingerprint=f"numpy={np.__version__} cpu={_cpu()}",
    )


def _cpu() -> str:
    """What numpy uses of the processor for exponentials and logarithms: their last bits depend on it."""
    known = np.lib.introspect.opt_func_info(func_name="^(exp|log)$", signature="float64")
    used = {kernel["current"] for kernels in known.values() for kernel in kernels.values()}
    return ",".join(sorted(used)) or "any"
