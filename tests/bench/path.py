"""What the path costs, as ratios within one run: `make bench`. Prints a table and writes bench.json."""

import json
import os
import platform
import time
from collections import deque
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from barcast.backtest.ledger import Ledger
from barcast.backtest.replay import arrivals, replay
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.daemon import pipeline
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import read_windows, scan
from barcast.daemon.pipeline import Settings
from barcast.daemon.ports import Activation, Revision
from barcast.daemon.timeframe import Timeframe
from barcast.models import (
    LEVELS,
    Bar,
    Card,
    FilteredHistoricalSimulation,
    Forecast,
    Forecaster,
    HistoricalSimulation,
    Window,
)
from barcast.models.checkpoint import open_forecaster

MINUTE = 60 * 10**9
HORIZONS = (1, 4, 16)


class Null:
    """Constant quantiles: what is left is the path itself."""

    card = Card("null", "null", "1m", HORIZONS, LEVELS, 8, 1, "none", 0, 0, "")
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


def walk(symbols: int, minutes: int) -> list[Bar]:
    """Random walks of many symbols, in order of their close."""
    steps = np.random.default_rng(1).normal(0, 1e-4, (minutes, symbols)).cumsum(0)
    prices = 100 * np.exp(steps)
    return [
        Bar(f"S{s:03d}", (m + 1) * MINUTE, p, p * 1.001, p * 0.999, p, 1.0)
        for m, row in enumerate(prices.tolist())
        for s, p in enumerate(row)
    ]


def plain_loop(bars: list[Bar]) -> float:
    """The reference: a moving-average cross with next-open fills, written out in Python."""
    fast: dict[str, deque[float]] = {}
    slow: dict[str, deque[float]] = {}
    position: dict[str, float] = {}
    cash = 0.0
    for bar in bars:
        f, s = fast.setdefault(bar.symbol, deque(maxlen=10)), slow.setdefault(bar.symbol, deque(maxlen=50))
        f.append(bar.close)
        s.append(bar.close)
        want = 1.0 if sum(f) / len(f) > sum(s) / len(s) else 0.0
        cash -= (want - position.get(bar.symbol, 0.0)) * bar.open
        position[bar.symbol] = want
    return cash


def through_path(bars: list[Bar], forecaster: Forecaster) -> None:
    """Replay bars with the books kept."""
    settings = Settings(
        root="bench",
        timeframe="1m",
        calendar="24x7",
        symbols=(),
        max_wait=1,
        sampler=None,
        steps=None,
        strategies=(),
    )
    opening = [Revision(0, settings.encode()), Activation(0, "bench", "", forecaster.card.window)]
    replay([*opening, *arrivals(bars)], pipeline.Pipeline(lambda *_: forecaster), Ledger(1.0, 2.0))


def cpu_seconds(work: Callable[[], object], repeat: int = 3) -> float:
    """The least CPU time of a few runs."""
    took = []
    for _ in range(repeat):
        began = time.process_time()
        work()
        took.append(time.process_time() - began)
    return min(took)


def main() -> None:
    """Measure, print, write."""
    torch.set_num_threads(1)
    bars = walk(100, 300)
    plain = cpu_seconds(lambda: plain_loop(bars))
    rows = [("plain Python loop, moving-average cross", len(bars), plain)]
    loops: list[tuple[str, Forecaster]] = [
        ("path, null forecaster", Null()),
        ("path, historical simulation", HistoricalSimulation("1m", HORIZONS, LEVELS)),
        ("path, filtered historical simulation", FilteredHistoricalSimulation("1m", HORIZONS, LEVELS)),
    ]
    for name, forecaster in loops:
        rows.append((name, len(bars), cpu_seconds(lambda f=forecaster: through_path(bars, f), 2)))  # type: ignore[misc]
    calendar = Calendars("XNYS", Timeframe.parse("session"))
    history = read_windows(scan([sample_bars()], "close", calendar))["IBM"]
    for sampler in ("dpmpp", "ddim"):
        model = open_forecaster(sample_checkpoint(), sampler)
        n, length = 100, model.card.window
        ends = range(len(history) - n, len(history))
        windows = [
            Window("IBM", history.close_times[k - length : k], history.values[k - length : k]) for k in ends
        ]
        model.forecast(windows[:3])
        label = f"forecast, sssd, {sampler}, {model.card.steps} steps, {model.card.samples} samples"
        rows.append((label, n, cpu_seconds(lambda m=model, w=windows: m.forecast(w), 2)))  # type: ignore[misc]
    table = Table(title="CPU time on one core")
    for column in ("what", "bars", "µs a bar", "bars a second", "times the plain loop"):
        table.add_column(column, justify="left" if column == "what" else "right")
    report = []
    for name, count, seconds in rows:
        each = seconds / count
        ratio = each / (plain / len(bars))
        table.add_row(name, str(count), f"{1e6 * each:.1f}", f"{1 / each:,.0f}", f"{ratio:.1f}")
        report.append({"what": name, "bars": count, "seconds": seconds, "ratio": ratio})
    Console().print(table)
    machine = {"cores": os.cpu_count(), "python": platform.python_version(), "torch": torch.__version__}
    when = datetime.now(UTC).isoformat(timespec="minutes")
    Path("bench.json").write_text(json.dumps({"when": when, "machine": machine, "rows": report}, indent=1))


if __name__ == "__main__":
    main()
