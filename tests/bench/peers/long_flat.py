"""A strategy as users write them: fully long while the median is above zero, else flat."""

from collections.abc import Mapping
from dataclasses import dataclass

from barcast.models import Forecast


@dataclass(frozen=True)
class LongFlat:
    """Long or flat by the sign of the median of the shortest horizon."""

    name: str

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """1 or 0 for each symbol."""
        return {symbol: float(f.quantiles[0, f.levels.index(0.5)] > 0) for symbol, f in forecasts.items()}
