"""Trade only when the central band of the forecast clears the costs of a round trip."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import copysign
from typing import Annotated

from msgspec import Meta

from barcast.models import Forecast
from barcast.strategies.horizon import Bars, told


@dataclass(frozen=True, slots=True)
class QuantileBand:
    """Long when even the band's lower edge gains more than a round trip costs, short when its upper loses it.

    `band` is the probability inside the band: a narrow one trades soon; 0.5 reaches from the lower to the
    upper quartile, and asks for a median beyond two thirds of a standard deviation, which is rare. `costs` is
    the cost of one side in basis points of the traded value; a round trip pays it twice. The size is |median|
    / distance of the quartiles, at most 1. `horizon` is in bars; None takes the longest.
    """

    name: str
    band: Annotated[float, Meta(ge=0, le=1)] = 0.05
    costs: Annotated[float, Meta(ge=0)] = 2.0
    horizon: Bars = None

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from -1 to 1; 0 while the band does not clear the costs."""
        levels = (0.5 - self.band / 2, 0.5 + self.band / 2, 0.25, 0.5, 0.75)
        read = told(self.name, self.horizon, levels, forecasts)
        return {symbol: self._target(*quantiles) for symbol, _, quantiles in read}

    def _target(self, lower: float, upper: float, first: float, median: float, third: float) -> float:
        round_trip = 2e-4 * self.costs
        if lower <= round_trip and upper >= -round_trip:
            return 0.0
        width = third - first
        return copysign(1.0 if abs(median) >= width else abs(median) / width, median)
