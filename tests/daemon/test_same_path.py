"""Live and replay are the same path: a busy event loop and late timers change no byte."""

import asyncio
import random

import pytest

from barcast.backtest import replay as replaying
from barcast.backtest.replay import Recording, ReplaySource, drive
from barcast.daemon import pipeline
from barcast.daemon.pipeline import Pipeline, run
from barcast.daemon.ports import Arrival, EndOfSource
from tests.fakes import MINUTE, START, Spread, bar, opening, outgoing

SECOND = 10**9


class BusySource:
    """A live source in miniature: events are stamped on arrival and handed out when the loop gets to them.

    Its clock runs on while forecasts are computed, and its timer wakes late.
    """

    def __init__(self, events, seed):
        self.waiting = list(events)
        self.random = random.Random(seed)
        self.clock = events[0].time

    def now(self):
        return self.clock

    async def next(self, deadline):
        self.clock += self.random.choice([0, 0, SECOND // 10, 3 * SECOND, 12 * SECOND])
        came = bool(self.waiting) and self.waiting[0].time <= self.clock
        if not came and deadline is not None and deadline <= self.clock:
            return None
        if not self.waiting:
            if deadline is None:
                raise EndOfSource
            self.clock = max(self.clock, deadline)
            return None
        if not came and deadline is not None and deadline < self.waiting[0].time:
            self.clock = max(self.clock, deadline + self.random.randrange(SECOND))
            if self.clock < self.waiting[0].time:
                return None
        event = self.waiting.pop(0)
        self.clock = max(self.clock, event.time)
        return event


def history(seed):
    """Half an hour of two symbols with delays, duplicates, missing and out-of-order bars."""
    dice, pieces = random.Random(seed), []
    for minute in range(1, 31):
        for symbol in "AB":
            delay = dice.choice([0.2, 0.5, 1, 9, 10, 11, 15, 70, 200])
            if dice.random() < 0.05:
                continue
            for _ in range(1 + (dice.random() < 0.1)):
                pieces.append((START + minute * MINUTE + int(delay * SECOND), bar(symbol, minute)))
                delay += dice.random() * 5
    return [*opening(), *(Arrival(t, (b,)) for t, b in sorted(pieces, key=lambda p: (p[0], p[1].symbol)))]


def live(events, seed):
    """What the loop says when it runs on a busy machine."""
    recording = Recording()
    asyncio.run(run(BusySource(events, seed), Pipeline(lambda *_: Spread()), recording))
    return recording.messages


@pytest.mark.parametrize("seed", range(25))
def test_busy_loop_says_what_its_replay_says(seed):
    """However late the loop gets to an arrival or a timer, the replay of what it received is the same."""
    events = history(seed)
    assert live(events, seed) == outgoing(events)


def test_lateness_decided_by_the_timer_breaks_it(monkeypatch):
    """The control: a loop that decides lateness when it gets to an arrival is found out."""

    async def by_timer(source, path, sink):
        while True:
            try:
                event = await source.next(path.deadline)
            except EndOfSource:
                return
            for group in path.due(source.now()):
                await sink.emit(path.outcome(group))
            for group in path.take(event, sink) if event else ():
                await sink.emit(path.outcome(group))

    def says(seed):
        recording = Recording()
        asyncio.run(by_timer(BusySource(history(seed), seed), Pipeline(lambda *_: Spread()), recording))
        return recording.messages

    assert sum(says(seed) != outgoing(history(seed)) for seed in range(25)) >= 5


def test_replay_refuses_to_wait():
    """A replay that would wait for the outside is a fault, not a hang."""

    async def waits():
        await asyncio.sleep(0)

    with pytest.raises(RuntimeError, match="waited"):
        drive(waits())


def test_replay_uses_the_live_loop():
    """There is one loop: the replay imports it, and has none of its own."""
    assert replaying.run is pipeline.run
    assert isinstance(ReplaySource([]), ReplaySource)
