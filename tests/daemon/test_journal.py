"""The journal: what was committed is there, once, in order."""

import sqlite3
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pg8000.exceptions import DatabaseError

from barcast.daemon.journal import Journal, Kind, Progress, State, exists
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError
from tests.postgres import quick

over_both = pytest.mark.usefixtures("each_journal")


def message(n):
    return Outgoing(f"id{n}", f"t/{n}", b"payload", True, 10)


@pytest.fixture
def journal(tmp_path, each_journal):
    opened = Journal(tmp_path / "journal.db")
    yield opened
    opened.close()


def test_records_come_back_in_order(journal):
    """Records are numbered from one in the order in which they were appended."""
    assert journal.append([(5, Kind.BARS, "a", b"1"), (6, Kind.BARS, "b", b"2")]) == [1, 2]
    assert journal.append([(7, Kind.REVISION, "", b"3")]) == [3]
    assert [(r.seq, r.time, r.kind, r.topic, r.payload) for r in journal.records(after=1)] == [
        (2, 6, "bars", "b", b"2"),
        (3, 7, "revision", "", b"3"),
    ]
    assert journal.last(Kind.REVISION).seq == 3
    assert journal.last_time() == 7


@pytest.mark.parametrize(
    ("what", "remedy"),
    [
        (PermissionError(13, "Permission denied"), "Permission denied; ask as the user of the daemon"),
        (OSError(36, "File name too long"), "File name too long; name another state_dir"),
    ],
)
def test_file_that_cannot_be_looked_at_is_a_fault(tmp_path, monkeypatch, what, remedy):
    """Whoever may not see whether there is a journal gets a sentence, not that there is none."""

    def refused(path, **_):
        raise what

    monkeypatch.setattr(Path, "stat", refused)
    for look in (exists, lambda path: Journal(path, readonly=True)):
        with pytest.raises(ConfigError, match=rf"journal\.db: {remedy}"):
            look(tmp_path / "journal.db")


@pytest.mark.parametrize(
    ("code", "what"),
    [
        (sqlite3.SQLITE_CANTOPEN, "unable to open database file"),
        (sqlite3.SQLITE_READONLY_DIRECTORY, "attempt to write a readonly database"),
    ],
)
def test_file_that_cannot_be_opened_is_not_called_damaged(tmp_path, monkeypatch, code, what):
    """It is whole, and its reader the wrong user: nobody is to move it away."""
    Journal(tmp_path / "journal.db").close()

    def refused(*_, **__):
        error = sqlite3.OperationalError(what)
        error.sqlite_errorcode = code
        raise error

    monkeypatch.setattr(sqlite3, "connect", refused)
    with pytest.raises(ConfigError, match=rf"journal\.db: {what}; let this user read and write it"):
        Journal(tmp_path / "journal.db", readonly=True)


def test_message_computed_again_is_not_sent_twice(journal):
    """A message whose id is in the outbox, delivered or not, is not put there again."""
    journal.settle(Progress(1, 5), [message(1), message(2)])
    journal.mark([(1, State.DELIVERED)])
    journal.settle(Progress(2, 6), [message(1), message(2), message(3)])
    assert [q.message.id for q in journal.pending(10)] == ["id2", "id3"]
    assert journal.outbox_counts() == {State.PENDING: 2, State.DELIVERED: 1, State.EXPIRED: 0}
    assert journal.progress() == Progress(2, 6)


def test_failed_commit_leaves_nothing(journal):
    """A commit is all or nothing."""
    with pytest.raises((sqlite3.Error, DatabaseError)):
        journal.append([(5, Kind.BARS, "a", b"1"), (6, None, "b", b"2")])
    assert list(journal.records()) == []


@over_both
def test_state_survives_closing(tmp_path):
    """What was committed is there after opening the file again, also for a second reader."""
    first = Journal(tmp_path / "journal.db")
    first.append([(5, Kind.BARS, "a", b"1")], [message(1)])
    reader = Journal(tmp_path / "journal.db", readonly=True)
    assert [r.payload for r in reader.records()] == [b"1"]
    reader.close()
    first.close()
    again = Journal(tmp_path / "journal.db")
    assert [q.message for q in again.pending(10)] == [message(1)]
    again.close()


def test_foreign_files_are_refused_by_name(tmp_path):
    """A file that is no journal, or of another version, is named in one sentence."""
    (tmp_path / "text.db").write_text("no database at all, just some text that is long enough")
    with pytest.raises(ConfigError, match=r"text\.db: not a journal"):
        Journal(tmp_path / "text.db")
    db = sqlite3.connect(tmp_path / "newer.db")
    db.execute("PRAGMA user_version = 99")
    db.close()
    with pytest.raises(ConfigError, match="journal version 99"):
        Journal(tmp_path / "newer.db")
    with pytest.raises(ConfigError, match="no journal there"):
        Journal(tmp_path / "absent.db", readonly=True)


@over_both
@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.lists(st.tuples(st.sampled_from("abcd"), st.booleans()), max_size=30), st.integers(1, 5))
def test_pending_is_the_oldest_of_each_topic(rows, limit):
    """What is handed out is the oldest undelivered message of each topic, oldest first, at most so many."""
    with TemporaryDirectory() as folder:
        journal = quick(Journal(Path(folder) / "journal.db"))
        told = [Outgoing(str(k), topic, b"", False, None) for k, (topic, _) in enumerate(rows)]
        journal.append([], told)
        journal.mark([(k + 1, State.DELIVERED) for k, (_, done) in enumerate(rows) if done])
        oldest = {}
        for k, (topic, done) in enumerate(rows):
            if not done:
                oldest.setdefault(topic, k + 1)
        assert [q.n for q in journal.pending(limit)] == sorted(oldest.values())[:limit]
        journal.close()


@over_both
def test_decisions_are_found_without_reading_bars(tmp_path):
    """A journal of hundred million bars would be read for minutes: the server would seem lost."""
    with closing(Journal(tmp_path / "journal.db")) as journal:
        db, plans = journal._db, []
        kinds = (Kind.ACTIVATION, *[Kind.BARS] * 9999, Kind.WARMUP)
        journal.append([(5, kind, "", b"1") for kind in kinds])
        db.execute("ANALYZE record")
        explain = "EXPLAIN QUERY PLAN" if isinstance(db, sqlite3.Connection) else "EXPLAIN"

        def explained(sql, values):
            plans.append(str(db.execute(f"{explain} {sql}", values).fetchall()))
            return db.execute(sql, values)

        journal._db = SimpleNamespace(execute=explained, reading=db.reading)
        journal.last(Kind.WARMUP)
        journal.of_kind(Kind.ACTIVATION)
        journal._db = db
        assert len(plans) == 2
        assert all("record_decisions" in plan for plan in plans), plans
