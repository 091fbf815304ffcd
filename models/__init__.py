"""From bars to windows, tensors and quantiles. The only package that imports torch or diffusers."""

from barcast.models.bar import Bar
from barcast.models.errors import BarcastError, CheckpointError, ConfigError, DataError
from barcast.models.forecast import Card, Forecast, Forecaster
from barcast.models.window import Verdict, Window, Windows

__all__ = [
    "Bar",
    "BarcastError",
    "Card",
    "CheckpointError",
    "ConfigError",
    "DataError",
    "Forecast",
    "Forecaster",
    "Verdict",
    "Window",
    "Windows",
]
