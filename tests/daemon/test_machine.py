"""Anything in any order: a daemon that is fed, disturbed and killed at its commits keeps every promise.

Hypothesis draws what happens next. The daemon is made of its own parts; the broker, the clock and the power
are the machine's.
"""

import asyncio
import json
import sqlite3
import tempfile
from collections import Counter, deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from unittest import mock

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from barcast.backtest.replay import Recording, replay
from barcast.daemon import live
from barcast.daemon.events import Champion, Warmth, events
from barcast.daemon.journal import Kind, Record, State
from barcast.daemon.live import Courier, Decision
from barcast.daemon.mqtt import NOT_CONNECTED, Delivery
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Arrival, EndOfSource, Warmup
from barcast.daemon.retention import compact
from barcast.daemon.wire import Outgoing, messages, to_text
from barcast.models import Bar
from tests.fakes import MINUTE, START, Spread, bar
from tests.fakes import settings as path_settings
from tests.rim import SECOND, Instance, Message, World, activation, outbox, path_of, revision

MODELS = {
    "spread": Spread(min_window=2),
    "other": Spread("other", window=6, min_window=2),
    "long": Spread("long", window=20, min_window=4),
}
BAD = [b"", b"{}", b'{"close_time": "yesterday"}', b"[[[[", b"\x92\xc0", b"\xff\xfe\x00", b"7"]
SETTINGS = [
    path_settings(symbols, max_wait)
    for symbols in (("A", "B", "C"), ("A", "B"), ())
    for max_wait in (SECOND, 10 * SECOND, 45 * SECOND)
]


class Crash(Exception):  # noqa: N818 - the power, not an error
    """The power went off."""


@dataclass
class Feed(World):
    """A broker with a lasting session, and a clock that stands still unless the machine moves it.

    The state is, besides the world's, what was not acknowledged yet by number, how often each message was,
    and until when timers may wake.
    """

    until: int = START
    connection: int = 1
    unacked: dict[int, Message] = field(default_factory=dict)
    known: Counter[Message] = field(default_factory=Counter)

    async def wait(self) -> None:
        """Wake at the deadline when it has come; else everything rests."""
        if self._deadline is not None and self._deadline <= self.until:
            self.time = max(self.time, self._deadline + self.late)
            raise TimeoutError
        raise EndOfSource

    def deliver(self, *messages: Message, qos: int = 1) -> None:
        """Send messages, and keep them until they are acknowledged."""
        for message in messages:
            self._mid += 1
            self.unacked[self._mid] = message
            self.inbox.append(Delivery(message.topic, message.payload, self._mid, qos, self.connection))

    def send_again(self) -> None:
        """Connect anew: what was not acknowledged comes again; earlier copies can no longer be."""
        self.connection += 1
        for mid, message in self.unacked.items():
            self.inbox.append(Delivery(message.topic, message.payload, mid, 1, self.connection))

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Take note of what was acknowledged: it must be the oldest that was not."""
        for delivery in deliveries:
            if delivery.connection == self.connection:
                assert delivery.mid == next(iter(self.unacked)), "acknowledged out of order"
                self.known[self.unacked.pop(delivery.mid)] += 1


class Subscriber:
    """The link as the courier sees it: `faults` are what becomes of the coming publications."""

    def __init__(self) -> None:
        self.connected = asyncio.Event()
        self.faults: deque[str] = deque()
        self.received: dict[str, list[Outgoing]] = {}

    async def publish(self, message: Outgoing, now: int, _properties: object = ()) -> str | None:
        """Receive a message, or not, or without saying so."""
        fault = self.faults.popleft() if self.faults else "none"
        assert message.expires is None or now < message.expires, "delivered past its validity"
        if fault in ("none", "lost after"):
            self.received.setdefault(message.topic, []).append(message)
        await asyncio.sleep(0)
        return {"none": None, "refused": "refused by the broker"}.get(fault, NOT_CONNECTED)


pieces = st.lists(
    st.tuples(
        st.sampled_from("ABCD"),
        st.sampled_from([0, 0, 0, 0, 1, 1, 2, 3, 5, -1]),  # minutes ago
        st.sampled_from([None, None, None, 101.5, 99.0]),  # another price than the first
    ),
    min_size=1,
    max_size=5,
)
decisions = st.sampled_from(sorted(MODELS)).map(activation) | st.sampled_from(SETTINGS).map(revision)
runs = st.sampled_from([True, True, True, False])  # whether the loop gets to it at once


class DaemonMachine(RuleBasedStateMachine):
    """What may happen to a daemon, and what must hold all the time.

    The state is the daemon and what surrounds it, the messages that were sent and what is wanted of each,
    what it told so far, and what is still to disturb it: a failing power, decisions, a slow forecast.
    """

    def __init__(self) -> None:
        super().__init__()
        self.folder = tempfile.TemporaryDirectory()
        self.file = Path(self.folder.name) / "journal.db"
        self.patches = [mock.patch.object(live, "PROGRESS_EVERY", 5), mock.patch.object(live, "TAKE", 4)]
        for patch in self.patches:
            patch.start()
        self.loop = asyncio.new_event_loop()
        self.feed, self.subscriber = Feed(), Subscriber()
        self.sent: list[Message] = []
        self.wanted: dict[Message, tuple[bool, str | None]] = {}
        self.told: list[Outgoing] = []
        self.letters: set[tuple[str, str]] = set()
        self.judged = self.decided = self.last = 0
        self.records: dict[int, Record] = {}
        self.power: tuple[str, str, int] | None = None
        self.amid: list[Decision] = []
        self.slow = 0
        self.start()

    # What the machine is made of.

    def start(self) -> None:
        """Start the daemon: it recovers, and the broker sends what was not acknowledged."""
        self.feed.inbox.clear()
        self.instance = Instance(self.file, self.feed, lambda model, *_: MODELS[model])
        journal = self.instance.journal
        for name in ("append", "settle", "mark"):
            setattr(journal, name, self.fragile(name, getattr(journal, name)))
        self.instance.sink.emit = self.disturbed(self.instance.sink.emit)
        self.courier = Courier(self.subscriber, self.instance.scribe, self.feed, "me", "boot")
        first = [
            (Kind.REVISION, revision(SETTINGS[1])),
            (Kind.ACTIVATION, activation("spread")),
        ]
        self.amid, self.slow, self.power = [], 0, None
        self.decisions = [decision for kind, decision in first if journal.last(kind) is None]
        self.reader = sqlite3.connect(self.file)
        self.feed.send_again()

    def crash(self) -> None:
        """Lose everything but the journal, and start again."""
        self.reader.close()
        self.instance.close()
        self.start()

    def fragile(self, name, commit):
        """A commit at which the power may go off, before or after."""

        def spied(*args):
            if self.power and self.power[0] == name:
                left = self.power[2] - 1
                self.power = (name, self.power[1], left)
                if left == 0 and self.power[1] == "before":
                    raise Crash
            done = commit(*args)
            if self.power == (name, "after", 0):
                raise Crash
            return done

        return spied

    def disturbed(self, emit):
        """A forecast during which time passes, or somebody decides something."""

        async def disturbed(outcome):
            await emit(outcome)
            for decision in self.amid:
                self.decide(decision)
            self.feed.time += self.slow
            self.amid, self.slow = [], 0

        return disturbed

    def decide(self, decision: Decision) -> None:
        """Decide something; it may be lost with the power, but not be there twice."""
        self.decided += 1
        self.instance.source.decide(decision)

    def go(self) -> None:
        """Let the daemon do what it can do now."""

        async def steps():
            for decision in self.decisions:
                self.decide(decision)
            self.decisions = []
            await self.instance.run()

        try:
            self.loop.run_until_complete(steps())
        except Crash:
            self.crash()

    def pass_time(self, until: int, late: int = 0) -> None:
        """Let timers wake until then, each so much late."""
        self.feed.until, self.feed.late = until, late
        self.go()
        self.feed.late = 0
        self.feed.time = self.feed.until = max(self.feed.time, until)

    def deliver(self, message: Message, good: bool = True, bad: str | None = None) -> None:
        """Send a message of which something is good, and a piece is bad."""
        self.wanted[message] = (good, bad)
        self.sent.append(message)
        self.feed.deliver(message)

    @property
    def minute(self) -> int:
        """How many minutes are over."""
        return (self.feed.time - START) // MINUTE

    def look(self) -> None:
        """Read what is new in the outbox, as others see the file."""
        rows = self.reader.execute(
            "SELECT n, id, topic, payload, retain, expires FROM outbox WHERE n > ? ORDER BY n", (self.last,)
        ).fetchall()
        self.last = rows[-1][0] if rows else self.last
        new = [Outgoing(i, t, p, bool(r), e) for _, i, t, p, r, e in rows]
        self.told += new
        bodies = [json.loads(m.payload) for m in new if "/deadletter/" in m.topic]
        self.letters |= {(body["topic"], body["payload"]) for body in bodies}

    def note_records(self) -> None:
        """Remember every record, as some will leave."""
        for record in self.instance.journal.records(max(self.records, default=0)):
            self.records[record.seq] = record

    # What may happen.

    @initialize(minutes=st.integers(1, 4))
    def begins(self, minutes):
        """Some minutes are as they should be."""
        for _ in range(minutes):
            self.a_minute("ABC", [1, 1, 1], True)

    @rule(
        symbols=st.permutations("ABC"), delays=st.lists(st.sampled_from([0, 1, 4, 12]), max_size=3), at=runs
    )
    def a_minute(self, symbols, delays, at):
        """The next minute closes, and some symbols' bars come with delays."""
        self.pass_time(START + (self.minute + 1) * MINUTE)
        closed = self.minute
        for symbol, delay in zip(symbols, delays, strict=False):
            self.pass_time(self.feed.time + delay * SECOND)
            self.deliver(Message.of(bar(symbol, closed)))
            if at:
                self.go()
        self.go()

    @rule(pieces=pieces, together=st.booleans(), at=runs)
    def bars(self, pieces, together, at):
        """Bars come: the newest, older ones, other values for known ones, one by one or as an array."""
        found = [bar(symbol, max(0, self.minute - ago), close) for symbol, ago, close in pieces]
        if together:
            self.deliver(Message.of(*found, topic="t/bars/1m"))
        else:
            for b in found:
                self.deliver(Message.of(b))
        if at:
            self.go()

    @precondition(lambda self: self.sent)
    @rule(data=st.data(), at=runs)
    def a_message_comes_again(self, data, at):
        """The feed sends something again."""
        message = data.draw(st.sampled_from(self.sent[-12:]))
        self.sent.append(message)
        self.feed.deliver(message)
        if at:
            self.go()

    @rule(
        payload=st.sampled_from(BAD), topic=st.sampled_from(["t/bars/1m/A", "t/bars/1m", "t/adjustments/A"])
    )
    def a_bad_message(self, payload, topic):
        """Something comes that is no message."""
        self.deliver(Message(topic, payload), False, payload.decode("utf-8", "backslashreplace"))
        self.go()

    @rule(pieces=pieces, at=st.integers(0, 4))
    def an_array_with_a_bad_bar(self, pieces, at):
        """A bad bar comes in an array of good ones."""
        good = [bar(symbol, max(0, self.minute - ago), close) for symbol, ago, close in pieces]
        found = json.loads(Message.of(*good, good[0], topic="t/bars/1m").payload)
        found.insert(at, {"symbol": "A"})
        self.deliver(Message("t/bars/1m", json.dumps(found).encode()), True, '{"symbol": "A"}')
        self.go()

    @rule(
        symbol=st.sampled_from("AB"),
        ago=st.integers(-3, 6),
        factor=st.sampled_from([0.5, 2.0, 1.1]),
        kind=st.sampled_from(["split", "roll"]),
    )
    def an_adjustment(self, symbol, ago, factor, kind):
        """A split or a roll is declared."""
        time = to_text(START + (self.minute - ago) * MINUTE)
        body = {"time": time, "factor": factor, "kind": kind}
        self.deliver(Message(f"t/adjustments/{symbol}", json.dumps(body).encode()))
        self.go()

    @rule(seconds=st.sampled_from([1, 5, 11, 46, 70, 200]), late=st.sampled_from([0, 0, 1, 3, 20]))
    def time_passes(self, seconds, late):
        """Timers wake, on time or late."""
        self.pass_time(self.feed.time + seconds * SECOND, late * SECOND)

    @rule(seconds=st.sampled_from([1, 11, 46, 130]))
    def the_machine_is_busy(self, seconds):
        """Time passes and the loop gets to nothing."""
        self.feed.time += seconds * SECOND

    @precondition(lambda self: not self.feed.unacked)  # else a bar may be too far ahead of its arrival
    @rule(seconds=st.sampled_from([1, 5, 90]))
    def the_clock_is_set_back(self, seconds):
        """The host's clock goes back."""
        self.feed.time = max(START, self.feed.time - seconds * SECOND)
        self.feed.until = self.feed.time

    @rule(decision=decisions, at=runs)
    def a_decision(self, decision, at):
        """A model takes over, or other settings."""
        self.decisions.append(decision)
        if at:
            self.go()

    @rule(decision=decisions, slow=st.sampled_from([0, 2, 30]))
    def a_decision_amid_work(self, decision, slow):
        """A model takes over, or other settings, while a group is forecast and the next one waits."""
        self.pass_time(START + (self.minute + 2) * MINUTE)
        self.amid, self.slow = [decision], slow * SECOND
        for symbols, minute in (("ABC", self.minute - 1), ("AB", self.minute)):
            self.deliver(Message.of(*(bar(symbol, minute) for symbol in symbols), topic="t/bars/1m"))
        self.go()

    @rule(symbol=st.sampled_from("AD"), ago=st.integers(0, 20), count=st.integers(1, 8))
    def a_warm_up(self, symbol, ago, count):
        """Bars of the history are put into the windows."""
        last = self.minute - ago
        bars = tuple(plain(bar(symbol, minute)) for minute in range(last - count, last + 1))
        warmth = Warmth(f"{symbol} {last} {count}", count, bars)
        self.decisions.append(Decision(Kind.WARMUP, warmth.encode(), warmth.event))
        self.go()

    @rule(
        name=st.sampled_from(["append", "settle", "mark"]),
        when=st.sampled_from(["before", "after"]),
        count=st.integers(1, 3),
    )
    def the_power_will_fail(self, name, when, count):
        """The power will go off right before or after one of the coming commits."""
        self.power = (name, when, count)

    @rule(
        name=st.sampled_from(["append", "settle"]),
        when=st.sampled_from(["before", "after"]),
        count=st.integers(1, 2),
        symbols=st.sampled_from(["ABC", "CB", "A"]),
        together=st.booleans(),
        wait=st.sampled_from([0, 0, 50]),
    )
    def the_power_fails_at_a_group(self, name, when, count, symbols, together, wait):
        """A minute closes, and the power goes off when its bars or its group are written."""
        self.pass_time(START + (self.minute + 1) * MINUTE)
        self.power = (name, when, count)
        closed = [bar(symbol, self.minute) for symbol in symbols]
        if together:
            self.deliver(Message.of(*closed, topic="t/bars/1m"))
        else:
            for b in closed:
                self.deliver(Message.of(b))
        self.go()
        self.pass_time(self.feed.time + wait * SECOND)
        self.power = None

    @rule(minutes=st.sampled_from([0, 1, 3, 10]), commits=st.sampled_from([0, 0, 1, 2, 3, 4, 6]))
    def what_is_old_leaves(self, minutes, commits):
        """A compaction keeps so many minutes; it may be killed after some of its commits."""
        self.look()
        self.note_records()
        done = 0

        def rest():
            nonlocal done
            done += 1
            if done == commits:
                raise Crash

        with suppress(Crash):
            compact(self.file.parent, self.feed.time, minutes * MINUTE, (), rest)

    @rule(seconds=st.sampled_from([0, 5, 60, 200]))
    def the_power_fails(self, seconds):
        """The power goes off while nothing is being written, for a while."""
        self.feed.time += seconds * SECOND
        self.crash()

    @rule()
    def the_connection_is_lost(self):
        """The broker sends again what it saw no acknowledgement of."""
        self.feed.send_again()

    @rule(
        faults=st.lists(st.sampled_from(["none", "refused", "lost before", "lost after"]), max_size=6),
    )
    def the_courier_delivers(self, faults):
        """Some of the outbox is published; some is refused, or lost on one of the two ways."""
        self.subscriber.faults = deque(faults)
        try:
            self.loop.run_until_complete(self.courier._deliver())
        except Crash:
            self.crash()

    # What must hold.

    @invariant()
    def what_is_acknowledged_is_committed(self):
        """What was acknowledged is in the journal as often, its fault in the outbox: others can read both."""
        self.look()
        for message, times in self.feed.known.items():
            good, bad = self.wanted[message]
            [(found,)] = self.reader.execute(
                "SELECT COUNT(*) FROM record WHERE topic = ? AND payload = ? AND seq > ?",
                (message.topic, message.payload, max(self.records, default=0)),
            )
            before = Message(message.topic, message.payload)
            found += sum(Message(r.topic, r.payload) == before for r in self.records.values())
            assert found >= times if good else found == 0
            assert bad is None or (message.topic, bad) in self.letters

    @invariant()
    def what_is_told_is_told_once(self):
        """A group ends once; a symbol is in one group of a close; each of its signals is there."""
        self.look()
        if len(self.told) == self.judged:
            return
        self.judged = len(self.told)
        assert len({m.id for m in self.told}) == len(self.told)
        ended = Counter[object]()
        members = Counter[tuple[str, str]]()
        signals = Counter[tuple[str, str]]()
        for message in self.told:
            body = json.loads(message.payload)
            if "/groups/" in message.topic:
                names = [*body["symbols"], *body["withheld"]]
                close = body["close_time"]
                ended[(close, *(names if body["straggler"] else ()))] += 1
                members.update((close, name) for name in names)
                assert all(signals[close, name] == 1 for name in body["symbols"])
            elif "/signals/" in message.topic:
                signals[body["close_time"], body["symbol"]] += 1
        assert set(ended.values()) | set(members.values()) | set(signals.values()) <= {1}

    @invariant()
    def nobody_waits_beyond_the_deadline(self):
        """Whatever was due at the time that the loop saw last has left."""
        source, deadline = self.instance.source, self.instance.pipeline.deadline
        if not source._ready and deadline is not None:
            for group in self.instance.pipeline.batcher._waiting.values():
                assert group.deadline > source._stamped or self.feed.inbox or self.decisions

    @invariant()
    def decisions_are_in_the_journal_before_they_act(self):
        """The model and the settings in force are the journal's last, and nothing is in there twice."""
        [(written,)] = self.reader.execute(
            "SELECT COUNT(*) FROM record WHERE kind NOT IN (?, ?, ?)",
            (Kind.BARS, Kind.ADJUSTMENT, Kind.OVERLOAD),
        )
        assert written <= self.decided
        pipeline, source = self.instance.pipeline, self.instance.source
        if source._ready or pipeline.model is None:
            return
        recorded = self.instance.journal.last(Kind.ACTIVATION)
        assert pipeline.model == Champion.decode(recorded.payload).model
        assert pipeline.settings.encode() == self.instance.journal.last(Kind.REVISION).payload

    @invariant()
    def topics_are_delivered_in_order(self):
        """A subscriber gets the messages of a topic in the outbox's order; one may come again, none late."""
        self.look()
        rank = {m.id: n for n, m in enumerate(self.told)}
        for received in self.subscriber.received.values():
            ranks = [rank[m.id] for m in received]
            assert ranks == sorted(ranks)
            assert all(m == self.told[n] for m, n in zip(received, ranks, strict=True))

    @rule()
    def the_replay_says_the_same(self):
        """What the path said so far is what a replay of the journal says first."""
        self.look()
        said, again = path_of(self.told), self.instance.replayed()
        ids = [message.id for message in said]
        first = ids.index(again[0].id) if again and again[0].id in ids else len(said)
        assert again[: len(said) - first] == said[first:]
        assert first == 0 or self.instance.journal.base

    def teardown(self):
        """At the end everything that is due is told, delivered, and replayed to the byte."""
        try:
            self.power = None
            self.go()
            self.pass_time(self.feed.time + 10 * MINUTE)
            self.go()
            self.what_is_acknowledged_is_committed()
            self.what_is_told_is_told_once()
            assert self.feed.unacked == {}
            left = outbox(self.instance.journal)
            ids = {message.id for message in left}
            assert left == [message for message in self.told if message.id in ids]
            self.the_whole_replay_and_that_of_the_rest_say_what_was_told()
            self.every_bar_is_in_its_group()
            self.the_courier_delivers([])
            self.topics_are_delivered_in_order()
            counts = self.instance.journal.outbox_counts()
            received = {m.id for own in self.subscriber.received.values() for m in own}
            assert counts[State.PENDING] == 0
            assert counts[State.DELIVERED] <= len(received)
        finally:
            self.reader.close()
            self.instance.close()
            self.loop.close()
            for patch in self.patches:
                patch.stop()
            self.folder.cleanup()

    def the_whole_replay_and_that_of_the_rest_say_what_was_told(self):
        """All records that ever were give all that was told; those that are left give exactly the rest."""
        self.note_records()
        base, recording = self.instance.journal.base, Recording()
        every = [self.records[seq] for seq in sorted(self.records)]
        shed = {record.payload.decode() for record in every if record.kind == Kind.OVERLOAD}
        opened = Pipeline(lambda model, *_: MODELS[model])
        replay((event for _, event in events(every)), opened, recording, shed=shed)
        assert recording.messages == path_of(self.told)
        pipeline, gone = Pipeline(lambda model, *_: MODELS[model]), 0
        for seq, event in events(every):
            if seq > base:
                break
            for group in pipeline.due(event.time):
                made = pipeline.passed(group) if group.key in shed else pipeline.outcome(group)
                gone += len(list(messages(made)))
            for group in pipeline.take(event):
                made = pipeline.passed(group) if group.key in shed else pipeline.outcome(group)
                gone += len(list(messages(made)))
        assert self.instance.replayed() == recording.messages[gone:]

    def every_bar_is_in_its_group(self):
        """Each bar that was the newest of its symbol, and not stale, is told of in one group of its close."""
        newest, expected = dict[str, int](), Counter[tuple[str, str]]()
        self.note_records()
        for _, event in events(self.records[seq] for seq in sorted(self.records)):
            if not isinstance(event, Arrival | Warmup):
                continue
            for b in event.bars:
                if b.close_time > newest.get(b.symbol, 0):
                    newest[b.symbol] = b.close_time
                    if isinstance(event, Arrival) and event.time <= b.close_time + 2 * MINUTE:
                        expected[to_text(b.close_time), b.symbol] += 1
        bodies = [json.loads(m.payload) for m in self.told if "/groups/" in m.topic]
        told = Counter((b["close_time"], s) for b in bodies for s in (*b["symbols"], *b["withheld"]))
        assert told == expected


def plain(b: Bar) -> Bar:
    """A bar of Python's own numbers."""
    return Bar(b.symbol, b.close_time, *map(float, b.values))


def test_whatever_happens_every_promise_holds():
    """Bars, bad messages, adjustments, decisions, late timers, lost connections and crashes in any order."""
    run_state_machine_as_test(DaemonMachine, settings=settings(max_examples=200, stateful_step_count=40))
