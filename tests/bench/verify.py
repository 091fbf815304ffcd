"""What a verification costs: a process that computes a journal again, and compares it with its outbox.

The journal is made without a broker, by the path itself; its figures are those of the process alone. Two
journals, one four times as long, show whether its memory grows with the journal.
"""

import json
import os
import sys
import time
from collections.abc import Callable
from contextlib import closing, suppress
from pathlib import Path

from barcast.backtest.replay import Recording, replay
from barcast.daemon import wire
from barcast.daemon.events import Champion, Warmth
from barcast.daemon.journal import Journal, Kind, Progress
from barcast.daemon.pipeline import Pipeline, Settings
from barcast.daemon.ports import Activation, Arrival, Event, Outcome, Revision, Warmup
from barcast.models import open_model
from tests.bench.report import Row, Section
from tests.bench.rig import bars, memory, minutes, name, walk

SYMBOLS = 1000
CLOSES = (360, 1440)
WARM = 520
"""Bars of each symbol in the windows before."""
FIRST = 1_750_032_000 * 10**9
SECOND = 10**9
PART_BARS = 10_000
PULSE_SECONDS = 0.1


class Outbox(Recording):
    """A sink that puts messages into a journal's outbox."""

    def __init__(self, journal: Journal) -> None:
        super().__init__()
        self._journal = journal

    async def emit(self, outcome: Outcome) -> None:
        """Write the outcome's messages."""
        self._journal.append([], list(wire.messages(outcome)))


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """CPU time and memory of a verification of historical simulation on one-minute bars."""
    section = Section(
        "verify",
        f"Verification of {SYMBOLS:,} symbols, hs, one-minute bars",
        {
            "signals": ("signals", ","),
            "journal_mb": ("MB of journal", ",.0f"),
            "cpu_s": ("CPU s", ",.0f"),
            "peak_mb": ("MB at most", ",.0f"),
            "us_per_signal": ("µs a signal", ",.0f"),
        },
    )
    for closes in CLOSES:
        state = folder / str(closes)
        state.mkdir()
        tell(f"{closes} closes, recording")
        _record(state / "journal.db", closes)
        tell(f"{closes} closes, verifying")
        section.rows.append(Row(f"{closes:,} closes", _verified(state / "journal.db", SYMBOLS * closes)))
    return section


def _record(file: Path, closes: int) -> None:
    """A journal and its outbox, as a daemon leaves them."""
    model = open_model("hs", "1m", None, None)
    names = [name(symbol) for symbol in range(SYMBOLS)]
    settings = Settings(
        root="bench",
        timeframe="1m",
        calendar="24x7",
        symbols=tuple(names),
        max_wait=SECOND,
        sampler=None,
        steps=None,
        strategies=(),
    )
    champion = Champion("hs", model.card.fingerprint, model.card.window, "bench")
    every = list(bars(walk(SYMBOLS, WARM + closes), minutes(FIRST, WARM + closes)))
    warm, live = every[: WARM * SYMBOLS], every[WARM * SYMBOLS :]
    events: list[Event] = [
        Revision(FIRST, settings.encode()),
        Activation(FIRST, "hs", champion.fingerprint, champion.window),
    ]
    with closing(Journal(file)) as journal:
        journal._db.execute("PRAGMA synchronous = OFF")
        journal.append(
            [(FIRST, Kind.REVISION, "", settings.encode()), (FIRST, Kind.ACTIVATION, "", champion.encode())]
        )
        for start in range(0, len(warm), PART_BARS):
            part = tuple(warm[start : start + PART_BARS])
            journal.append([(FIRST, Kind.WARMUP, "", Warmth("", champion.window, part).encode())])
            events.append(Warmup(FIRST, "", part))
        last = 0
        for start in range(0, len(live), SYMBOLS):
            together = live[start : start + SYMBOLS]
            came = together[0].close_time + SECOND
            [last] = journal.append([(came, Kind.BARS, "bench/bars/1m", wire.encode_bars(together))])
            events.append(Arrival(came, tuple(together)))
        replay(events, Pipeline(lambda *_: model), Outbox(journal))
        journal.settle(Progress(last, events[-1].time), [])


def _verified(file: Path, signals: int) -> dict[str, float]:
    """Let the command verify it in a process of its own."""
    command = [sys.executable, "-m", "barcast.backtest.cli", "verify", str(file), "--json"]
    answer = file.with_name("report.json")
    with answer.open("wb") as out:
        began = time.monotonic()
        pid = os.posix_spawn(
            sys.executable, command, os.environ, file_actions=[(os.POSIX_SPAWN_DUP2, out.fileno(), 1)]
        )
        most = 0.0
        while not (ended := os.wait4(pid, os.WNOHANG))[0]:
            with suppress(KeyError):  # a process that ends has no memory any more
                most = memory(pid)["peak_mb"]  # not what wait4 says, which begins with that of the parent
            time.sleep(PULSE_SECONDS)
        _, status, usage = ended
        wall = time.monotonic() - began
    report = json.loads(answer.read_bytes())
    if status or report["signals"] != signals or not report["agrees"]:
        raise RuntimeError(f"exit status {status}, {report['signals']} of {signals} signals: it differs")
    cpu = usage.ru_utime + usage.ru_stime
    return {
        "signals": signals,
        "journal_mb": file.stat().st_size / 1e6,
        "cpu_s": cpu,
        "wall_s": wall,
        "peak_mb": most,
        "us_per_signal": 1e6 * cpu / signals,
    }
