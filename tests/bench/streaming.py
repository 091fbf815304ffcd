"""What a backtest takes in memory, by the length of its history: two lengths, and the slope between them.

The bars are a seeded walk of one-minute bars in the sessions of XNYS. Each run is the command line in a
process of its own, as a quant calls it, and its memory the most that the kernel counted as resident, mapped
files with it. `python -m tests.bench.streaming SESSIONS` measures one length: 2516 are ten years.
"""

import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from barcast.daemon.calendar import Calendar
from barcast.daemon.timeframe import Timeframe
from tests.bench.report import Row, Section, Target, host, sentence
from tests.bench.rig import name

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
CHILD = """
import json, os, sys, time
from barcast.backtest.cli import main
from tests.bench.rig import memory
try:
    main()
except SystemExit as end:
    if end.code:
        raise
print(json.dumps([memory(os.getpid())["peak_mb"], time.process_time()]))
"""
"""The command line, and then the most memory that it took (MB) and its seconds of CPU."""


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """The most memory at both lengths, what a bar more takes, and what ten years would by that."""
    section = Section(
        "streaming",
        f"Backtest of {SYMBOLS} symbols, one-minute bars of XNYS, hs, one strategy, with report",
        {
            "sessions": ("sessions", ","),
            "bars": ("bars", ","),
            "peak_mb": ("MB at most", ",.0f"),
            "bytes_per_bar": ("bytes a bar", ",.1f"),
            "us_per_bar": ("µs a bar", ",.0f"),
        },
    )
    for sessions in (SHORT, LONG):
        tell(f"{sessions} sessions")
        section.rows.append(Row(f"{sessions} sessions", run(sessions, folder / str(sessions))))
    short, long = (row.raw for row in section.rows)
    slope = 1e6 * (long["peak_mb"] - short["peak_mb"]) / (long["bars"] - short["bars"])
    decade = long["peak_mb"] + slope * (DECADE - long["bars"]) / 1e6
    raw = {"bars": DECADE, "peak_mb": decade, "bytes_per_bar": slope}
    section.rows.append(Row("ten years, by the slope", raw, target=Target("peak_mb", MOST, most=True)))
    return section


def run(sessions: int, folder: Path) -> dict[str, Any]:
    """Backtest so many sessions in a process of its own."""
    count = write_bars(sessions, folder / "bars")
    words = ["backtest", str(folder / "bars"), "--stamp", "close", "--timeframe", "1m", "--calendar", "XNYS"]
    words += ["--model", "hs", "--strategy", "median-drift", "--out", str(folder / "out")]
    began = time.monotonic()
    done = subprocess.run([sys.executable, "-c", CHILD, *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(f"the backtest failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    peak, cpu = json.loads(done.stdout.splitlines()[-1])
    size = sum(path.stat().st_size for path in (folder / "out").iterdir())
    seconds = time.monotonic() - began
    return {
        "sessions": sessions,
        "bars": count,
        "peak_mb": peak,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "us_per_bar": 1e6 * cpu / count,
        "result_mb": size / 1e6,
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
    with tempfile.TemporaryDirectory(prefix="barcast-bench-") as folder:
        print(json.dumps(run(sessions, Path(folder)), indent=1))


if __name__ == "__main__":
    main()
