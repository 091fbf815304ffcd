"""What a strategy reads from forecasts: which horizon, and the quantile at any level."""

from collections.abc import Iterator, Mapping, Sequence
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


def told(
    strategy: str, horizon: int | None, levels: Sequence[float], forecasts: Mapping[str, Forecast]
) -> Iterator[tuple[str, float, list[float]]]:
    """Of each forecast the symbol, and the standard deviation and quantiles of the log return over a horizon.

    The quantiles are at `levels`, linear between the forecast's. Where a figure stands is looked up once for
    forecasts of one kind. Raise `ConfigError` as `chosen` does, and for a level outside of the forecast's.
    """
    horizons: tuple[int, ...] = ()
    known: tuple[float, ...] = ()
    places: list[int | None] = []
    flat: list[int] = []
    row = -1
    for symbol, forecast in forecasts.items():
        if forecast.horizons is not horizons or forecast.levels is not known:
            horizons, known = forecast.horizons, forecast.levels
            row = horizons.index(chosen(strategy, horizon, forecast))
            places = [_place(strategy, level, row, known) for level in levels]
            flat = [at for at in places if at is not None]
        item = forecast.quantiles.item
        if len(flat) == len(levels):
            quantiles = [*map(item, flat)]
        else:
            quantiles = [
                float(np.interp(level, known, forecast.quantiles[row])) if at is None else item(at)
                for level, at in zip(levels, places, strict=True)
            ]
        yield symbol, forecast.std.item(row), quantiles


def _place(strategy: str, level: float, row: int, known: tuple[float, ...]) -> int | None:
    """Where the quantile at a level stands among all of a forecast, row after row; None if between."""
    for same in (level, round(level, 12)):  # 0.5 - 0.9 / 2 is not 0.05
        if same in known:
            return row * len(known) + known.index(same)
    if not known[0] <= level <= known[-1]:
        raise ConfigError(
            f"strategy {strategy!r} needs the level {level:g}, but the model forecasts "
            f"{known[0]} to {known[-1]}: stay within, or take a model with that level."
        )
    return None
