"""A full disk: the daemon waits and says so, acknowledges nothing, and goes on by itself."""

import asyncio
import errno
import gc
import json
import os
import sqlite3
from contextlib import closing

import pytest
import structlog

from barcast.backtest import cli
from barcast.backtest.sample import sample_checkpoint
from barcast.daemon import live, mqtt, vitals
from barcast.daemon.app import Daemon, Outside
from barcast.daemon.config import load
from barcast.daemon.journal import Journal, Kind, Progress
from barcast.daemon.live import Scribe
from barcast.daemon.mqtt import Delivery, Link
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.room import check_room, make, room
from barcast.daemon.start import only_one
from barcast.daemon.store import ModelStore
from barcast.daemon.vitals import Vitals
from barcast.models import ConfigError, DiskFullError
from tests.checks import open_model
from tests.fakes import MINUTE, START, bar, settings
from tests.rim import (
    Instance,
    Message,
    World,
    activation,
    outbox,
    path_of,
    play,
    revision,
    source,
    taken,
)


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Try again at once."""
    monkeypatch.setattr(live, "ROOM_SECONDS", 0.01)


def fill(journal):
    """Take all room from a journal, but for what its pages still hold."""
    [(pages,)] = journal._db.execute("PRAGMA page_count")
    journal._db.execute(f"PRAGMA max_page_count = {pages}")


def empty(journal):
    """Give it room."""
    journal._db.execute("PRAGMA max_page_count = 1000000")


def many(count):
    """Bars of many minutes, which need more than a page."""
    return [Message.of(*(bar("A", -m) for m in range(k, k + 40)), topic="t/bars/1m") for k in range(1, count)]


async def until(holds):
    """Let others work until something holds."""
    for _ in range(1000):
        if holds():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to this")


def test_full_disk_holds_everything_up_and_loses_nothing(tmp_path):
    """Without room nothing is acknowledged and nothing acts; with room all of it goes on, once."""
    with (
        closing(Scribe(Journal(tmp_path / "journal.db"))) as scribe,
        structlog.testing.capture_logs() as said,
    ):
        world = World()
        src = source(world, scribe)
        world.deliver(Message.of(bar("A", 0)))

        async def story():
            await src.next(None)
            fill(scribe.journal)
            world.deliver(*many(30))
            rest = asyncio.create_task(taken(src))
            await until(lambda: scribe.full)
            await asyncio.sleep(0.1)
            assert (world.acked, rest.done(), src.held) == ([1], False, True)
            assert scribe.turned.is_set()
            scribe.turned.clear()
            empty(scribe.journal)
            found = await rest
            assert scribe.turned.is_set()
            return found

        rest = play(story())
        assert not scribe.full
        assert world.acked == list(range(1, 31))
        assert len(rest) == 29
        assert len(list(scribe.journal.records())) == 30
    lines = [line for line in said if line["event"].startswith("disk")]
    assert [(line["log_level"], line["event"]) for line in lines] == [
        ("error", "disk_full"),
        ("info", "disk_has_room"),
    ]
    assert lines[0]["path"].endswith("journal.db")
    assert lines[0]["free_bytes"] > 0
    assert "make room on the disk" in lines[0]["remedy"]


def test_what_is_said_waits_for_room_as_well(tmp_path):
    """The outbox fills the disk, too: what the path said of a group comes after the wait."""
    world = World()
    world.script.append((START, lambda src: src.decide(revision(settings(("A", "B"))))))
    world.script.append((START, lambda src: src.decide(activation("spread"))))
    for m in range(1, 40):
        world.script.append((START + m * MINUTE, [Message.of(bar("A", m)), Message.of(bar("B", m))]))
    with closing(Instance(tmp_path / "journal.db", world, open_model)) as instance:
        journal = instance.journal
        settle, waits = journal.settle, []

        def tight(*args):
            """Every fifth commit finds no room at first."""
            if len(waits) % 5 == 0 and not instance.scribe.full:
                fill(journal)
            else:
                empty(journal)
                waits.append(None)
            return settle(*args)

        journal.settle = tight

        async def whole():
            async with asyncio.timeout(20):
                await instance.run()

        with structlog.testing.capture_logs() as said:
            asyncio.run(whole())
        sent = outbox(journal)
        assert path_of(sent) == instance.replayed()
        assert sum("/signals/" in m.topic for m in sent) > 60
    assert sum(line["event"] == "disk_full" for line in said) >= 1


def no_room(*_):
    """What the journal says of a full disk."""
    raise OSError(errno.ENOSPC, "database or disk is full")


def test_failed_commit_leaves_the_journal_usable(tmp_path):
    """After a commit that found no room the next one works, also where SQLite has rolled back by itself."""
    with closing(Journal(tmp_path / "journal.db")) as journal:
        fill(journal)
        with pytest.raises(OSError, match="full"):
            journal.append([(1, Kind.BARS, "t", bytes(100_000))])
        assert not journal._db.in_transaction
        journal.settle(Progress(0, 1), [])
        empty(journal)
        assert journal.append([(1, Kind.BARS, "t", bytes(100_000))]) == [1]


def test_other_faults_of_the_journal_are_not_waited_for(tmp_path):
    """A damaged database ends the daemon, as before."""
    with closing(Scribe(Journal(tmp_path / "journal.db"))) as scribe:

        def damaged(*_):
            raise sqlite3.DatabaseError("database disk image is malformed")

        scribe.journal.append = damaged

        async def asks():
            with pytest.raises(sqlite3.DatabaseError, match="malformed"):
                await scribe(scribe.journal.append, [])

        play(asks())
        assert not scribe.full


def test_stopping_waits_for_no_room(tmp_path):
    """A daemon that is stopped while its disk is full ends; what was not acknowledged comes again."""
    scribe = Scribe(Journal(tmp_path / "journal.db"))
    scribe.journal.append = no_room

    async def stops():
        written = scribe(scribe.journal.append, [])
        await until(lambda: scribe.full)
        await asyncio.get_running_loop().run_in_executor(None, scribe.close)
        with pytest.raises(OSError, match="full"):
            await written

    play(stops())


@pytest.mark.parametrize("damaged", [False, True])
def test_what_nobody_waits_for_any_more_is_heard(tmp_path, damaged):
    """A stop may have ended who wanted a commit: no room for it is nothing to report, any other fault is."""
    scribe, told = Scribe(Journal(tmp_path / "journal.db")), []

    def fails(*_):
        if scribe._closing.wait(5) and damaged:
            raise sqlite3.DatabaseError("database disk image is malformed")
        no_room()

    async def stops():
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _loop, context: told.append(context))
        scribe(fails)
        await loop.run_in_executor(None, scribe.close)
        await asyncio.sleep(0)
        gc.collect()

    with structlog.testing.capture_logs() as said:
        play(stops())
    assert told == []
    assert ("journal_failed" in [line["event"] for line in said]) == damaged


def test_wait_for_room_is_no_hang(tmp_path, monkeypatch):
    """The watchdog is fed while the disk is full, and the status says so; a hang is still one."""
    monkeypatch.setattr(vitals, "LAG_SECONDS", 0.001)
    monkeypatch.setattr(vitals, "FEED_SECONDS", 0.0)

    class Still:
        waiting, position, held = False, 7, True

    fed = []

    class Watchdog:
        def send(self, text):
            fed.append(text)

    async def watches():
        path = Pipeline(lambda *_: None)
        watch = Vitals(Still, path, Watchdog())
        task = asyncio.create_task(watch.run())
        await until(lambda: len(fed) > 3)
        assert watch.moving
        Still.held = False
        await asyncio.sleep(0.05)
        count = len(fed)
        await asyncio.sleep(0.05)
        assert len(fed) == count
        path.forecasts += 1  # some symbols of a large group are done
        await until(lambda: len(fed) == count + 1)
        task.cancel()

    asyncio.run(watches())


def configured(folder):
    """A daemon that has read its configuration."""
    path = folder / "barcast.toml"
    path.write_text('instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\n')
    return Daemon(load(path), {}, asyncio.Event(), None, Outside())


def test_status_says_that_the_disk_is_full(tmp_path):
    """Subscribers and systemd are told at once, and again when bars are taken."""
    said, shown = [], []

    class Systemd:
        def send(self, *states):
            shown.extend(states)

    class Broker:
        greeted, deaf, inbox = True, False, ()

        async def publish(self, message, _now):
            said.append(json.loads(message.payload)["state"])

    class Alive:
        moving, processed, paused = True, 0, False

    async def tells():
        daemon = configured(tmp_path)
        daemon.config.state_dir.mkdir()
        daemon.link, daemon.state = Broker(), "ready"
        daemon.vitals = daemon.sink = daemon.pipeline = Alive()
        daemon.notifier = Systemd()
        daemon.scribe = Scribe(Journal(daemon.config.state_dir / "journal.db"))
        task = asyncio.create_task(daemon._heartbeat())
        append, daemon.scribe.journal.append = daemon.scribe.journal.append, no_room
        written = daemon.scribe(lambda: daemon.scribe.journal.append([]))
        await until(lambda: said == ["full"])
        daemon.scribe.journal.append = append
        await written
        await until(lambda: said == ["full", "ready"])
        assert shown == ["STATUS=full", "STATUS=ready"]
        task.cancel()
        daemon.scribe.close()

    play(tells())


def test_start_on_a_full_disk_is_worth_another_try(tmp_path, monkeypatch, capsys):
    """It ends in one sentence, and with a status on which systemd starts it again."""
    configured(tmp_path)
    monkeypatch.setattr(Journal, "write", no_room)
    monkeypatch.setattr("sys.argv", ["barcast", "run", str(tmp_path / "barcast.toml")])
    with pytest.raises(SystemExit) as ended:
        cli.main()
    said = capsys.readouterr().err
    assert ended.value.code == 74
    assert "bytes are free: make room on its disk" in said
    assert "state" in said
    assert "Traceback" not in said


def test_start_needs_more_than_a_page(tmp_path, monkeypatch):
    """Some room left in the journal's own files is not enough to begin with."""
    check_room(tmp_path)
    monkeypatch.setattr("barcast.daemon.room.free_bytes", lambda _: 4096)
    with pytest.raises(DiskFullError, match="4096 bytes are free, and a start needs 1000000"):
        check_room(tmp_path)


@pytest.mark.parametrize(
    ("number", "kind"),
    [(errno.ENOSPC, DiskFullError), (errno.EDQUOT, DiskFullError), (errno.EACCES, ConfigError)],
)
def test_faults_of_the_disk_are_told_apart(tmp_path, number, kind):
    """A full disk or quota passes; a directory that may not be written needs somebody."""
    with pytest.raises(kind), room(tmp_path / "not" / "there"):
        raise OSError(number, "no", str(tmp_path))


def test_half_a_model_is_no_model(tmp_path, monkeypatch):
    """A copy that found no room leaves nothing that could be taken for a model, nor takes room."""

    sample = sample_checkpoint()
    store = ModelStore(tmp_path / "models", "1d")
    copies = []

    def copy(source, target):
        copies.append(target)
        if len(copies) == 2:
            raise OSError(errno.ENOSPC, "No space left on device", str(target))
        target.write_bytes(source.read_bytes())

    monkeypatch.setattr("barcast.daemon.store.shutil.copyfile", copy)
    with pytest.raises(DiskFullError, match="bytes are free"):
        store.adopt(sample)
    assert list((tmp_path / "models").iterdir()) == []
    copies.append(None)
    model = store.adopt(sample)
    assert store.path(model) == str(tmp_path / "models" / model)


def test_copies_of_many_connections_are_forgotten(monkeypatch):
    """While nothing can be taken, a broker that comes and goes does not fill the memory."""
    monkeypatch.setattr(mqtt, "RECEIVE_MAXIMUM", 5)
    link = Link(mqtt.Address("127.0.0.1", 1, "x"), ["t"], None)

    async def connects():
        for connection in range(1, 41):
            link._open()
            for mid in range(1, 6):
                link.inbox.append(Delivery("t", b"%d" % mid, mid, 1, connection))

    asyncio.run(connects())
    assert len(link.inbox) <= 10
    assert [d.connection for d in link.inbox][-5:] == [40] * 5
    link.inbox.append(Delivery("t", b"other", 1, 1, 40))
    link._forget_copies()
    assert [d.payload for d in link.inbox] == [b"1", b"2", b"3", b"4", b"5", b"other"]


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may give files away")
def test_what_root_makes_belongs_to_whom_the_state_belongs(tmp_path):
    """A compaction by root leaves lock and archive to the service that they are of."""
    state = tmp_path / "state"
    state.mkdir()
    os.chown(state, 61234, 61235)
    with only_one(state / "compaction.lock", "compaction"):
        make(state / "archive" / "deeper")
    owners = {(path.stat().st_uid, path.stat().st_gid) for path in state.rglob("*")}
    assert (len(list(state.rglob("*"))), owners) == (3, {(61234, 61235)})
