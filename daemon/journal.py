"""The journal: every arrival and decision in order, and the outbox of what is due to subscribers.

SQLite in WAL mode with synchronous=FULL: what a commit returned from survives the process and the power.
One row holds one accepted message with its raw payload; a replay decodes it by the same code.
"""

import sqlite3
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError

VERSION = 1
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


class Kind:
    """What a record is."""

    BARS = "bars"
    ADJUSTMENT = "adjustment"
    REVISION = "revision"
    WARMUP = "warmup"
    ACTIVATION = "activation"


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
class Queued:
    """A message of the outbox that is not delivered yet."""

    n: int
    message: Outgoing


class Journal:
    """Reads and writes one journal file. Not for several threads at once.

    `readonly` opens an existing journal, also while a daemon is writing it.
    """

    def __init__(self, path: Path, *, readonly: bool = False) -> None:
        if readonly and not path.is_file():
            raise ConfigError(f"{path}: no journal there; give the journal.db of a state directory")
        self.path = path
        uri = f"{path.absolute().as_uri()}?mode={'ro' if readonly else 'rwc'}"
        with self._reading():
            self._db = sqlite3.connect(uri, uri=True, isolation_level=None, check_same_thread=False)
            version = self._db.execute("PRAGMA user_version").fetchone()[0]
            empty = self._db.execute("SELECT COUNT(*) FROM sqlite_master").fetchone()[0] == 0
        if version == 0 and empty and not readonly:
            self._db.execute("PRAGMA journal_mode = WAL")
            self._db.executescript(f"BEGIN; {_SCHEMA} PRAGMA user_version = {VERSION}; COMMIT;")
        elif version == 0:
            what = "is empty" if empty else "is another program's database"
            raise ConfigError(f"{path}: not a journal (it {what}); move it away or restore a copy")
        elif version != VERSION:
            raise ConfigError(
                f"{path}: journal version {version}, not {VERSION}; use the version of barcast that wrote "
                "it, or move it away"
            )
        self._db.execute("PRAGMA synchronous = FULL")

    def append(
        self, records: Sequence[tuple[int, str, str, bytes]], outgoing: Sequence[Outgoing] = ()
    ) -> list[int]:
        """Write records (time, kind, topic, payload) and messages in one commit; return the numbers."""
        with _transaction(self._db) as db:
            seqs = [
                db.execute("INSERT INTO record (time, kind, topic, payload) VALUES (?, ?, ?, ?)", r).lastrowid
                or 0
                for r in records
            ]
            _enqueue(db, outgoing)
        return seqs

    def settle(self, progress: Progress, outgoing: Sequence[Outgoing]) -> None:
        """Put messages into the outbox and note how far the path has come, in one commit."""
        with _transaction(self._db) as db:
            _enqueue(db, outgoing)
            db.execute("UPDATE progress SET seq = ?, clock = ?", (progress.seq, progress.clock))

    def mark(self, states: Iterable[tuple[int, State]]) -> None:
        """Record what became of messages: (number in the outbox, state)."""
        with _transaction(self._db) as db:
            db.executemany("UPDATE outbox SET state = ? WHERE n = ?", [(int(s), n) for n, s in states])

    def progress(self) -> Progress:
        """How far the path had come at the last commit."""
        with self._reading():
            return Progress(*self._db.execute("SELECT seq, clock FROM progress").fetchone())

    def records(self, after: int = 0, upto: int | None = None) -> Iterator[Record]:
        """Records in order, those numbered above `after` and not above `upto`."""
        limit = upto if upto is not None else (1 << 62)
        with self._reading():
            rows = self._db.execute(
                "SELECT seq, time, kind, topic, payload FROM record WHERE seq > ? AND seq <= ? ORDER BY seq",
                (after, limit),
            )
            for row in rows:
                yield Record(*row)

    def last(self, kind: str) -> Record | None:
        """The newest record of a kind."""
        with self._reading():
            row = self._db.execute(
                "SELECT seq, time, kind, topic, payload FROM record WHERE kind = ? ORDER BY seq DESC LIMIT 1",
                (kind,),
            ).fetchone()
        return None if row is None else Record(*row)

    def last_time(self) -> int:
        """The time of the newest record, 0 in an empty journal."""
        with self._reading():
            return int(self._db.execute("SELECT COALESCE(MAX(time), 0) FROM record").fetchone()[0])

    def pending(self, limit: int) -> list[Queued]:
        """The oldest undelivered message of each topic, at most `limit` of them, oldest first."""
        with self._reading():
            rows = self._db.execute(_PENDING, (limit,)).fetchall()
        return [Queued(n, Outgoing(i, t, p, bool(r), e)) for n, i, t, p, r, e in rows]

    def outbox_counts(self) -> dict[State, int]:
        """How many messages are pending, delivered and expired."""
        rows = self._db.execute("SELECT state, COUNT(*) FROM outbox GROUP BY state")
        return dict.fromkeys(State, 0) | {State(state): count for state, count in rows}

    def waiting(self) -> int:
        """How many messages are pending; by the index, however many were delivered."""
        with self._reading():
            return int(self._db.execute("SELECT COUNT(*) FROM outbox WHERE state = 0").fetchone()[0])

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextmanager
    def _reading(self) -> Iterator[None]:
        """Name the file when SQLite finds no database in it, or a damaged one."""
        try:
            yield
        except sqlite3.DatabaseError as error:
            raise ConfigError(
                f"{self.path}: not a journal, or damaged ({error}); move it away or restore a copy"
            ) from error


class _transaction:  # noqa: N801
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK when the body raises."""

    def __init__(self, db: sqlite3.Connection) -> None:
        self.db = db

    def __enter__(self) -> sqlite3.Connection:
        self.db.execute("BEGIN IMMEDIATE")
        return self.db

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self.db.execute("ROLLBACK" if kind else "COMMIT")


def _enqueue(db: sqlite3.Connection, outgoing: Sequence[Outgoing]) -> None:
    """Add messages; one whose id is there already was computed before a crash and is not sent twice."""
    db.executemany(
        "INSERT INTO outbox (id, topic, payload, retain, expires) VALUES (?, ?, ?, ?, ?) "
        "ON CONFLICT (id) DO NOTHING",
        [(m.id, m.topic, m.payload, m.retain, m.expires) for m in outgoing],
    )
