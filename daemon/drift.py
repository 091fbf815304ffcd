"""Whether the champion still keeps what it promised: its newest signals, held against what then happened."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from barcast.models import Window
from barcast.models.quantiles import central
from barcast.models.scores import Estimate, crps, lag, mean

TIMES = 250
"""Closes whose signals are judged, the newest of which all outcomes are known."""
LEAST = 100
"""Fewer closes than this say nothing."""
SYMBOLS = 32
"""Symbols that are looked at, evenly spread over their names."""
NOMINAL = (0.8, 0.9)
"""Central intervals whose coverage is judged."""
ERRORS = 3.0
"""Standard errors that a figure must be beyond its band: several are looked at, again and again."""


class Bars(msgspec.Struct, frozen=True):
    """How many bars ahead a horizon is."""

    bars: int


class Said(msgspec.Struct, frozen=True):
    """What is needed of a published signal; quantiles (H, Q) are prices."""

    symbol: str
    close_time: str
    reference: float
    model: str
    horizons: list[Bars]
    levels: list[float]
    quantiles: list[list[float]]


@dataclass(frozen=True, slots=True)
class Reading:
    """Realised coverage and CRPS of the newest matured signals, each with its standard error.

    `coverage` is (nominal, horizon in bars) -> share of outcomes inside; `crps` is divided by the mean
    absolute outcome and averaged over the horizons, as in a verdict.
    """

    signals: int
    times: int
    coverage: dict[tuple[float, int], Estimate]
    crps: Estimate

    def plain(self) -> dict[str, object]:
        """As it is logged."""
        shares = {
            f"in_{100 * nominal:.0f}": {
                str(bars): round(share.value, 4) for (p, bars), share in self.coverage.items() if p == nominal
            }
            for nominal, _ in self.coverage
        }
        return {"signals": self.signals, "closes": self.times, "crps": round(self.crps.value, 5), **shares}

    def beyond(self, coverage: float, worse: float, held_out: float | None) -> str | None:
        """What is further from its promise than its band, for sure, as a sentence; None if nothing is.

        `coverage` is the band of the shares, `worse` that of the CRPS over the `held_out` one, where known.
        """
        found: list[tuple[float, str]] = []
        for (nominal, bars), share in self.coverage.items():
            off = abs(share.value - nominal) - coverage
            if off > ERRORS * share.error:
                inside, promised = 100 * share.value, 100 * nominal
                text = f"{inside:.1f} % of outcomes over {bars} bars inside the {promised:.0f} % interval"
                found.append((off, text))
        if held_out:
            above = self.crps.value / held_out - 1
            if above - worse > ERRORS * self.crps.error / held_out:
                text = f"CRPS {100 * above:.1f} % above the {held_out:.4g} of its verdict"
                found.append((above - worse, text))
        return f"drift: {max(found)[1]}, {self.signals} signals" if found else None


def chosen(symbols: Iterable[str]) -> list[str]:
    """At most `SYMBOLS` of the symbols, evenly spread over their sorted names."""
    names = sorted(symbols)
    every = max(1, -(-len(names) // SYMBOLS))
    return names[::every]


@dataclass(frozen=True, slots=True)
class Matched:
    """n signals of one model, and what then happened.

    `symbols` (n,); `places` (n,) are those of their closes among the bars of their symbol, `times` (n,) the
    closes in nanoseconds. `y` (n, H) are log returns over each horizon, nan where that bar is not there yet,
    and `q` (n, H, Q) the quantiles that were told of them.
    """

    horizons: list[int]
    levels: list[float]
    symbols: NDArray[np.str_]
    places: NDArray[np.int64]
    times: NDArray[np.int64]
    y: NDArray[np.float64]
    q: NDArray[np.float64]

    def only(self, kept: Any) -> "Matched":
        """Some of the signals: those that a mask (n,) keeps, or at places."""
        symbols, places, times = self.symbols[kept], self.places[kept], self.times[kept]
        return Matched(self.horizons, self.levels, symbols, places, times, self.y[kept], self.q[kept])


def matched(said: Iterable[Said], closes: Mapping[str, Window]) -> Matched | None:
    """Hold one model's signals against the bars of their symbols; None where there are none of these.

    A horizon counts the symbol's own bars. A signal that is told twice counts once, one whose bar is not
    there, or of another shape than the first, not at all.
    """
    first: Said | None = None
    seen: set[tuple[str, str]] = set()
    prices: dict[str, NDArray[np.float64]] = {}
    symbols: list[str] = []
    places: list[tuple[int, int]] = []
    outcomes, quantiles = [], []
    for signal in said:
        window, key = closes.get(signal.symbol), (signal.symbol, signal.close_time)
        if window is None or key in seen:
            continue
        seen.add(key)
        if first is None:
            first, ahead = signal, np.array([h.bars for h in signal.horizons])
        if signal.symbol not in prices:
            prices[signal.symbol] = np.log(window.values[:, 3])
        price = prices[signal.symbol]
        time = int(np.datetime64(signal.close_time.rstrip("Z"), "ns").astype(np.int64))
        at = int(np.searchsorted(window.close_times, time))
        told = np.log(np.array(signal.quantiles) / signal.reference)
        if (
            at < len(price)
            and window.close_times[at] == time
            and told.shape == (len(ahead), len(first.levels))
        ):
            there = at + ahead < len(price)
            ends = np.where(there, at + ahead, at)
            symbols.append(signal.symbol)
            places.append((at, time))
            outcomes.append(np.where(there, price[ends] - price[at], np.nan))
            quantiles.append(told)
    if first is None or not symbols:
        return None
    at, times = np.array(places).T
    horizons = [h.bars for h in first.horizons]
    y, q = np.array(outcomes), np.array(quantiles)
    return Matched(horizons, first.levels, np.array(symbols), at, times, y, q)


def share(
    inside: NDArray[np.bool_], of: NDArray[np.int64], times: int, nominal: float, bars: int
) -> Estimate:
    """The share (n,) of outcomes over so many bars that were inside a central interval, with its error.

    `of` (n,) numbers the closes, of which there are `times`. Errors are those of Newey and West over closes,
    whose symbols move together and whose outcomes overlap; with few closes these are too small, and are taken
    to be at least what closes / horizon outcomes would have.
    """
    found = mean(inside, of, times, lag(bars, 1, times))
    least = sqrt(nominal * (1 - nominal) * bars / times)
    return Estimate(found.value, max(least, found.error))  # in this order: of one close, the error is nan


def measure(said: Iterable[Said], closes: Mapping[str, Window]) -> Reading | None:
    """Hold one model's signals against the bars of their symbols; None with too few to say anything.

    Only signals count of which the outcomes of all horizons are known, and of these the newest `TIMES`
    closes, see `matched`. The errors are those of `share`, also of the CRPS.
    """
    held = matched(said, closes)
    if held is None:
        return None
    held = held.only(np.isfinite(held.y).all(1))
    moments = np.unique(held.times)[-TIMES:]
    if len(moments) < LEAST:
        return None
    held = held.only(held.times >= moments[0])
    horizons, levels, y, q = held.horizons, held.levels, held.y, held.q
    of, times = np.searchsorted(moments, held.times), len(moments)
    coverage: dict[tuple[float, int], Estimate] = {}
    for low, high in central(levels):
        nominal = round(levels[high] - levels[low], 12)
        if nominal in NOMINAL:
            for k, bars in enumerate(horizons):
                inside = (y[:, k] >= q[:, k, low]) & (y[:, k] <= q[:, k, high])
                coverage[nominal, bars] = share(inside, of, times, nominal, bars)
    losses, size = crps(y, q, levels), np.abs(y)  # (n, H)
    scale = np.where(size.mean(0) > 0, size.mean(0), 1.0)
    ratio = losses.mean(0) / scale
    # The error of a ratio of means, to first order.
    linear = ((losses - ratio * size) / scale).mean(1)
    error = mean(linear, of, times, lag(max(horizons), 1, times)).error
    least = float(linear.std()) * sqrt(max(horizons) / times)
    value = float(ratio.mean())
    return Reading(len(y), times, coverage, Estimate(value, max(error, least))) if isfinite(value) else None
