"""A strategy that is made anew for each question: how the audit finds what another keeps between them."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec

from barcast.daemon.pipeline import StrategySettings
from barcast.models import Forecast


@dataclass(frozen=True)
class Anew:
    """Asks a new instance of the strategy with these `settings`, at these `closes`, both in JSON."""

    name: str
    settings: str
    closes: str

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> Mapping[str, float]:
        """What an instance says that was never asked before; nothing at another close."""
        if close_time not in msgspec.json.decode(self.closes, type=frozenset[int]):
            return {}
        settings = msgspec.json.decode(self.settings, type=StrategySettings)
        return settings.build().on_forecasts(close_time, forecasts)


def anew(settings: StrategySettings, closes: list[int]) -> StrategySettings:
    """The settings of a strategy of the same name that is asked so at closes in nanoseconds."""
    told = {
        "settings": msgspec.json.encode(settings).decode(),
        "closes": msgspec.json.encode(closes).decode(),
    }
    return StrategySettings.of(f"{__file__}:Anew", settings.name, told)
