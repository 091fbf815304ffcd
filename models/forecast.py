"""What a forecaster returns, and the one verb it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import msgspec
import numpy as np
from numpy.typing import NDArray

from barcast.models.window import Window

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""The quantile probabilities that are forecast unless others are asked for."""


def default_horizons(timeframe: str) -> tuple[int, ...]:
    """Bars ahead: a day, a week and a month of sessions for daily bars, else 1, 4 and 16 bars."""
    return (1, 5, 20) if timeframe == "session" or timeframe.endswith("d") else (1, 4, 16)


class Coverage(msgspec.Struct, frozen=True, eq=False, gc=False):
    """How many of a symbol's last outcomes lay inside the intervals that had been forecast of them.

    `share` is (I, H), for the central intervals of nominal coverage `intervals` (I,), the widest first;
    `outcomes` (H,), all above 0, is of how many.
    """

    intervals: tuple[float, ...]
    share: NDArray[np.float64]
    outcomes: tuple[int, ...]


class Paths(msgspec.Struct, frozen=True, eq=False, gc=False):
    """S equally likely ways that the closing price may take, along some of the symbol's next bars.

    `returns` (S, G) float64 are log returns from the reference to each of the rising `steps` (G,), counted in
    bars ahead; the longest is the longest horizon, and every horizon is among them. `bridge` (G,) is the
    standard deviation of the Brownian motion that stands for the prices between one step and the next: it
    says how far highs and lows go beyond the closes.
    """

    steps: tuple[int, ...]
    returns: NDArray[np.float64]
    bridge: NDArray[np.float64]


class Forecast(msgspec.Struct, frozen=True, eq=False, gc=False):
    """Quantiles of one symbol's log return over each horizon, seen from the close of one bar.

    `quantiles` is (H, Q) float64, rising along the levels; `mean`, `std` and `rise` (the probability
    that the price is above `reference`) are (H,). Returns are log(price at the horizon / reference). Bars
    that no model can make sense of give quantiles that are not finite; they are withheld. While a symbol is
    `warming` the model saw fewer bars than it looks back for; those behind its calibration do not count.
    `coverage` is that of the forecasts before, where it is known. `paths` are there where they were asked
    for: their distribution at each horizon is that of the quantiles. Arrays are read-only.
    """

    symbol: str
    close_time: int
    reference: float
    horizons: tuple[int, ...]
    levels: tuple[float, ...]
    quantiles: NDArray[np.float64]
    mean: NDArray[np.float64]
    std: NDArray[np.float64]
    rise: NDArray[np.float64]
    warming: bool
    coverage: Coverage | None = None
    paths: Paths | None = None

    def quantile(self, level: float, horizon: int) -> float:
        """The log return that the outcome stays below with probability `level` over `horizon` bars."""
        return self.quantiles.item(self.horizons.index(horizon), self.levels.index(level))


@dataclass(frozen=True, slots=True)
class Card:
    """What identifies a forecaster and what it needs.

    `path` are the steps of the paths that its forecasts carry, none where they carry none.
    """

    model: str
    kind: str
    timeframe: str
    horizons: tuple[int, ...]
    levels: tuple[float, ...]
    window: int
    min_window: int
    sampler: str
    steps: int
    samples: int
    fingerprint: str
    path: tuple[int, ...] = ()


def freeze(*arrays: NDArray[np.float64]) -> None:
    """Let nobody write to arrays any more: strategies are given them."""
    for array in arrays:
        array.setflags(write=False)


def forecast_from(
    card: Card,
    window: Window,
    quantiles: NDArray[np.float64],
    mean: NDArray[np.float64],
    std: NDArray[np.float64],
    rise: NDArray[np.float64],
    coverage: Coverage | None = None,
    warming: bool | None = None,
) -> Forecast:
    """The forecast that a model of this card makes of a window; the figures are those of `Forecast`.

    It is warming below the card's window, unless that is said. From now on nobody can write to the figures.
    """
    freeze(quantiles, mean, std, rise)
    return Forecast(
        symbol=window.symbol,
        close_time=window.close_time,
        reference=window.reference,
        horizons=card.horizons,
        levels=card.levels,
        quantiles=quantiles,
        mean=mean,
        std=std,
        rise=rise,
        warming=len(window) < card.window if warming is None else warming,
        coverage=coverage,
    )


FAR = 5.0
"""Log return beyond which no quantile is believed: 148 times the price."""


def usable(forecasts: Sequence[Forecast], card: Card) -> NDArray[np.bool_]:
    """Which forecasts of one call have quantiles that can be prices: finite and below `FAR`, (B,).

    Raise ValueError for quantiles that fall along the levels, or are not of the card's shape (H, Q).
    """
    if not forecasts:
        return np.empty(0, np.bool_)
    shape = (len(card.horizons), len(card.levels))
    for forecast in forecasts:
        if forecast.quantiles.shape != shape:
            raise ValueError(
                f"quantiles of {forecast.symbol} have shape {forecast.quantiles.shape}, not {shape}"
            )
    quantiles = np.concatenate([forecast.quantiles for forecast in forecasts])
    falls = quantiles[:, 1:] < quantiles[:, :-1]
    if np.count_nonzero(falls):
        wrong = forecasts[int(np.argmax(falls.any(1))) // shape[0]]
        raise ValueError(f"quantiles of {wrong.symbol} fall along the levels: {wrong.quantiles}")
    near: NDArray[np.bool_] = (np.abs(quantiles) < FAR).reshape(len(forecasts), -1).all(1)
    return near


class Forecaster(Protocol):
    """Windows in, quantiles out. A window's forecast never depends on the other windows of the call."""

    @property
    def card(self) -> Card:
        """Identity, horizons and levels, and the window that is needed, in bars."""
        ...

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; each must hold at least `card.min_window` bars."""
        ...
