"""`python -m tests.bench.peers`: a moving-average cross on the same bars here and in other engines.

It prints CPU time as ratios (here = 1) and writes bench-peers.json. Every run is a process of its own with
one thread; the runs of all engines take turns, so that noise meets all, and the median of three counts.
`make bench-peers` makes the environment of the other engines. The wall clock may be read here.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn

from tests.bench.peers import engines
from tests.bench.peers.engines import SLOW, Times, Values
from tests.bench.report import Row, Section, host, sentence

RESULT = Path("bench-peers.json")
THEIRS = Path(".tools/peers/bin/python")
PATH, BACKTEST = "here: path and books", "here: backtest of a file, scores, report"
JOBS: dict[str, list[str]] = {
    PATH: [sys.executable, "-m", "tests.bench.peers.here", "path"],
    BACKTEST: [sys.executable, "-m", "tests.bench.peers.here", "backtest"],
    **{
        name: [str(THEIRS), "-I", engines.__file__, name]
        for name in ("backtesting", "nautilus_trader", "backtrader")
    },
    "plain loop": [str(THEIRS), "-I", engines.__file__, "plain"],
}
SIZES = {20_000: list(JOBS), 100_000: [job for job in JOBS if job != BACKTEST]}
"""Bars, and what runs on them."""
REPEAT = 3
PATIENCE_SECONDS = 600
THREADS = ("OMP", "OPENBLAS", "MKL", "NUMEXPR", "RAYON")
ONE_THREAD = {f"{name}_NUM_THREADS": "1" for name in THREADS} | {
    "POLARS_MAX_THREADS": "1",
    "TOKIO_WORKER_THREADS": "1",
}
MINUTE = 60 * 10**9
FIRST = 29_000_000 * MINUTE
TICK = 1 / 32
"""Prices are multiples of it: sums of them are exact, so that no engine rounds another cross into being."""
WIDTH = 150
"""Columns where there is no terminal to ask."""


def make(count: int, seed: int = 1) -> tuple[Times, Values]:
    """Minute bars of a random walk around 1000: closes (N,) and values (N, 5).

    Each opens where the one before closed: an engine that fills at the close it decides at pays what one
    that waits for the next open pays. Prices fall while the averages warm up, as not all engines show the
    first bar that has them to a strategy, and at the end, where an order may or may not be filled.
    """
    rng = np.random.default_rng(seed)
    steps = rng.normal(0, 16, count).round()
    for falling in (slice(SLOW + 1), slice(-SLOW, None)):
        steps[falling] = -np.abs(steps[falling])
    close = 1000 / TICK + steps.cumsum()
    open_ = close - steps
    above, below = rng.integers(0, 16, (2, count))
    ticks = (open_, np.maximum(open_, close) + above, np.minimum(open_, close) - below, close)
    volume = rng.integers(1_000, 10_000, count)
    return FIRST + MINUTE * np.arange(count), np.stack([*(TICK * t for t in ticks), volume], 1)


def check_agree(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Raise RuntimeError unless every run made as many entries, at prices of the same sum, as the others."""
    found = {job: {(run["entries"], run["paid"]) for run in own} for job, own in runs.items()}
    each = set().union(*found.values())
    if len(each) > 1 or (0, 0) in each:
        raise RuntimeError(
            f"the engines did not do the same work: entries and the sums of their prices are {found}"
        )


def main() -> None:
    """Measure, compare, print, write."""
    if not THEIRS.exists():
        sys.exit("the other engines are not installed: run `make bench-peers`")
    out = Console()
    if not out.is_terminal:
        out = Console(width=WIDTH)
    facts = host() | {name: version(name) for name in ("numpy", "polars")}
    out.print(sentence(facts))
    began = time.monotonic()
    sections = _measure(out)
    found = {"machine": facts, "sections": {section.name: section.plain() for section in sections}}
    RESULT.write_text(json.dumps(found, indent=1))
    for section in sections:
        out.print(section.table())
    out.print(f"{time.monotonic() - began:.0f} s; every number is in {RESULT}")


def _measure(out: Console) -> list[Section]:
    columns = (SpinnerColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    sections = []
    with (
        tempfile.TemporaryDirectory(prefix="barcast-peers-") as folder,
        Progress(*columns, console=out, refresh_per_second=2) as progress,
    ):
        for count, jobs in SIZES.items():
            line, began = progress.add_task(f"{count:,} bars", total=1), time.monotonic()
            file = Path(folder) / f"{count}.npz"
            closes, values = make(count)
            np.savez(file, closes=closes, values=values)
            runs = defaultdict(list)
            for _ in range(REPEAT):
                for job in jobs:
                    progress.update(line, description=f"{count:,} bars: {job}")
                    runs[job].append(_run([*JOBS[job], str(file)], Path(folder)))
            check_agree(runs)
            sections.append(_section(count, runs))
            sections[-1].seconds = time.monotonic() - began
            progress.update(line, description=f"{count:,} bars", completed=1)
    return sections


def _run(command: list[str], folder: Path) -> dict[str, Any]:
    env = os.environ | ONE_THREAD | {"TMPDIR": str(folder)}
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=PATIENCE_SECONDS)
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {done.returncode}:\n{done.stderr[-2000:]}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _section(count: int, runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> Section:
    section = Section(
        f"{count}",
        f"SMA({engines.FAST})/SMA({SLOW}) cross, one symbol, {count:,} minute bars: CPU time, here = 1",
        {
            "cpu_seconds": ("CPU s", ",.3f"),
            "bars_per_second": ("bars/s", ",.0f"),
            "entries": ("entries", ","),
            "peak_mb": ("MB at most", ",.0f"),
        },
    )
    ours = median(run["cpu_seconds"] for run in runs[PATH])
    for job, own in runs.items():
        cpu = median(run["cpu_seconds"] for run in own)
        raw = {
            "cpu_seconds": cpu,
            "bars_per_second": count / cpu,
            "entries": own[0]["entries"],
            "peak_mb": median(run["peak_mb"] for run in own),
            "runs": own,
        }
        section.rows.append(Row(f"{job} {own[0].get('version') or ''}".strip(), raw, cpu / ours, PATH))
    return section


if __name__ == "__main__":
    main()
