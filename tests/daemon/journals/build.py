"""`python -m tests.daemon.journals.build`: the golden journals, one of each version there was.

Each is written by the statements of its own version, which stand here and never change: a journal that is out
there looks so. Its outbox holds what the path said then. A new version gets a function of its own; the files
of older ones stay as they are.
"""

import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import msgspec

from barcast.backtest.replay import Recording, replay
from barcast.daemon.events import events
from barcast.daemon.journal import Record
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.wire import Outgoing, encode_bars
from barcast.models import Bar
from tests.fakes import MINUTE, START, Spread, bar

HERE = Path(__file__).parent
PAGE = 1024
"""Bytes of a page: the files are in git."""
FIRST = """
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
SECOND = """
CREATE TABLE base (one INTEGER PRIMARY KEY CHECK (one = 1), seq INTEGER NOT NULL);
INSERT INTO base VALUES (1, 0);
CREATE TABLE snapshot (seq INTEGER PRIMARY KEY, size INTEGER NOT NULL);
CREATE TABLE snapshot_part (
  seq INTEGER NOT NULL, part INTEGER NOT NULL, body BLOB NOT NULL, PRIMARY KEY (seq, part)
);
"""
SETTINGS = {
    "root": "t",
    "timeframe": "1m",
    "calendar": "24x7",
    "calendars": {},
    "symbols": ["A", "B"],
    "max_wait": 10 * 10**9,
    "max_jump": 0.3,
    "sampler": None,
    "steps": None,
    "strategies": [{"kind": "median-drift", "name": "drift", "params": {}}],
}
CHAMPION = {"model": "spread", "fingerprint": "numpy", "window": 8, "reason": "the configuration names it"}
"""Of the fields that version 1 had: later ones have defaults."""
MINUTES = 8


def rows() -> list[tuple[int, str, str, bytes]]:
    """What came: settings, a model, and bars of two symbols, of which one is late, corrected and absent."""
    found = [
        (START, "revision", "", msgspec.json.encode(SETTINGS)),
        (START, "activation", "", msgspec.json.encode(CHAMPION)),
    ]
    for minute in range(1, MINUTES + 1):
        for symbol in ("A", "B"):
            if (symbol, minute) == ("B", 5):
                continue
            b = bar(symbol, minute)
            body = encode_bars([Bar(b.symbol, b.close_time, *map(float, b.values))])
            found.append((START + minute * MINUTE + 10**9, "bars", f"t/bars/1m/{symbol}", body))
    return found


def said(records: Sequence[tuple[int, str, str, bytes]]) -> list[Outgoing]:
    """What the path says to them, computed anew."""
    recording = Recording()
    read = (Record(k, *row) for k, row in enumerate(records, 1))
    replay((event for _, event in events(read)), Pipeline(lambda *_: Spread()), recording)
    return recording.messages


def write(version: int, more: str) -> None:
    """A journal of a version, whose path has come to its end."""
    path = HERE / f"version-{version}.db"
    path.unlink(missing_ok=True)
    records = rows()
    with closing(sqlite3.connect(path)) as db:
        db.executescript(f"PRAGMA page_size = {PAGE}; {FIRST} {more} PRAGMA user_version = {version};")
        db.executemany("INSERT INTO record (time, kind, topic, payload) VALUES (?, ?, ?, ?)", records)
        db.executemany(
            "INSERT INTO outbox (id, topic, payload, retain, expires, state) VALUES (?, ?, ?, ?, ?, 1)",
            [(m.id, m.topic, m.payload, m.retain, m.expires) for m in said(records)],
        )
        db.execute("UPDATE progress SET seq = ?, clock = ?", (len(records), records[-1][0]))
        db.commit()


if __name__ == "__main__":
    write(1, "")
    write(2, SECOND)
