"""What backtest and training take in memory, by the length of the history: two lengths, and the slope.

The bars are a seeded walk of one-minute bars in the sessions of XNYS. Each run is the command line in a
process of its own, as a quant calls it, and its memory the most that the kernel counted as resident, mapped
files with it. `python -m tests.bench.streaming SESSIONS` measures one length: 2516 are ten years.
"""

import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from barcast.daemon.calendar import Calendar
from barcast.daemon.timeframe import Timeframe
from tests.bench.report import Row, Section, Target, host, sentence
from tests.bench.rig import name, run

SYMBOLS = 20
SESSION = 390
SHORT, LONG = 160, 480
"""Sessions of the two lengths."""
DECADE = 2516 * SESSION * SYMBOLS
"""Bars of ten years."""
FIRST = np.datetime64("2015-01-02T14:30", "ns").astype(np.int64).item()
MOST = 2048
"""MB that ten years may take."""
AT_ONCE = 50
"""Sessions in one file."""
BARS = ("--stamp", "close", "--timeframe", "1m", "--calendar", "XNYS")
WORK = {
    "backtest": ("--model", "hs", "--strategy", "median-drift"),
    "train": (),
}
"""What is measured: a backtest with report, and a training of the default kind."""


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """The most memory at both lengths, what a bar more takes, and what ten years would by that."""
    section = Section(
        "streaming",
        f"{SYMBOLS} symbols, one-minute bars of XNYS: backtest by hs with report, and training",
        {
            "bars": ("bars", ","),
            "peak_mb": ("MB at most", ",.0f"),
            "bytes_per_bar": ("bytes a bar", ",.1f"),
            "us_per_bar": ("µs a bar", ",.0f"),
        },
    )
    counts = {sessions: write_bars(sessions, folder / str(sessions)) for sessions in (SHORT, LONG)}
    for command in WORK:
        found = []
        for sessions, count in counts.items():
            tell(f"{command}, {sessions} sessions")
            found.append(_ran(command, count, folder / str(sessions), folder / f"{command}-{sessions}"))
            section.rows.append(Row(f"{command}, {sessions} sessions", found[-1]))
        short, long = found
        slope = 1e6 * (long["peak_mb"] - short["peak_mb"]) / (long["bars"] - short["bars"])
        decade = long["peak_mb"] + slope * (DECADE - long["bars"]) / 1e6
        raw = {"bars": DECADE, "peak_mb": decade, "bytes_per_bar": slope}
        target = Target("peak_mb", MOST, most=True)
        section.rows.append(Row(f"{command}, ten years, by the slope", raw, target=target))
    return section


def _ran(command: str, count: int, bars: Path, target: Path) -> dict[str, Any]:
    """Run a command on so many bars in a process of its own."""
    ran = run(command, str(bars), *BARS, *WORK[command], "--out", str(target))
    return {
        "bars": count,
        "peak_mb": ran.peak_mb,
        "seconds": ran.seconds,
        "cpu_seconds": ran.cpu_seconds,
        "us_per_bar": 1e6 * ran.cpu_seconds / count,
        "result_mb": sum(path.stat().st_size for path in target.iterdir()) / 1e6,
    }


def write_bars(sessions: int, folder: Path) -> int:
    """Parquet files of some sessions each; return how many bars there are in all."""
    folder.mkdir(parents=True)
    rng, last = np.random.default_rng(1), np.full(SYMBOLS, np.log(100.0))
    close, calendar = FIRST, Calendar("XNYS", Timeframe.parse("1m"))
    for number, start in enumerate(range(0, sessions, AT_ONCE)):
        count = SESSION * min(AT_ONCE, sessions - start)
        closes = np.array(calendar.closes_after(close, count))
        steps = last + rng.normal(0, 4e-4, (count, SYMBOLS)).cumsum(0)
        close, last, price = int(closes[-1]), steps[-1], np.exp(steps)
        opened = price * np.exp(rng.normal(0, 1e-4, price.shape))
        columns = {
            "open": opened,
            "high": np.maximum(opened, price) * 1.0002,
            "low": np.minimum(opened, price) * 0.9998,
            "close": price,
            "volume": rng.integers(1, 10_000, price.shape).astype(float),
        }
        frame = pl.DataFrame(
            {"symbol": [name(s) for s in range(SYMBOLS)] * count, "close_time": closes.repeat(SYMBOLS)}
        )
        frame = frame.with_columns(pl.Series(column, values.ravel()) for column, values in columns.items())
        frame = frame.with_columns(pl.col("close_time").cast(pl.Datetime("ns", "UTC")))
        frame.write_parquet(folder / f"{number:04}.parquet")
    return sessions * SESSION * SYMBOLS


def main() -> None:
    """Measure one length and say what was found."""
    sessions = int(sys.argv[1])
    print(sentence(host()))
    with tempfile.TemporaryDirectory(prefix="barcast-bench-") as place:
        folder = Path(place)
        count = write_bars(sessions, folder / "bars")
        for command in WORK:
            print(command, json.dumps(_ran(command, count, folder / "bars", folder / command), indent=1))


if __name__ == "__main__":
    main()
