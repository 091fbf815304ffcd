"""What the metrics cost: a scrape with few and with many symbols, and to count one span of time."""

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from barcast.daemon import log
from barcast.daemon.app import Daemon
from barcast.daemon.distribution import Distribution
from barcast.daemon.live import LATE
from barcast.models import Coverage
from tests.bench.report import Row, Section
from tests.daemon.living import LEAST, at_work, daemon, deliver
from tests.fakes import MINUTE, START, bar
from tests.rim import SECOND, Message

FEW, MANY = 10, 1000
SCRAPES = 100
SPANS = 200_000


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """Milliseconds and bytes of a scrape, every one with a coverage for each symbol."""
    columns = {
        "ms_p50": ("ms p50", ".1f"),
        "ms_max": ("ms at most", ".1f"),
        "kb": ("kB", ".1f"),
        "us": ("µs", ".2f"),
    }
    section = Section("scrape", "Metrics", columns)
    log.configure("warning")
    for symbols in (FEW, MANY):
        tell(f"{symbols:,} symbols")
        (folder / str(symbols)).mkdir()
        made = daemon(folder / str(symbols), LEAST, START + 2 * MINUTE + SECOND)
        section.rows.append(Row(f"scrape, {symbols:,} symbols", asyncio.run(_scrapes(made, symbols))))
    found, began = Distribution(LATE), time.perf_counter()
    for _ in range(SPANS):
        found.observe(0.3)
    section.rows.append(Row("count one span", {"us": 1e6 * (time.perf_counter() - began) / SPANS}))
    return section


async def _scrapes(made: Daemon, symbols: int) -> dict[str, float]:
    async with at_work(made):
        names = [f"S{i}" for i in range(symbols)]
        await deliver(made, *(Message.of(bar(name, 2)) for name in names))
        made.sink.horizons = (1, 4, 16)
        known = Coverage((0.9, 0.8, 0.5), np.full((3, 3), 0.8), (250, 250, 250))
        made.sink.coverage = dict.fromkeys(names, known)
        took = []
        for _ in range(SCRAPES):
            began = time.perf_counter()
            text = await made.metrics.text()
            took.append(1e3 * (time.perf_counter() - began))
    return {"symbols": symbols, "ms_p50": float(np.median(took)), "ms_max": max(took), "kb": len(text) / 1e3}
