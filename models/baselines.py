"""Classical forecasters behind the same protocol: no training, numpy only, a pure function of the window."""

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256

import numpy as np
from numpy.lib.stride_tricks import sliding_window_view
from numpy.typing import NDArray

from barcast.models.forecast import Card, Forecast
from barcast.models.window import Window

Array = NDArray[np.float64]

RETURNS = 500  # realised outcomes behind the quantiles
LEAST = 100  # realised outcomes below which nothing is forecast
DECAY = 0.94  # of the variance, RiskMetrics (1996)
MEMORY = 128  # bars of the variance; the weight beyond is DECAY**MEMORY = 0.0004
TINY = 1e-12  # variance per bar of a symbol that stands still: (0.01 bp)²


class HistoricalSimulation:
    """The quantiles of the last 500 returns over each horizon."""

    def __init__(self, timeframe: str, horizons: Sequence[int], levels: Sequence[float]) -> None:
        reach = max(horizons) + 1
        parameters = {"returns": RETURNS, "least": LEAST}
        self.card = _card("hs", timeframe, horizons, levels, RETURNS + reach, LEAST + reach, parameters)

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        return [_forecast(self.card, w, self._outcomes(_prices(self.card, w))) for w in windows]

    def _outcomes(self, price: Array) -> list[Array]:
        return [(price[h:] - price[:-h])[-RETURNS:] for h in self.card.horizons]


class FilteredHistoricalSimulation:
    """Quantiles of past outcomes over the volatility of their time, times the volatility of today.

    Barone-Adesi, Giannopoulos and Vosper (1999), with an exponentially weighted variance over the last 128
    returns and the square root of the horizon.
    """

    def __init__(self, timeframe: str, horizons: Sequence[int], levels: Sequence[float]) -> None:
        reach = max(horizons) + MEMORY + 1
        parameters = {"returns": RETURNS, "least": LEAST, "decay": DECAY, "memory": MEMORY}
        self.card = _card("fhs", timeframe, horizons, levels, RETURNS + reach, LEAST + reach, parameters)

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; raises `ValueError` for one shorter than `card.min_window`."""
        return [_forecast(self.card, w, self._outcomes(_prices(self.card, w))) for w in windows]

    def _outcomes(self, price: Array) -> list[Array]:
        weight = DECAY ** np.arange(MEMORY - 1, -1, -1)
        squares = sliding_window_view(np.diff(price) ** 2, MEMORY)
        sigma = np.sqrt(np.maximum((squares * weight).sum(-1) / weight.sum(), TINY))  # of bars MEMORY on
        known = price[MEMORY:]
        outcomes = []
        for h in self.card.horizons:
            z = (known[h:] - known[:-h]) / sigma[:-h]  # the square root of h cancels
            outcomes.append(z[-RETURNS:] * sigma[-1])
        return outcomes


def _card(
    kind: str,
    timeframe: str,
    horizons: Sequence[int],
    levels: Sequence[float],
    window: int,
    min_window: int,
    parameters: Mapping[str, float],
) -> Card:
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
        fingerprint=f"numpy={np.__version__}",
    )


def _prices(card: Card, window: Window) -> Array:
    if len(window) < card.min_window:
        raise ValueError(f"{window.symbol} has {len(window)} bars; a forecast needs {card.min_window}")
    price: Array = np.log(window.values[-card.window :, 3])
    return price


def _forecast(card: Card, window: Window, outcomes: list[Array]) -> Forecast:
    return Forecast(
        symbol=window.symbol,
        close_time=window.close_time,
        reference=window.reference,
        horizons=card.horizons,
        levels=card.levels,
        quantiles=np.array([np.quantile(x, card.levels) for x in outcomes]),
        mean=np.array([x.mean() for x in outcomes]),
        std=np.array([x.std() for x in outcomes]),
        rise=np.array([(x > 0).mean() for x in outcomes]),
        warming=len(window) < card.window,
    )
