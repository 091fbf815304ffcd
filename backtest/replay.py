"""The replay composition root: the very path that runs live, fed from history or from a journal."""

from collections.abc import Coroutine, Iterable, Iterator
from dataclasses import dataclass
from itertools import groupby
from operator import attrgetter
from pathlib import Path as FilePath
from typing import Any

import msgspec

from barcast.daemon import wire
from barcast.daemon.calendar import Calendar
from barcast.daemon.events import events, read_history
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.pipeline import Path, Settings, run
from barcast.daemon.ports import Arrival, EndOfSource, Event, Outcome, Sink
from barcast.daemon.store import ModelStore
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import Outgoing
from barcast.models import Bar, ConfigError


class ReplaySource:
    """Events in order of their time, and a clock that jumps from one to the next.

    After the last event the clock jumps from deadline to deadline, so that no group stays behind.
    """

    def __init__(self, events: Iterable[Event]) -> None:
        self._events = iter(events)
        self._ahead: Event | None = next(self._events, None)
        self._now = 0

    def now(self) -> int:
        """The simulated time in nanoseconds."""
        return self._now

    async def next(self, deadline: int | None) -> Event | None:
        """See `Source.next`."""
        event = self._ahead
        if deadline is not None and (event is None or deadline < event.time):
            self._now = deadline
            return None
        if event is None:
            raise EndOfSource
        self._now, self._ahead = event.time, next(self._events, None)
        return event


class Recording:
    """A sink that keeps every outgoing message, as the live daemon would have sent it."""

    def __init__(self) -> None:
        self.messages: list[Outgoing] = []

    def accepted(self, bar: Bar) -> None:
        """Nothing is sent of a bar alone."""

    async def emit(self, outcome: Outcome) -> None:
        """Encode the outcome's messages."""
        self.messages.extend(wire.messages(outcome))

    async def settle(self, now: int) -> None:
        """There is nothing to make durable."""


def arrivals(bars: Iterable[Bar]) -> Iterator[Arrival]:
    """Bars sorted by close time, as if those of one close came together at that moment."""
    for close_time, together in groupby(bars, attrgetter("close_time")):
        yield Arrival(close_time, tuple(together))


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits for the outside: it needs no event loop, also in a notebook."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("a replay waited for something outside of it")


def replay(source: Iterable[Event], path: Path, sink: Sink) -> None:
    """Drive the path with events until their end."""
    drive(run(ReplaySource(source), path, sink))


def replay_journal(journal: FilePath) -> list[Outgoing]:
    """Compute again every signal, target and group message from a journal.

    Models and history are those of the journal's state directory. Raise ConfigError when the journal has
    no settings in it, DataError when the history changed, CheckpointError when a model did.
    """
    reader = Journal(journal, readonly=True)
    try:
        revision = reader.last(Kind.REVISION)
        if revision is None:
            raise ConfigError(f"{journal}: nothing was recorded yet; run the daemon first")
        settings = Settings.decode(revision.payload)
        calendar = Calendar(settings.calendar, Timeframe.parse(settings.timeframe))
        folder = journal.parent
        store = ModelStore(folder / "models", settings.timeframe)
        recorded = events(reader.records(), lambda warmth: read_history(folder / "history", warmth, calendar))
        recording = Recording()
        replay((event for _, event in recorded), Path(store.open), recording)
        return recording.messages
    finally:
        reader.close()


@dataclass(frozen=True, slots=True)
class Difference:
    """Replayed messages beside captured ones, as (topic, payload), each counted once."""

    signals: int
    differing: tuple[tuple[str, bytes], ...]
    missing: tuple[Outgoing, ...]

    def sentence(self) -> str:
        """What a person wants to know."""
        return (
            f"{self.signals} signals captured, {len(self.differing)} messages differ from the replay, "
            f"{len(self.missing)} of the replay were not captured"
        )


def compare(replayed: Iterable[Outgoing], captured: Iterable[tuple[str, bytes]]) -> Difference:
    """Compare byte by byte. At-least-once delivery may have brought a message twice: it counts once."""
    seen = dict.fromkeys(captured)
    again = {(m.topic, m.payload): m for m in replayed}
    return Difference(
        sum("/signals/" in topic for topic, _ in seen),
        tuple(key for key in seen if key not in again),
        tuple(m for key, m in again.items() if key not in seen),
    )


def read_capture(path: FilePath) -> list[tuple[str, bytes]]:
    """Topics and payloads that a subscriber wrote down: one JSON array of two texts a line."""
    pairs = msgspec.json.Decoder(tuple[str, str])
    return [(t, p.encode()) for t, p in map(pairs.decode, path.read_bytes().splitlines())]
