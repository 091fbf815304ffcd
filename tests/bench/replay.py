"""The loop alone: bars through the path in one process, as a backtest runs it, beside a plain loop."""

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch

from barcast.backtest.cache import ForecastCache
from barcast.backtest.ledger import Execution, Ledger
from barcast.backtest.replay import arrivals, replay
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.daemon import pipeline
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import read_windows, scan
from barcast.daemon.pipeline import Settings, StrategySettings
from barcast.daemon.ports import Activation, Outcome, Revision, Sink, Warmup
from barcast.daemon.timeframe import Timeframe
from barcast.models import (
    LEVELS,
    Adjustment,
    Bar,
    Calibrated,
    Card,
    FilteredHistoricalSimulation,
    Forecast,
    Forecaster,
    HistoricalSimulation,
    Window,
)
from barcast.models.checkpoint import open_forecaster
from tests.bench.report import Row, Section, Target
from tests.bench.rig import MINUTE, bars, minutes, walk

HORIZONS = (1, 4, 16)
SYMBOLS = 100
WARM = 700
"""Closes in the windows before the clock starts, so that every bar is forecast from a full window."""
CLOSES = 300
FORECAST_CLOSES = 60
MODEL_WINDOWS = 100


class Null:
    """Constant quantiles: what is left is the path itself."""

    card = Card("null", "null", "1m", HORIZONS, LEVELS, 8, 8, "none", 0, 0, "")
    quantiles = np.tile(np.linspace(-1e-3, 1e-3, len(LEVELS)), (3, 1))
    zero, half = np.zeros(3), np.full(3, 0.5)

    def forecast(self, windows: Sequence[Window]) -> list[Forecast]:
        return [
            Forecast(
                w.symbol,
                w.close_time,
                w.reference,
                HORIZONS,
                LEVELS,
                self.quantiles,
                self.zero,
                self.half,
                self.half,
                False,
            )
            for w in windows
        ]


class Nothing:
    """A sink that keeps nothing, and counts what it was told."""

    def __init__(self) -> None:
        self.forecasts = 0

    def accepted(self, bar: Bar) -> None:
        pass

    def adjusted(self, adjustment: Adjustment) -> None:
        """Nothing is kept."""

    async def emit(self, outcome: Outcome) -> None:
        self.forecasts += len(outcome.forecasts)

    async def settle(self, now: int) -> None:
        pass


def plain_loop(some: list[Bar]) -> float:
    """The reference: a moving-average cross with next-open fills, written out in Python."""
    fast: dict[str, deque[float]] = {}
    slow: dict[str, deque[float]] = {}
    position: dict[str, float] = {}
    cash = 0.0
    for bar in some:
        f, s = fast.setdefault(bar.symbol, deque(maxlen=10)), slow.setdefault(bar.symbol, deque(maxlen=50))
        f.append(bar.close)
        s.append(bar.close)
        want = 1.0 if sum(f) / len(f) > sum(s) / len(s) else 0.0
        cash -= (want - position.get(bar.symbol, 0.0)) * bar.open
        position[bar.symbol] = want
    return cash


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """CPU time on one core, of which the least of a few runs is taken."""
    torch.set_num_threads(1)
    values = walk(SYMBOLS, WARM + CLOSES)
    every = list(bars(values, minutes(MINUTE, WARM + CLOSES)))
    before, after = every[: WARM * SYMBOLS], every[WARM * SYMBOLS :]
    section = Section(
        "replay",
        "Replay loop: CPU time on one core",
        {"bars": ("bars", ","), "us_per_bar": ("µs a bar", ",.1f"), "bars_per_second": ("bars/s", ",.0f")},
    )
    plain = "plain loop: moving-average cross"

    def note(what: str, count: int, seconds: float, target: Target | None = None) -> None:
        raw = {
            "bars": count,
            "cpu_seconds": seconds,
            "us_per_bar": 1e6 * seconds / count,
            "bars_per_second": count / seconds,
        }
        first = section.rows[0].raw["us_per_bar"] if section.rows else raw["us_per_bar"]
        section.rows.append(Row(what, raw, raw["us_per_bar"] / first, plain, target))

    tell("plain loop")
    note(plain, len(after), min(_timed(lambda: plain_loop(after)) for _ in range(5)))
    loops: list[tuple[str, Forecaster, Callable[[], Sink], int, Target | None]] = [
        (
            "path, null forecaster, null sink",
            Null(),
            Nothing,
            CLOSES,
            Target("bars_per_second", 100_000, 300_000),
        ),
        ("path, null forecaster, ledger", Null(), _ledger, CLOSES, None),
        (
            "path, historical simulation, ledger",
            HistoricalSimulation("1m", HORIZONS, LEVELS),
            _ledger,
            FORECAST_CLOSES,
            None,
        ),
        (
            "path, filtered historical simulation, ledger",
            FilteredHistoricalSimulation("1m", HORIZONS, LEVELS),
            _ledger,
            FORECAST_CLOSES,
            None,
        ),
    ]
    for what, forecaster, sink, closes, target in loops:
        tell(what)
        some = after[: closes * SYMBOLS]
        repeat = 5 if isinstance(forecaster, Null) else 2
        note(
            what,
            len(some),
            min(_through_path(before, some, forecaster, sink()) for _ in range(repeat)),
            target,
        )
    tell("another strategy over kept forecasts")
    model = HistoricalSimulation("1m", HORIZONS, LEVELS)
    with ForecastCache(folder) as cache:
        _through_path(before, after, cache.of(model), Nothing(), hashed=True)
    beside: list[tuple[str, Callable[[], Sink], Target | None]] = [
        ("another strategy over kept forecasts, null sink", Nothing, Target("bars_per_second", 100_000)),
        ("the same, ledger with its tables", _ledger, Target("bars_per_second", 100_000)),
    ]
    for what, sink, target in beside:
        took = []
        for _ in range(3):
            cache = ForecastCache(folder)
            took.append(_through_path(before, after, cache.of(model), sink(), ("median-drift",), hashed=True))
            if cache.made:
                raise RuntimeError(f"{cache.made} windows were forecast again")
        note(what, len(after), min(took), target)
    for what, shipped, windows in _shipped():
        tell(what)
        note(what, len(windows), min(_timed(lambda m=shipped, w=windows: m.forecast(w)) for _ in range(3)))  # type: ignore[misc]
    return section


def _ledger() -> Ledger:
    return Ledger(Execution())


def _shipped() -> Iterator[tuple[str, Forecaster, list[Window]]]:
    """The shipped model under both samplers, and windows of it."""
    calendar = Calendars("XNYS", Timeframe.parse("session"))
    history = read_windows(scan([sample_bars()], "close", calendar))["IBM"]
    for sampler in ("dpmpp", "ddim"):
        model = open_forecaster(sample_checkpoint(), sampler)
        assert isinstance(model, Calibrated)
        length, ends = model.card.window, range(len(history) - MODEL_WINDOWS, len(history))
        windows = [
            Window("IBM", history.close_times[k - length : k], history.values[k - length : k]) for k in ends
        ]
        model.forecast(windows[:3])
        what = f"{sampler} {model.card.steps} steps, {model.card.samples} samples"
        yield f"sssd forecasts alone, {what}", model, windows
        yield f"sssd forecasts alone, before calibration, {what}", model.inner, windows


def _through_path(
    before: list[Bar],
    some: list[Bar],
    forecaster: Forecaster,
    sink: Sink,
    strategies: Sequence[str] = (),
    hashed: bool = False,
) -> float:
    """Replay bars on windows that are warm already; return the CPU seconds of the replay."""
    settings = Settings(
        root="bench",
        timeframe="1m",
        calendar="24x7",
        symbols=(),
        max_wait=1,
        sampler=None,
        steps=None,
        strategies=tuple(map(StrategySettings.parse, strategies)),
    )
    path = pipeline.Pipeline(lambda *_: forecaster, hashed=hashed)
    for event in (
        Revision(0, settings.encode()),
        Activation(0, "bench", "", forecaster.card.window),
        Warmup(0, "", tuple(before)),
    ):
        assert not list(path.take(event))
    took = _timed(lambda: replay(arrivals(some), path, sink))
    if isinstance(sink, Nothing) and sink.forecasts != len(some):
        raise RuntimeError(f"{sink.forecasts} forecasts of {len(some)} bars: the loop did not do its work")
    return took


def _timed(work: Callable[[], object]) -> float:
    began = time.process_time()
    work()
    return time.process_time() - began
