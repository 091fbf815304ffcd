"""What is old leaves, and nobody notices: recovery and replay go on from snapshots as from the records."""

import asyncio
import errno
import json
import os
import random
import sqlite3
from contextlib import closing
from pathlib import Path

import msgspec
import polars as pl
import pytest
import structlog
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from barcast.backtest import cli
from barcast.backtest.verify import verify
from barcast.daemon import journal as journal_module
from barcast.daemon import retention
from barcast.daemon.bars import every_bar, known_bars, read_archive
from barcast.daemon.events import Champion, Warmth
from barcast.daemon.history import read_windows, scan
from barcast.daemon.journal import Journal, Kind, Progress, State
from barcast.daemon.pipeline import Pipeline, PipelineState
from barcast.daemon.ports import Activation, Arrival, Declaration, Revision, Warmup
from barcast.daemon.retention import compact, daily
from barcast.daemon.trainer import children
from barcast.daemon.wire import Outgoing, encode_bars, messages
from barcast.models import Adjustment, Bar, ConfigError, DataError, DiskFullError
from tests.checks import open_model, serve, story
from tests.fakes import MINUTE, START, Spread, bar, opening
from tests.fakes import settings as path_settings
from tests.postgres import change, image, put, quick
from tests.replayed import replay_journal
from tests.rim import MINUTELY, SECOND, Instance, World, outbox, path_of

DAY = 86_400 * SECOND
over_both = pytest.mark.usefixtures("each_journal")


def nothing():
    """What a compaction does after each commit, when nobody else is there."""


def plain(b):
    """A bar of Python's own numbers."""
    return Bar(b.symbol, b.close_time, *map(float, b.values))


# The state of the path.


def anything(seed, count=60):
    """Events of every kind in order of time: bars on time, late, twice, corrected; decisions; adjustments."""
    dice, time, found = random.Random(seed), START, [*opening(("A", "B"), 8)]
    for _ in range(count):
        time += dice.choice([0, SECOND, 7 * SECOND, 20 * SECOND, MINUTE])
        minute, symbol = (time - START) // MINUTE, dice.choice("ABCD")
        match dice.randrange(14):
            case 0:
                wait = dice.choice([1, 5, 30]) * SECOND
                event = Revision(time, path_settings(dice.choice([("A", "B"), (), ("C",)]), wait).encode())
            case 1:
                model, window = dice.choice([("spread", 8), ("other", 6), ("long", 20)])
                event = Activation(time, model, "numpy", window)
            case 2:
                event = Declaration(
                    time,
                    Adjustment(symbol, START + (minute - 2) * MINUTE, dice.choice([0.5, 1.0, 2.0]), "split"),
                )
            case 3:
                old = tuple(plain(bar(symbol, m)) for m in range(minute - 6, minute - 1))
                event = Warmup(time, "", old, dice.choice([None, symbol]))
            case _:
                ago, close = dice.choice([0, 0, 0, 0, 1, 2, 5, 70]), dice.choice([None, None, 101.0, 99.0])
                names = dice.sample("ABCD", dice.randint(1, 4))
                event = Arrival(time, tuple(plain(bar(name, minute - ago, close)) for name in names))
        found.append(event)
    return found


MODELS = {"spread": Spread(), "other": Spread("other", window=6), "long": Spread("long", window=20)}


def spoken(pipeline, happened):
    """What the path says to events, and in the end of what still waits."""
    said = []

    def tell(group):
        said.extend(messages(pipeline.outcome(group)))

    for event in happened:
        for group in pipeline.due(event.time):
            tell(group)
        for group in pipeline.take(event):
            tell(group)
    return said


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**6), st.integers(2, 62), st.integers(2, 62))
def test_snapshot_anywhere_changes_nothing(seed, first, second):
    """From a snapshot after any event, taken twice, the path says the same and ends in the same state."""
    story_ = anything(seed)
    whole = Pipeline(lambda model, *_: MODELS[model])
    wanted = spoken(whole, story_)
    said, pipeline, at = [], Pipeline(lambda model, *_: MODELS[model]), 0
    for cut in (*sorted((first, second)), len(story_)):
        said += spoken(pipeline, story_[at:cut])
        state, at = pipeline.state.encode(), cut
        pipeline = Pipeline(lambda model, *_: MODELS[model])
        pipeline.restore(PipelineState.decode(state))
        assert pipeline.state == PipelineState.decode(state)
    assert said == wanted
    assert pipeline.state == whole.state


# Compaction.


def recorded(folder, minutes=range(1, 13), symbols="AB", keep_going=True):
    """A state directory whose daemon took bars for some minutes and delivered what it said."""
    world = World(time=START)
    script = story() if minutes is None else None
    world.script.extend(script or [])
    with closing(Instance(folder / "journal.db", world, open_model)) as instance:
        asyncio.run(instance.run())
        instance.journal.mark([(n, State.DELIVERED) for n in range(1, 10_000)])
        return outbox(instance.journal)


@over_both
def test_compacted_journal_replays_what_it_still_holds(tmp_path):
    """The replay of a journal from which a part left is the rest of the whole replay, to the byte."""
    whole = path_of(recorded(tmp_path, None))
    for minute in (4, 6, 7, 9):
        done = compact(tmp_path, START + minute * MINUTE + 30 * SECOND + DAY, DAY, (), nothing)
        with closing(Instance(tmp_path / "journal.db", World(time=START), open_model)) as instance:
            rest = instance.replayed()
            assert instance.journal.base == done.base > 0
            kinds = [r.kind for r in instance.journal.records() if r.seq < done.base]
            assert Kind.BARS not in kinds
            assert instance.journal.last(Kind.REVISION) is not None
        assert 0 < len(rest) < len(whole)
        assert rest == whole[-len(rest) :]
        said = {json.loads(m.payload)["close_time"] for m in rest if "/groups/" in m.topic}
        assert min(said) >= f"2023-11-14T22:{14 + minute}:00Z"


def open_path(path, *options):
    """The models of the stories, from a store."""
    return open_model(Path(path).name, *options[1:])


@over_both
def test_capture_of_what_left_is_no_difference(tmp_path, monkeypatch):
    """What a subscriber wrote down of closes that have left is counted apart; a wrong byte is still found."""
    monkeypatch.setattr("barcast.daemon.store.open_model", open_path)
    whole = path_of(recorded(tmp_path, None))
    captured = [(m.topic, m.payload) for m in whole]
    file = tmp_path / "journal.db"
    assert replay_journal(file).messages == whole
    assert verify(file, captured=captured).older == 0
    compact(tmp_path, START + 7 * MINUTE + 30 * SECOND + DAY, DAY, (), nothing)
    found = verify(file, captured=captured)
    assert (found.differing, found.missing) == (0, 0)
    assert found.older == len(whole) - len(replay_journal(file).messages) > 0
    assert f"{found.older} are older than what the journal still holds" in found.sentence()
    spoilt = [*captured[:-1], (captured[-1][0], captured[-1][1].replace(b"22:", b"23:"))]
    assert verify(file, captured=spoilt).differing == 1
    assert verify(file, captured=[("t/signals/1m/A", b"no")]).differing == 1


@over_both
def test_outbox_of_a_compacted_journal_holds_what_a_replay_says(tmp_path, monkeypatch):
    """Old messages leave the outbox, too: what is left is compared, and what went first is not missed."""
    monkeypatch.setattr("barcast.daemon.store.open_model", open_path)
    recorded(tmp_path, None)
    compact(tmp_path, START, DAY, (), nothing)
    change(tmp_path / "journal.db", "DELETE FROM outbox WHERE n < 4")  # records stay longer, as of late bars
    assert verify(tmp_path / "journal.db").agrees
    compact(tmp_path, START + 7 * MINUTE + 30 * SECOND + DAY, DAY, (), nothing)
    whole = verify(tmp_path / "journal.db")
    assert (whole.agrees, whole.older > 0) == (True, True)
    change(tmp_path / "journal.db", "DELETE FROM outbox WHERE n <= (SELECT MAX(n) FROM outbox) - 9")
    short = verify(tmp_path / "journal.db")
    assert (short.agrees, short.older, 0 < short.signals < whole.signals) == (True, 0, True)
    change(tmp_path / "journal.db", "DELETE FROM outbox WHERE n = (SELECT MAX(n) FROM outbox) - 4")
    assert not verify(tmp_path / "journal.db").agrees


class Killed(Exception):  # noqa: N818 - kill -9, not an error
    """The compaction is gone."""


def killed_after(commits):
    """A pause in which the compaction is killed after so many commits."""
    left = commits

    def rest():
        nonlocal left
        left -= 1
        if left == 0:
            raise Killed

    return rest


@pytest.fixture
def small(monkeypatch):
    """Commits of a row or some hundred bytes, so that there are many of them."""
    monkeypatch.setattr(journal_module, "LEAVING", 4)
    monkeypatch.setattr(journal_module, "LEAVING_BYTES", 300)


def copied(copy, folder):
    """A state directory with a copy of a journal."""
    put(copy, folder / "journal.db")
    return folder


@over_both
def test_compaction_killed_at_any_commit_changes_no_message(tmp_path, small, each_journal):
    """Whenever a compaction dies, start and replay go on as without it, and the next one ends its work."""
    whole = serve(tmp_path, story(), cutting=True)
    picked = [c for c in whole.cuts if c.what in ("settle at 543.0", "append at 570.0", "settle at 726.0")]
    assert len(picked) == 3
    for cut in picked if each_journal == "sqlite" else picked[1:2]:  # one takes seconds, and is the longest
        commits = 0
        while True:
            commits += 1
            folder = copied(cut.journal, tmp_path / "state")
            try:
                compact(folder, START + 7 * MINUTE, 10 * SECOND, (), killed_after(commits))
            except Killed:
                ended = False
            else:
                ended = True
            with closing(Journal(folder / "journal.db")) as journal:
                left = image(journal)
            rest = serve(folder, cut.rest, cut.time, left)
            gone = len(whole.sent) - len(rest.sent)
            assert rest.sent == whole.sent[gone:], (cut.what, commits)
            assert rest.replayed == whole.replayed[-len(rest.replayed) :], (cut.what, commits)
            assert len(rest.replayed) > 10
            again = compact(folder, START + 7 * MINUTE, 10 * SECOND, (), nothing)
            with closing(Journal(folder / "journal.db")) as journal:
                bars_left = [r.seq for r in journal.records() if r.kind == Kind.BARS]
                assert min(bars_left) >= again.base > 0
                [(parts,)] = journal._db.execute(
                    "SELECT COUNT(*) FROM snapshot_part WHERE seq NOT IN (SELECT seq FROM snapshot)"
                )
                assert parts == 0
            if ended:
                break
        assert commits > 30


@over_both
def test_nothing_leaves_that_is_not_settled(tmp_path):
    """Records whose outcomes are not in the outbox stay, however old they are, and so do pending messages."""
    whole = serve(tmp_path, story(), cutting=True)
    [cut] = [c for c in whole.cuts if c.what == "append at 570.0"]
    folder = copied(cut.journal, tmp_path / "state")
    with closing(Journal(folder / "journal.db")) as journal:
        settled = journal.progress().seq
        waiting = list(journal.records(settled))
        pending = journal.outbox_counts()[State.PENDING]
    done = compact(folder, START + 400 * DAY, DAY, (), nothing)
    with closing(Journal(folder / "journal.db")) as journal:
        assert done.base == done.newest == settled
        assert list(journal.records(settled)) == waiting
        assert waiting
        assert journal.outbox_counts()[State.PENDING] == pending > 0
        assert journal.append([(START, Kind.BARS, "t", b"")]) == [waiting[-1].seq + 1]


@pytest.mark.parametrize("started", [False, True])
def test_journal_without_anything_settled_is_compacted(tmp_path, started):
    """A daemon to which no bars come has little that could leave: what was delivered."""
    with closing(Journal(tmp_path / "journal.db")) as journal:
        letters = [Outgoing(f"{n}", "t/deadletter/me", b"{}", False, None) for n in range(4)]
        if started:
            journal.append([(START, Kind.REVISION, "", path_settings().encode())], letters)
            journal.mark([(n, State.DELIVERED) for n in (1, 2, 4)])
        done = compact(tmp_path, START + 400 * DAY, DAY, (), nothing)
        assert (done.base, done.newest, done.records) == (0, 0, 0)
        assert [message.id for message in outbox(journal)] == (["2", "3"] if started else [])
        assert journal.snapshot(1 << 62) is None
        assert journal.last_time() == (START if started else 0)


def filled(folder, days, each=200):
    """Append `days` of bars of two symbols to a journal, settled and delivered."""
    with closing(Journal(folder / "journal.db")) as journal:
        quick(journal)
        if journal.last(Kind.REVISION) is None:
            journal.append(
                [
                    (START, Kind.REVISION, "", path_settings().encode()),
                    (START, Kind.ACTIVATION, "", Champion("spread", "numpy", 8, "").encode()),
                ]
            )
        for day in days:
            rows, out = [], []
            for k in range(each):
                minute = day * 1440 + k
                time = START + minute * MINUTE + SECOND
                found = [plain(bar(symbol, minute)) for symbol in "AB"]
                rows += [(time, Kind.BARS, f"t/bars/1m/{b.symbol}", encode_bars([b])) for b in found]
                out.append(Outgoing(f"{day} {k}", "t/signals/1m/A", bytes(400), True, time + 2 * MINUTE))
            last = journal.append(rows, out)[-1]
            journal.settle(Progress(last, rows[-1][0]), [])
            counts = journal._db.execute("SELECT n FROM outbox WHERE state = 0").fetchall()
            journal.mark([(n, State.DELIVERED) for (n,) in counts])


def test_file_stops_growing(tmp_path):
    """What leaves makes room for what comes: compacted daily, the file stays as large as `keep` needs."""
    sizes, starts = [], []
    for day in range(12):
        filled(tmp_path, [day])
        now = START + (day + 1) * DAY
        compact(tmp_path, now, 3 * DAY, (), nothing)
        with closing(Journal(tmp_path / "journal.db")) as journal:
            sizes.append(journal._db.execute("PRAGMA page_count").fetchone()[0])
            pipeline = Pipeline(open_model)
            newest = journal.snapshot(journal.progress().seq)
            pipeline.restore(PipelineState.decode(newest.state))
            starts.append(len(list(journal.records(newest.seq))))
    assert sizes[11] <= sizes[5] * 1.05
    assert sizes[5] > sizes[0]
    assert starts == [0] * 12


def test_verification_of_a_day_finds_a_snapshot_near(tmp_path):
    """Compacted once a day, or at each of many starts, a snapshot is left that is a day to two days old."""
    now = START
    for day in range(5):
        filled(tmp_path, [day], 3)
        for hour in (1, 2, 9, 24) if day % 2 else (24,):
            now = START + day * DAY + hour * DAY // 24
            compact(tmp_path, now, 30 * DAY, (), nothing)
        with closing(Journal(tmp_path / "journal.db")) as journal:
            ages = [(now - time) / DAY for _, time in journal.snapshots()]
            assert len(ages) <= 3
            assert day < 2 or any(1 <= age <= 3 for age in ages)
            assert journal.base == 0


@over_both
def test_second_compaction_waits_for_nobody(tmp_path):
    """Two at a time are refused by name; without a journal there is nothing to do."""
    from barcast.daemon.start import only_one

    with pytest.raises(ConfigError, match=r"no journal there; run the daemon first"):
        compact(tmp_path, START, DAY, (), nothing)
    filled(tmp_path, [0], 5)
    with only_one(tmp_path / "compaction.lock"), pytest.raises(ConfigError, match="another compaction"):
        compact(tmp_path, START, DAY, (), nothing)


@over_both
def test_damaged_snapshot_is_named(tmp_path):
    """A snapshot that cannot be read ends a start in one sentence."""
    filled(tmp_path, range(3))
    compact(tmp_path, START + 3 * DAY, DAY, (), nothing)
    for sql, values, reason in (
        ("UPDATE snapshot_part SET body = ?", [b"\xc1"], "damaged"),
        ("UPDATE snapshot SET size = 1", [], "cannot be read"),
        ("DELETE FROM snapshot", [], "missing"),
    ):
        change(tmp_path / "journal.db", sql, *values)
        with pytest.raises(ConfigError, match=f"journal.db: the snapshot after record .* {reason}"):
            Instance(tmp_path / "journal.db", World(time=START), open_model)


# What leaves is kept.


@over_both
def test_archive_holds_what_left_and_trainers_see_all(tmp_path):
    """Journal, archive and history together say after a compaction what they said before it."""
    (tmp_path / "history").mkdir()
    old = [plain(bar("A", m, 50.0)) for m in range(-30, 3)]
    times = pl.Series([b.close_time for b in old]).cast(pl.Datetime("ns", "UTC"))
    columns = {n: [getattr(b, n) for b in old] for n in ("open", "high", "low", "close", "volume")}
    pl.DataFrame({"symbol": ["A"] * len(old), "close_time": times, **columns}).write_parquet(
        tmp_path / "history" / "h.parquet"
    )
    filled(tmp_path, range(3), 50)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        end = START + 2 * DAY + 49 * MINUTE + 2 * SECOND
        better, first = plain(bar("A", 2 * 1440 + 47, 150.0)), plain(bar("A", 2 * 1440 + 47))
        split = json.dumps({"time": "2023-11-15T00:00:00Z", "factor": 0.5, "kind": "split"}).encode()
        rows = [(end, Kind.BARS, "t/bars/1m/A", encode_bars([b])) for b in (better, first)]
        journal.append([*rows, (end, Kind.ADJUSTMENT, "t/adjustments/A", split)])
        journal.settle(Progress(journal.last(Kind.ADJUSTMENT).seq, end), [])
    before = known_bars(tmp_path, MINUTELY, START + 9 * DAY)
    compact(tmp_path, START + 3 * DAY, DAY + 30 * MINUTE, (), nothing)
    compact(tmp_path, START + 4 * DAY, DAY, (), nothing)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        journal.append([(end + SECOND, Kind.BARS, "t/bars/1m/A", encode_bars([first]))])  # once more
    after = known_bars(tmp_path, MINUTELY, START + 9 * DAY)
    assert list(before) == list(after) == ["A", "B"]
    for symbol in before:
        assert (before[symbol].close_times == after[symbol].close_times).all()
        assert (before[symbol].values == after[symbol].values).all()
    assert len(after["A"]) == 30 + 150
    files = sorted(p.name for p in (tmp_path / "archive").iterdir())
    assert files == [f"bars-2023-11-{day}.parquet" for day in (14, 15, 16)]
    archived = read_archive(tmp_path / "archive")
    assert archived.filter(pl.col("close") == 150.0).height == 1
    readable = read_windows(scan([tmp_path / "archive"], "close", MINUTELY))
    assert {s: len(w) for s, w in readable.items()} == {"A": 150, "B": 150}


@over_both
def test_history_of_a_warm_up_leaves_as_a_fact(tmp_path):
    """Of an old warm-up digest and length stay, so that the next start finds nothing to take again."""
    filled(tmp_path, range(3))
    warmth = Warmth("abc", 8, tuple(plain(bar("A", m)) for m in range(-9, -1)))
    with closing(Journal(tmp_path / "journal.db")) as journal:
        last = journal.append([(START + 3 * DAY, Kind.WARMUP, "", warmth.encode())])
        journal.settle(Progress(last[0], START + 3 * DAY), [])
    filled(tmp_path, range(4, 6))
    compact(tmp_path, START + 6 * DAY, DAY, (), nothing)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        kept = Warmth.decode(journal.last(Kind.WARMUP).payload)
        assert kept == msgspec.structs.replace(warmth, bars=())
        assert Champion.decode(journal.last(Kind.ACTIVATION).payload).model == "spread"


@over_both
def test_messages_leave_the_outbox_when_they_are_as_old(tmp_path):
    """Delivered messages go with the records of their time; those since `keep`, and the last one, stay."""
    filled(tmp_path, range(4))
    done = compact(tmp_path, START + 4 * DAY, 2 * DAY, (), nothing)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        left = outbox(journal)
        assert done.messages == 400
        assert [m.id for m in left][::200] == ["2 0", "3 0"]
    compact(tmp_path, START + 400 * DAY, DAY, (), nothing)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        assert [m.id for m in outbox(journal)] == ["3 199"]
        journal.append([], [Outgoing("new", "t", b"", False, None)])
        assert journal._db.execute("SELECT MAX(n) FROM outbox").fetchone() == (801,)


@over_both
def test_signals_of_the_last_bars_stay_for_what_judges_them(tmp_path):
    """However short `keep` is, messages of the last 500 bars stay: their outcomes are looked at."""
    filled(tmp_path, range(4))
    compact(tmp_path, START + (3 * 1440 + 200) * MINUTE, MINUTE, (), nothing)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        assert [m.id for m in outbox(journal)] == [f"3 {k}" for k in range(200)]


@over_both
def test_models_that_nothing_needs_are_removed(tmp_path):
    """A replay's models, the one before them, those that the configuration names, and young ones stay."""
    names = {name: f"{k:016x}" for k, name in enumerate(("first", "before", "base", "now", "stray", "named"))}
    filled(tmp_path, range(1))
    for day, name in enumerate(("first", "before", "base")):
        with closing(Journal(tmp_path / "journal.db")) as journal:
            champion = Champion(names[name], "numpy", 8, "").encode()
            at = START + (day + 1) * DAY - SECOND
            journal.settle(Progress(journal.append([(at, Kind.ACTIVATION, "", champion)])[0], at), [])
        filled(tmp_path, [day + 1], 5)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        at = START + 3 * DAY + 10 * MINUTE
        seq = journal.append([(at, Kind.ACTIVATION, "", Champion(names["now"], "numpy", 8, "").encode())])
        journal.settle(Progress(seq[0], at), [])
    folders = [tmp_path / "models" / name for name in (*names.values(), "notes", f".{7:016x}.partial")]
    for folder in folders:
        folder.mkdir(parents=True)
    young = compact(tmp_path, START + 4 * DAY, DAY, (), nothing)
    assert young.models == ()
    made = max(max(f.stat().st_ctime_ns, f.stat().st_mtime_ns) for f in folders)
    done = compact(tmp_path, made + 2 * DAY, made + 2 * DAY - START - 3 * DAY, (names["named"],), nothing)
    assert done.models == ()
    done = compact(tmp_path, made + 2, 1, (names["named"],), nothing)
    assert sorted(done.models) == sorted(
        [names["first"], names["before"], names["stray"], f".{7:016x}.partial"]
    )
    assert sorted(p.name for p in (tmp_path / "models").iterdir()) == sorted(
        [names["base"], names["now"], names["named"], "notes"]
    )


# Versions.


def as_version_1(file):
    """Make of a journal what an earlier version of barcast wrote."""
    with closing(sqlite3.connect(file)) as db:
        for table in ("base", "snapshot", "snapshot_part"):
            db.execute(f"DROP TABLE {table}")
        db.execute("PRAGMA user_version = 1")
        db.commit()


def test_journal_of_version_1_is_read_and_taken_over(tmp_path):
    """A replay reads it as it is; a start adds tables; without them it is what it was."""
    recorded(tmp_path, None)
    file = tmp_path / "journal.db"
    with closing(Journal(file, readonly=True)) as journal:
        before = list(journal.records())
    as_version_1(file)
    with closing(Journal(file, readonly=True)) as journal:
        assert (journal.base, journal.snapshot(10**9), list(journal.records())) == (0, None, before)
    assert len(every_bar(tmp_path, MINUTELY, START + DAY)[0]) > 20
    with closing(sqlite3.connect(file)) as db:
        assert db.execute("PRAGMA user_version").fetchone() == (1,)
    with closing(Instance(file, World(time=START), open_model)) as instance:
        said = instance.replayed()
        assert said == path_of(outbox(instance.journal))
        assert list(instance.journal.records()) == before
    with closing(sqlite3.connect(file)) as db:  # the way back, as the README has it
        assert db.execute("PRAGMA user_version").fetchone() == (2,)
        db.execute("PRAGMA user_version = 1")
        db.commit()
    with closing(Journal(file, readonly=True)) as journal:
        assert list(journal.records()) == before
    with closing(Instance(file, World(time=START), open_model)) as instance:  # and forward again
        assert instance.replayed() == said


# Export.


def command(*arguments):
    """Run the command line; return what it printed."""
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.output


def forbidden(_):
    """What a sandbox says to who asks for another priority."""
    raise PermissionError(errno.EPERM, "Operation not permitted")


def instance(folder):
    """The configuration of an instance whose state is in this folder."""
    path = folder / "barcast.toml"
    path.write_text('instance = "x"\nstate_dir = "."\ntimeframe = "1m"\nkeep = "1d"\n')
    return path


@over_both
def test_export_is_read_by_every_command_and_may_be_repeated(tmp_path):
    """All bars are there, by day, with all that a feed said; a second time nothing is written."""
    filled(tmp_path, range(3), 50)
    with closing(Journal(tmp_path / "journal.db")) as journal:
        rich = msgspec.structs.replace(plain(bar("C", 2 * 1440)), trades=7, vwap=99.5)
        row = (START + 3 * DAY, Kind.BARS, "t/bars/1m/C", encode_bars([rich]))
        journal.settle(Progress(journal.append([row])[0], START + 3 * DAY), [])
    compact(tmp_path, START + 3 * DAY, DAY, (), nothing)
    config, out = instance(tmp_path), tmp_path / "out"
    said = command("export", config, "--out", out)
    assert "301 bars in 3 files, 3 of them written" in said
    assert "301 bars in 3 files, 0 of them written" in command("export", config, "--out", out)
    assert sorted(p.name for p in out.iterdir()) == [f"bars-2023-11-{d}.parquet" for d in (14, 15, 16)]
    frame = pl.read_parquet(out / "bars-2023-11-16.parquet")
    assert frame.columns == [
        *("symbol", "close_time", "open", "high", "low", "close", "volume", "trades", "vwap", "timeframe")
    ]
    assert frame.filter(symbol="C").row(0, named=True)["vwap"] == 99.5
    assert frame["timeframe"].unique().to_list() == ["1m"]
    known = known_bars(tmp_path, MINUTELY, START + 9 * DAY)
    read = read_windows(scan([out], "close", MINUTELY))
    assert list(read) == list(known)
    assert all((read[s].values == known[s].values).all() for s in read)
    part = command("export", config, "--out", tmp_path / "part", "--since", "2023-11-15T22:20:00Z")
    assert "in 2 files" in part
    assert command("export", config, "--out", out, "--until", "2023-11-15").startswith(
        "100 bars in 1 files, 0"
    )


def test_export_says_what_is_in_the_way(tmp_path):
    """No bars, bars of another timeframe, and a folder that is a file end in one sentence."""
    config, out = instance(tmp_path), tmp_path / "out"
    with pytest.raises(DataError, match=r"neither history/, archive/ nor journal\.db holds a bar"):
        command("export", config, "--out", out)
    filled(tmp_path, range(1), 5)
    with pytest.raises(DataError, match="no bar closes in that time"):
        command("export", config, "--out", out, "--since", "2030-01-01")
    command("export", config, "--out", out)
    config.write_text(config.read_text().replace("1m", "5m"))
    with pytest.raises(DataError, match="holds bars of 1m, not 5m"):
        command("export", config, "--out", out)
    with pytest.raises(ConfigError, match="--out"):
        command("export", instance(tmp_path), "--out", config)


@over_both
def test_archive_on_a_full_disk_leaves_no_half_file(tmp_path, monkeypatch):
    """What cannot be archived does not leave the journal, and no file is half there."""
    filled(tmp_path, range(3), 20)

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(DiskFullError, match="make room"):
            compact(tmp_path, START + 3 * DAY, DAY, (), nothing)
    assert list((tmp_path / "archive").iterdir()) == []
    with closing(Journal(tmp_path / "journal.db")) as journal:
        assert (journal.base, len(list(journal.records()))) == (0, 122)
    monkeypatch.setattr(os, "nice", forbidden)
    assert "messages with bars left" in command("compact", instance(tmp_path))
    with closing(Journal(tmp_path / "journal.db")) as journal:
        assert journal.base == 122


def test_damaged_archive_is_named(tmp_path):
    """A file of the archive that cannot be read is named before anything leaves."""
    filled(tmp_path, range(3), 20)
    compact(tmp_path, START + 2 * DAY, DAY, (), nothing)
    (tmp_path / "archive" / "bars-2023-11-15.parquet").write_bytes(b"PAR1")
    with pytest.raises(DataError, match=r"bars-2023-11-15\.parquet cannot be read as bars"):
        known_bars(tmp_path, MINUTELY, START + 9 * DAY)
    with pytest.raises(DataError, match=r"bars-2023-11-15\.parquet"):
        compact(tmp_path, START + 3 * DAY, DAY, (), nothing)


# The daemon's part.


def daily_lines(monkeypatch, script, enough):
    """The log lines of a daemon that compacts again and again by a shell script, until there are enough."""
    monkeypatch.setattr(retention, "FIRST_SECONDS", 0.0)
    monkeypatch.setattr(retention, "EVERY_SECONDS", 0.01)

    async def runs():
        task = asyncio.create_task(daily(children({"compact": ["sh", "-c", script]}, os.environ)))
        for _ in range(1000):
            if enough():
                break
            await asyncio.sleep(0.01)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    asyncio.run(runs())


def test_daemon_compacts_again_and_again_and_outlives_a_failure(tmp_path, monkeypatch):
    """What a compaction says is a line of the log, and one that fails is told and tried again."""
    with structlog.testing.capture_logs() as said:
        script = f'cd "{tmp_path}"; mkdir once 2>&- && echo went wrong && exit 74; echo 7 left'
        daily_lines(monkeypatch, script, lambda: len(said) >= 3)
    assert said[0] == {
        "event": "compaction_failed",
        "log_level": "error",
        "exit_status": 74,
        "last_words": "went wrong",
    }
    assert said[1] == said[2] == {"event": "compacted", "log_level": "info", "said": "7 left"}


def test_compaction_that_hangs_is_killed(tmp_path, monkeypatch):
    """One that does not end in its time is told of, and the next one takes place."""
    monkeypatch.setattr(retention, "LONGEST_SECONDS", 0.3)
    mark = tmp_path / "pid"
    with structlog.testing.capture_logs() as said:
        daily_lines(monkeypatch, f'echo $$ >> "{mark}"; exec sleep 60', lambda: len(said) >= 2)
    assert {line["event"] for line in said} == {"compaction_failed"}
    assert "it was killed" in said[0]["reason"]
    for pid in mark.read_text().split():
        with pytest.raises(ProcessLookupError):
            os.kill(int(pid), 0)


def test_compaction_ends_with_the_daemon(tmp_path, monkeypatch):
    """A daemon that stops leaves no compaction behind: the next one ends its work."""
    mark = tmp_path / "pid"
    daily_lines(monkeypatch, f'echo $$ > "{mark}"; exec sleep 60', lambda: mark.exists() and mark.read_text())
    with pytest.raises(ProcessLookupError):
        os.kill(int(mark.read_text()), 0)
