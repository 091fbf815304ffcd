"""`python -m tests.bench.page`: what the page costs who looks at it, and the daemon that it looks at.

A thousand symbols are forecast each second, by `hs`. Once nobody looks, then ten programs read the events,
then a browser shows the market. It prints one table, writes page.json, and ends with 1 when an aim is missed.
"""

import argparse
import json
import multiprocessing
import re
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, sync_playwright
from rich.console import Console

from tests.backtest.browser import find_chromium
from tests.bench.latency import HISTORY
from tests.bench.report import Row, Section, Target, machine, quantiles, sentence
from tests.bench.rig import (
    NOW,
    Broker,
    Clock,
    Daemon,
    Raw,
    bars,
    memory,
    minutes,
    name,
    packets,
    walk,
    write_history,
)
from tests.integration.broker import executable, free_port

SYMBOLS, VIEWERS = 1000, 10
SPEED = 60.0
"""So that a bar of a minute closes each second."""
WARM_SECONDS = 5.0
"""How long bars come before anything is measured."""
SECONDS = 60.0
"""How long it is looked at the loop, without viewers and with them."""
BROWSED_SECONDS = 180.0
"""How long the page is looked at in a browser."""
LEAD_SECONDS = 45.0
"""How long the daemon may take to start, until its clock runs."""
UPDATE_MS, PAGE_MB, GROWTH_MS = 200.0, 300.0, 10.0
"""The aims: from an event to the drawn frame (95 %), the renderer's memory, how much later the loop wakes."""
PATIENCE_MS = 60_000
RESULT = Path("page.json")
WIDTH = 150
"""Columns where there is no terminal to ask."""
TIMED = """
window.took = [];
window.longest = 0;
const plain = EventSource.prototype.addEventListener;
EventSource.prototype.addEventListener = function (name, take, ...rest) {
  const timed = (event) => {
    const began = performance.now();
    take(event);
    requestAnimationFrame(() => {
      const { port1, port2 } = new MessageChannel();
      port1.onmessage = () => window.took.push(performance.now() - began);
      port2.postMessage(0);
    });
  };
  return plain.call(this, name, name === "group" ? timed : take, ...rest);
};
new PerformanceObserver((list) => {
  for (const { duration } of list.getEntries()) window.longest = Math.max(window.longest, duration);
}).observe({ type: "longtask" });
"""
"""Notes for each group how long it took from its event until the frame with it was drawn.

What is posted in the callback of a frame comes after style, layout and paint of that frame."""
BUCKET = re.compile(r'^barcast_loop_lag_seconds_bucket\{le="([^"]+)"\} (\S+)$', re.MULTILINE)


def measure(seconds: float, browsed: float, folder: Path) -> Section:
    """All of it with one broker and one daemon."""
    section = Section(
        "page",
        f"the page, {SYMBOLS:,} symbols, a bar of each every second, hs",
        {
            "updates": ("updates", ","),
            "p50_ms": ("p50 ms", ",.0f"),
            "p95_ms": ("p95 ms", ",.0f"),
            "max_ms": ("max ms", ",.0f"),
            "longest_ms": ("longest task ms", ",.0f"),
            "heap_mb": ("JS heap MB", ",.0f"),
            "rss_mb": ("renderer MB", ",.0f"),
            "lag_p99_ms": ("loop lag p99 ms", ",.1f"),
            "growth_ms": ("growth ms", ",.1f"),
        },
    )
    count = round(LEAD_SECONDS + WARM_SECONDS + 2 * seconds + browsed)
    values = walk(SYMBOLS, HISTORY + count)
    closes = minutes(NOW, len(values))
    write_history(values[:HISTORY], closes[:HISTORY], folder / "state" / "history")
    port, clock = free_port(), Clock(closes[HISTORY - 1], SPEED, LEAD_SECONDS)
    with Broker(folder / "broker") as broker:
        publisher = Raw(broker.port, "feed")
        symbols = [name(s) for s in range(SYMBOLS)]
        table = f"{clock.table()}[http]\nport = {port}\n"
        with Daemon(folder, broker, symbols=symbols, model="hs", clock=table) as daemon:
            daemon.settle()
            if clock.late:
                raise RuntimeError("it was ready after its clock had begun to run: the machine is too busy")
            with _fed(publisher, clock, values[HISTORY:], closes[HISTORY:]):
                clock.wait(closes[HISTORY])
                time.sleep(WARM_SECONDS)
                alone = _lag(port, seconds)
                section.rows.append(Row("event loop, nobody looks", {"lag_p99_ms": alone}))
                with _readers(port):
                    crowd = _lag(port, seconds)
                raw = {"lag_p99_ms": crowd, "growth_ms": crowd - alone}
                target = Target("growth_ms", GROWTH_MS, most=True)
                section.rows.append(Row(f"event loop, {VIEWERS} viewers", raw, target=target))
                took, room = _browsed(port, browsed)
        publisher.close()
    update = Target("p95_ms", UPDATE_MS, most=True)
    section.rows.append(Row("event to drawn frame", took, target=update))
    section.rows.append(Row("memory of the page", room, target=Target("rss_mb", PAGE_MB, most=True)))
    return section


@contextmanager
def _fed(publisher: Raw, clock: Clock, values: Any, closes: list[int]) -> Iterator[None]:
    """Publish each close when the clock comes to it, as long as the body runs."""
    ended = threading.Event()

    def feed() -> None:
        for k, close in enumerate(closes):
            some = packets(([bar] for bar in bars(values[k : k + 1], [close])), "1m")
            clock.wait(close)
            if ended.is_set():
                return
            publisher.send_all(some, len(some))

    thread = threading.Thread(target=feed, name="feed", daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def _lag(port: int, seconds: float) -> float:
    """The 99 % quantile of the loop's lag in this span in ms, linear within the buckets of the metric."""
    before = _counted(port)
    time.sleep(seconds)
    counts = {bound: count - before[bound] for bound, count in _counted(port).items()}
    return quantile(counts, 0.99) * 1e3


def _counted(port: int) -> dict[float, float]:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
        return {float(bound): float(count) for bound, count in BUCKET.findall(answer.read().decode())}


def quantile(counts: dict[float, float], share: float) -> float:
    """A quantile of a histogram whose counts are of values up to each bound; linear between two bounds."""
    wanted, low, below = share * counts[float("inf")], 0.0, 0.0
    for bound, count in sorted(counts.items()):
        if count >= wanted:
            return low if bound == float("inf") else low + (bound - low) * (wanted - below) / (count - below)
        low, below = bound, count
    raise ValueError("a histogram counts all values as at most infinite")


@contextmanager
def _readers(port: int) -> Iterator[None]:
    """Programs that read the events, all in one process of their own."""
    process = multiprocessing.get_context("spawn").Process(target=_read, args=(port,), daemon=True)
    process.start()
    try:
        yield
        if not process.is_alive():
            raise RuntimeError("a reader of the events was sent away")
    finally:
        process.terminate()
        process.join()


def _read(port: int) -> None:
    def one() -> None:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/events", timeout=60) as events:
            while events.read1(1 << 16):
                pass

    threads = [threading.Thread(target=one, daemon=True) for _ in range(VIEWERS)]
    for thread in threads:
        thread.start()
    while all(thread.is_alive() for thread in threads):
        time.sleep(0.2)


def _browsed(port: int, seconds: float) -> tuple[dict[str, float], dict[str, float]]:
    """How long updates took in a browser, and what memory its page took in the end."""
    with sync_playwright() as playwright:
        options = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
        browser = playwright.chromium.launch(executable_path=find_chromium(), args=options)
        tab = browser.new_page(viewport={"width": 1280, "height": 900})
        tab.add_init_script(TIMED)
        tab.goto(f"http://127.0.0.1:{port}/")
        tab.wait_for_function("() => window.took.length > 0", timeout=PATIENCE_MS)
        tab.evaluate("window.took.length = window.longest = 0")
        tab.wait_for_timeout(1e3 * seconds)
        took = [ms / 1e3 for ms in tab.evaluate("window.took")]
        longest = float(tab.evaluate("window.longest"))
        session = tab.context.new_cdp_session(tab)
        session.send("Performance.enable")
        found = {one["name"]: one["value"] for one in session.send("Performance.getMetrics")["metrics"]}
        room = {"heap_mb": found["JSHeapUsedSize"] / 1e6, "rss_mb": _renderer_mb(browser)}
        browser.close()
    return {"updates": len(took), **quantiles(took), "longest_ms": longest}, room


def _renderer_mb(browser: Browser) -> float:
    """What the greatest renderer takes: the others are spare ones."""
    processes = browser.new_browser_cdp_session().send("SystemInfo.getProcessInfo")["processInfo"]
    return max(memory(one["id"])["rss_mb"] for one in processes if one["type"] == "renderer")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(prog="python -m tests.bench.page", description=__doc__)
    parser.add_argument("--seconds", type=float, default=SECONDS, help="without viewers, and with them")
    parser.add_argument("--browsed", type=float, default=BROWSED_SECONDS, help="seconds in a browser")
    given = parser.parse_args()
    if executable() is None or find_chromium() is None:
        parser.error("mosquitto or Chromium is missing: .ci/tools installs them")
    out, facts = Console(), machine()
    if not out.is_terminal:
        out = Console(width=WIDTH)
    out.print(sentence(facts))
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="barcast-bench-") as folder:
        section = measure(given.seconds, given.browsed, Path(folder))
    section.seconds = time.monotonic() - began
    RESULT.write_text(json.dumps({"machine": facts, "sections": {section.name: section.plain()}}, indent=1))
    out.print(section.table())
    out.print(f"{section.seconds:.0f} s; every number is in {RESULT}")
    sys.exit(any(row.verdict() == "no" for row in section.rows))


if __name__ == "__main__":
    main()
