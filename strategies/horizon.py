"""Which horizon of a forecast a strategy trades on."""

from barcast.models import ConfigError, Forecast


def chosen(strategy: str, horizon: int | None, forecast: Forecast) -> int:
    """`horizon`, or the shortest of the forecast. Raise `ConfigError` if it is not forecast."""
    if horizon is None:
        return min(forecast.horizons)
    if horizon not in forecast.horizons:
        raise ConfigError(
            f"strategy {strategy!r} wants horizon {horizon}, but the model forecasts "
            f"{', '.join(map(str, forecast.horizons))} bars: take one of these."
        )
    return horizon


def quantile(strategy: str, level: float, horizon: int, forecast: Forecast) -> float:
    """The forecast's quantile. Raise `ConfigError` if the model has no such level."""
    if level not in forecast.levels:
        raise ConfigError(
            f"strategy {strategy!r} needs the level {level}, but the model forecasts "
            f"{', '.join(map(str, forecast.levels))}: take another strategy, or a model with that level."
        )
    return forecast.quantile(level, horizon)
