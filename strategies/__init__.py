"""From forecasts to targets: pure functions of all forecasts of a due group."""

from collections.abc import Mapping
from typing import Protocol

from barcast.models import Forecast


class Strategy(Protocol):
    """Turns the forecasts of one group into wanted exposures."""

    @property
    def name(self) -> str:
        """The segment that names this strategy in topics and reports."""
        ...

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from -1 (fully short) to 1 (fully long), from this group alone."""
        ...
