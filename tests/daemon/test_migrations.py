"""Journals of every version there was: read, recovered, replayed, taken over, and given back."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from barcast.backtest.replay import Recording, replay
from barcast.daemon import journal as journals
from barcast.daemon.events import events, restore
from barcast.daemon.journal import VERSION, Journal, Progress
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.start import Following
from barcast.models import DiskFullError
from tests.daemon.journals.build import rows, said
from tests.fakes import Spread

GOLDEN = {
    int(path.stem.removeprefix("version-")): path for path in Path(__file__).parent.glob("journals/*.db")
}
Pairs = list[tuple[str, bytes]]


def golden(version: int, folder: Path) -> Path:
    """A copy of a golden journal where a start would look for it."""
    return Path(shutil.copy(GOLDEN[version], folder / "journal.db"))


def outbox(path: Path) -> Pairs:
    """Topics and payloads of what was sent, in order."""
    with closing(sqlite3.connect(path)) as db:
        return [(str(t), bytes(p)) for t, p in db.execute("SELECT topic, payload FROM outbox ORDER BY n")]


def version_of(path: Path) -> int:
    """What a file says of itself."""
    with closing(sqlite3.connect(path)) as db:
        return int(db.execute("PRAGMA user_version").fetchone()[0])


def replayed(path: Path) -> Pairs:
    """Everything that the path says to a journal, which is only read."""
    recording, pipeline = Recording(), Pipeline(lambda *_: Spread())
    with closing(Journal(path, readonly=True)) as journal, journal.one_moment():
        base = restore(journal, pipeline, journal.base)
        replay((event for _, event in events(journal.records(base))), pipeline, recording)
    return [(message.topic, message.payload) for message in recording.messages]


def test_there_is_a_golden_journal_of_each_version() -> None:
    """A new version comes with one, built by the statements that it began with."""
    assert sorted(GOLDEN) == list(range(1, VERSION + 1))


@pytest.mark.parametrize("version", GOLDEN)
def test_golden_journal_is_replayed_to_the_byte(version: int, tmp_path: Path) -> None:
    """As it lies there, by today's program: what was sent then is computed again, and nothing else."""
    path = golden(version, tmp_path)
    assert len(outbox(path)) == 27
    assert replayed(path) == outbox(path) == [(m.topic, m.payload) for m in said(rows())]
    assert version_of(path) == version


@pytest.mark.parametrize("version", GOLDEN)
def test_golden_journal_is_recovered_and_goes_on(version: int, tmp_path: Path) -> None:
    """A start takes it over: nothing is sent twice, what comes now is written, and it has today's version."""
    path = golden(version, tmp_path)
    with closing(Journal(path)) as journal:
        assert Following(journal, Pipeline(lambda *_: Spread())).recover() == []
        [number] = journal.append([rows()[-1]])
        assert number == len(rows()) + 1
        assert journal.progress() == Progress(len(rows()), rows()[-1][0])
    assert version_of(path) == VERSION


def test_older_journal_is_copied_before_it_is_taken_over(tmp_path: Path) -> None:
    """The copy is the older journal, whole and of its version; what a crash left of one is replaced."""
    path, copy = golden(1, tmp_path), tmp_path / "journal.db.1"
    copy.write_text("half a copy")
    (tmp_path / ".journal.db.1.partial").write_text("less than half")
    Journal(path).close()
    assert sorted(each.name for each in tmp_path.iterdir()) == ["journal.db", "journal.db.1"]
    assert (version_of(path), version_of(copy)) == (VERSION, 1)
    assert replayed(copy) == outbox(copy) == outbox(path)
    Journal(path).close()  # a start of today's version copies nothing
    assert version_of(copy) == 1


def test_way_back_and_forward_again(tmp_path: Path) -> None:
    """The copy in the journal's place is what the older program left, and is taken over once more."""
    path, copy = golden(1, tmp_path), tmp_path / "journal.db.1"
    before = outbox(path)
    with closing(Journal(path)) as journal:
        journal.append([rows()[-1]])
    path.rename(tmp_path / "journal.db.2")
    copy.rename(path)
    with closing(sqlite3.connect(path)) as db:
        assert [row[0] for row in db.execute("SELECT name FROM sqlite_master WHERE type = 'table'")] == [
            "record",
            "outbox",
            "progress",
        ]
        assert db.execute("SELECT time, kind, topic, payload FROM record ORDER BY seq").fetchall() == rows()
    assert version_of(path) == 1
    assert replayed(path) == before
    with closing(Journal(path)) as journal:
        assert len(list(journal.records())) == len(rows())
    assert (version_of(path), version_of(copy)) == (VERSION, 1)


def test_nothing_is_taken_over_without_room_for_the_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is too full for the way back leaves all as it was, and says how much is needed."""
    path = golden(1, tmp_path)
    content = path.read_bytes()
    monkeypatch.setattr(journals, "free_bytes", lambda _folder: 1_000_000)
    with pytest.raises(DiskFullError, match=r"version 1 .* needs 10\d{5} bytes, and 1000000 are free"):
        Journal(path)
    assert path.read_bytes() == content
    assert [each.name for each in tmp_path.iterdir()] == ["journal.db"]


def test_journal_is_not_taken_over_when_its_copy_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that fails at the last moment: no half copy, and the journal is still the older one."""
    path = golden(1, tmp_path)

    def fails(_path: Path) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(journals, "flush", fails)
    with pytest.raises(OSError, match="Input/output error"):
        Journal(path)
    assert version_of(path) == 1
    assert [each.name for each in tmp_path.iterdir()] == ["journal.db"]
