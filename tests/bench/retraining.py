"""What a training does to the daemon beside it: the event loop's lag, and signals that come late or never.

Minute bars pass a second each, of symbols that come all at once; a challenger is trained and judged meanwhile
at the operator's word, as a child of the daemon. The quiet row is the same without a training.
"""

import json
import threading
import time
from collections.abc import Callable
from pathlib import Path

from barcast.daemon.control import Order, ask
from barcast.daemon.wire import to_text
from tests.bench.report import Row, Section, Target, quantiles
from tests.bench.rig import (
    NOW,
    ROOT,
    Broker,
    Clock,
    Daemon,
    Raw,
    bars,
    minutes,
    name,
    packets,
    publish_close,
    walk,
    write_history,
)

SYMBOLS = 20
HISTORY = 5000
QUIET = 20
"""Closes without a training."""
CLOSES = 600
"""Closes at most: a training that takes longer is not measured to its end."""
BAR_SECONDS = 1.0
LEAD_SECONDS = 15.0


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """One daemon: a quiet time, then a training until it is judged."""
    section = Section(
        "retraining",
        "While a challenger is trained and judged: the event loop's lag, bars without all their signals",
        {
            "seconds": ("seconds", ",.0f"),
            "closes": ("closes", ","),
            "missing": ("missing", ","),
            "lag_p99_ms": ("lag p99 ms", ",.1f"),
            "lag_max_ms": ("lag max ms", ",.1f"),
            "p50_ms": ("signal p50 ms", ",.1f"),
            "p95_ms": ("signal p95 ms", ",.1f"),
        },
    )
    count = HISTORY + CLOSES
    values, closes = walk(SYMBOLS, count), minutes(NOW, count)
    write_history(values[:HISTORY], closes[:HISTORY], folder / "state" / "history")
    with Broker(folder / "broker") as broker:
        publisher = Raw(broker.port, "feed")
        watcher = Raw(broker.port, "watch", subscribe=[f"{ROOT}/signals/#"])
        clock = Clock(closes[HISTORY - 1], 60.0 / BAR_SECONDS, LEAD_SECONDS)
        with Daemon(
            folder,
            broker,
            symbols=[name(s) for s in range(SYMBOLS)],
            timeframe="1m",
            calendar="24x7",
            model="fhs",
            max_wait="1m",
            clock=clock.table() + "\n[retrain]\nmargin = 0.9\n",
        ):
            tell("without a training")
            at = HISTORY

            def feed(going: Callable[[int], bool]) -> dict[str, float]:
                nonlocal at
                first, missing, took = at, 0, []
                while going(at - first) and at < count:
                    some = packets(([bar] for bar in bars(values[at : at + 1], closes[at : at + 1])), "1m")
                    clock.wait(closes[at])
                    mark = f'"close_time":"{to_text(closes[at])}"'.encode()
                    sent, arrived = publish_close(publisher, watcher, some, mark, 2 * BAR_SECONDS)
                    missing += len(some) - len(arrived)
                    took += [moment - sent[-1] for moment in arrived.values()]
                    at += 1
                return {"closes": at - first, "missing": missing, **quantiles(took)}

            feed(lambda done: done < 3)
            quiet = feed(lambda done: done < QUIET)
            tell("with a training")
            result: list[str | None] = []
            training = threading.Thread(
                target=lambda: result.append(ask(folder / "state", Order("retrain", wait=True), tell))
            )
            began = time.monotonic()
            training.start()
            busy = feed(lambda _done: training.is_alive())
            seconds = time.monotonic() - began
            training.join()
        lines = [json.loads(line) for line in (folder / "daemon.log").read_text().splitlines() if "{" in line]
    ended = next(line for line in lines if line["event"] == "retrain_ended")
    section.rows += [
        Row("quiet", {"seconds": QUIET * BAR_SECONDS, **quiet}),
        Row(
            f"a training, {SYMBOLS} symbols x {HISTORY:,} bars",
            {
                "seconds": seconds,
                "lag_p99_ms": ended["loop_lag_p99_ms"],
                "lag_max_ms": ended["loop_lag_max_ms"],
                "result": ended["result"],
                **busy,
            },
            busy["p95_ms"] / quiet["p95_ms"],
            "quiet",
            Target("lag_p99_ms", 100, 50, most=True),
        ),
    ]
    return section
