"""From a bar's PUBLISH to its signal at a subscriber, through a real mosquitto and the real daemon.

All symbols of a close are published at once, one message a bar; the next close follows when all signals
are there. Beside it stands the broker alone: the same packets on their way to a bare subscriber.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from barcast.backtest.sample import sample_checkpoint
from barcast.daemon.calendar import Calendar
from barcast.daemon.timeframe import Timeframe
from tests.bench.report import Row, Section, Target, quantiles
from tests.bench.rig import (
    MINUTE,
    PATIENCE_SECONDS,
    ROOT,
    Broker,
    Daemon,
    Raw,
    bars,
    cpu_seconds,
    memory,
    name,
    packets,
    walk,
    write_history,
)

HISTORY = 750
"""Bars of each symbol before the first: more than any window here."""
WARM = 1
"""Closes before those that are measured: the first finds caches cold, and the warm-up under way."""
DAY = 86_400
MONDAY = datetime(2012, 9, 10, 12, tzinfo=UTC)
"""Before the first session of the rehearsals; a week without a holiday follows."""
IDLE_SECONDS = 2.0
SETTLE_SECONDS = 0.05


@dataclass(frozen=True)
class Trial:
    """One model at one size: how many closes are measured and, in a rehearsal, how long a day is."""

    model: str
    symbols: int
    closes: int
    day_seconds: float = 0.0

    @property
    def what(self) -> str:
        return f"{self.model}, {self.symbols:,} symbols"


TRIALS = (
    Trial("fhs", 5, 100),
    Trial("fhs", 100, 30),
    Trial("fhs", 1000, 6),
    Trial("sssd", 5, 40, 0.25),
    Trial("sssd", 100, 6, 1.5),
    Trial("sssd", 1000, 2, 7.0),
)
"""The shipped model takes daily bars alone. Its days must be long enough for a signal not to expire."""


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """Each trial has a broker and a daemon of its own."""
    section = Section(
        "latency",
        "From the PUBLISH of a close's last bar (own: of the symbol's own) to the signal at a subscriber; "
        "CPU a bar and signal",
        {
            "closes": ("closes", ","),
            "p50_ms": ("p50 ms", ",.1f"),
            "p95_ms": ("p95 ms", ",.1f"),
            "max_ms": ("max ms", ",.1f"),
            "own_p50_ms": ("own p50", ",.1f"),
            "own_p95_ms": ("own p95", ",.1f"),
            "own_max_ms": ("own max", ",.1f"),
            "cpu_us_per_signal": ("CPU µs", ",.0f"),
            "rss_mb": ("MB", ",.0f"),
        },
    )
    started: dict[int, float] = {}
    for trial in TRIALS:
        tell(trial.what)
        place = folder / f"{trial.model}-{trial.symbols}"
        lead = 3.0 + 2.0 * started.get(trial.symbols, 2.0)
        try:
            raw, alone = _trial(trial, place, lead)
        except _LateError:
            raw, alone = _trial(trial, place / "again", 3 * lead)
        started.setdefault(trial.symbols, raw["start_seconds"])
        reference = f"broker alone, {trial.symbols:,} symbols"
        if all(row.what != reference for row in section.rows):
            section.rows.append(Row(reference, alone))
        base = next(row for row in section.rows if row.what == reference)
        target = Target("p95_ms", 250, 100, most=True) if trial.symbols == 5 else None
        ratio = raw["p95_ms"] / base.raw["p95_ms"]
        section.rows.append(Row(trial.what, raw, ratio, base.what, target))
    return section


class _LateError(Exception):
    """The daemon was ready after its clock had begun to run: it needs a longer lead."""


def _trial(trial: Trial, folder: Path, lead: float) -> tuple[dict[str, Any], dict[str, Any]]:
    count = HISTORY + WARM + trial.closes
    values = walk(trial.symbols, count)
    if trial.model == "sssd":
        calendar, timeframe = "XNYS", "session"
        closes = _sessions(count)
    else:
        calendar, timeframe = "24x7", "1m"
        # They lie ahead of the clock, as those of a feed that is early: nothing expires meanwhile.
        now = time.time_ns() // MINUTE
        closes = [(now + k - HISTORY) * MINUTE for k in range(count)]
    due = [
        packets(([bar] for bar in bars(values[k : k + 1], closes[k : k + 1])), timeframe)
        for k in range(HISTORY, count)
    ]
    write_history(values[:HISTORY], closes[:HISTORY], folder / "state" / "history")
    with Broker(folder / "broker") as broker:
        publisher = Raw(broker.port, "feed")
        alone = _alone(publisher, broker, due)
        watcher = Raw(broker.port, "watch", subscribe=[f"{ROOT}/signals/#"])
        clock = _Clock(closes[HISTORY - 1], trial.day_seconds, lead)
        with Daemon(
            folder,
            broker,
            symbols=[name(s) for s in range(trial.symbols)],
            timeframe=timeframe,
            calendar=calendar,
            model=str(sample_checkpoint()) if trial.model == "sssd" else trial.model,
            max_wait="2d" if trial.model == "sssd" else "60s",
            rehearsal=clock.table(),
        ) as daemon:
            if clock.late(closes[HISTORY]):
                raise _LateError(
                    f"{trial.what}: ready only after {daemon.started_in:.0f} s, its clock runs already"
                )
            last, own = [], []
            for k, some in enumerate(due):
                clock.wait(closes[HISTORY + k])
                if k == WARM:
                    began, cpu, size = time.monotonic(), cpu_seconds(daemon.pid), daemon.journal_bytes()
                sent, arrived = _group(publisher, watcher, some)
                if k >= WARM:
                    last += [at - sent[-1] for at in arrived]
                    own += [at - mine for at, mine in zip(arrived, sent, strict=True)]
                time.sleep(SETTLE_SECONDS)
            signals, size = trial.closes * trial.symbols, daemon.journal_bytes() - size
            wall, spent = time.monotonic() - began, cpu_seconds(daemon.pid) - cpu
            idle = _idle(daemon)
            spent -= idle * wall
            raw = {
                "model": trial.model,
                "symbols": trial.symbols,
                "closes": trial.closes,
                "signals": signals,
                **quantiles(last),
                **quantiles(own, "own_"),
                "cpu_seconds": spent,
                "cpu_us_per_signal": 1e6 * spent / signals,
                "idle_share": idle,
                "start_seconds": daemon.started_in,
                "disk_bytes_per_signal": size / signals,
                **memory(daemon.pid),
            }
    return raw, alone


class _Clock:
    """The clock of a rehearsal, whose days last `day_seconds`; with 0 it is the real one."""

    def __init__(self, start: int, day_seconds: float, lead: float) -> None:
        self.start, self.speed = start, DAY / day_seconds if day_seconds else 0.0
        self.at = datetime.now(UTC) + timedelta(seconds=lead)

    def table(self) -> str:
        """As the configuration says it."""
        if not self.speed:
            return ""
        start = datetime.fromtimestamp(self.start // 10**9, UTC)
        return (
            f"[rehearsal]\nstart = {start.isoformat()}\nat = {self.at.isoformat()}\nspeed = {self.speed:f}\n"
        )

    def wait(self, moment: int) -> None:
        """Until the clock shows `moment`."""
        if self.speed:
            real = self.at.timestamp() + (moment - self.start) / 1e9 / self.speed
            time.sleep(max(0.0, real - time.time()))

    def late(self, moment: int) -> bool:
        """Whether the clock has passed `moment` already."""
        real = self.at.timestamp() + (moment - self.start) / 1e9 / self.speed if self.speed else time.time()
        return time.time() > real + 0.5


def _group(publisher: Raw, watcher: Raw, some: Sequence[bytes]) -> tuple[list[float], list[float]]:
    """Publish the bars of a close; return when each was sent and when its signal came."""
    sent = []
    for one in some:
        sent.append(time.monotonic())
        publisher.send(one)
    arrived: dict[str, float] = {}
    until = time.monotonic() + PATIENCE_SECONDS
    while len(arrived) < len(some):
        for message in watcher.receive(1.0):
            arrived[message.topic.rpartition("/")[2]] = message.at
        if time.monotonic() > until:
            raise TimeoutError(f"{len(arrived)} signals came of {len(some)} bars")
    publisher.confirm(len(some))
    return sent, [arrived[name(s)] for s in range(len(some))]


def _alone(publisher: Raw, broker: Broker, due: Sequence[Sequence[bytes]]) -> dict[str, Any]:
    """The same packets, from one socket to another by way of the broker."""
    watcher = Raw(broker.port, "alone", subscribe=[f"{ROOT}/bars/#"])
    last, own = [], []
    for some in due:
        sent, arrived = [], []
        for one in some:
            sent.append(time.monotonic())
            publisher.send(one)
        while len(arrived) < len(some):
            arrived += [message.at for message in watcher.receive(1.0)]
        publisher.confirm(len(some))
        last += [at - sent[-1] for at in arrived]
        own += [at - mine for at, mine in zip(arrived, sent, strict=True)]
    watcher.close()
    return {"symbols": len(due[0]), "closes": len(due), **quantiles(last), **quantiles(own, "own_")}


def _idle(daemon: Daemon) -> float:
    """The share of a core that the daemon takes while nothing comes."""
    cpu = cpu_seconds(daemon.pid)
    time.sleep(IDLE_SECONDS)
    return (cpu_seconds(daemon.pid) - cpu) / IDLE_SECONDS


def _sessions(count: int) -> list[int]:
    """Closes of New York, of which the last of the history is that of a Monday."""
    calendar = Calendar("XNYS", Timeframe.parse("session"))
    first = int(datetime(2009, 1, 1, tzinfo=UTC).timestamp()) * 10**9
    closes = calendar.closes_after(first, 2 * count)
    at = next(k for k, close in enumerate(closes) if close > int(MONDAY.timestamp()) * 10**9)
    return list(closes[at + 1 - HISTORY :][:count])
