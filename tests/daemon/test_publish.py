"""The feed from files: each bar when its close comes, and word of a long wait."""

import asyncio

from barcast.daemon import publish as module
from barcast.daemon.mqtt import Address
from barcast.models import Bar
from tests.fakes import MINUTE, START
from tests.rim import play

BARS = (("A", 1), ("B", 1), ("A", 2))
"""Symbol and minute of each."""


class Wire:
    """A link in memory that takes everything."""

    def __init__(self, *_):
        self.connected, self.topics = asyncio.Event(), []

    async def run(self, _on_connect):
        self.connected.set()
        await asyncio.Event().wait()

    async def publish(self, message, _now):
        self.topics.append(message.topic)


class Clock:
    """A clock on which each close is some real seconds away."""

    def __init__(self, *seconds):
        self._seconds = list(seconds)

    def now(self):
        return START

    def seconds_until(self, _moment):
        return self._seconds.pop(0)


def test_only_a_long_wait_is_told(monkeypatch):
    """Which close is waited for, and for how many real seconds; a short wait is not worth a word."""
    monkeypatch.setattr(module, "LONG_SECONDS", 0.005)
    wires = []
    monkeypatch.setattr(module, "Link", lambda *_: wires.append(Wire()) or wires[0])
    sent, waits = [], []

    async def main():
        await module.publish(
            [Bar(symbol, START + k * MINUTE, 2.0, 3.0, 1.0, 2.0, 5.0) for symbol, k in BARS],
            Address("h", 1, "x"),
            "t",
            "1m",
            Clock(0.0, 0.01),
            lambda *each: sent.append(each),
            lambda *each: waits.append(each),
        )

    play(main())
    assert sent == [(2, START + MINUTE), (1, START + 2 * MINUTE)]
    assert waits == [(START + 2 * MINUTE, 0.01)]
    assert wires[0].topics == ["t/bars/1m/A", "t/bars/1m/B", "t/bars/1m/A"]
