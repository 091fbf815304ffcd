"""A thousand active symbols among ten thousand announced, for ten minutes of a clock that runs faster.

The bars of a close are published at once, one message each; the group waits `max_wait` for the symbols that
never come, then the active ones are forecast together. In the last trial the clock runs faster than the
forecasts: what would come too late is shed, the oldest first.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from barcast.daemon.wire import to_ns
from tests.bench.latency import HISTORY, SETTLE_SECONDS, Clock
from tests.bench.report import Row, Section, Target, quantiles
from tests.bench.rig import (
    MINUTE,
    NOW,
    ROOT,
    Broker,
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
GROWTH = 0.03
"""The share by which memory may grow from the third minute to the last: the journal's pages, and chance."""
LEARNT_SYMBOLS, LEARNT_STEPS = 8, 60


@dataclass(frozen=True)
class Trial:
    """One model, and how many real seconds a bar lasts."""

    what: str
    model: str
    bar_seconds: float


TRIALS = (
    Trial("hs", "hs", 6.0),
    Trial("default model", "sssd", 20.0),
    Trial("default model, clock too fast", "sssd", 4.0),
)


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """Each trial has a broker and a daemon of its own."""
    section = Section(
        "scale",
        f"{ACTIVE:,} active of {ANNOUNCED:,} announced symbols, {CLOSES} one-minute bars; from the PUBLISH "
        f"of a close's last bar to a signal, of which {WAIT_SECONDS * 1e3:.0f} ms wait for the others",
        {
            "bar_seconds": ("s a bar", ",.0f"),
            "signals": ("signals", ","),
            "late": ("too late", ","),
            "groups_shed": ("groups shed", ","),
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
    model = _learnt(folder / "learnt", tell)
    for trial in TRIALS:
        tell(trial.what)
        place = folder / trial.what.replace(" ", "-")
        write_history(values[:HISTORY], closes[:HISTORY], place / "state" / "history")
        raw = _trial(trial, place, values, closes, str(model) if trial.model == "sssd" else trial.model)
        section.rows.append(Row(trial.what, raw, target=Target("growth", GROWTH, most=True)))
    return section


def _learnt(folder: Path, tell: Callable[[str], None]) -> Path:
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


def _trial(trial: Trial, folder: Path, values: Any, closes: list[int], model: str) -> dict[str, Any]:
    due = [
        packets(([bar] for bar in bars(values[k : k + 1], closes[k : k + 1])), "1m")
        for k in range(HISTORY, len(values))
    ]
    with Broker(folder / "broker") as broker:
        publisher = Raw(broker.port, "feed")
        watcher = Raw(broker.port, "watch", subscribe=[f"{ROOT}/signals/#", f"{ROOT}/groups/#"])
        clock = Clock(closes[HISTORY - 1], 60 / trial.bar_seconds, LEAD_SECONDS)
        with Daemon(
            folder,
            broker,
            symbols=[name(s) for s in range(ANNOUNCED)],
            model=model,
            max_wait=f"{round(WAIT_SECONDS * 60 / trial.bar_seconds)}s",
            clock=clock.table(),
        ) as daemon:
            daemon.settle()
            if clock.late:
                raise RuntimeError(f"{trial.what}: it was ready after its clock had begun to run")
            sent: dict[int, float] = {}
            took: list[float] = []
            counts = {"signals": 0, "late": 0, "groups_shed": 0}
            sizes: list[float] = []
            for k, some in enumerate(due):
                clock.wait(closes[HISTORY + k])
                publisher.send_all(some, len(some))
                sent[closes[HISTORY + k]] = time.time()
                if k >= WARM - 1:
                    sizes.append(memory(daemon.pid)["rss_mb"])
                grace = 2 if k == len(due) - 1 else 1
                until = closes[HISTORY + k] + grace * MINUTE
                while (left := clock.real(until) - time.time()) > 0:
                    for message in watcher.receive(left):
                        _note(message, clock, sent, took, counts)
            time.sleep(SETTLE_SECONDS)
            sizes.append(memory(daemon.pid)["rss_mb"])
    command = [sys.executable, "-m", "barcast.backtest.cli", "verify", str(daemon.config), "--json"]
    checked = subprocess.run(command, capture_output=True, text=True, check=False)
    return {
        "bar_seconds": trial.bar_seconds,
        **counts,
        **(quantiles(took) if took else {}),  # a machine that is far too slow tells nothing in time
        "rss_mb": sizes[-1],
        "growth": max(sizes[1:]) / sizes[0] - 1,
        "differing": json.loads(checked.stdout)["differing"],
    }


def _note(
    message: Received, clock: Clock, sent: dict[int, float], took: list[float], counts: dict[str, int]
) -> None:
    """Count a signal and how long it took, or a group that was shed."""
    body = json.loads(message.payload)
    if "/groups/" in message.topic:
        counts["groups_shed"] += body.get("shed", False)
        return
    at = time.time() - (time.monotonic() - message.at)
    close = to_ns(datetime.fromisoformat(body["close_time"]))
    counts["signals"] += 1
    counts["late"] += at > clock.real(close + 2 * MINUTE)
    took.append(at - sent[close])
