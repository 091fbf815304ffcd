"""The live rim of the path: arrivals from the broker by way of the journal, outcomes by way of its outbox."""

import asyncio
import threading
from collections import deque
from collections.abc import Callable, Collection, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import structlog

from barcast.daemon import wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.distribution import Distribution
from barcast.daemon.journal import Journal, Kind, Progress, Queued, State
from barcast.daemon.mqtt import Delivery, Link
from barcast.daemon.ports import Arrival, Declaration, Event, Group, Outcome, Warmup
from barcast.daemon.room import free_bytes, is_full
from barcast.daemon.wire import Outgoing, Reject
from barcast.models import Adjustment, Bar, BarcastError, Coverage, JournalLostError

TAKE = 500
"""Messages written in one commit, at most."""
TAKE_BYTES = 2_000_000
"""Bytes after which a commit takes no further message: what is decoded at once holds up the event loop."""
PROGRESS_EVERY = 1000
"""Records after which progress is noted even when nothing is due to subscribers."""
AT_ONCE = 256
"""Publications under way at once."""
ROOM_SECONDS = 1.0
"""How often it is tried whether there is room on a full disk, or the journal's server, again."""
RETRY_SECONDS = 1.0
"""Pause after a publication failed, unless something new is due."""
LATE = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300, 3600)
"""Seconds of the instance's clock behind a close: bounds of what is counted."""
QUICK = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
"""Seconds of work: bounds of what is counted."""
EMITTED = 100_000
"""Messages of which it is known when they were emitted: those before are delivered without being timed."""

log = structlog.get_logger()
T = TypeVar("T")


class Clock(Protocol):
    """Nanoseconds since 1970, and how long to wait for a moment."""

    def now(self) -> int:
        """The time."""
        ...

    def seconds_until(self, time: int) -> float:
        """Seconds of waiting until `time`, not negative."""
        ...


@dataclass(frozen=True, slots=True)
class Decision:
    """Something decided by us that a replay cannot derive: journalled like an arrival, before it acts."""

    kind: str
    payload: bytes
    event: Callable[[int], Event]
    notices: Callable[[int], Sequence[Outgoing]] = lambda _time: ()


class Scribe:
    """The one thread that touches the journal, so that commits never block the event loop.

    Without room on the disk, or without the journal's server, it tries again until there is some: nothing is
    acknowledged and nothing acts meanwhile, as all that would follows a commit. The state is whether the disk
    is `full`, or the server `lost`, now; `turned` is set when that changes.
    """

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.full = self.lost = False
        self.turned = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "journal")
        self._closing = threading.Event()

    def __call__(self, verb: Callable[..., T], *args: object) -> asyncio.Future[T]:
        """Call a method of the journal on its thread, in the order of the calls."""
        loop = asyncio.get_running_loop()
        future = loop.run_in_executor(self._thread, lambda: self._until_it_can(loop, verb, *args))
        future.add_done_callback(self._left)
        return future

    @property
    def held(self) -> bool:
        """Whether it waits for either."""
        return self.full or self.lost

    def close(self) -> None:
        """Finish what is under way, but wait for no room and no server, and close the journal."""
        self._closing.set()
        self._thread.submit(self.journal.close).result()
        self._thread.shutdown()

    def _left(self, future: asyncio.Future[Any]) -> None:
        """Hear what a stop left undone: whoever wanted it may be gone."""
        if not self._closing.is_set() or future.cancelled():
            return
        error = future.exception()
        if error is not None and not isinstance(error, OSError | BarcastError):
            log.error("journal_failed", exc_info=error)

    def _until_it_can(self, loop: asyncio.AbstractEventLoop, verb: Callable[..., T], *args: object) -> T:
        while True:
            try:
                done = verb(*args)
            except OSError as error:
                if not is_full(error) and not isinstance(error, JournalLostError):
                    raise
                self._turn(loop, error)
                if self._closing.wait(ROOM_SECONDS):
                    raise
            else:
                self._turn(loop, None)
                return done

    def _turn(self, loop: asyncio.AbstractEventLoop, error: OSError | None) -> None:
        """Say once that there is no room or no server, and once that there is again."""
        before, place = (self.full, self.lost), self.journal.place
        self.lost = isinstance(error, JournalLostError)
        self.full = error is not None and not self.lost
        if before == (self.full, self.lost):
            return
        disk = {"free_bytes": free_bytes(place.parent)} if isinstance(place, Path) else {}
        if self.full:
            where = str(place.parent if isinstance(place, Path) else place)
            log.error(
                "disk_full",
                path=str(place),
                reason=str(error),
                remedy=f"make room on the disk of {where}: no bar is taken or acknowledged until then",
                **disk,
            )
        elif self.lost:
            log.error(
                "journal_lost", reason=str(error), waits="no bar is taken or acknowledged until it is back"
            )
        else:
            log.info("disk_has_room" if before[0] else "journal_found", path=str(place), **disk)
        loop.call_soon_threadsafe(self.turned.set)


@dataclass(frozen=True, slots=True)
class _Commit:
    """What the journal is writing: the numbers that its records will have, and what follows then."""

    numbers: asyncio.Future[list[int]]
    events: Sequence[Event]
    deliveries: Sequence[Delivery]
    written: Sequence[asyncio.Future[int]]
    outgoing: bool


class LiveSource:
    """Events from the broker and from our own decisions, each committed to the journal before it acts.

    Arrivals are stamped here, in one place and never backwards, when they are committed; they are
    acknowledged after the commit, in order. One commit is written while the path works on the events of the
    one before. The state is that commit, the events that are committed and not handed out yet, the decisions
    that wait, the newest stamp, the number of the event handed out last, how many parts of messages could not
    be used, how late the last bar of each message was, and how long a symbol of the group forecast last took
    (nanoseconds). `caught_up` is set when nothing was left for the first time. `shed` are the keys of groups
    that were shed before a restart and are not settled.
    """

    def __init__(
        self,
        link: Link,
        scribe: Scribe,
        clock: Clock,
        *,
        root: str,
        calendars: Calendars,
        deadletters: str,
        queued: Callable[[], None],
        backlog: Iterable[tuple[int, Event]],
        position: int,
        stamped: int,
        shed: Collection[str],
    ) -> None:
        self.position = position
        self.waiting = False
        self.dead_letters = 0
        self.bar_lag = Distribution(LATE)
        self.caught_up = asyncio.Event()
        self._link, self._scribe, self._clock = link, scribe, clock
        self._root, self._calendars, self._deadletters = root, calendars, deadletters
        self._queued = queued
        self._ready: deque[tuple[int, Event]] = deque(backlog)
        self._decisions: deque[tuple[Decision, asyncio.Future[int]]] = deque()
        self._writing: _Commit | None = None
        self._stamped = stamped
        self._shed = shed
        self._pace = 0.0
        self._began: tuple[int, int] | None = None

    @property
    def held(self) -> bool:
        """Whether everything waits for room on the disk, or for the journal: a known wait, not a hang."""
        return self._scribe.held

    def now(self) -> int:
        """The time, never before a stamp that was given."""
        self._stamped = max(self._stamped, self._clock.now())
        return self._stamped

    def decide(self, decision: Decision) -> asyncio.Future[int]:
        """Let a decision take its place before everything that is not committed yet.

        The future is done when the decision is in the journal; it is the number of its record.
        """
        written: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._decisions.append((decision, written))
        self._link.arrived.set()
        return written

    async def next(self, deadline: int | None) -> Event | None:
        """The next committed event, or None once `deadline` passed with nothing left that came before."""
        while True:
            if self._writing is None and (self._link.inbox or self._decisions):
                self._writing = self._begin()
            if self._ready:
                self.position, event = self._ready.popleft()
                if isinstance(event, Warmup):
                    await asyncio.sleep(0)  # one after another would hold up the event loop
                return event
            if self._writing is not None:
                await self._finish(self._writing)
                continue
            if deadline is not None and self.now() >= deadline:
                return None
            self.caught_up.set()
            self._link.arrived.clear()
            wait = None if deadline is None else self._clock.seconds_until(deadline)
            self.waiting = True
            with suppress(TimeoutError):
                async with asyncio.timeout(wait):
                    await self._link.arrived.wait()
            self.waiting = False

    async def sheds(self, group: Group, valid_until: Callable[[Group], int]) -> bool:
        """Whether its signals would be ready when nobody may use them: oldest first, newer ones have time.

        How long a group takes is what the last one took, by its symbols. After one that is shed half of that
        is believed, and half the time that signals are valid at most: a machine that was slow but once is
        not taken to be so for long. The decision is in the journal before it acts.
        """
        now, count = self.now(), len(group.symbols)
        if group.key not in self._shed:
            valid = valid_until(group)
            if now + self._pace * count < valid:
                self._began = None if group.straggler else (now, count)
                return False
            self._pace = min(self._pace, (valid - group.due) / count) / 2
            record = (now, Kind.OVERLOAD, "", group.key.encode())
            await self._scribe(self._scribe.journal.append, [record])
        log.warning("group_shed", close_time=wire.to_text(group.close_time), symbols=count)
        return True

    def forecast(self) -> None:
        """A group is forecast: note its pace, without the commits that follow, which may wait for a disk."""
        if self._began is not None:
            (began, count), self._began = self._began, None
            self._pace = (self.now() - began) / count

    def _begin(self) -> _Commit:
        """Stamp and decode what has come, and let the journal write it."""
        inbox, size = self._link.inbox, 0
        deliveries: list[Delivery] = []
        while inbox and len(deliveries) < TAKE and size < TAKE_BYTES:
            deliveries.append(inbox.popleft())
            size += len(deliveries[-1].payload)
        decisions = [self._decisions.popleft() for _ in range(len(self._decisions))]
        time = self.now()
        records: list[tuple[int, str, str, bytes]] = []
        events: list[Event] = []
        outgoing: list[Outgoing] = []
        for decision, _ in decisions:
            records.append((time, decision.kind, "", decision.payload))
            events.append(decision.event(time))
            outgoing.extend(decision.notices(time))
        for delivery in deliveries:
            if delivery.canary or delivery.request is not None:
                continue
            found, rejects = self._decode(delivery.topic, delivery.payload, time)
            if found is not None:
                kind = Kind.BARS if isinstance(found, Arrival) else Kind.ADJUSTMENT
                records.append((time, kind, delivery.topic, delivery.payload))
                events.append(found)
            if rejects:
                topic, reason = delivery.topic[: wire.CUT], rejects[0].reason[: wire.CUT]
                log.warning("dead_letter", topic=topic, reason=reason, count=len(rejects))
                self.dead_letters += len(rejects)
                outgoing.append(wire.dead_letter(rejects, delivery.topic, time, self._deadletters))
        numbers = self._scribe(self._scribe.journal.append, records, outgoing)
        return _Commit(numbers, events, deliveries, [written for _, written in decisions], bool(outgoing))

    async def _finish(self, commit: _Commit) -> None:
        """Once it is written, acknowledge what came and hand the events out."""
        numbers = await commit.numbers
        self._writing = None
        self._link.ack(commit.deliveries)
        for written, number in zip(commit.written, numbers, strict=False):  # decisions come first
            if not written.done():  # whoever waited may have gone
                written.set_result(number)
        self._ready.extend(zip(numbers, commit.events, strict=True))
        if commit.outgoing:
            self._queued()

    def _decode(self, topic: str, payload: bytes, time: int) -> tuple[Event | None, list[Reject]]:
        if topic.startswith(f"{self._root}/adjustments/"):
            found = wire.declared(topic, payload, self._root)
            return (None, [found]) if isinstance(found, Reject) else (Declaration(time, found), [])
        bars, rejects = wire.decode(topic, payload, time, self._root, self._calendars)
        if bars:
            self.bar_lag.observe((time - bars[-1].close_time) / 1e9)
        return (Arrival(time, tuple(bars)) if bars else None), rejects


class Courier:
    """Publishes the outbox in its order for each topic, until the broker has a message or it expired.

    The state is what is wrong with which topic, so that it is said once and not at each try, how many
    publications this boot has made, what came of them, and what was emitted when for which close.
    """

    def __init__(self, link: Link, scribe: Scribe, clock: Clock, instance: str, boot: str) -> None:
        self._link, self._scribe, self._clock = link, scribe, clock
        self._instance, self._boot = instance, boot
        self._sequence = 0
        self._faults: dict[str, str] = {}
        self._emitted: dict[str, tuple[int, int]] = {}
        self.delivered = self.expired = self.failed = 0
        self.latency, self.since_close = Distribution(QUICK), Distribution(LATE)
        self._wake = asyncio.Event()
        self._idle = asyncio.Event()

    def wake(self) -> None:
        """There is something new in the outbox."""
        self._idle.clear()
        self._wake.set()

    def expect(self, messages: Iterable[Outgoing], close_time: int, now: int) -> None:
        """Messages about a close were emitted: time them until the broker has them."""
        self._emitted.update((message.id, (close_time, now)) for message in messages)
        while len(self._emitted) > EMITTED:
            del self._emitted[next(iter(self._emitted))]

    async def drained(self) -> None:
        """Return once the outbox is empty."""
        await self._idle.wait()

    async def run(self) -> None:
        """Deliver until cancelled."""
        while True:
            await self._link.connected.wait()
            self._wake.clear()
            if await self._deliver():
                self._idle.set()
                await self._wake.wait()
            else:
                with suppress(TimeoutError):
                    async with asyncio.timeout(RETRY_SECONDS):
                        await self._wake.wait()

    async def _deliver(self) -> bool:
        """Send until nothing is pending, or only what failed just now; say whether all of it is done.

        At any moment only the oldest message of a topic is under way, so that a refused one is not overtaken.
        """
        journal, blocked = self._scribe.journal, set[str]()
        while True:
            now = self._clock.now()
            rows = await self._scribe(journal.pending, AT_ONCE + len(blocked))
            rows = [row for row in rows if row.message.topic not in blocked]
            if not rows:
                return not blocked
            states = [(row.n, State.EXPIRED) for row in rows if _expired(row, now)]
            due = [row for row in rows if not _expired(row, now)]
            self.expired += len(states)
            answers = await asyncio.gather(*(self._publish(row.message, now) for row in due))
            for row, fault in zip(due, answers, strict=True):
                topic = row.message.topic
                if fault is None:
                    states.append((row.n, State.DELIVERED))
                    self.delivered += 1
                    self._faults.pop(topic, None)
                    continue
                self.failed += 1
                blocked.add(topic)
                if self._faults.get(topic) != fault:
                    self._faults[topic] = fault
                    log.warning("publish_failed", topic=topic, id=row.message.id, reason=fault)
            await self._scribe(journal.mark, states)

    async def _publish(self, message: Outgoing, now: int) -> str | None:
        self._sequence += 1
        properties = (
            ("published_at", wire.to_text(now)),
            ("instance", self._instance),
            ("boot", self._boot),
            ("sequence", str(self._sequence)),
        )
        fault = await self._link.publish(message, now, properties)
        if fault is None and (known := self._emitted.pop(message.id, None)):
            close_time, emitted = known
            done = self._clock.now()
            self.latency.observe((done - emitted) / 1e9)
            self.since_close.observe((done - close_time) / 1e9)
        return fault


def _expired(row: Queued, now: int) -> bool:
    return row.message.expires is not None and row.message.expires <= now


@dataclass(slots=True)
class Emitted:
    """What became of the groups since the start, and of their symbols.

    A group is full, incomplete or a straggler; a symbol of it gets a signal or is withheld. Of the signals
    some are `degraded` or `warming`. `holes` are gaps right before a bar, `refused` the groups in which a
    strategy's targets could not be taken, once for each strategy. Those that are `shed` were not forecast at
    all.
    """

    full: int = 0
    incomplete: int = 0
    straggler: int = 0
    signals: int = 0
    withheld: int = 0
    degraded: int = 0
    warming: int = 0
    holes: int = 0
    refused: int = 0
    shed: int = 0


class LiveSink:
    """Outcomes into the outbox, in one commit with how far the path has come.

    The state is what was emitted and not committed yet, the number of the event settled last, and the newest
    close of which a group was emitted (nanoseconds, 0: none since the start); how many outcomes there were,
    how long they took from when they were due, and the newest coverage of each symbol, by the model that made
    the last forecasts, over its `horizons`. `moved` is set when the path has gone on. `told` is given the
    messages of each commit after it.
    """

    def __init__(
        self,
        scribe: Scribe,
        source: LiveSource,
        courier: Courier,
        told: Callable[[Sequence[Outgoing]], None] = lambda _messages: None,
    ) -> None:
        self.processed = self.reached = 0
        self.moved = asyncio.Event()
        self.counts = Emitted()
        self.latency = Distribution(QUICK)
        self.horizons: tuple[int, ...] = ()
        self.coverage: dict[str, Coverage] = {}
        self._model = ""
        self._scribe, self._source, self._courier, self._told = scribe, source, courier, told
        self._batch: list[Outgoing] = []
        self._settled = source.position

    def accepted(self, bar: Bar) -> None:
        """Nothing is published of a bar alone."""

    def adjusted(self, adjustment: Adjustment) -> None:
        """Nothing is published of an adjustment alone."""

    async def emit(self, outcome: Outcome) -> None:
        """Encode the outcome's messages; they are committed when the path settles."""
        self._source.forecast()
        messages = list(wire.messages(outcome))
        self._batch.extend(messages)
        now, close_time = self._source.now(), outcome.group.close_time
        self.latency.observe((now - outcome.group.due) / 1e9)
        self._courier.expect(messages, close_time, now)
        self._count(outcome)
        self.processed = max(self.processed, close_time)
        log.info(
            "group",
            close_time=wire.to_text(close_time),
            signals=len(outcome.forecasts),
            withheld=len(outcome.withheld),
            straggler=outcome.group.straggler,
        )
        for strategy, reason in outcome.refused.items():
            error = outcome.raised.get(strategy)
            log.warning("targets_refused", strategy=strategy, reason=reason, exc_info=error)

    def _count(self, outcome: Outcome) -> None:
        counts, group = self.counts, outcome.group
        counts.straggler += group.straggler
        counts.incomplete += bool(group.missing)
        counts.full += not (group.straggler or group.missing)
        counts.signals += len(outcome.forecasts)
        counts.withheld += len(outcome.withheld)
        counts.degraded += len(outcome.degraded.keys() & outcome.forecasts.keys())
        counts.warming += sum(forecast.warming for forecast in outcome.forecasts.values())
        counts.holes += len(outcome.holes)
        counts.refused += len(outcome.refused)
        counts.shed += outcome.shed
        if outcome.card.model != self._model:
            self._model, self.horizons = outcome.card.model, outcome.card.horizons
            self.coverage.clear()
        for symbol, forecast in outcome.forecasts.items():
            if forecast.coverage:
                self.coverage[symbol] = forecast.coverage

    async def settle(self, now: int) -> None:
        """Commit what was emitted since the last time, and the progress."""
        position = self.reached = self._source.position
        self.moved.set()
        if self._batch or position - self._settled >= PROGRESS_EVERY:
            batch, self._batch = self._batch, []
            await self._scribe(self._scribe.journal.settle, Progress(position, now), batch)
            self._settled = position
            if batch:
                self._courier.wake()
                self._told(batch)
