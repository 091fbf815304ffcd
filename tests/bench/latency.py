"""From a bar's PUBLISH to its signal at a subscriber, through a real mosquitto and the real daemon.

All symbols of a close are published at once, one message a bar, when the daemon's clock shows it; the clock
runs fast, so that the next close comes soon after the signals. Beside it stands the broker alone: the same
packets on their way to a bare subscriber.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from barcast.backtest.sample import sample_checkpoint
from barcast.daemon.calendar import Calendar
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import to_text
from tests.bench.report import Row, Section, Target, quantiles
from tests.bench.rig import (
    MINUTE,
    NOW,
    PATIENCE_SECONDS,
    ROOT,
    Broker,
    Clock,
    Daemon,
    Raw,
    bars,
    cpu_seconds,
    memory,
    minutes,
    name,
    packets,
    publish_close,
    walk,
    write_history,
)

HISTORY = 750
"""Bars of each symbol before the first: more than any window here."""
WARM = 1
"""Closes before those that are measured: the first finds caches cold."""
DAY = 1440 * MINUTE
MONDAY = datetime(2012, 9, 10, 12, tzinfo=UTC)
"""Before the first session of the rehearsals; a week without a holiday follows."""
IDLE_SECONDS = 2.0
SETTLE_SECONDS = 0.05
GRACE_BARS = 2
"""How long signals are waited for: those that have not come by then have expired."""
LEAST_SHARE = 0.9
"""Of the signals that must come: a machine that stops for a moment may lose one, as time does not wait."""


@dataclass(frozen=True)
class Trial:
    """One model at one size: how many closes are measured, and how many real seconds a bar lasts.

    A signal expires after two bars: they must last long enough for it to come. With 0 the clock stands, at
    the first close that is measured: the one before is not stale yet and the one after not too early.
    """

    model: str
    symbols: int
    closes: int
    bar_seconds: float

    @property
    def what(self) -> str:
        """For people."""
        return f"{self.model}, {self.symbols:,} symbols"


TRIALS = (
    Trial("fhs", 5, 40, 0.5),
    Trial("fhs", 100, 20, 0.6),
    Trial("fhs", 1000, 5, 3.0),
    Trial("sssd", 5, 30, 0.5),
    Trial("sssd", 100, 4, 2.5),
    Trial("sssd", 1000, 2, 0),
)
"""Minutes for `fhs`; the shipped model takes the sessions of New York alone, five in seven days."""


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """Each trial has a broker and a daemon of its own."""
    section = Section(
        "latency",
        "From the PUBLISH of a close's last bar (own: of the symbol's own) to the signal at a subscriber; "
        "CPU a bar and signal",
        {
            "closes": ("closes", ","),
            "missing": ("missing", ","),
            "p50_ms": ("p50 ms", ",.1f"),
            "p95_ms": ("p95 ms", ",.1f"),
            "max_ms": ("max ms", ",.1f"),
            "own_p50_ms": ("own p50", ",.1f"),
            "own_p95_ms": ("own p95", ",.1f"),
            "cpu_us_per_signal": ("CPU µs", ",.0f"),
            "rss_mb": ("MB", ",.0f"),
        },
    )
    for trial in TRIALS:
        tell(trial.what)
        place = folder / f"{trial.model}-{trial.symbols}"
        lead = 7.0 + 0.012 * trial.symbols
        try:
            raw, alone = _trial(trial, place, lead)
        except _LateError:
            raw, alone = _trial(trial, place / "again", 3 * lead)
        reference = f"broker alone, {trial.symbols:,} symbols"
        if all(row.what != reference for row in section.rows):
            section.rows.append(Row(reference, alone))
        base = next(row for row in section.rows if row.what == reference)
        target = Target("p95_ms", 250, 100, most=True) if trial.symbols == 5 else None
        ratio = raw["p95_ms"] / base.raw["p95_ms"]
        section.rows.append(Row(trial.what, raw, ratio, base.what, target))
    return section


class _LateError(Exception):
    """The daemon was warm after its clock had begun to run: it needs a longer lead."""


def _trial(trial: Trial, folder: Path, lead: float) -> tuple[dict[str, Any], dict[str, Any]]:
    count = HISTORY + WARM + trial.closes
    values = walk(trial.symbols, count)
    if trial.model == "sssd":
        calendar, timeframe, bar, closes = "XNYS", "session", DAY, _sessions(count)
    else:
        calendar, timeframe, bar, closes = "24x7", "1m", MINUTE, minutes(NOW, count)
    due = [
        packets(([bar] for bar in bars(values[k : k + 1], closes[k : k + 1])), timeframe)
        for k in range(HISTORY, count)
    ]
    write_history(values[:HISTORY], closes[:HISTORY], folder / "state" / "history")
    with Broker(folder / "broker") as broker:
        publisher = Raw(broker.port, "feed")
        alone = _alone(publisher, broker, due)
        watcher = Raw(broker.port, "watch", subscribe=[f"{ROOT}/signals/#"])
        if trial.bar_seconds:
            clock = Clock(closes[HISTORY - 1], bar / 1e9 / trial.bar_seconds, lead)
        else:
            clock = Clock(closes[HISTORY + WARM], 0.0, lead)
        patience = GRACE_BARS * trial.bar_seconds or PATIENCE_SECONDS
        with Daemon(
            folder,
            broker,
            symbols=[name(s) for s in range(trial.symbols)],
            timeframe=timeframe,
            calendar=calendar,
            model=str(sample_checkpoint()) if trial.model == "sssd" else trial.model,
            max_wait="1d" if trial.model == "sssd" else "1m",
            clock=clock.table(),
        ) as daemon:
            daemon.settle()
            if clock.late:
                raise _LateError(f"{trial.what}: its clock runs already")
            last, own = [], []
            for k, some in enumerate(due):
                clock.wait(closes[HISTORY + k])
                if k == WARM:
                    began, cpu, size = time.monotonic(), cpu_seconds(daemon.pid), daemon.journal_bytes()
                mark = f'"close_time":"{to_text(closes[HISTORY + k])}"'.encode()
                sent, arrived = publish_close(publisher, watcher, some, mark, patience)
                if k >= WARM:
                    last += [at - sent[-1] for at in arrived.values()]
                    own += [at - sent[symbol] for symbol, at in arrived.items()]
            time.sleep(SETTLE_SECONDS)
            signals, size = trial.closes * trial.symbols, daemon.journal_bytes() - size
            wall, spent = time.monotonic() - began, cpu_seconds(daemon.pid) - cpu
            if len(last) < LEAST_SHARE * signals:
                raise RuntimeError(f"{trial.what}: {len(last)} signals came of {signals}")
            idle = _idle(daemon)
            spent -= idle * wall
            raw = {
                "model": trial.model,
                "symbols": trial.symbols,
                "closes": trial.closes,
                "signals": len(last),
                "missing": signals - len(last),
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


def _alone(publisher: Raw, broker: Broker, due: Sequence[Sequence[bytes]]) -> dict[str, Any]:
    """The same packets, from one socket to another by way of the broker."""
    watcher = Raw(broker.port, "alone", subscribe=[f"{ROOT}/bars/#"])
    last, own = [], []
    for some in due:
        sent: list[float] = []
        arrived: list[float] = []
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
