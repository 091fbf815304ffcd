"""What a strategy reads from a forecast: which horizon, and the quantile at any level."""

from typing import Annotated

import numpy as np
from msgspec import Meta

from barcast.models import ConfigError, Forecast

Bars = Annotated[int, Meta(ge=1)] | None
"""A horizon in bars; None takes the longest that is forecast."""


def chosen(strategy: str, horizon: int | None, forecast: Forecast) -> int:
    """`horizon`, or the longest of the forecast. Raise `ConfigError` if it is not forecast."""
    if horizon is None:
        return max(forecast.horizons)
    if horizon not in forecast.horizons:
        raise ConfigError(
            f"strategy {strategy!r} wants horizon {horizon}, but the model forecasts "
            f"{', '.join(map(str, forecast.horizons))} bars: take one of these."
        )
    return horizon


def quantile(strategy: str, level: float, horizon: int, forecast: Forecast) -> float:
    """The log return at `level`, linear between the forecast's levels.

    Raise `ConfigError` for a level outside of them.
    """
    if level in forecast.levels:
        return forecast.quantile(level, horizon)
    known = round(level, 12)  # 0.5 - 0.9 / 2 is not 0.05
    if known in forecast.levels:
        return forecast.quantile(known, horizon)
    if not forecast.levels[0] <= level <= forecast.levels[-1]:
        raise ConfigError(
            f"strategy {strategy!r} needs the level {level:g}, but the model forecasts "
            f"{forecast.levels[0]} to {forecast.levels[-1]}: stay within, or take a model with that level."
        )
    return float(np.interp(level, forecast.levels, forecast.quantiles[forecast.horizons.index(horizon)]))


def deviation(horizon: int, forecast: Forecast) -> float:
    """The standard deviation of the log return over a horizon."""
    return forecast.std.item(forecast.horizons.index(horizon))
