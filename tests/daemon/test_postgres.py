"""A journal on a server: what only happens there. The rest is tested over both kinds, by `each_journal`."""

import asyncio
import shutil
import subprocess
import threading
import time
from contextlib import closing, suppress
from dataclasses import replace

import pytest
from pg8000.core import CoreConnection
from pg8000.exceptions import InterfaceError

from barcast.backtest.cli import doctor
from barcast.daemon import live, postgres
from barcast.daemon.config import load
from barcast.daemon.journal import Journal, Kind, Progress, exists
from barcast.daemon.live import Scribe
from barcast.daemon.postgres import Lease, Postgres, connect, leased
from barcast.daemon.retention import compact
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError, DeposedError, JournalLostError
from tests.daemon.living import until
from tests.fakes import bar
from tests.integration.instance import url
from tests.postgres import Cluster
from tests.rim import Message, World, play, source, taken

pytestmark = pytest.mark.postgres
TEXT = 'instance = "x"\nstate_dir = "state"\ntimeframe = "1m"\n[journal]\n'


@pytest.fixture
def server(cluster, request):
    """A schema of its own for each test."""
    made = cluster.server(f"barcast_{abs(hash(request.node.nodeid)):x}")
    yield made
    tell(made, f'DROP SCHEMA IF EXISTS "{made.schema}" CASCADE')


@pytest.fixture
def journal(server):
    """A journal there."""
    with closing(Journal(server)) as made:
        yield made


def tell(server, sql):
    """Run a statement beside the journal."""
    with closing(connect(server)) as other:
        other.execute_simple(f'SET search_path TO "{server.schema}"')
        return other.execute_simple(sql).rows


def payloads(journal):
    """What it holds."""
    return [record.payload for record in journal.records()]


def letter(n):
    """A message."""
    return Outgoing(f"id{n}", "t", b"", True, None)


def lost_at(monkeypatch, word, before):
    """The connection goes once, right before a statement or right after it."""
    execute, done = Postgres.execute, []

    def goes(self, sql, values=()):
        if sql.startswith(word) and not done:
            done.append(sql)
            rows = None if before else execute(self, sql, values)
            self.close()
            raise JournalLostError(f"lost at {sql}, {rows}")
        return execute(self, sql, values)

    monkeypatch.setattr(Postgres, "execute", goes)
    return done


# A commit is there once, whatever becomes of the connection.


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
@pytest.mark.parametrize("word", ["BEGIN", "SELECT epoch", "SELECT COALESCE(MAX(seq)", "COMMIT"])
def test_append_is_repeated_and_written_once(journal, monkeypatch, word, before):
    """Wherever the connection is lost, also between a commit and the word of it, they are there once."""
    assert journal.append([(1, Kind.BARS, "t", b"1")]) == [1]
    done = lost_at(monkeypatch, word, before)
    with pytest.raises(JournalLostError):
        journal.append([(2, Kind.BARS, "t", b"2"), (3, Kind.BARS, "t", b"3")], [letter(1)])
    assert done
    assert journal.append([(2, Kind.BARS, "t", b"2"), (3, Kind.BARS, "t", b"3")], [letter(1)]) == [2, 3]
    assert journal.append([(4, Kind.BARS, "t", b"4")]) == [4]
    assert payloads(journal) == [b"1", b"2", b"3", b"4"]
    assert journal.waiting() == 1


@pytest.mark.parametrize("before", [True, False], ids=["before", "after"])
def test_shed_and_settle_are_written_once(journal, monkeypatch, before):
    """The same of what is passed over, and of what is settled."""
    journal.append([(1, Kind.BARS, "t", b"1")])
    lost_at(monkeypatch, "COMMIT", before)
    with suppress(JournalLostError):
        journal.shed(5, [(5, Kind.REVISION, "", b"r")], [letter(1)])
    journal.shed(5, [(5, Kind.REVISION, "", b"r")], [letter(1)])
    assert [r.kind for r in journal.records()] == [Kind.BARS, Kind.SHED, Kind.REVISION]
    assert journal.progress() == Progress(2, 5)
    monkeypatch.undo()
    lost_at(monkeypatch, "COMMIT", before)
    with suppress(JournalLostError):
        journal.settle(Progress(3, 6), [letter(2)])
    journal.settle(Progress(3, 6), [letter(2)])
    assert (journal.progress(), journal.waiting()) == (Progress(3, 6), 2)


def test_server_that_is_gone_holds_everything_up_and_loses_nothing(monkeypatch):
    """Nothing is acknowledged and nothing acts until it is back; what came is stored once then."""
    monkeypatch.setattr(live, "ROOM_SECONDS", 0.02)
    cluster = Cluster()
    cluster.start()
    try:
        with closing(Scribe(Journal(cluster.server("barcast_x")))) as scribe:
            world = World()
            world.deliver(*(Message.of(bar(symbol, 1)) for symbol in "AB"))
            src = source(world, scribe)

            async def goes_and_comes():
                cluster.kill()
                rest = asyncio.create_task(taken(src))
                await until(lambda: scribe.lost)
                assert (world.acked, rest.done(), src.held, scribe.full) == ([], False, True, False)
                await asyncio.to_thread(cluster.start)
                found = await rest
                assert not scribe.lost
                return found

            events = play(goes_and_comes())
            assert [b.symbol for event in events for b in event.bars] == ["A", "B"]
            assert world.acked == [1, 2]
            assert len(payloads(scribe.journal)) == 2
    finally:
        cluster.remove()


def test_server_without_room_is_a_full_disk(server, monkeypatch):
    """It is waited for as room on a disk of our own is."""
    monkeypatch.setattr(live, "ROOM_SECONDS", 0.02)
    with closing(Scribe(Journal(server))) as scribe:
        tell(
            server,
            "CREATE FUNCTION no_room() RETURNS trigger LANGUAGE plpgsql AS "
            "$$BEGIN RAISE EXCEPTION 'could not extend file' USING ERRCODE = '53100'; END$$; "
            "CREATE TRIGGER full_ BEFORE INSERT ON record EXECUTE FUNCTION no_room()",
        )

        async def fills_and_empties():
            written = scribe(scribe.journal.append, [(1, Kind.BARS, "t", b"1")], [])
            await until(lambda: scribe.full)
            assert not scribe.lost
            tell(server, "DROP TRIGGER full_ ON record")
            assert await written == [1]
            assert not scribe.full

        play(fills_and_empties())
        assert payloads(scribe.journal) == [b"1"]


# One at a time writes.


def test_deposed_writer_can_commit_nothing(journal, server):
    """Who lost the lease finds out at the next commit, of whatever kind; reading goes on."""
    first, second = Lease(server, "a"), Lease(server, "b")
    journal.write_as(first.take())
    journal.append([(1, Kind.BARS, "t", b"1")])
    assert second.take() is None
    tell(server, "UPDATE lease SET expires = now() - interval '1 s'")
    assert first.renew()  # late, and nobody took it
    tell(server, "UPDATE lease SET expires = now() - interval '1 s'")
    assert second.take() == 2
    assert not first.renew()
    for commit in (
        lambda: journal.append([(2, Kind.BARS, "t", b"2")]),
        lambda: journal.append([], [letter(1)]),
        lambda: journal.settle(Progress(1, 1), []),
        lambda: journal.mark([]),
        journal.write,
    ):
        with pytest.raises(DeposedError, match="epoch 2 after our 1"):
            commit()
    assert (payloads(journal), journal.progress(), journal.waiting()) == ([b"1"], Progress(0, 0), 0)
    first.release()
    assert second.renew()
    second.release()
    assert first.take() == 3
    first.release()


def test_lease_goes_to_one_of_many(journal, server):
    """However many try at the same moment, one of them has it, and it lapses by the server's clock alone."""
    leases, found = [Lease(server, str(n)) for n in range(8)], []
    ready = threading.Barrier(len(leases))

    def tries(lease):
        ready.wait()
        found.append(lease.take())

    threads = [threading.Thread(target=tries, args=(lease,)) for lease in leases]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [epoch for epoch in found if epoch is not None] == [1]
    for lease in leases:
        lease.release()


def test_writer_that_hangs_in_a_commit_is_put_out(journal, server, monkeypatch):
    """One that is stopped in the middle holds the next one up for a moment only, and has written nothing."""
    monkeypatch.setattr(postgres, "OPEN_SECONDS", 0.2)
    first, second = Lease(server, "a"), Lease(server, "b")
    journal.write_as(first.take())

    def hangs():
        with journal._db.transaction() as db:
            db.execute("UPDATE progress SET seq = 7")
            tell(server, "UPDATE lease SET expires = now() - interval '1 s'")
            assert second.take() == 2
            db.execute("UPDATE progress SET clock = 7")

    with pytest.raises(JournalLostError):
        hangs()
    assert journal.progress() == Progress(0, 0)
    first.release()
    second.release()


def test_standby_that_hangs_while_it_takes_over_is_put_out(journal, server, monkeypatch):
    """One that is stopped with the writer's row in its hands leaves it to the next one."""
    monkeypatch.setattr(postgres, "OPEN_SECONDS", 0.2)
    first, second = Lease(server, "a"), Lease(server, "b")
    execute = first.execute

    def hangs(sql, values=()):
        done = execute(sql, values)
        if sql.startswith("UPDATE writer"):
            assert second.take() == 1
        return done

    first.execute = hangs
    with pytest.raises(JournalLostError):
        first.take()
    assert (first.epoch, second.renew()) == (None, True)
    second.release()


def test_rollback_by_hand_needs_the_lease(journal, server):
    """Work on the journal of an instance that serves is refused, and possible when that has gone."""
    serving = Lease(server, "a")
    serving.take()
    with pytest.raises(ConfigError, match="an instance serves from it; stop that"), leased(server, "b"):
        pass
    serving.release()
    with leased(server, "b") as epoch:
        assert epoch == 2
    assert serving.take() == 3
    serving.release()


def test_second_compaction_is_refused_also_from_elsewhere(journal, server, tmp_path):
    """Two hosts have no lock file in common: the server tells them apart."""
    with closing(Journal(server)) as other:
        other.begin_compaction()
        with pytest.raises(ConfigError, match="another compaction is at work"):
            compact(tmp_path, 0, 1, (), lambda: None, server)


# Servers that will not do.


@pytest.mark.parametrize(
    ("setting", "back"),
    [
        ("ALTER SYSTEM SET fsync = off", "ALTER SYSTEM RESET fsync"),
        ("ALTER ROLE barcast SET synchronous_commit = off", "ALTER ROLE barcast RESET synchronous_commit"),
    ],
)
def test_server_on_which_a_commit_does_not_last_is_refused(cluster, setting, back):
    """It says which setting, and what to do."""
    server = cluster.server("barcast_hasty")

    def put(sql):
        tell(server, sql)
        tell(server, "SELECT pg_reload_conf()")
        time.sleep(0.3)

    put(setting)
    try:
        with pytest.raises(ConfigError, match=r"(fsync|synchronous_commit) is off there.* set it on"):
            Journal(server)
    finally:
        put(back)
    assert not exists(server)


def test_journal_of_a_later_version_is_refused(server):
    """As a file of one is; without a journal a reader says so."""
    with pytest.raises(ConfigError, match="no journal there; run the daemon first"):
        Journal(server, readonly=True)
    Journal(server).close()
    assert exists(server)
    tell(server, "UPDATE version SET number = 99")
    with pytest.raises(ConfigError, match="journal version 99"):
        Journal(server)


@pytest.mark.parametrize("hung_up", [False, True])
def test_whatever_keeps_us_out_is_a_sentence(server, monkeypatch, hung_up):
    """No server, no such database: what to do stands there, and no traceback."""
    if hung_up:  # before the driver has said good-bye

        def close(_connection):
            raise InterfaceError("network error") from BrokenPipeError()

        monkeypatch.setattr(CoreConnection, "close", close)
    with pytest.raises(JournalLostError, match=r"no connection.*(refused|No such file)"):
        Journal(replace(server, port=1))
    with pytest.raises(ConfigError, match=r'journal\.url: .*"nowhere" does not exist'):
        Journal(replace(server, database="nowhere"))


@pytest.fixture(scope="module")
def tls(tmp_path_factory):
    """A server with TLS that wants a password, and the authority that signed its certificate."""
    folder = tmp_path_factory.mktemp("tls")
    words = "req -x509 -newkey rsa:2048 -nodes -days 2 -subj /CN=x -addext subjectAltName=IP:127.0.0.1"
    for name in ("good", "other"):
        files = ["-keyout", folder / f"{name}.key", "-out", folder / f"{name}.crt"]
        subprocess.run(["openssl", *words.split(), *files], check=True, capture_output=True)
    made = Cluster(["ssl=on", "ssl_cert_file=tls.crt", "ssl_key_file=tls.key"])
    for end in ("crt", "key"):
        shutil.copy(folder / f"good.{end}", made.data / f"tls.{end}")
        (made.data / f"tls.{end}").chmod(0o600)
        owner = made.data.stat()
        shutil.chown(made.data / f"tls.{end}", owner.st_uid, owner.st_gid)
    made.start()
    tell(made.server("x"), "ALTER ROLE barcast PASSWORD 'opensesame'")
    (made.data / "pg_hba.conf").write_text("local all all trust\nhostssl all all all scram-sha-256\n")
    tell(made.server("x"), "SELECT pg_reload_conf()")
    (folder / "password").write_text("opensesame\n")
    (folder / "wrong").write_text("sesame\n")
    yield folder, made.port
    made.remove()


@pytest.mark.parametrize(
    ("host", "rest", "fault"),
    [
        ("127.0.0.1", 'password_file = "password"\nca_file = "good.crt"', None),
        (
            "127.0.0.1",
            'password_file = "password"\nca_file = "other.crt"',
            r"journal\.ca_file: .*self-signed",
        ),
        ("localhost", 'password_file = "password"\nca_file = "good.crt"', r"journal\.ca_file: .*mismatch"),
        ("127.0.0.1", 'password_file = "wrong"\nca_file = "good.crt"', "password authentication failed"),
        ("127.0.0.1", 'ca_file = "good.crt"', "password authentication failed"),
    ],
)
def test_server_is_verified_and_told_the_password_by_tls(tls, host, rest, fault):
    """The authority and the name in the certificate count, and so does the password; none is ever shown."""
    folder, port = tls
    path = folder / "barcast.toml"
    path.write_text(TEXT + f'url = "postgresql://barcast@{host}:{port}/postgres"\n{rest}\n')
    place = load(path).journal_place
    assert "sesame" not in f"{place} {place!r}"
    if fault is None:
        Journal(place).close()
        assert exists(place)
        return
    with pytest.raises(ConfigError, match=fault) as raised:
        Journal(place)
    assert "sesame" not in str(raised.value)


def test_server_without_tls_is_refused_where_it_is_needed(cluster, tls, tmp_path):
    """Off this machine a journal goes by TLS or not at all."""
    folder, _ = tls
    path = tmp_path / "barcast.toml"
    url = f"postgresql://barcast@127.0.0.1:{cluster.port}/postgres"
    path.write_text(TEXT + f'url = "{url}"\nca_file = "{folder}/good.crt"\n')
    with pytest.raises(ConfigError, match="it has no TLS"):
        Journal(load(path).journal_place)
    path.write_text(TEXT + 'url = "postgresql://barcast@db.example/postgres"\n')
    context = load(path).journal_place.tls
    assert (context.check_hostname, context.verify_mode.name) == (True, "CERT_REQUIRED")


@pytest.mark.parametrize(
    ("url", "fault"),
    [
        ("postgresql://barcast:hunter2@db/x", "a password does not belong here"),
        ("postgres://barcast@db/x", "write postgresql://"),
        ("postgresql://db/x", "write postgresql://"),
        ("postgresql://barcast@db", "write postgresql://"),
        ("postgresql://barcast@db/x?sslmode=disable", "write postgresql://"),
        ("postgresql://barcast@/x?host=relative", "write postgresql://"),
        ("postgresql://barcast@db:99999/x", "[Pp]ort"),
    ],
)
def test_bad_address_is_named(tmp_path, url, fault):
    """Each fault of the key is one sentence, before anything starts."""
    path = tmp_path / "barcast.toml"
    path.write_text(TEXT + f'url = "{url}"\n')
    with pytest.raises(ConfigError, match=rf"journal\.url: .*{fault}") as error:
        load(path)
    assert "hunter2" not in str(error.value)


def test_long_name_is_refused(tmp_path):
    """An instance's name that PostgreSQL would cut is refused: two could be one."""
    path = tmp_path / "barcast.toml"
    path.write_text(TEXT.replace('"x"', f'"{"x" * 56}"') + 'url = "postgresql://barcast@db/x"\n')
    with pytest.raises(ConfigError, match="more than 55 characters"):
        load(path)


def test_long_rows_are_not_one_statement():
    """The server takes the time in which a long statement arrives for idleness, and ends its writer."""
    rows = [(n, b"x" * size) for n, size in enumerate([10, 200_000, 60_000, 1, 900_000, 5, 5, 5])]
    parts = list(postgres._parts(rows, 3))
    assert [row for part in parts for row in part] == rows
    assert [len(part) for part in parts] == [2, 2, 1, 3]
    assert list(postgres._parts([], 3)) == []


def test_rights_that_are_lacking_are_named(server, cluster):
    """Neither a database of somebody else's nor a table of one is a server that is away."""
    tell(server, "CREATE ROLE guest LOGIN")
    guest = replace(server, user="guest", schema="barcast_guest")
    assert "guest may not make a schema" in Postgres.fault(guest)
    with pytest.raises(ConfigError, match=r"journal\.url: .*permission denied"):
        Journal(guest)
    with closing(Journal(server)):
        tell(server, f'GRANT USAGE ON SCHEMA "{server.schema}" TO guest')
        tell(server, f'GRANT SELECT ON "{server.schema}".version TO guest')
    denied = pytest.raises(ConfigError, match=r"journal\.url: .*permission denied")
    with closing(Journal(replace(server, user="guest"))) as journal, denied:
        journal.append([(1, Kind.BARS, "t", b"x")])


def test_leader_is_told(server, tmp_path):
    """Who has the lease, as long as it lasts; without one a doctor does not believe that a standby waits."""
    (tmp_path / "state").mkdir()
    (tmp_path / "barcast.toml").write_text(TEXT + f'url = "{url(server)}"\n')
    config = load(tmp_path / "barcast.toml")
    case = doctor.Case(tmp_path / "barcast.toml", config)

    def said():
        [(state, sentence, _)] = doctor.daemon(case)
        return state, sentence

    assert said() == ("warn", "none serves, here or elsewhere")
    server = config.journal_place
    with closing(Journal(server)):
        lease = Lease(server, "a")
        assert Postgres.leader(server) is None
        assert said()[0] == "warn"
        lease.take()
        assert Postgres.leader(server) == "a"
        assert said() == ("ok", "one serves elsewhere: a standby may wait here")
        lease.release()
        assert Postgres.leader(server) is None
    tell(server, f'DROP SCHEMA "{server.schema}" CASCADE')


def test_table_that_is_gone_is_a_sentence(server):
    """As a damaged file is."""
    with closing(Journal(server)) as journal:
        tell(server, f'DROP TABLE "{server.schema}".outbox')
        with pytest.raises(ConfigError, match="not a journal, or damaged"):
            journal.waiting()
