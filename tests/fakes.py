"""A numpy forecaster and ready-made events, for tests of the path without torch."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

import msgspec
import numpy as np

from barcast.backtest.replay import Recording, ReplaySource, drive
from barcast.daemon.pipeline import Pipeline, Settings, StrategySettings, run
from barcast.daemon.ports import Activation, Event, Revision
from barcast.daemon.wire import Outgoing
from barcast.models import Bar, Card, Forecast, Window
from barcast.models.forecast import Paths, freeze

MINUTE = 60 * 10**9
START = 1_700_000_040 * 10**9 // MINUTE * MINUTE
LEVELS = (0.05, 0.5, 0.95)


class Spread:
    """Quantiles from the mean and spread of the window's returns: every bar of the window moves them."""

    def __init__(self, model: str = "spread", window: int = 8, min_window: int = 3) -> None:
        self.card = Card(model, "fake", "1m", (1, 2), LEVELS, window, min_window, "none", 0, 0, "numpy")

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        return [self._one(w) for w in windows]

    def _one(self, w: Window) -> Forecast:
        r = np.diff(np.log(w.values[:, 3]))
        spread = 1e-4 + np.abs(r).mean() + 1e-9 * w.values[:, 4].sum()
        q = r.mean() + spread * np.array([[-1.6, 0.0, 1.6], [-2.3, 0.0, 2.3]])
        two = np.array([1.0, 2.0])
        mean, std, rise = two * r.mean(), two * spread, np.array([0.5, 0.5])
        freeze(q, mean, std, rise)
        return Forecast(
            w.symbol,
            w.close_time,
            w.reference,
            (1, 2),
            LEVELS,
            q,
            mean,
            std,
            rise,
            len(w) < self.card.window,
        )


class Winding(Spread):
    """Forecasts with three paths of two steps."""

    def __init__(self, model: str = "spread", window: int = 8, min_window: int = 3) -> None:
        super().__init__(model, window, min_window)
        self.card = replace(self.card, path=(1, 2))

    def _one(self, w: Window) -> Forecast:
        forecast = super()._one(w)
        returns = forecast.std[:1] * np.array([[0.5, 0.2], [-0.4, -1.1], [0.1, 0.9]])
        bridge = forecast.std / 3
        freeze(returns, bridge)
        return msgspec.structs.replace(forecast, paths=Paths((1, 2), returns, bridge))


def settings(symbols: Sequence[str] = ("A", "B"), max_wait: int = 10 * 10**9) -> Settings:
    """Settings of a path on one-minute bars with one strategy."""
    return Settings(
        root="t",
        timeframe="1m",
        calendar="24x7",
        symbols=tuple(symbols),
        max_wait=max_wait,
        sampler=None,
        steps=None,
        strategies=(StrategySettings("median-drift", "drift", {}),),
    )


def opening(symbols: Sequence[str] = ("A", "B"), window: int = 8) -> list[Event]:
    """The events every journal begins with."""
    return [Revision(START, settings(symbols).encode()), Activation(START, "spread", "numpy", window)]


def bar(symbol: str, minute: int, close: float | None = None, volume: float = 10.0) -> Bar:
    """The bar that closes `minute` minutes after the start; its price follows from symbol and minute."""
    price = 100 + ord(symbol[0]) % 7 + np.sin(minute * 1.3 + ord(symbol[0])) if close is None else close
    return Bar(symbol, START + minute * MINUTE, price, price + 1, price - 1, price, volume)


def outgoing(events: Iterable[Event], **models: Spread) -> list[Outgoing]:
    """Everything the path says to these events."""
    recording = Recording()
    known = {"spread": Spread()} | models
    path = Pipeline(lambda model, *_: known[model])
    drive(run(ReplaySource(events), path, recording))
    return recording.messages
