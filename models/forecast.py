"""What a forecaster returns, and the one verb it has."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from barcast.models.window import Window

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
"""The quantile probabilities that are forecast unless others are asked for."""


def default_horizons(timeframe: str) -> tuple[int, ...]:
    """Bars ahead: a day, a week and a month of sessions for daily bars, else 1, 4 and 16 bars."""
    return (1, 5, 20) if timeframe == "session" or timeframe.endswith("d") else (1, 4, 16)


@dataclass(frozen=True, slots=True, eq=False)
class Forecast:
    """Quantiles of one symbol's log return over each horizon, seen from the close of one bar.

    `quantiles` is (H, Q) float64, rising along the levels; `mean`, `std` and `rise` (the probability
    that the price is above `reference`) are (H,). Returns are log(price at the horizon / reference). Bars
    that no model can make sense of give quantiles that are not finite; they are withheld.
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

    def __post_init__(self) -> None:
        shape = (len(self.horizons), len(self.levels))
        if self.quantiles.shape != shape:
            raise ValueError(f"quantiles of {self.symbol} have shape {self.quantiles.shape}, not {shape}")
        if (np.diff(self.quantiles, axis=1) < 0).any():
            raise ValueError(f"quantiles of {self.symbol} fall along the levels: {self.quantiles}")

    def quantile(self, level: float, horizon: int) -> float:
        """The log return that the outcome stays below with probability `level` over `horizon` bars."""
        return float(self.quantiles[self.horizons.index(horizon), self.levels.index(level)])


@dataclass(frozen=True, slots=True)
class Card:
    """What identifies a forecaster and what it needs."""

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


class Forecaster(Protocol):
    """Windows in, quantiles out. A window's forecast never depends on the other windows of the call."""

    @property
    def card(self) -> Card:
        """Identity, horizons and levels, and the window that is needed, in bars."""
        ...

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        """Forecast every window; each must hold at least `card.min_window` bars."""
        ...
