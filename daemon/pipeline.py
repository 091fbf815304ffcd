"""The one path from bars to outcomes, and the one loop that drives it, live and in every replay."""

import asyncio
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Executor
from dataclasses import dataclass

import msgspec
import numpy as np

from barcast.daemon.batcher import Batcher
from barcast.daemon.calendar import Calendar
from barcast.daemon.ports import (
    Activation,
    Arrival,
    EndOfSource,
    Event,
    Group,
    Outcome,
    Revision,
    Sink,
    Source,
    Warmup,
)
from barcast.daemon.timeframe import Timeframe
from barcast.models import Bar, Card, Forecast, Forecaster, Verdict, Window, Windows
from barcast.strategies import Strategy, build

HOLES_WITHHELD = 0.1
"""The share of missing bars in the shortest usable window above which no forecast is made."""


class StrategySettings(msgspec.Struct, frozen=True):
    """One strategy of the path: what it is, what it is called, its parameters."""

    kind: str
    name: str
    params: dict[str, float | int | str | bool] = {}


class Settings(msgspec.Struct, frozen=True, kw_only=True):
    """What the path needs to know; journalled at every change, so that a replay knows it too."""

    root: str
    timeframe: str
    calendar: str
    symbols: tuple[str, ...]
    max_wait: int
    sampler: str | None
    steps: int | None
    strategies: tuple[StrategySettings, ...]

    def bar_calendar(self) -> Calendar:
        """The bar closes of the path."""
        return Calendar(self.calendar, Timeframe.parse(self.timeframe))

    def build(self) -> tuple[Strategy, ...]:
        """The strategies of the path."""
        return tuple(build(s.kind, s.name, s.params) for s in self.strategies)

    def encode(self) -> bytes:
        """Canonical JSON: the same settings always give the same bytes."""
        return msgspec.json.encode(self, order="deterministic")

    @classmethod
    def decode(cls, payload: bytes) -> "Settings":
        """Read what `encode` wrote."""
        return msgspec.json.decode(payload, type=cls)


OpenModel = Callable[[str, str | None, int | None], Forecaster]
"""Opens a model by id, with a sampler and a number of steps (None: the model's own)."""


@dataclass(slots=True)
class Counts:
    """What became of the bars."""

    newest: int = 0
    older: int = 0
    correction: int = 0
    duplicate: int = 0
    forgotten: int = 0
    stale: int = 0
    straggler: int = 0


class Pipeline:
    """Batcher, windows, forecaster and strategies: what turns events into outcomes.

    The state is the windows, the batcher, the settings and the model in force, and counters. The first
    event must be a `Revision`; a model is opened when the first group needs it.
    """

    def __init__(self, open_model: OpenModel) -> None:
        self.counts = Counts()
        self.model: str | None = None
        self._revision: Settings | None = None
        self.windows = Windows(1)
        self.batcher = Batcher((), 0)
        self.calendar = Calendar("24x7", Timeframe.parse("1m"))
        self.strategies: tuple[Strategy, ...] = ()
        self._open_model = open_model
        self._forecaster: Forecaster | None = None

    @property
    def deadline(self) -> int | None:
        """When the path must be told the time again, at the latest."""
        return self.batcher.deadline

    @property
    def forecaster(self) -> Forecaster:
        """The model in force, opened on first use."""
        if self._forecaster is None:
            if self.model is None:
                raise RuntimeError("a group is due before an activation")
            settings = self.settings
            self._forecaster = self._open_model(self.model, settings.sampler, settings.steps)
        return self._forecaster

    @property
    def settings(self) -> Settings:
        """The settings in force."""
        if self._revision is None:
            raise RuntimeError("an event came before the first revision")
        return self._revision

    def due(self, now: int) -> Iterator[Group]:
        """Groups whose wait ended at or before `now`."""
        return self.batcher.due(now)

    def take(self, event: Event, sink: Sink | None = None) -> Iterator[Group]:
        """Take one event; yield each group that it completes before going on."""
        match event:
            case Arrival(time, bars):
                for bar in bars:
                    yield from self._take_bar(bar, time, sink)
            case Revision():
                self._revise(Settings.decode(event.settings))
            case Warmup(_, _, bars):
                self.windows.warm(bars)
            case Activation():
                self.model, self._forecaster = event.model, None
                self.windows.lengthen(event.window)

    def outcome(self, group: Group) -> Outcome:
        """Forecast a group and ask the strategies: a function of the state at this moment."""
        card, settings = self.forecaster.card, self.settings
        windows: list[Window] = []
        holed: set[str] = set()
        withheld: dict[str, str] = {}
        for symbol in group.symbols:
            window = self.windows.cut(symbol, group.close_time, card.window)
            if window is None or len(window) < card.min_window:
                have = 0 if window is None else len(window)
                withheld[symbol] = f"{have} of at least {card.min_window} bars"
                continue
            holes = self._holes(window.close_times[-card.min_window :])
            if holes > HOLES_WITHHELD * card.min_window:
                withheld[symbol] = f"{holes} of the last {card.min_window} bars are missing"
                continue
            if holes:
                holed.add(symbol)
            windows.append(window)
        forecasts: dict[str, Forecast] = {}
        for forecast in self.forecaster.forecast(windows):
            if np.isfinite(forecast.quantiles).all():
                forecasts[forecast.symbol] = forecast
            else:
                withheld[forecast.symbol] = "the model gave no finite forecast"
        flags = {
            name: ("warming",) * forecast.warming + ("degraded",) * (name in holed)
            for name, forecast in forecasts.items()
        }
        targets = {}
        if forecasts and not group.straggler:
            targets = {s.name: s.on_forecasts(group.close_time, forecasts) for s in self.strategies}
        closes = self.calendar.closes_after(group.close_time, max(card.horizons))
        return Outcome(
            root=settings.root,
            timeframe=settings.timeframe,
            group=group,
            card=card,
            forecasts=forecasts,
            flags=flags,
            withheld=withheld,
            targets=targets,
            ends=tuple(closes[h - 1] for h in card.horizons),
            valid_until=self.calendar.valid_until(group.close_time),
        )

    def _take_bar(self, bar: Bar, time: int, sink: Sink | None) -> Iterator[Group]:
        verdict = self.windows.put(bar)
        setattr(self.counts, verdict.value, getattr(self.counts, verdict.value) + 1)
        if verdict is not Verdict.NEWEST:
            return
        if sink is not None:
            sink.accepted(bar)
        if time > self.calendar.valid_until(bar.close_time):
            self.counts.stale += 1
            return
        for group in self.batcher.add(bar, time):
            self.counts.straggler += group.straggler
            yield group

    def _revise(self, settings: Settings) -> None:
        self._revision, self._forecaster = settings, None
        self.calendar = settings.bar_calendar()
        self.batcher.reconfigure(settings.symbols, settings.max_wait)
        self.strategies = settings.build()

    def _holes(self, closes: np.ndarray) -> int:
        first, last = int(closes[0]), int(closes[-1])
        return max(0, self.calendar.missing_between(first, last) - (len(closes) - 2))


def try_strategies(strategies: Iterable[Strategy], card: Card) -> None:
    """Ask each strategy once about a forecast of the card's shape.

    Raise ConfigError for one that needs a level or a horizon that the model does not forecast: better before
    the settings are journalled than at the first group.
    """
    rising = np.linspace(-0.01, 0.01, len(card.levels))
    some = np.full(len(card.horizons), 0.5)
    trial = Forecast(
        symbol="TRIAL",
        close_time=0,
        reference=1.0,
        horizons=card.horizons,
        levels=card.levels,
        quantiles=np.tile(rising, (len(card.horizons), 1)),
        mean=some,
        std=some,
        rise=some,
        warming=False,
    )
    for strategy in strategies:
        strategy.on_forecasts(0, {"TRIAL": trial})


async def run(source: Source, pipeline: Pipeline, sink: Sink, executor: Executor | None = None) -> None:
    """Drive the pipeline until the source ends or the task is cancelled.

    Lateness is decided by an event's own recorded time, and before the event joins; a group that is due
    leaves before anything newer is seen. With an executor the forecasts are computed there, so that a
    live event loop stays free; in a replay they are computed at once.
    """

    async def emit(group: Group) -> None:
        if executor is None:
            outcome = pipeline.outcome(group)
        else:
            outcome = await asyncio.get_running_loop().run_in_executor(executor, pipeline.outcome, group)
        await sink.emit(outcome)

    while True:
        try:
            event = await source.next(pipeline.deadline)
        except EndOfSource:
            return
        now = source.now() if event is None else event.time
        for group in pipeline.due(now):
            await emit(group)
        if event is not None:
            for group in pipeline.take(event, sink):
                await emit(group)
        await sink.settle(now)
