"""Follow the median of the forecast, smaller the less certain it is."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import copysign
from typing import Annotated

from msgspec import Meta

from barcast.models import Forecast
from barcast.strategies.horizon import Bars, told


@dataclass(frozen=True, slots=True)
class MedianDrift:
    """Hold `gain` * median / standard deviation of the forecast, between -1 and 1.

    Nothing is held while the median does not clear the costs of a round trip; `costs` is the cost of one
    side in basis points of the traded value. `horizon` is in bars; None takes the longest.
    """

    name: str
    gain: Annotated[float, Meta(ge=0)] = 2.0
    costs: Annotated[float, Meta(ge=0)] = 2.0
    horizon: Bars = None

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from -1 to 1; 0 while the median does not clear the costs."""
        read = told(self.name, self.horizon, (0.5,), forecasts)
        return {symbol: self._target(median, std) for symbol, std, (median,) in read}

    def _target(self, median: float, std: float) -> float:
        if abs(median) <= 2e-4 * self.costs:
            return 0.0
        drift = self.gain * median
        return copysign(1.0, drift) if abs(drift) >= std else drift / std
