"""Hold the symbols of a group against one another: long those with the best forecasts, short the worst."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import copysign, floor, inf
from typing import Annotated

from msgspec import Meta

from barcast.models import Forecast
from barcast.strategies.horizon import Bars, told


@dataclass(frozen=True, slots=True)
class Rank:
    """Rank the symbols by median / standard deviation of their forecasts, the Sharpe ratio that is expected.

    The upper `share` of them is held long and as many of the lower end short, all in equal size and at least
    one each, so that longs and shorts come to the same value. Equal ratios are ranked by symbol. A group of
    fewer than `least` symbols holds nothing. `horizon` is in bars; None takes the longest.
    """

    name: str
    share: Annotated[float, Meta(gt=0, le=0.5)] = 0.2
    least: Annotated[int, Meta(ge=2)] = 2
    horizon: Bars = None

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol: 1, 0 or -1, as many of 1 as of -1."""
        read = told(self.name, self.horizon, (0.5,), forecasts)
        ratios = {symbol: _ratio(median, std) for symbol, std, (median,) in read}
        targets = dict.fromkeys(forecasts, 0.0)
        if len(ratios) >= self.least:
            ranked = sorted(ratios, key=lambda symbol: (-ratios[symbol], symbol))
            held = max(1, floor(self.share * len(ranked) + 1e-9))  # 0.29 * 100 is below 29
            targets |= dict.fromkeys(ranked[:held], 1.0) | dict.fromkeys(ranked[-held:], -1.0)
        return targets


def _ratio(median: float, std: float) -> float:
    if std > 0:
        return median / std
    return copysign(inf, median) if median else 0.0
