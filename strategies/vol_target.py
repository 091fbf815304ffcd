"""Stay long, the less the more volatile the forecast is."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from barcast.models import Forecast
from barcast.strategies.horizon import Bars, told


@dataclass(frozen=True, slots=True)
class VolatilityTarget:
    """Long `volatility` / standard deviation of the forecast, at most 1: the risk is constant, not the size.

    `volatility` is the standard deviation that the position shall have over the horizon itself, as a log
    return: 0.05 is 5 % over that many bars, not in a year. No view on the direction is taken. `horizon` is in
    bars; None takes the longest.
    """

    name: str
    volatility: Annotated[float, Meta(gt=0)] = 0.05
    horizon: Bars = None

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from above 0 to 1."""
        read = told(self.name, self.horizon, (), forecasts)
        return {symbol: 1.0 if std <= self.volatility else self.volatility / std for symbol, std, _ in read}
