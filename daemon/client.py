"""For trading systems: signals as they come, each once and only as long as it may be acted on.

    async with Client("127.0.0.1", instance="desk", on_halt=close_positions) as client:
        async for signal in client.signals():
            ...

A composition root of its own: it reads the clock, unless it is given one.
"""

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator, Callable, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Generic, Self, TypeVar

import msgspec
import structlog

from barcast.daemon.mqtt import NOT_CONNECTED, OPERATOR_PROPERTY, SESSION_SECONDS, Address, Link
from barcast.daemon.wire import (
    SCHEMA,
    UNDECODABLE,
    AnswerMessage,
    GroupDone,
    ModelNotice,
    OrderMessage,
    Outgoing,
    Signal,
    Status,
    Target,
    from_text,
)
from barcast.models import BarcastError, ConfigError

SILENT_INTERVALS = 3
"""After so many intervals without a status the daemon is taken for dead."""
INTERVAL_SECONDS = 10.0
"""How long an interval is taken to be until a status says so."""
GRACE_SECONDS = 5.0
"""How long the signals of a group may come after the message that it is complete."""
REMEMBERED = 100_000
"""Ids that are remembered, at most: many more than are valid at any time."""
WAITING = 10_000
"""Messages that wait for a reader, at most; then the oldest is dropped, and named as a gap."""
UNFINISHED = 1_000
"""Closes whose signals wait for the message that their group is complete, at most."""
HALTS = {
    "starting": "the daemon is starting",
    "deaf": "the daemon hears no bars",
    "full": "the disk of the daemon is full",
    "stopped": "the daemon was stopped",
    "lost": "the daemon lost its connection, or its life",
}

PAUSED = "an operator paused the daemon"

log = structlog.get_logger()
T = TypeVar("T")
Message = Signal | Target
Body = Message | GroupDone | Status | ModelNotice
"""What a reader may have subscribed to."""


TAKEN_SECONDS = 30.0
"""How long an order may take to be taken, by the broker and by the daemon; then it is of no use any more."""


class NewerSchemaError(BarcastError):
    """A message of a newer version than this client knows. It was not acknowledged."""


@dataclass(frozen=True, slots=True)
class SignalGroup:
    """A complete group: what was said of it, and those of its signals that may be acted on, by symbol."""

    done: GroupDone
    signals: Mapping[str, Signal]


@dataclass(frozen=True, slots=True)
class Gap:
    """Signals that did not come. Without symbols, at least the whole group of that close was missed."""

    timeframe: str
    close_time: str
    symbols: tuple[str, ...] = ()


class _Version(msgspec.Struct):
    schema: int


_version = msgspec.json.Decoder(_Version)
_decoders: dict[str, msgspec.json.Decoder[Body]] = {
    "signals": msgspec.json.Decoder(Signal),
    "targets": msgspec.json.Decoder(Target),
    "groups": msgspec.json.Decoder(GroupDone),
    "status": msgspec.json.Decoder(Status),
    "models": msgspec.json.Decoder(ModelNotice),
}


def read(topic: str, payload: bytes, root: str) -> Body | None:
    """What a message below a root topic says; None, and a line in the log, for bytes that are none.

    Raise NewerSchemaError for one that only a newer client understands.
    """
    try:
        version = _version.decode(payload).schema
        if version > SCHEMA:
            raise NewerSchemaError(
                f"{topic}: the message has schema {version}, and this client reads up to {SCHEMA}; "
                "install the barcast that the daemon has"
            )
        return _decoders[topic.removeprefix(f"{root}/").split("/")[0]].decode(payload)
    except UNDECODABLE as error:
        log.warning("message_unreadable", topic=topic, reason=str(error))
        return None


def outdated(status: Status, before: Status | None) -> bool:
    """Whether a status is the last will of a start before the one that was heard of."""
    return status.state == "lost" and before is not None and status.boot != before.boot


class Client:
    """A connection to the messages of one instance; it connects again after every loss.

    - Each signal, target and group is handed out once, however often it is delivered. A reader that is
      started anew gets the retained ones again: keep the ids that were acted on.
    - What is past its `valid_until` on the `clock` (nanoseconds since 1970) is not handed out, and neither is
      what is not `tradable`, unless `untradable` asks for it; `on_stale` is told of both.
    - `on_gap` is told of signals and groups that should have come and did not, also of those that were shed.
    - `on_halt` is told, once and with the reason, when the daemon is not at work: it says so, or nothing has
      come from it for three of its intervals, whatever the cause. `on_resume` is told when it is at work,
      also the first time. `halted` is the reason, or None.
    - A newer version of the messages raises `NewerSchemaError` where they are iterated.

    With a `name` of its own the broker keeps what comes while this client is away, for a week; each client
    needs another one. `tls` is a context as `ssl.create_default_context` makes it. Callbacks are called from
    the event loop: they must not block. What the connection has to say goes to structlog.

    The state is what waits for each reader, the ids that were seen, the signals of groups that are not
    complete yet (None for one that was not to be handed out), the groups that are told complete and are
    not, the close of the newest group of each timeframe, and the newest status.
    """

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 1883,
        *,
        instance: str,
        root: str = "barcast/v1",
        name: str | None = None,
        username: str | None = None,
        password: str | None = None,
        tls: ssl.SSLContext | None = None,
        untradable: bool = False,
        clock: Callable[[], int] = time.time_ns,
        on_stale: Callable[[Message], None] = lambda _message: None,
        on_gap: Callable[[Gap], None] = lambda _gap: None,
        on_halt: Callable[[str], None] = lambda _reason: None,
        on_resume: Callable[[], None] = lambda: None,
    ) -> None:
        self.halted: str | None = "no status has come yet"
        self.status: Status | None = None
        self._instance, self._root, self._untradable, self._clock = instance, root, untradable, clock
        self._on_stale, self._on_gap, self._on_halt, self._on_resume = on_stale, on_gap, on_halt, on_resume
        topics = [f"{root}/{kind}/#" for kind in ("signals", "targets")]
        topics += [f"{root}/groups/+", f"{root}/status/{instance}"]
        address = Address(host, port, name or "", username, password, tls)
        self._link = Link(address, topics, will=None, session=SESSION_SECONDS if name else 0)
        self._signals, self._targets, self._groups = _Line[Signal](), _Line[Target](), _Line[SignalGroup]()
        self._seen: dict[str, None] = {}
        self._parts: dict[tuple[str, str], dict[str, Signal | None]] = {}
        self._unfinished: dict[tuple[str, str], list[GroupDone]] = {}
        self._newest: dict[str, int] = {}
        self._beat = asyncio.Event()
        self._interval = INTERVAL_SECONDS
        self._told = False
        self._tasks: list[asyncio.Task[None]] = []

    async def __aenter__(self) -> Self:
        """Begin to connect. Nothing is lost before the first reader asks."""
        for work in (self._link.run(nothing), self._receive(), self._watch()):
            task = asyncio.create_task(work)
            task.add_done_callback(self._ended)
            self._tasks.append(task)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Leave the broker; readers end. Raise what went wrong when no reader was there to raise it."""
        self._link.leave()
        for task in self._tasks:
            task.cancel()
        ends = await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks.clear()
        self._end(None)
        for end in ends:
            if isinstance(end, Exception) and error is None:
                raise end

    async def signals(self) -> AsyncIterator[Signal]:
        """Signals one by one, in the order of each symbol's closes."""
        async for signal in self._signals.read():
            if self._may_act(signal):
                yield signal

    async def targets(self) -> AsyncIterator[Target]:
        """What strategies want to hold, one by one."""
        async for target in self._targets.read():
            if self._may_act(target):
                yield target

    async def groups(self) -> AsyncIterator[SignalGroup]:
        """Groups of which all signals have come, stragglers as groups of their own; none without signals."""
        async for group in self._groups.read():
            signals = {name: signal for name, signal in group.signals.items() if self._may_act(signal)}
            if signals:
                yield SignalGroup(group.done, signals)

    def _ended(self, task: asyncio.Task[None]) -> None:
        """What went wrong is raised by the readers."""
        if not task.cancelled():
            self._end(task.exception())

    def _end(self, error: BaseException | None) -> None:
        self._signals.end(error)
        self._targets.end(error)
        self._groups.end(error)

    async def _receive(self) -> None:
        link = self._link
        while True:
            await link.arrived.wait()
            link.arrived.clear()
            while link.inbox:
                self._take(link.inbox[0].topic, link.inbox[0].payload)
                link.ack([link.inbox.popleft()])

    def _take(self, topic: str, payload: bytes) -> None:
        """Take a message. Raise NewerSchemaError for one that only a newer client understands."""
        if not payload:  # a retained message was taken back
            return
        body = read(topic, payload, self._root)
        if isinstance(body, Status):
            self._hear(body)
            return
        if body is None or isinstance(body, ModelNotice) or body.id in self._seen:
            return
        self._seen[body.id] = None
        if len(self._seen) > REMEMBERED:
            del self._seen[next(iter(self._seen))]
        if isinstance(body, GroupDone):
            self._follow(body)
        elif isinstance(body, Signal):
            self._collect(body)
        elif self._may_act(body):
            self._hand_out(self._targets, body, (body.timeframe, body.close_time), body.symbol)

    def _may_act(self, message: Message) -> bool:
        """Whether a message may be acted on now; if not, tell of it."""
        fresh = from_text(message.valid_until) > self._clock() and (message.tradable or self._untradable)
        if not fresh:
            self._on_stale(message)
        return fresh

    def _collect(self, signal: Signal) -> None:
        """Hand a signal out, and put it to those of its close."""
        good = self._may_act(signal)
        close = (signal.timeframe, signal.close_time)
        if good:
            self._hand_out(self._signals, signal, close, signal.symbol)
        self._parts.setdefault(close, {})[signal.symbol] = signal if good else None
        if len(self._parts) > UNFINISHED:
            del self._parts[next(iter(self._parts))]
        for done in list(self._unfinished.get(close, ())):
            self._complete(done)

    def _follow(self, done: GroupDone) -> None:
        """Notice groups that were missed, and wait for the signals of this one."""
        close, newest = from_text(done.close_time), self._newest.get(done.timeframe)
        if not done.straggler:
            if newest is not None and done.previous is not None and from_text(done.previous) > newest:
                self._on_gap(Gap(done.timeframe, done.previous))
            self._newest[done.timeframe] = max(close, newest or 0)
        if done.shed:
            self._on_gap(Gap(done.timeframe, done.close_time, tuple(done.withheld)))
            return
        self._unfinished.setdefault((done.timeframe, done.close_time), []).append(done)
        if not self._complete(done):
            asyncio.get_running_loop().call_later(GRACE_SECONDS, self._give_up, done)

    def _complete(self, done: GroupDone) -> bool:
        """Hand a group out if all of its signals have come."""
        close = (done.timeframe, done.close_time)
        parts = self._parts.get(close, {})
        if not parts.keys() >= set(done.symbols):
            return False
        found = {name: parts.pop(name) for name in done.symbols}
        self._forget(done)
        signals = {name: signal for name, signal in found.items() if signal is not None}
        if signals:
            self._hand_out(self._groups, SignalGroup(done, signals), close)
        return True

    def _give_up(self, done: GroupDone) -> None:
        """Tell of the signals of a group that have not come."""
        close = (done.timeframe, done.close_time)
        if self._tasks and done in self._unfinished.get(close, ()):
            parts = self._parts.get(close, {})
            missing = tuple(name for name in done.symbols if name not in parts)
            for name in done.symbols:
                parts.pop(name, None)
            self._forget(done)
            self._on_gap(Gap(*close, missing))

    def _forget(self, done: GroupDone) -> None:
        close = (done.timeframe, done.close_time)
        self._unfinished[close].remove(done)
        if not self._unfinished[close]:
            del self._unfinished[close]
        if not self._parts.get(close, True):
            del self._parts[close]

    def _hand_out(self, line: "_Line[T]", item: T, close: tuple[str, str], *symbols: str) -> None:
        """Let something wait for its reader; what is dropped for want of room is a gap."""
        if (dropped := line.put(item, Gap(*close, symbols))) is not None:
            self._on_gap(dropped)

    def _hear(self, status: Status) -> None:
        """A sign of life, or of its end."""
        if outdated(status, self.status):
            return
        self.status = status
        self._interval = status.interval or self._interval
        self._beat.set()
        if status.state == "ready" and not status.paused:
            if self.halted is not None:
                self.halted, self._told = None, False
                self._on_resume()
        else:
            self._halt(PAUSED if status.state == "ready" else HALTS[status.state])

    def _halt(self, reason: str) -> None:
        self.halted = reason
        if not self._told:
            self._told = True
            self._on_halt(reason)

    async def _watch(self) -> None:
        """Notice that nothing comes."""
        while True:
            self._beat.clear()
            seconds = SILENT_INTERVALS * self._interval
            try:
                async with asyncio.timeout(seconds):
                    await self._beat.wait()
            except TimeoutError:
                reason = f"no status of {self._instance} for {seconds:g} s"
                self._halt(f"{reason}: the daemon hangs, or the broker is out of reach")


class _Line(Generic[T]):
    """What waits for a reader, each with the gap that it would leave; how it ended, and whether one reads."""

    def __init__(self) -> None:
        self._items: deque[tuple[T, Gap]] = deque()
        self._news = asyncio.Event()
        self._read = self._over = False
        self._error: BaseException | None = None

    def put(self, item: T, gap: Gap) -> Gap | None:
        """Add an item; return the gap of one that was dropped for it, if it is missed."""
        self._items.append((item, gap))
        self._news.set()
        if len(self._items) <= WAITING:
            return None
        _, lost = self._items.popleft()
        return lost if self._read else None

    def end(self, error: BaseException | None) -> None:
        """Nothing will follow, because of an error or not."""
        self._over, self._error = True, self._error or error
        self._news.set()

    async def read(self) -> AsyncIterator[T]:
        """What is there and what comes, until the end. Raise the error that ended it."""
        self._read = True
        while True:
            while self._items:
                yield self._items.popleft()[0]
            if self._error is not None:
                raise self._error
            if self._over:
                return
            self._news.clear()
            await self._news.wait()


async def order(
    host: str = "127.0.0.1",
    port: int = 1883,
    *,
    instance: str,
    verb: str,
    wait: bool = False,
    to: str | None = None,
    reason: str | None = None,
    operator: str = "",
    root: str = "barcast/v1",
    username: str | None = None,
    password: str | None = None,
    tls: ssl.SSLContext | None = None,
    on_line: Callable[[str], None] = lambda _line: None,
) -> str:
    """Order something of a daemon, on a connection of its own; return what came of it.

    Verbs are those of `barcast ctl`: `retrain` and `reload` may `wait` for the end, `rollback` may go `to` a
    model. `operator` is who the journal says has claimed to order, for a `reason`. `on_line` gets what is
    told on the way. Raise ConfigError when the daemon refuses, when the broker lets this user not order, when
    nobody takes the order in time, and when the daemon ends before it has answered.
    """
    talk, known = _Talk(instance, verb), time.time_ns()
    answers, status = f"{root}/answers/{instance}/{known:x}", f"{root}/status/{instance}"
    link = Link(Address(host, port, "", username, password, tls), [answers, status], will=None, session=0)
    body = OrderMessage(wait=wait, to=to, reason=reason)
    topic, correlation = f"{root}/control/{instance}/{verb}", known.to_bytes(8)
    loop = asyncio.get_running_loop()
    end = loop.time() + TAKEN_SECONDS

    async def send() -> None:
        """At each connection, as answers are lost without one; an order that is known is answered again."""
        left = int(max(1.0, end - loop.time()) * 1e9)
        message = Outgoing("", topic, msgspec.json.encode(body), False, left)
        claim = [(OPERATOR_PROPERTY, operator)] if operator else []
        fault = await link.publish(message, 0, claim, answers=answers, correlation=correlation)
        if fault not in (None, NOT_CONNECTED):
            talk.fault = f"{topic}: {fault}; let the broker's access list allow it"
            link.arrived.set()

    connection = asyncio.create_task(link.run(send))
    connection.add_done_callback(lambda _task: link.arrived.set())
    try:
        while True:
            try:
                async with asyncio.timeout_at(None if talk.boot else end):
                    await link.arrived.wait()
            except TimeoutError as error:
                why = talk.known if link.connected.is_set() else f"no broker: {link.fault}"
                raise ConfigError(
                    f"{instance}: no answer to {verb} within {TAKEN_SECONDS:.0f} s ({why}); look "
                    f"whether the daemon is at work and may read {root}/control/{instance}/+"
                ) from error
            link.arrived.clear()
            if talk.fault:
                raise ConfigError(talk.fault)
            if connection.done():
                connection.result()
            while link.inbox:
                delivery = link.inbox.popleft()
                link.ack([delivery])
                if (done := talk.hear(delivery.topic == answers, delivery.payload, on_line)) is not None:
                    return done
    finally:
        link.leave()
        connection.cancel()
        await asyncio.gather(connection, return_exceptions=True)


class _Talk:
    """What is known of an order and of the daemon, by its status.

    Of the order it is the start of the daemon that took it ("": none yet), and what is wrong.
    """

    def __init__(self, instance: str, verb: str) -> None:
        self.boot = self.fault = ""
        self.known = "it has no status on the broker"
        self._instance, self._verb = instance, verb

    def hear(self, answers: bool, payload: bytes, on_line: Callable[[str], None]) -> str | None:
        """Take an answer or a status; return what came of the order, if that is it. Raise ConfigError."""
        try:
            if not answers:
                self._watch(msgspec.json.decode(payload, type=Status))
                return None
            answer = msgspec.json.decode(payload, type=AnswerMessage)
        except UNDECODABLE as error:
            log.warning("message_unreadable", reason=str(error))
            return None
        if answer.refused is not None:
            raise ConfigError(answer.refused)
        if answer.line is not None:
            self.boot = answer.boot
            on_line(answer.line)
        return answer.done

    def _watch(self, status: Status) -> None:
        self.known = f"its status is {status.state}"
        if self.boot and (status.boot != self.boot or status.state in ("lost", "stopped")):
            raise ConfigError(
                f"{self._instance}: the daemon ended before it had answered {self._verb}; its log says why"
            )


async def nothing() -> None:
    """There is nothing to say to the broker when it is there."""
