"""Trade only when the central half of the forecast clears the costs of a round trip."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import copysign

from barcast.models import Forecast
from barcast.strategies.horizon import chosen, quantile


@dataclass(frozen=True, slots=True)
class QuantileBand:
    """Long when even the lower quartile gains more than a round trip costs, short when the upper loses more.

    `costs` is the cost of one side in basis points of the traded value; a round trip pays it twice. The size
    is |median| / (upper - lower quartile), at most 1. `horizon` is in bars; None takes the shortest.
    """

    name: str
    costs: float = 2.0
    horizon: int | None = None

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from -1 to 1; 0 while the band does not clear the costs."""
        return {symbol: self._target(forecast) for symbol, forecast in forecasts.items()}

    def _target(self, forecast: Forecast) -> float:
        horizon = chosen(self.name, self.horizon, forecast)
        lower, median, upper = (quantile(self.name, level, horizon, forecast) for level in (0.25, 0.5, 0.75))
        round_trip = 2e-4 * self.costs
        if lower <= round_trip and upper >= -round_trip:
            return 0.0
        width = upper - lower
        return copysign(1.0 if abs(median) >= width else abs(median) / width, median)
