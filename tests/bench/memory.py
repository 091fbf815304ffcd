"""What a symbol costs in memory: daemons with few and with many symbols, whose windows are full.

The bars come from the broker, a few arrays at a time, so that the queue between socket and windows is as
short for many symbols as for few. Rings are written to their end, as untouched memory costs nothing.
"""

import time
from collections.abc import Callable
from pathlib import Path

from barcast.models import open_model
from barcast.models.window import SLACK
from tests.bench.ingest import FIRST, LENGTH
from tests.bench.report import Row, Section
from tests.bench.rig import MINUTE, PROBE, Broker, Daemon, Raw, bars, memory, minutes, packets, walk

FEW, MANY = 10, 1000
AT_ONCE = 50
"""Arrays that are published before they must be in the journal."""
PULSE_SECONDS = 0.01


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """Resident memory with few and with many symbols, and the difference for each."""
    section = Section(
        "memory",
        "Memory of the daemon, fhs, windows full",
        {
            "symbols": ("symbols", ","),
            "rss_mb": ("MB", ",.0f"),
            "peak_mb": ("MB at most", ",.0f"),
            "kb_per_symbol": ("kB a symbol", ",.0f"),
        },
    )
    found = {}
    for symbols in (FEW, MANY):
        tell(f"{symbols:,} symbols")
        found[symbols] = _resident(symbols, folder / str(symbols), tell)
        section.rows.append(Row(f"{symbols:,} symbols", {"symbols": symbols, **found[symbols]}))
    each = 1e3 * (found[MANY]["rss_mb"] - found[FEW]["rss_mb"]) / (MANY - FEW)
    section.rows.append(Row("each symbol more", {"kb_per_symbol": each}))
    return section


def _resident(symbols: int, folder: Path, tell: Callable[[str], None]) -> dict[str, float]:
    window = open_model("fhs", "1m", None, None).card.window
    rounds = -(-2 * (window + SLACK) // LENGTH)
    with Broker(folder / "broker") as broker:
        publisher = Raw(broker.port, "feed")
        with Daemon(folder, broker, symbols=[PROBE]) as daemon:
            sent = 0
            for n in range(rounds):
                tell(f"{symbols:,} symbols, {n * LENGTH} bars of each")
                closes = minutes(FIRST + n * LENGTH * MINUTE, LENGTH)
                every = list(bars(walk(symbols, LENGTH, seed=n), closes))
                arrays = packets((every[s::symbols] for s in range(symbols)), "1m")
                for start in range(0, len(arrays), AT_ONCE):
                    publisher.send_all(arrays[start : start + AT_ONCE])
                    sent += min(AT_ONCE, len(arrays) - start)
                    while daemon.records() < sent:
                        time.sleep(PULSE_SECONDS)
            daemon.settle()
            return memory(daemon.pid)
