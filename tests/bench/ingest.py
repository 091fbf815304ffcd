"""Bars from a real mosquitto into the journal, beside a bare aiomqtt subscriber of the same messages.

The consumer is stopped (SIGSTOP) while the broker is filled, and the clock starts when it goes on: what is
measured is how fast the consumer drains a queue that is there. The bars are old, so that none is forecast.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from barcast.models import Bar
from tests.bench.report import Row, Section, Target
from tests.bench.rig import (
    MINUTE,
    PATIENCE_SECONDS,
    PROBE,
    ROOT,
    Broker,
    Daemon,
    Raw,
    bars,
    cpu_seconds,
    minutes,
    packets,
    walk,
)

SYMBOLS = 100
SINGLES = 20_000
ARRAYS, LENGTH = 2_000, 200
FIRST = 26_000_000 * MINUTE
"""The close of the first bar, in 2019: on arrival its signal has expired."""


def measure(tell: Callable[[str], None], folder: Path) -> Section:
    """Both consumers take the singles, then the arrays; each has a broker of its own."""
    section = Section(
        "ingest",
        "Ingest from mosquitto, QoS 1: until all is journalled, acknowledged and in the windows",
        {
            "messages": ("messages", ","),
            "messages_per_second": ("messages/s", ",.0f"),
            "bars_per_second": ("bars/s", ",.0f"),
            "cpu_us_per_message": ("CPU µs each", ",.1f"),
            "cpu_us_per_bar": ("µs a bar", ",.2f"),
            "disk_bytes_per_bar": ("disk B a bar", ",.0f"),
        },
    )
    tell("encoding the bars")
    loads = {
        "single bars": (packets(_singles(), "1m"), 1, Target("messages_per_second", 2_000)),
        f"arrays of {LENGTH} bars": (packets(_arrays(), "1m"), LENGTH, Target("bars_per_second", 2e5, 3e5)),
    }
    tell("bare aiomqtt")
    with Broker(folder / "bare") as broker, _bare(broker, [len(p) for p, *_ in loads.values()]) as process:
        publisher = Raw(broker.port, "feed")
        for what, (messages, length, _) in loads.items():
            tell(f"bare aiomqtt, {what}")
            began, cpu = _fill(process.pid, publisher, messages)
            stamp, _ = _line(process).split()
            raw = _raw(len(messages), length, float(stamp) - began, cpu_seconds(process.pid) - cpu)
            section.rows.append(Row(f"bare aiomqtt, {what}", raw))
    tell("daemon")
    with Broker(folder / "daemon") as broker:
        watcher = Raw(broker.port, "watch", subscribe=[f"{ROOT}/groups/#"])
        publisher = Raw(broker.port, "feed")
        with Daemon(folder / "daemon", broker, symbols=[PROBE]) as daemon:
            await_answer(daemon, publisher, watcher)
            for (what, (messages, length, target)), bare in zip(loads.items(), section.rows[:2], strict=True):
                tell(f"daemon, {what}")
                records, size = daemon.records(), daemon.journal_bytes()
                began, cpu = _fill(daemon.pid, publisher, [*messages, daemon.probe()])
                ended = answer(watcher)
                raw = _raw(len(messages), length, ended - began, cpu_seconds(daemon.pid) - cpu)
                raw["disk_bytes_per_bar"] = (daemon.journal_bytes() - size) / (len(messages) * length)
                if (found := daemon.records() - records) != len(messages) + 1:
                    raise RuntimeError(f"{found} records in the journal of {len(messages) + 1} messages")
                ratio = raw["bars_per_second"] / bare.raw["bars_per_second"]
                section.rows.append(Row(f"daemon, {what}", raw, ratio, bare.what, target))
        again = Raw(broker.port, Daemon.CLIENT, resume=True)
        if resent := again.receive(0.5):
            raise RuntimeError(f"the broker still had {len(resent)} messages that were not acknowledged")
    return section


def await_answer(daemon: Daemon, publisher: Raw, watcher: Raw) -> float:
    """Probe the daemon; return when its answer came."""
    publisher.send_all([daemon.probe()])
    return answer(watcher)


def answer(watcher: Raw) -> float:
    """When the group message came that answers a probe."""
    until = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < until:
        if found := watcher.receive(1.0):
            return found[-1].at
    raise TimeoutError("the daemon does not answer")


def _fill(pid: int, publisher: Raw, messages: Sequence[bytes]) -> tuple[float, float]:
    """Let the broker queue messages for a consumer that stands still; return when it goes on, and its CPU."""
    os.kill(pid, signal.SIGSTOP)
    try:
        publisher.send_all(messages)
        cpu = cpu_seconds(pid)
    finally:
        began = time.monotonic()
        os.kill(pid, signal.SIGCONT)
    return began, cpu


@contextmanager
def _bare(broker: Broker, counts: list[int]) -> Iterator["subprocess.Popen[bytes]"]:
    command = [sys.executable, "-m", "tests.bench.bare", str(broker.port), *map(str, counts)]
    process = subprocess.Popen(command, stdout=subprocess.PIPE)
    try:
        _line(process)
        yield process
    finally:
        process.kill()
        process.wait()


def _line(process: "subprocess.Popen[bytes]") -> str:
    assert process.stdout is not None
    if line := process.stdout.readline():
        return line.decode().strip()
    raise RuntimeError("the bare subscriber ended")


def _raw(messages: int, length: int, seconds: float, cpu: float) -> dict[str, float]:
    return {
        "messages": messages,
        "bars": messages * length,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "messages_per_second": messages / seconds,
        "bars_per_second": messages * length / seconds,
        "cpu_us_per_message": 1e6 * cpu / messages,
        "cpu_us_per_bar": 1e6 * cpu / (messages * length),
    }


def _singles() -> Iterator[list[Bar]]:
    count = SINGLES // SYMBOLS
    for bar in bars(walk(SYMBOLS, count), minutes(FIRST, count)):
        yield [bar]


def _arrays() -> Iterator[list[Bar]]:
    """Arrays of one symbol each, of bars after the singles."""
    rounds = ARRAYS // SYMBOLS
    begin = FIRST + SINGLES // SYMBOLS * MINUTE
    for n in range(rounds):
        values, closes = walk(SYMBOLS, LENGTH, seed=n), minutes(begin + n * LENGTH * MINUTE, LENGTH)
        every = list(bars(values, closes))
        for symbol in range(SYMBOLS):
            yield every[symbol::SYMBOLS]
