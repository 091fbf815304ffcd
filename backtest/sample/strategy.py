"""A strategy to begin with: a copy of this file is named in a configuration or by --strategy FILE.py."""

from collections.abc import Mapping
from dataclasses import dataclass

from barcast.models import Forecast


@dataclass(frozen=True)
class Lean:
    """Long as far as a higher price is likelier than a lower one over the longest horizon, or short."""

    name: str
    least: float = 0.05

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from -1 to 1; no state: the same forecasts give the same targets."""
        leans = {symbol: 2 * forecast.rise[-1] - 1 for symbol, forecast in forecasts.items()}
        return {symbol: lean if abs(lean) > self.least else 0.0 for symbol, lean in leans.items()}
