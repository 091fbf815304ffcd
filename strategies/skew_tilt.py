"""Lean to the side on which the forecast has its longer tail."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

from msgspec import Meta

from barcast.models import Forecast
from barcast.strategies.horizon import Bars, told


@dataclass(frozen=True, slots=True)
class SkewTilt:
    """Hold `gain` * skewness of the forecast's quantiles, between -1 and 1.

    The skewness is (upper + lower - 2 median) / (upper - lower) of the quantiles at `level` and 1 - `level`:
    Bowley's at the quartiles, Hinkley's (1975) at any level; from -1 to 1, above 0 when the upper tail is the
    longer one. Nothing is held while it is not beyond `dead`. `horizon` is in bars; None takes the longest.
    """

    name: str
    level: Annotated[float, Meta(gt=0, lt=0.5)] = 0.05
    gain: Annotated[float, Meta(ge=0)] = 4.0
    dead: Annotated[float, Meta(ge=0, le=1)] = 0.02
    horizon: Bars = None

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from -1 to 1; 0 while the forecast is about symmetric."""
        read = told(self.name, self.horizon, (self.level, 0.5, 1 - self.level), forecasts)
        return {symbol: self._target(*quantiles) for symbol, _, quantiles in read}

    def _target(self, lower: float, median: float, upper: float) -> float:
        above, below = upper - median, median - lower
        if above + below <= 0:
            return 0.0
        skewness = (above - below) / (above + below)
        return max(-1.0, min(1.0, self.gain * skewness)) if abs(skewness) > self.dead else 0.0
