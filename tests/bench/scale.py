"""A thousand active symbols among ten thousand announced, for ten minutes of a clock that runs faster.

The bars of a close are published at once, one message each; the group waits `max_wait` for the symbols that
never come, then the active ones are forecast together. In the last trial a group takes longer than a
bar to forecast: what would come too late is shed, the oldest first.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from datetime import datetime
from pathlib import Path
from typing import Any

from barcast.daemon.journal import Kind
from barcast.daemon.wire import to_ns, to_text
from tests.bench.latency import HISTORY, SETTLE_SECONDS
from tests.bench.report import Row, Section, Target, quantiles
from tests.bench.rig import (
    MINUTE,
    NOW,
    ROOT,
    Broker,
    Clock,
    Daemon,
    Raw,
    Received,
    bars,
    memory,
    minutes,
    name,
    packets,
    walk,
    write_history,
)

ACTIVE, ANNOUNCED = 1000, 10_000
WARM, CLOSES = 3, 10
WAIT_SECONDS = 0.5
"""How long a group waits for the symbols that never come, in real seconds."""
LEAD_SECONDS = 90.0
GRACE_SECONDS = 20.0
"""How long the last group is waited for: where its signals have expired, nobody is told of it."""
GROWTH = 0.03
"""The share by which memory may grow from the third minute to the last: the journal's pages, and chance."""
LEARNT_SYMBOLS, LEARNT_STEPS = 8, 60
BAR_SECONDS = 10.0
OVERLOAD = 1.25
"""Bars that a group takes to forecast in the last trial: its signals are valid for two, minus the wait."""


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """Each trial has a broker and a daemon of its own."""
    section = Section(
        "scale",
        f"{ACTIVE:,} active of {ANNOUNCED:,} announced symbols, {CLOSES} one-minute bars; from the PUBLISH "
        f"of a close's last bar to a signal, of which {WAIT_SECONDS * 1e3:.0f} ms wait for the others",
        {
            "bar_seconds": ("s a bar", ",.2f"),
            "told": ("groups told", ","),
            "groups_shed": ("shed", ","),
            "signals": ("signals", ","),
            "late": ("too late", ","),
            "p50_ms": ("p50 ms", ",.0f"),
            "p95_ms": ("p95 ms", ",.0f"),
            "max_ms": ("max ms", ",.0f"),
            "rss_mb": ("MB", ",.0f"),
            "growth": ("growth", ".1%"),
            "differing": ("differ in a replay", ","),
        },
    )
    values = walk(ACTIVE, HISTORY + WARM + CLOSES)
    closes = minutes(NOW, len(values))
    model = learnt(folder / "learnt", tell)

    def trial(what: str, model: str, bar_seconds: float, target: Target) -> dict[str, Any]:
        tell(what)
        place = folder / what.replace(" ", "-")
        write_history(values[:HISTORY], closes[:HISTORY], place / "state" / "history")
        raw = _trial(what, model, bar_seconds, place, values, closes)
        section.rows.append(Row(what, raw, target=target))
        return raw

    flat = Target("growth", GROWTH, most=True)
    trial("hs", "hs", BAR_SECONDS, flat)
    whole = trial("default model", str(model), BAR_SECONDS, flat)
    took = whole["p50_ms"] / 1e3 - WAIT_SECONDS
    trial("default model, clock too fast", str(model), took / OVERLOAD, Target("groups_shed", 1))
    return section


def learnt(folder: Path, tell: Callable[[str], None]) -> Path:
    """A model of the default kind for one-minute bars; it has its size and speed, not its skill."""
    tell("a model for one-minute bars")
    write_history(walk(LEARNT_SYMBOLS, 4 * HISTORY, 7), minutes(NOW, 4 * HISTORY), folder)
    command = [sys.executable, "-m", "barcast.backtest.cli", "train", str(folder / "history.parquet")]
    options = ["--stamp", "close", "--timeframe", "1m", "--steps", str(LEARNT_STEPS)]
    done = subprocess.run(
        [*command, *options, "--out", str(folder / "model")], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"no model was learnt:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    return folder / "model"


def _trial(
    what: str, model: str, bar_seconds: float, folder: Path, values: Any, closes: list[int]
) -> dict[str, Any]:
    due = [
        packets(([bar] for bar in bars(values[k : k + 1], closes[k : k + 1])), "1m")
        for k in range(HISTORY, len(values))
    ]
    with Broker(folder / "broker") as broker:
        publisher = Raw(broker.port, "feed")
        watcher = Raw(broker.port, "watch", subscribe=[f"{ROOT}/signals/#", f"{ROOT}/groups/#"])
        clock = Clock(closes[HISTORY - 1], 60 / bar_seconds, LEAD_SECONDS)
        with Daemon(
            folder,
            broker,
            symbols=[name(s) for s in range(ANNOUNCED)],
            model=model,
            max_wait=f"{round(WAIT_SECONDS * 60 / bar_seconds)}s",
            clock=clock.table(),
        ) as daemon:
            daemon.settle()
            if clock.late:
                raise RuntimeError(f"{what}: it was ready after its clock had begun to run")
            sent: dict[int, float] = {}
            took: list[float] = []
            counts = {"told": 0, "signals": 0, "late": 0}
            last = f'"close_time":"{to_text(closes[-1])}"'.encode()
            sizes: list[float] = []
            for k, some in enumerate(due):
                clock.wait(closes[HISTORY + k])
                publisher.send_all(some, len(some))
                sent[closes[HISTORY + k]] = time.time()
                if k >= WARM - 1:
                    sizes.append(memory(daemon.pid)["rss_mb"])
                while (left := clock.real(closes[HISTORY + k] + MINUTE) - time.time()) > 0:
                    for message in watcher.receive(left):
                        _note(message, clock, sent, took, counts)
            end, ended = time.time() + GRACE_SECONDS, False
            while not ended and (left := end - time.time()) > 0:
                for message in watcher.receive(left):
                    _note(message, clock, sent, took, counts)
                    ended = "/groups/" in message.topic and last in message.payload
            time.sleep(SETTLE_SECONDS)
            shed = daemon.records(Kind.OVERLOAD)
            sizes.append(memory(daemon.pid)["rss_mb"])
    command = [sys.executable, "-m", "barcast.backtest.cli", "verify", str(daemon.config), "--json"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "bar_seconds": bar_seconds,
        **counts,
        "groups_shed": shed,
        **(quantiles(took) if took else {}),  # a machine that is far too slow tells nothing in time
        "rss_mb": sizes[-1],
        "growth": max(sizes[1:]) / sizes[0] - 1,
        "differing": json.loads(checked.stdout)["differing"],
    }


def _note(
    message: Received, clock: Clock, sent: dict[int, float], took: list[float], counts: dict[str, int]
) -> None:
    """Count a group, or a signal and how long it took."""
    body = json.loads(message.payload)
    if "/groups/" in message.topic:
        counts["told"] += 1
        return
    at = time.time() - (time.monotonic() - message.at)
    close = to_ns(datetime.fromisoformat(body["close_time"]))
    counts["signals"] += 1
    counts["late"] += at > clock.real(close + 2 * MINUTE)
    took.append(at - sent[close])
