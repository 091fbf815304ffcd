"""The journal: every arrival and decision in order, and the outbox of what is due to subscribers.

SQLite in WAL mode with synchronous=FULL, or PostgreSQL: what a commit returned from survives the process and
the power.
One row holds one accepted message with its raw payload; a replay decodes it by the same code. What is old
leaves: the state of the path after a record, a snapshot, stands for the messages up to it.
"""

import errno
import sqlite3
import stat
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass
from enum import IntEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

import msgspec

from barcast.daemon.postgres import Postgres, Server
from barcast.daemon.room import LEAST_FREE, flush, free_bytes, hand_over
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError, DiskFullError

VERSION = 2
_SCHEMA = """
CREATE TABLE record (
  seq INTEGER PRIMARY KEY, time INTEGER NOT NULL, kind TEXT NOT NULL, topic TEXT NOT NULL,
  payload BLOB NOT NULL
);
CREATE TABLE outbox (
  n INTEGER PRIMARY KEY, id TEXT NOT NULL UNIQUE, topic TEXT NOT NULL, payload BLOB NOT NULL,
  retain INTEGER NOT NULL, expires INTEGER, state INTEGER NOT NULL DEFAULT 0
);
CREATE INDEX outbox_pending ON outbox (topic, n) WHERE state = 0;
CREATE TABLE progress (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL, clock INTEGER NOT NULL);
INSERT INTO progress VALUES (1, 0, 0);
"""
# Version 2. The records up to `base` have left, or are about to; a snapshot is whole once it has a row.
_RETENTION = """
CREATE TABLE IF NOT EXISTS base (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL);
INSERT OR IGNORE INTO base VALUES (1, 0);
CREATE TABLE IF NOT EXISTS snapshot (seq INTEGER PRIMARY KEY, size INTEGER NOT NULL);
CREATE TABLE IF NOT EXISTS snapshot_part (
  seq INTEGER NOT NULL, part INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (seq, part)
);
"""

# The few records that are not bars, found without reading those. Other versions of barcast pass it over.
_DECISIONS = """
CREATE INDEX IF NOT EXISTS record_decisions ON record (kind, seq) WHERE kind <> 'bars';
"""
TABLES = _SCHEMA + _RETENTION + _DECISIONS
"""Of a new journal."""

READ = 200
"""Rows read at once: a record may be an array of a thousand bars."""
BUSY_SECONDS = 60.0
"""How long a commit waits for one of the other process, at most: each of them takes milliseconds."""
NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
"""What SQLite says when the disk, or the quota, is full: here it is an OSError, as of any file."""
NOT_LET = (sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_READONLY)
"""What it says to who may not read, or not write: readers write, too, to tell that they read."""
LEAVING, LEAVING_BYTES = 500, 1_000_000
"""Rows, and bytes, that leave or are written in one commit of a compaction, at most."""

# From topic to topic by the index: grouping would read all that is pending, and a flood of dead letters is
# pending on one topic.
_PENDING = """
WITH RECURSIVE waiting(topic) AS (
  SELECT MIN(topic) FROM outbox WHERE state = 0
  UNION ALL
  SELECT (SELECT MIN(topic) FROM outbox WHERE state = 0 AND topic > waiting.topic)
  FROM waiting WHERE waiting.topic IS NOT NULL
)
SELECT n, id, topic, payload, retain, expires FROM outbox WHERE n IN (
  SELECT (SELECT MIN(n) FROM outbox WHERE state = 0 AND topic = waiting.topic)
  FROM waiting WHERE waiting.topic IS NOT NULL
) ORDER BY n LIMIT ?
"""


_TYPES = (int, int, str, str, bytes)
"""Of the columns of a record."""


class Kind:
    """What a record is."""

    BARS = "bars"
    ADJUSTMENT = "adjustment"
    REVISION = "revision"
    WARMUP = "warmup"
    NEWCOMER = "newcomer"
    ACTIVATION = "activation"
    SHED = "shed"
    OVERLOAD = "overload"
    PAUSE = "pause"
    RESUME = "resume"
    ORDERED = "ordered"
    ANSWERED = "answered"


class State(IntEnum):
    """What became of an outgoing message."""

    PENDING = 0
    DELIVERED = 1
    EXPIRED = 2


@dataclass(frozen=True, slots=True)
class Record:
    """One row: when it was received (nanoseconds), what it is, and the raw message or decision."""

    seq: int
    time: int
    kind: str
    topic: str
    payload: bytes


@dataclass(frozen=True, slots=True)
class Progress:
    """The last record whose outcomes are in the outbox, and the time up to which groups were released."""

    seq: int
    clock: int


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The state of the path right after a record."""

    seq: int
    state: bytes


@dataclass(frozen=True, slots=True)
class Queued:
    """A message of the outbox that is not delivered yet."""

    n: int
    message: Outgoing


Place = Path | Server
"""Where a journal is: a file, or a schema on a server."""


def exists(place: Place) -> bool:
    """Whether there is a journal.

    Raise ConfigError for a file that may not be looked at, JournalLostError when its server cannot say.
    """
    return Postgres.exists(place) if isinstance(place, Server) else _is_file(place)


def _is_file(path: Path) -> bool:
    try:
        return stat.S_ISREG(path.stat().st_mode)
    except (FileNotFoundError, NotADirectoryError, ValueError):  # no path has such characters
        return False
    except OSError as error:
        refused = isinstance(error, PermissionError)
        remedy = "ask as the user of the daemon" if refused else "name another state_dir"
        raise ConfigError(f"{path}: {error.strerror}; {remedy}") from error


class Journal:
    """Reads and writes one journal. Not for several threads at once.

    `readonly` opens an existing journal, also while a daemon is writing it. An older file is taken over where
    it is opened to be written, and a copy of it, named by its version, stays beside it. The state is the
    connection, and the last number of an append that failed: in a server's journal it may have been committed
    all the same.
    """

    def __init__(self, place: Place, *, readonly: bool = False) -> None:
        self.place = place
        self._tried: int | None = None
        self._db: _Sqlite | Postgres
        if isinstance(place, Server):
            self._db = Postgres(place, TABLES, VERSION, readonly=readonly)
        else:
            self._db = _open(place, readonly)

    def append(
        self, records: Sequence[tuple[int, str, str, bytes]], outgoing: Sequence[Outgoing] = ()
    ) -> list[int]:
        """Write records (time, kind, topic, payload) and messages in one commit; return the numbers.

        One that failed is to be repeated before any other: if it was committed, nothing is written again.
        """
        with self._db.transaction() as db:
            if (seqs := self._done(db, records)) is None:
                seqs = self._insert(db, records)
                _enqueue(db, outgoing)
        self._tried = None
        return seqs

    def settle(self, progress: Progress, outgoing: Sequence[Outgoing]) -> None:
        """Put messages into the outbox and note how far the path has come, in one commit."""
        with self._db.transaction() as db:
            _enqueue(db, outgoing)
            _come(db, progress)

    def shed(
        self, time: int, records: Sequence[tuple[int, str, str, bytes]], outgoing: Sequence[Outgoing]
    ) -> None:
        """Append, behind the record that all before it is done with at `time`, unforecast, in one commit.

        That record holds the progress until then. What is said of a failed `append` holds here, too.
        """
        with self._db.transaction() as db:
            began = msgspec.json.encode(Progress(*_one(db, "SELECT seq, clock FROM progress")))
            all_ = [(time, Kind.SHED, "", began), *records]
            if self._done(db, all_) is None:
                _come(db, Progress(self._insert(db, all_)[0], time))
                _enqueue(db, outgoing)
        self._tried = None

    def mark(self, states: Iterable[tuple[int, State]]) -> None:
        """Record what became of messages: (number in the outbox, state)."""
        became: dict[State, list[int]] = {}
        for n, state in states:
            became.setdefault(state, []).append(n)
        with self._db.transaction() as db:
            for state, numbers in became.items():
                for first in range(0, len(numbers), READ):
                    part = numbers[first : first + READ]
                    places = ", ".join("?" * len(part))
                    db.execute(f"UPDATE outbox SET state = ? WHERE n IN ({places})", [int(state), *part])

    def progress(self) -> Progress:
        """How far the path had come at the last commit."""
        with self._db.reading():
            row = self._db.execute("SELECT seq, clock FROM progress").fetchone()
        if row is None or {*map(type, row)} != {int}:
            raise _damaged(self.place, f"its progress is {row}")
        return Progress(*row)

    def records(self, after: int = 0, upto: int | None = None) -> Iterator[Record]:
        """Records in order, those numbered above `after` and not above `upto`."""
        limit = upto if upto is not None else (1 << 62)
        while True:
            with self._db.reading():
                rows = self._db.execute(
                    "SELECT seq, time, kind, topic, payload FROM record WHERE seq > ? AND seq <= ? "
                    "ORDER BY seq LIMIT ?",
                    (after, limit, READ),
                ).fetchall()
            for row in rows:
                yield self._record(row)
            if len(rows) < READ:
                return
            after = rows[-1][0]

    def decisions(self, upto: int) -> Iterator[Record]:
        """The records up to a number that are not bars, in order: they stay when bars leave."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT seq, time, kind, topic, payload FROM record "
                "WHERE seq <= ? AND kind <> 'bars' ORDER BY seq",
                (upto,),
            ).fetchall()
        return map(self._record, rows)

    def of_kind(self, kind: str, after: int = 0) -> Iterator[Record]:
        """All records of a kind that is not bars, in order, those numbered above `after`."""
        with self._db.reading():
            rows = self._db.execute(
                "SELECT seq, time, kind, topic, payload FROM record "
                "WHERE kind = ? AND kind <> 'bars' AND seq > ? ORDER BY seq",
                (kind, after),
            ).fetchall()
        return map(self._record, rows)

    def last(self, kind: str, upto: int = 1 << 62) -> Record | None:
        """The newest record of a kind that is not bars, of those up to a number."""
        with self._db.reading():
            row = self._db.execute(
                "SELECT seq, time, kind, topic, payload FROM record "
                # + 0: else a server may think it quicker to go back through all bars to the first one
                "WHERE kind = ? AND kind <> 'bars' AND seq <= ? ORDER BY seq + 0 DESC LIMIT 1",
                (kind, upto),
            ).fetchone()
        return None if row is None else self._record(row)

    def last_time(self) -> int:
        """The time of the newest record, 0 in an empty journal: times never go back."""
        with self._db.reading():
            row = self._db.execute("SELECT time FROM record ORDER BY seq DESC LIMIT 1").fetchone()
        return int(row[0]) if row else 0

    def last_seq(self) -> int:
        """The number of the newest record, which never leaves; 0 in an empty journal."""
        with self._db.reading():
            return _last(self._db)

    @property
    def base(self) -> int:
        """The number up to which records have left: the snapshot after it stands for them. 0: none have."""
        if not self._db.compacted:
            return 0
        with self._db.reading():
            row = self._db.execute("SELECT seq FROM base").fetchone()
        if row is None or type(row[0]) is not int:
            raise _damaged(self.place, f"its base is {row}")
        return row[0]

    def snapshot(self, upto: int) -> Snapshot | None:
        """The newest snapshot after a record that is not above `upto`."""
        if not self._db.compacted:
            return None
        with self._db.reading():
            row = self._db.execute(
                "SELECT seq, size FROM snapshot WHERE seq <= ? ORDER BY seq DESC LIMIT 1", (upto,)
            ).fetchone()
            if row is None:
                return None
            parts = self._db.execute("SELECT body FROM snapshot_part WHERE seq = ? ORDER BY part", row[:1])
            state = b"".join(body for (body,) in parts)
        if len(state) != row[1]:
            raise ConfigError(
                f"{self.place}: the snapshot after record {row[0]} is damaged ({len(state)} of {row[1]} "
                "bytes); restore a copy"
            )
        return Snapshot(row[0], state)

    def snapshots(self) -> list[tuple[int, int]]:
        """Number and time of the record that each snapshot was taken after, oldest first."""
        if not self._db.compacted:
            return []
        with self._db.reading():
            return self._db.execute(
                "SELECT record.seq, record.time FROM snapshot JOIN record ON record.seq = snapshot.seq "
                "ORDER BY record.seq"
            ).fetchall()

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """Let all that is read inside be of one moment, whatever others write meanwhile."""
        with self._db.one_moment():
            yield

    def write(self) -> None:
        """Change nothing, in a commit: it fails where none can be made."""
        with self._db.transaction() as db:
            db.execute("UPDATE progress SET seq = seq")

    # The verbs of a compaction. Each commit is small, and `rest` is called after it, so that those of a
    # running daemon need not wait; none is fsynced, as all can be done again.

    def begin_compaction(self) -> None:
        """Make commits without an fsync from now on. Raise ConfigError where a second one can be told of."""
        self._db.relax()

    def put_snapshot(self, snapshot: Snapshot, rest: Callable[[], None]) -> None:
        """Write a snapshot piece by piece; it counts when all of it is there."""
        seq, state = snapshot.seq, snapshot.state
        for part, start in enumerate(range(0, len(state), LEAVING_BYTES)):
            with self._db.transaction() as db:
                if part == 0:
                    db.execute("DELETE FROM snapshot WHERE seq = ?", (seq,))
                piece = state[start : start + LEAVING_BYTES]
                db.execute(
                    "INSERT INTO snapshot_part VALUES (?, ?, ?) "
                    "ON CONFLICT (seq, part) DO UPDATE SET body = excluded.body",
                    (seq, part, piece),
                )
            rest()
        with self._db.transaction() as db:
            last = -(-len(state) // LEAVING_BYTES)
            db.execute("DELETE FROM snapshot_part WHERE seq = ? AND part >= ?", (seq, last))
            db.execute(
                "INSERT INTO snapshot VALUES (?, ?) ON CONFLICT (seq) DO UPDATE SET size = excluded.size",
                (seq, len(state)),
            )
        rest()

    def rebase(self, base: int, kept: Collection[int]) -> None:
        """Let the snapshot after `base` stand for the records up to it, and forget all that are not kept."""
        with self._db.transaction() as db:
            db.execute("UPDATE base SET seq = ?", (base,))
            found = db.execute("SELECT seq FROM snapshot").fetchall()
            db.executemany("DELETE FROM snapshot WHERE seq = ?", [row for row in found if row[0] not in kept])

    def drop_snapshots(self, rest: Callable[[], None]) -> None:
        """Remove the pieces of snapshots that do not count."""
        rows = self._db.execute(
            "SELECT seq, part FROM snapshot_part WHERE seq NOT IN (SELECT seq FROM snapshot)"
        ).fetchall()
        for row in rows:
            with self._db.transaction() as db:
                db.execute("DELETE FROM snapshot_part WHERE seq = ? AND part = ?", row)
            rest()

    def drop_bars(self, rest: Callable[[], None]) -> int:
        """Remove the messages with bars before the base; return how many.

        The last record before the base stays in its place: numbers are never given twice.
        """
        count = 0
        while True:
            rows = self._db.execute(
                "SELECT seq, LENGTH(payload) FROM record WHERE seq < ? AND kind = ? ORDER BY seq LIMIT ?",
                (self.base, Kind.BARS, LEAVING),
            ).fetchall()
            if not rows:
                return count
            for first, last in pairwise(_portions(rows)):
                with self._db.transaction() as db:
                    count += db.execute(
                        "DELETE FROM record WHERE seq >= ? AND seq < ? AND kind = ?", (first, last, Kind.BARS)
                    ).rowcount
                rest()

    def shorten(self, seq: int, payload: bytes) -> None:
        """Put another payload into a record, the bars of which are in a snapshot."""
        with self._db.transaction() as db:
            db.execute("UPDATE record SET payload = ? WHERE seq = ?", (payload, seq))

    def drop_messages(self, before: int, rest: Callable[[], None]) -> int:
        """Remove what was delivered or expired from the outbox, up to the first that was valid at `before`.

        The last message stays in its place. Return how many were removed.
        """
        row = self._db.execute(
            "SELECT n FROM outbox WHERE expires > ? ORDER BY n LIMIT 1", (before,)
        ).fetchone() or _one(self._db, "SELECT MAX(n) FROM outbox")
        end, count, first = row[0] or 0, 0, 0
        while True:
            rows = self._db.execute(
                "SELECT n, LENGTH(payload) FROM outbox WHERE n >= ? AND n < ? AND state != ? "
                "ORDER BY n LIMIT ?",
                (first, end, State.PENDING, LEAVING),
            ).fetchall()
            if not rows:
                return count
            for low, high in pairwise(_portions(rows)):
                with self._db.transaction() as db:
                    count += db.execute(
                        "DELETE FROM outbox WHERE n >= ? AND n < ? AND state != ?", (low, high, State.PENDING)
                    ).rowcount
                rest()
            first = rows[-1][0] + 1

    def pending(self, limit: int) -> list[Queued]:
        """The oldest undelivered message of each topic, at most `limit` of them, oldest first."""
        with self._db.reading():
            rows = self._db.execute(_PENDING, (limit,)).fetchall()
        return [Queued(n, Outgoing(i, t, p, bool(r), e)) for n, i, t, p, r, e in rows]

    def sent(self, prefix: str, rows: int) -> Iterator[tuple[str, bytes]]:
        """Topic and payload of what went out under topics that begin with `prefix`, newest first.

        Only the last `rows` messages of the outbox are looked at.
        """
        with self._db.reading():
            found = self._db.execute(
                "SELECT topic, payload FROM outbox WHERE n > (SELECT COALESCE(MAX(n), 0) FROM outbox) - ? "
                "AND topic >= ? AND topic < ? ORDER BY n DESC",
                (rows, prefix, prefix + "\U0010ffff"),
            )
            yield from found

    def told(self, start: int = 0) -> Iterator[tuple[str, bytes]]:
        """Topic and payload of the messages of the outbox that are numbered from `start` on, in order."""
        while True:
            with self._db.reading():
                rows = self._db.execute(
                    "SELECT n, topic, payload FROM outbox WHERE n >= ? ORDER BY n LIMIT ?", (start, READ)
                ).fetchall()
            for _, topic, payload in rows:
                yield topic, payload
            if len(rows) < READ:
                return
            start = rows[-1][0] + 1

    def valid_after(self, moment: int) -> int:
        """The number of a message from which on all were told that were still valid after a moment.

        It is found by halving, as messages stand in the order of their time. 0: it is the first one there is.
        """
        with self._db.reading():
            first, last = _one(self._db, "SELECT MIN(n), MAX(n) FROM outbox")
            low, high = (first or 0), (last or 0) + 1
            while low < high:
                middle = (low + high) // 2
                n, expires = self._db.execute(
                    "SELECT n, expires FROM outbox WHERE n >= ? AND expires IS NOT NULL ORDER BY n LIMIT 1",
                    (middle,),
                ).fetchone() or (high, moment)
                if n >= high or expires > moment:
                    high = middle
                else:
                    low = n + 1
        return low if low != first else 0

    def outbox_counts(self) -> dict[State, int]:
        """How many messages are pending, delivered and expired."""
        rows = self._db.execute("SELECT state, COUNT(*) FROM outbox GROUP BY state")
        return dict.fromkeys(State, 0) | {State(state): count for state, count in rows}

    def waiting(self) -> int:
        """How many messages are pending; by the index, however many were delivered."""
        with self._db.reading():
            return int(_one(self._db, "SELECT COUNT(*) FROM outbox WHERE state = 0")[0])

    def size(self) -> int:
        """Bytes that it takes."""
        return self._db.size()

    def write_as(self, epoch: int) -> None:
        """Make commits under an epoch of the lease from now on: those of a journal on a server."""
        assert isinstance(self._db, Postgres)
        self._db.epoch = epoch

    def close(self) -> None:
        """Close the file, or the connection."""
        self._db.close()

    def _record(self, row: tuple[Any, ...]) -> Record:
        """The record of a row; SQLite itself holds a column to no type, least of all in a damaged file."""
        seq, time, kind, topic, payload = row
        if isinstance(payload, str):  # of an operator who changed it by hand
            payload = payload.encode()
        if (type(seq), type(time), type(kind), type(topic), type(payload)) != _TYPES:
            raise _damaged(
                self.place, f"record {seq!r} is {', '.join(type(value).__name__ for value in row)}"
            )
        return Record(seq, time, kind, topic, payload)

    def _done(self, db: "Database", records: Sequence[object]) -> list[int] | None:
        """The numbers of records, if the append before, which failed, wrote just them."""
        if self._tried is None or self._tried > _last(db):
            return None
        return list(range(self._tried - len(records) + 1, self._tried + 1))

    def _insert(self, db: "Database", records: Sequence[tuple[int, str, str, bytes]]) -> list[int]:
        """Write records; return their numbers."""
        first = _last(db) + 1
        self._tried = first + len(records) - 1 if records else None
        rows = [(seq, *record) for seq, record in enumerate(records, first)]
        db.executemany("INSERT INTO record (seq, time, kind, topic, payload) VALUES (?, ?, ?, ?, ?)", rows)
        return [seq for seq, *_ in rows]


class _Sqlite(sqlite3.Connection):
    """A journal file: how it is read, and how it is committed to."""

    file: Path
    compacted: bool

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Name the file when SQLite finds no database in it, or a damaged one."""
        with _reading(self.file):
            yield

    @contextmanager
    def transaction(self) -> Iterator["_Sqlite"]:
        """BEGIN IMMEDIATE … COMMIT, or ROLLBACK when the body or the commit raises."""
        try:
            self.execute("BEGIN IMMEDIATE")
            yield self
            self.execute("COMMIT")
        except sqlite3.OperationalError as error:
            if (full := _no_room(error)) is not None:
                raise full from error
            raise
        finally:
            if self.in_transaction:  # SQLite may have rolled back by itself, as on a full disk
                self.execute("ROLLBACK")

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """Let all that is read inside be of one moment."""
        with self.reading():
            self.execute("BEGIN")
        try:
            yield
        finally:
            if self.in_transaction:
                with self.reading():
                    self.execute("COMMIT")

    def relax(self) -> None:
        """Make commits without an fsync from now on."""
        self.execute("PRAGMA synchronous = NORMAL")

    def size(self) -> int:
        """Bytes of the files."""
        files = (self.file, self.file.with_name(f"{self.file.name}-wal"))
        return sum(f.stat().st_size for f in files if f.exists())


Database = _Sqlite | Postgres
"""What runs a statement with a `?` for each value, alone or in a transaction."""


def checked(path: Path, proceed: Callable[[], bool]) -> tuple[int, list[str]]:
    """The version of a journal file, and what SQLite says of it: "ok" alone, faults, or nothing.

    It says nothing when it was not to proceed, which it asks now and then. Raise ConfigError for a file that
    this user may not read.
    """
    number = 0
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)) as db:
            number = db.execute("PRAGMA user_version").fetchone()[0]
            db.set_progress_handler(lambda: not proceed(), 1_000)
            return number, [str(row[0]) for row in db.execute("PRAGMA quick_check(3)")]
    except sqlite3.DatabaseError as error:
        if (refused := _not_let(path, error)) is not None:
            raise refused from error
        return number, [] if error.sqlite_errorcode == sqlite3.SQLITE_INTERRUPT else [str(error)]


def _open(path: Path, readonly: bool) -> _Sqlite:
    if readonly and not _is_file(path):
        raise ConfigError(f"{path}: no journal there; give the journal.db of a state directory")
    uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rwc'}"
    with _reading(path):
        db = sqlite3.connect(
            uri,
            uri=True,
            isolation_level=None,
            check_same_thread=False,
            timeout=BUSY_SECONDS,
            factory=_Sqlite,
        )
        version = _one(db, "PRAGMA user_version")[0]
        empty = _one(db, "SELECT COUNT(*) FROM sqlite_master")[0] == 0
    if version == 0 and (readonly or not empty):
        what = "is empty" if empty else "is another program's database"
        raise ConfigError(f"{path}: not a journal (it {what}); move it away or restore a copy")
    if version not in (0, 1, VERSION):
        raise ConfigError(
            f"{path}: journal version {version}, not {VERSION}; use the version of barcast that wrote it, or "
            "move it away"
        )
    db.file, db.compacted = path, version == VERSION or not readonly
    if readonly:
        return db
    with _reading(path):
        if version == 0:
            db.execute("PRAGMA journal_mode = WAL")
        if version not in (0, VERSION):
            _keep(db, path, version)
        if version != VERSION:
            tables = ("" if version else _SCHEMA) + _RETENTION
            db.executescript(f"BEGIN; {tables} PRAGMA user_version = {VERSION}; COMMIT;")
        db.execute(_DECISIONS)
        db.execute("PRAGMA synchronous = FULL")
    return db


def _keep(db: _Sqlite, path: Path, version: int) -> None:
    """Leave a copy of an older journal beside it, as the program that wrote it can read: the way back.

    The copy is on the disk, and whole, before anything is changed. Raise DiskFullError without room.
    """
    copy = path.with_name(f"{path.name}.{version}")
    pages, size = (db.execute(f"PRAGMA {what}").fetchone()[0] for what in ("page_count", "page_size"))
    needed, free = pages * size + LEAST_FREE, free_bytes(path.parent)
    if free < needed:
        raise DiskFullError(
            f"{path}: it is of version {version} and is copied before it is taken over, which needs "
            f"{needed} bytes, and {free} are free: make room on its disk, then start again"
        )
    partial = copy.with_name(f".{copy.name}.partial")
    partial.unlink(missing_ok=True)
    try:
        with closing(sqlite3.connect(partial)) as target:
            db.backup(target)
        hand_over(partial)
        flush(partial)
        partial.replace(copy)
        flush(copy.parent)
    finally:
        for left in (partial, *(partial.with_name(partial.name + end) for end in ("-wal", "-shm"))):
            left.unlink(missing_ok=True)


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the file when SQLite finds no database in it, or a damaged one."""
    try:
        yield
    except sqlite3.DatabaseError as error:
        if (full := _no_room(error)) is not None:
            raise full from error
        raise _not_let(path, error) or _damaged(path, error) from error
    except UnicodeDecodeError as error:  # of a text, or of what SQLite says of one
        raise _damaged(path, error) from error


def _not_let(path: Path, error: sqlite3.DatabaseError) -> ConfigError | None:
    """What to say of a file that is there, and that this user may not open as SQLite does."""
    if getattr(error, "sqlite_errorcode", 0) & 0xFF not in NOT_LET or not path.is_file():
        return None
    return ConfigError(f"{path}: {error}; let this user read and write it, or ask as the user of the daemon")


def _damaged(place: Place, what: object) -> ConfigError:
    return ConfigError(f"{place}: not a journal, or damaged ({what}); move it away or restore a copy")


def _no_room(error: sqlite3.DatabaseError) -> OSError | None:
    """The fault of a full disk, if it is one."""
    full = getattr(error, "sqlite_errorcode", None) in NO_ROOM
    return OSError(errno.ENOSPC, str(error)) if full else None


def _portions(rows: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Bounds of portions of rows (number, bytes), each of at most `LEAVING_BYTES` or one row."""
    size = 0
    for k, (number, length) in enumerate(rows):
        if k == 0 or size + length > LEAVING_BYTES:
            size = 0
            yield number
        size += length
    yield rows[-1][0] + 1


def _one(db: Database, sql: str) -> tuple[Any, ...]:
    """The one row of a statement."""
    [row] = db.execute(sql).fetchall()
    return tuple(row)


def _last(db: Database) -> int:
    """The number of the newest record: it stays in its place, so that none is given twice."""
    return int(_one(db, "SELECT COALESCE(MAX(seq), 0) FROM record")[0])


def _come(db: Database, progress: Progress) -> None:
    """Note how far the path has come."""
    db.execute("UPDATE progress SET seq = ?, clock = ?", (progress.seq, progress.clock))


def _enqueue(db: Database, outgoing: Sequence[Outgoing]) -> None:
    """Add messages; one whose id is there already was computed before a crash and is not sent twice."""
    if outgoing:
        first = int(_one(db, "SELECT COALESCE(MAX(n), 0) FROM outbox")[0]) + 1
        db.executemany(
            "INSERT INTO outbox (n, id, topic, payload, retain, expires) VALUES (?, ?, ?, ?, ?, ?) "
            "ON CONFLICT (id) DO NOTHING",
            [(n, m.id, m.topic, m.payload, m.retain, m.expires) for n, m in enumerate(outgoing, first)],
        )
