"""Whether the champion still keeps what it promised: its newest signals, held against what then happened."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import isfinite, sqrt

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


def measure(said: Iterable[Said], closes: Mapping[str, Window]) -> Reading | None:
    """Hold one model's signals against the bars of their symbols; None with too few to say anything.

    A horizon counts the symbol's own bars. Only signals count of which the outcomes of all horizons are
    known, and of these the newest `TIMES` closes; a signal that is told twice counts once. Errors are those
    of Newey and West over closes, whose symbols move together and whose outcomes overlap; with few closes
    these are too small, and are taken to be at least what closes / horizon outcomes would have.
    """
    signals = {(s.symbol, s.close_time): s for s in said if s.symbol in closes}
    first = next(iter(signals.values()), None)
    if first is None:
        return None
    horizons, levels = [h.bars for h in first.horizons], first.levels
    ahead = np.array(horizons)
    rows: list[tuple[int, NDArray[np.float64], NDArray[np.float64]]] = []
    for signal in signals.values():
        window = closes[signal.symbol]
        time = int(np.datetime64(signal.close_time.rstrip("Z"), "ns").astype(np.int64))
        at = int(np.searchsorted(window.close_times, time))
        if at + ahead.max() < len(window) and window.close_times[at] == time:
            price = np.log(window.values[:, 3])
            told = np.log(np.array(signal.quantiles) / signal.reference)
            if told.shape == (len(ahead), len(levels)):
                rows.append((time, price[at + ahead] - price[at], told))
    moments = sorted({time for time, _, _ in rows})[-TIMES:]
    if len(moments) < LEAST:
        return None
    rows = [row for row in rows if row[0] >= moments[0]]
    of = np.searchsorted(np.array(moments), np.array([time for time, _, _ in rows]))
    y, q = np.array([row[1] for row in rows]), np.array([row[2] for row in rows])  # (n, H), (n, H, Q)
    times = len(moments)
    coverage: dict[tuple[float, int], Estimate] = {}
    for low, high in central(levels):
        nominal = round(levels[high] - levels[low], 12)
        if nominal in NOMINAL:
            for k, bars in enumerate(horizons):
                inside = (y[:, k] >= q[:, k, low]) & (y[:, k] <= q[:, k, high])
                share = mean(inside, of, times, lag(bars, 1, times))
                least = sqrt(nominal * (1 - nominal) * bars / times)
                coverage[nominal, bars] = Estimate(share.value, max(share.error, least))
    losses, size = crps(y, q, levels), np.abs(y)  # (n, H)
    scale = np.where(size.mean(0) > 0, size.mean(0), 1.0)
    ratio = losses.mean(0) / scale
    # The error of a ratio of means, to first order.
    linear = ((losses - ratio * size) / scale).mean(1)
    error = mean(linear, of, times, lag(max(horizons), 1, times)).error
    least = float(linear.std()) * sqrt(max(horizons) / times)
    value = float(ratio.mean())
    return (
        Reading(len(rows), times, coverage, Estimate(value, max(error, least))) if isfinite(value) else None
    )
