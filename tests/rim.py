"""A broker and a clock in memory, for tests of the live rim without a network and without waiting."""

import asyncio
import sqlite3
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from barcast.backtest.replay import Recording, replay
from barcast.daemon.calendar import Calendars
from barcast.daemon.events import Champion, events, restore, shed_groups
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.live import Decision, LiveSink, LiveSource, Scribe
from barcast.daemon.mqtt import Delivery
from barcast.daemon.pipeline import OpenModel, Pipeline, Settings, run
from barcast.daemon.ports import EndOfSource, Event, Revision
from barcast.daemon.start import Following
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import Outgoing, encode_bars
from barcast.models import Bar
from tests.fakes import START
from tests.postgres import image, quick

SECOND = 10**9
T = TypeVar("T")
MINUTELY = Calendars("24x7", Timeframe.parse("1m"))


@dataclass(frozen=True)
class Message:
    """A message on its way to the broker."""

    topic: str
    payload: bytes

    @classmethod
    def of(cls, *bars: Bar, topic: str | None = None) -> "Message":
        """Bars as a feed sends them."""
        plain = [Bar(b.symbol, b.close_time, *map(float, b.values)) for b in bars]
        return cls(topic or f"t/bars/1m/{bars[0].symbol}", encode_bars(plain))


Step = tuple[int, Sequence[Message] | Callable[[LiveSource], object]]
"""What happens at a time in nanoseconds: messages arrive, or somebody decides something."""


@dataclass
class World:
    """The link and the clock of a source: time passes only while the source waits.

    The state is the time, the inbox, what is still to happen, and what was acknowledged. When nothing is left
    to happen and nobody has a deadline, the source ends. A timer wakes `late` nanoseconds after its moment.
    """

    script: deque[Step] = field(default_factory=deque)
    time: int = START
    late: int = 0
    inbox: deque[Delivery] = field(default_factory=deque)
    acked: list[int] = field(default_factory=list)
    source: LiveSource | None = None
    _deadline: int | None = None
    _mid: int = 0

    @property
    def arrived(self) -> "World":
        """Stands in for the event that says that something arrived."""
        return self

    def now(self) -> int:
        """The time."""
        return self.time

    def seconds_until(self, moment: int) -> float:
        """Note the deadline; more real seconds than any test takes."""
        self._deadline = moment
        return 60.0

    def set(self) -> None:
        """A decision was made: whoever waits looks before waiting."""

    def clear(self) -> None:
        """Forget the last deadline."""
        self._deadline = None

    async def wait(self) -> None:
        """Let the next thing happen."""
        if self.script and (self._deadline is None or self.script[0][0] <= self._deadline):
            moment, what = self.script.popleft()
            self.time = max(self.time, moment)
            if callable(what):
                what(self.source)
            else:
                self.deliver(*what)
        elif self._deadline is not None:
            self.time = max(self.time, self._deadline + self.late)
            raise TimeoutError
        else:
            raise EndOfSource

    def deliver(self, *messages: Message, qos: int = 1) -> None:
        """Put messages into the inbox."""
        for message in messages:
            self._mid += 1
            self.inbox.append(Delivery(message.topic, message.payload, self._mid, qos, 1))

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Note what was acknowledged."""
        self.acked += [delivery.mid for delivery in deliveries]


def source(world: World, scribe: Scribe, **changes: object) -> LiveSource:
    """A live source in that world, on one-minute bars under the root `t`."""
    settings = {
        "root": "t",
        "calendars": MINUTELY,
        "deadletters": "t/deadletter/me",
        "queued": lambda: None,
        "backlog": (),
        "position": 0,
        "stamped": 0,
        "shed": (),
    }
    world.source = LiveSource(world, scribe, world, **(settings | changes))
    return world.source


def play(coroutine: Coroutine[Any, Any, T]) -> T:
    """Run a coroutine under asyncio's debug mode, and not for long."""

    async def limited() -> T:
        async with asyncio.timeout(10):
            return await coroutine

    return asyncio.run(limited(), debug=True)


async def taken(src: LiveSource) -> list[Event | None]:
    """All events until the source ends."""
    found = []
    while True:
        try:
            found.append(await src.next(None))
        except EndOfSource:
            return found


def outbox(journal: Journal) -> list[Outgoing]:
    """Every message that was ever put into the outbox, in its order."""
    rows = journal._db.execute("SELECT id, topic, payload, retain, expires FROM outbox ORDER BY n")
    return [Outgoing(i, t, p, bool(r), e) for i, t, p, r, e in rows]


def path_of(messages: Sequence[Outgoing]) -> list[Outgoing]:
    """What the path said: all but the dead letters and what is said of models."""
    return [m for m in messages if m.topic.split("/")[1] not in ("deadletter", "models")]


def revision(settings: Settings) -> Decision:
    """The settings of the path are these from now on."""
    body = settings.encode()
    return Decision(Kind.REVISION, body, lambda time: Revision(time, body))


def activation(model: str, window: int = 8) -> Decision:
    """A model takes over."""
    champion = Champion(model, "numpy", window, "test")
    return Decision(Kind.ACTIVATION, champion.encode(), champion.event)


class Silent:
    """A courier that delivers nothing."""

    def wake(self) -> None:
        """Nothing waits for it."""

    def expect(self, messages: Iterable[Outgoing], close_time: int, now: int) -> None:
        """Nothing is delivered."""


class Instance:
    """The daemon's own parts over a journal file: built like a start of it, recovery and all."""

    def __init__(self, file: Path, world: World, open_model: OpenModel) -> None:
        self.journal = quick(Journal(file))
        self.pipeline = Pipeline(open_model)
        backlog = Following(self.journal, self.pipeline).recover()
        self.scribe = Scribe(self.journal)
        progress = self.journal.progress()
        self.source = source(
            world,
            self.scribe,
            backlog=backlog,
            position=progress.seq,
            stamped=max(self.journal.last_time(), progress.clock),
            shed=shed_groups(self.journal, progress.seq),
        )
        self.sink = LiveSink(self.scribe, self.source, Silent())
        self._open_model = open_model

    async def run(self) -> None:
        """Go on until nothing is left to happen."""
        await run(self.source, self.pipeline, self.sink)

    def replayed(self) -> list[Outgoing]:
        """What a replay of the journal says, to its end."""
        recording, pipeline = Recording(), Pipeline(self._open_model)
        base = restore(self.journal, pipeline, self.journal.base)
        recorded = events(self.journal.records(base), pipeline.revision)
        replay((event for _, event in recorded), pipeline, recording, shed=shed_groups(self.journal))
        return recording.messages

    def image(self) -> sqlite3.Connection:
        """A copy of the journal as it is on the disk now."""
        return image(self.journal)

    def close(self) -> None:
        """Close the journal; what is in memory is lost."""
        self.scribe.close()
