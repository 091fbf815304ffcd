"""What a run leaves behind, and what it proves: each promise that was broken, as a sentence."""

import json
import sqlite3
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median, quantiles

import msgspec
import polars as pl

from barcast.backtest.verify import verify
from barcast.daemon.bars import read_archive
from barcast.daemon.journal import Kind, State
from barcast.daemon.wire import BarMessage, to_ns
from tests.chaos.feed import Message
from tests.chaos.proxy import Told
from tests.replayed import replay_journal

FRESH_SECONDS = 4.0
"""What a broker took less than that before it was killed or stopped, it may lose, or let expire, itself.

As it is shipped it saves each second or two. With `autosave_on_changes` it would not save what it sent to a
daemon that cannot acknowledge yet, and lose all of that.
"""
PATH = ("signals", "targets", "groups", "backfill")
"""Kinds of topics that a replay computes."""
ONE_EACH = ("signals", "targets")
"""Kinds of topics that have one message for each close."""
SHOWN = 3
"""Examples in a sentence."""


@dataclass(frozen=True, slots=True)
class Record:
    """A record of the journal, without its number."""

    time: int
    kind: str
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Posted:
    """A message of the outbox, without its number."""

    id: str
    topic: str
    payload: bytes


@dataclass
class Evidence:
    """All that was seen.

    `fed` is what the broker took from the feed, and when. By the end of the faults, `gone` is what the daemon
    had acknowledged and did not have, `lost` what the broker had forgotten; both were sent again. `taken` is
    what the daemon acknowledged, `delivered` what the broker acknowledged to it, `seen` what a subscriber
    saw. `records`, `outbox` and `states` are the journal's, by number, also what has left it; `replayed` what
    a replay of it says. `archived` are symbols and closes in the archive, `left` of the bars that are not in
    the journal any more. `broker_down` are the times at which the broker was killed or stopped. `faults`
    counts them by kind, with each that was to be, `ends` the ends of the daemon that are no fault. `said` are
    violations that were noticed on the way. `sent` says when a bar was given to the feed, by symbol and
    close. All times are monotonic.
    """

    fed: dict[Message, float] = field(default_factory=dict)
    gone: set[Message] = field(default_factory=set)
    lost: dict[Message, float] = field(default_factory=dict)
    taken: list[Told] = field(default_factory=list)
    delivered: list[Told] = field(default_factory=list)
    seen: list[tuple[float, str, bytes]] = field(default_factory=list)
    records: dict[int, Record] = field(default_factory=dict)
    outbox: dict[int, Posted] = field(default_factory=dict)
    states: dict[int, State] = field(default_factory=dict)
    replayed: set[Message] = field(default_factory=set)
    archived: set[tuple[str, int]] = field(default_factory=set)
    left: set[tuple[str, int]] = field(default_factory=set)
    broker_down: list[float] = field(default_factory=list)
    faults: Counter[str] = field(default_factory=Counter)
    ends: Counter[str] = field(default_factory=Counter)
    said: list[str] = field(default_factory=list)
    sent: dict[tuple[str, str], float] = field(default_factory=dict)

    def look(self, journal: Path) -> None:
        """Take in a copy of the journal: several must hold the same, but for the bars of warm-ups."""
        with closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)) as db:
            for seq, *rest in db.execute("SELECT seq, time, kind, topic, payload FROM record"):
                record, warmth = Record(*rest), rest[1] in (Kind.WARMUP, Kind.NEWCOMER)
                known = self.records.setdefault(seq, record)
                if known != record and not warmth:
                    self.said.append(f"record {seq} of the journal changed: {known} became {record}")
            for n, i, topic, payload, state in db.execute("SELECT n, id, topic, payload, state FROM outbox"):
                posted = Posted(i, topic, payload)
                if self.outbox.setdefault(n, posted) != posted:
                    self.said.append(f"message {n} of the outbox changed: it became {posted}")
                self.states[n] = State(state)

    def replay(self, journal: Path) -> None:
        """Compute a copy of the journal again, and hold its outbox against that."""
        replayed, found = replay_journal(journal), verify(journal)
        if not found.agrees:
            self.said.append(f"replay of {journal.parent.name}: {found.sentence()}")
        self.replayed |= {(m.topic, m.payload) for m in replayed.messages}

    def read_archive(self, folder: Path, journal: Path) -> None:
        """Note which bars have left the journal, and which are in the archive."""
        with closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)) as db:
            kept = {seq for (seq,) in db.execute("SELECT seq FROM record")}
        gone = (r.payload for n, r in self.records.items() if n not in kept and r.kind == Kind.BARS)
        self.left = {close for payload in gone for close in _closes(payload)}
        frame = read_archive(folder).select("symbol", pl.col("close_time").to_physical())
        self.archived = set(frame.iter_rows())

    def violations(self) -> list[str]:
        """Every promise that was broken."""
        return [*self.said, *self._bars(), *self._identities(), *self._deliveries(), *self._journal()]

    def _bars(self) -> Iterator[str]:
        stored = self.stored | self.refused
        taken = {(told.topic, told.payload) for told in self.taken}
        yield from _broken(
            "messages acknowledged by the daemon, and neither in its journal nor in a dead letter",
            self.gone | (taken - stored),
        )
        yield from _broken(
            "messages acknowledged by a broker that nobody harmed since, and gone",
            (m for m, when in self.lost.items() if when > max(self.broker_down, default=0.0)),
        )
        yield from _broken("messages sent again, and still not in the journal", self.fed.keys() - stored)
        yield from _broken("bars that left the journal and are in no archive", self.left - self.archived)

    def _identities(self) -> Iterator[str]:
        said = {(topic, payload) for _, topic, payload in self.seen if _kind(topic) != "status"}
        said |= {(posted.topic, posted.payload) for posted in self.outbox.values()}
        yield from _broken(
            "ids with different bytes", _twice((_field(payload, "id"), (t, payload)) for t, payload in said)
        )
        yield from _broken(
            "closes with two messages on one topic",
            _twice(
                ((topic, _field(payload, "close_time")), _field(payload, "id"))
                for topic, payload in said
                if _kind(topic) in ONE_EACH
            ),
        )

    def _deliveries(self) -> Iterator[str]:
        seen = {(topic, payload) for _, topic, payload in self.seen}
        places = {(posted.topic, posted.payload): n for n, posted in self.outbox.items()}
        yield from _broken(
            "messages seen by a subscriber, and not in the outbox",
            (m for m in seen if _kind(m[0]) != "status" and m not in places),
        )
        pending = [n for n, state in self.states.items() if state == State.PENDING]
        yield from _broken(
            "messages due and neither delivered nor expired", (self.outbox[n] for n in pending)
        )
        answered = {(told.topic, told.payload): told.time for told in self.delivered}
        for n, state in self.states.items():
            pair = self.outbox[n].topic, self.outbox[n].payload
            if state == State.DELIVERED and pair not in seen and not self._excused(answered.get(pair)):
                yield f"marked as delivered, and no subscriber saw it: {self.outbox[n]}"
        newest: dict[str, int] = {}
        for topic, payload in dict.fromkeys((topic, payload) for _, topic, payload in self.seen):
            place = places.get((topic, payload), -1)
            if 0 <= place < newest.get(topic, -1):
                yield f"out of order on {topic}: number {place} of the outbox after {newest[topic]}"
            newest[topic] = max(place, newest.get(topic, -1))

    def _journal(self) -> Iterator[str]:
        posted = {(p.topic, p.payload) for p in self.outbox.values() if _kind(p.topic) in PATH}
        yield from _broken("messages in the outbox that no replay says", posted - self.replayed)
        yield from _broken("messages of a replay that never were in the outbox", self.replayed - posted)
        times = [record.time for _, record in sorted(self.records.items())]
        if times != sorted(times):
            yield "the stamps of the journal go back"
        yield from _broken(
            "kinds of faults that did not happen", (k for k, n in self.faults.items() if not n)
        )
        if State.DELIVERED not in self.states.values() or not self.taken:
            yield "nothing was acknowledged, or nothing delivered: nothing is shown"

    def _excused(self, when: float | None) -> bool:
        """Whether the broker was killed or stopped soon after it said yes."""
        return when is not None and any(0 <= down - when < FRESH_SECONDS for down in self.broker_down)

    @property
    def stored(self) -> set[Message]:
        """The messages that are, or were, in the journal."""
        return {(record.topic, record.payload) for record in self.records.values()}

    @property
    def refused(self) -> set[Message]:
        """The messages that dead letters name."""
        letters = (p.payload for p in self.outbox.values() if _kind(p.topic) == "deadletter")
        bodies = map(json.loads, letters)
        return {(body["topic"], body["payload"].encode()) for body in bodies}

    def figures(self) -> dict[str, object]:
        """What a person wants to know, by name."""
        path = [n for n, posted in self.outbox.items() if _kind(posted.topic) == "signals"]
        count = Counter(self.states[n] for n in path)
        first: dict[tuple[str, str], float] = {}
        for when, topic, payload in self.seen:
            if _kind(topic) == "signals":
                first.setdefault((topic.split("/")[-1], _field(payload, "close_time")), when)
        late = [when - self.sent[key] for key, when in first.items() if key in self.sent]
        told = {(t.topic, t.payload) for t in self.taken}
        return {
            "messages fed": len(self.fed),
            "acknowledged by the daemon": len(told),
            "acknowledged again": len(self.taken) - len(told),
            "stored": len(self.stored & self.fed.keys()),
            "answered by dead letters": len(self.refused & self.fed.keys()),
            "lost by the broker itself, sent again": len(self.lost),
            "of these, taken long before it was harmed": sum(
                not self._excused(t) for t in self.lost.values()
            ),
            "signals": len(path),
            "signals delivered": count[State.DELIVERED],
            "signals expired": count[State.EXPIRED],
            "seen by the subscriber, with repetitions": sum(_kind(t) == "signals" for _, t, _ in self.seen),
            "bar to signal, p50 and p95 (s)": [round(median(late), 3), round(quantiles(late, n=20)[-1], 3)]
            if len(late) > 1
            else "none",
            "closes in the archive": len({close for _, close in self.archived}),
        }


def _kind(topic: str) -> str:
    """What is published there: the segment after the root."""
    return topic.split("/")[2]


def _field(payload: bytes, name: str) -> str:
    return str(json.loads(payload).get(name))


def _closes(payload: bytes) -> Iterator[tuple[str, int]]:
    """Symbols and closes (nanoseconds) of a message with bars."""
    body = msgspec.json.decode(payload, type=BarMessage | list[BarMessage])
    for bar in body if isinstance(body, list) else [body]:
        yield str(bar.symbol), to_ns(bar.close_time)


def _twice(pairs: Iterable[tuple[object, object]]) -> list[object]:
    """The keys that have more than one value."""
    found: dict[object, set[object]] = defaultdict(set)
    for key, value in pairs:
        found[key].add(value)
    return [key for key, values in found.items() if len(values) > 1]


def _broken(what: str, things: Iterable[object]) -> Iterator[str]:
    """A sentence about things that must not be, if there are any."""
    some = list(things)
    if some:
        yield f"{len(some)} {what}, such as {'; '.join(str(each)[:300] for each in some[:SHOWN])}"


def copy(journal: Path, folder: Path) -> Path:
    """Copy a journal as it is at one moment, also while a daemon writes it; give the models to it."""
    folder.mkdir(parents=True)
    with (
        closing(sqlite3.connect(f"{journal.as_uri()}?mode=ro", uri=True)) as source,
        closing(sqlite3.connect(folder / "journal.db")) as target,
    ):
        source.backup(target)
    (folder / "models").symlink_to(journal.parent / "models")
    return folder / "journal.db"
