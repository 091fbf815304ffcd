"""A real PostgreSQL for tests: Debian's, on a Unix socket and loopback, its files in memory."""

import hashlib
import os
import shutil
import signal
import socket
import sqlite3
import subprocess
import tempfile
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path

import pytest

from barcast.daemon import journal
from barcast.daemon.journal import Journal
from barcast.daemon.postgres import Postgres, Server, connect
from barcast.models import ConfigError, JournalLostError

PLACES = [
    *sorted(Path("/usr/lib/postgresql").glob("*/bin"), reverse=True),
    *(Path(__file__).parents[1] / ".tools/usr/lib/postgresql").glob("*/bin"),
]
"""Debian's, and where `make` unpacks it without root."""
MEMORY = Path("/dev/shm")
TABLES = ("record", "outbox", "progress", "base", "snapshot", "snapshot_part")
MISSING = "PostgreSQL is missing: run `make test`, which installs it, or `apt-get install postgresql`"


def executable(name: str) -> str | None:
    """Where a program of PostgreSQL is, if it is."""
    return shutil.which(name) or next((str(p / name) for p in PLACES if (p / name).is_file()), None)


class Cluster:
    """One server with its own folder and port, to be stopped, killed and started again.

    It refuses to run as root, and then runs as `postgres` or `nobody`.
    """

    def __init__(self, settings: Sequence[str] = ()) -> None:
        if executable("initdb") is None:
            raise RuntimeError(MISSING)
        self.folder = Path(tempfile.mkdtemp(prefix="barcast-pg-", dir=MEMORY if MEMORY.is_dir() else None))
        as_nobody = ["setpriv", "--reuid=nobody", "--regid=nogroup", "--clear-groups"]
        self._as = as_nobody if os.getuid() == 0 else []
        if self._as:
            shutil.chown(self.folder, "nobody", "nogroup")
        self.folder.chmod(0o755)
        with socket.socket() as s:
            s.bind(("127.0.0.1", 0))
            self.port = int(s.getsockname()[1])
        self._settings = [f"port={self.port}", f"unix_socket_directories={self.folder}", *settings]
        options = ["-U", "barcast", "-A", "trust", "-E", "UTF8", "--no-locale", "-N"]
        self._run("initdb", "-D", str(self.data), *options)
        self.process: subprocess.Popen[bytes] | None = None

    @property
    def data(self) -> Path:
        """The folder of its files."""
        return self.folder / "data"

    def start(self) -> None:
        """Start and wait until it takes connections."""
        program = executable("postgres")
        assert program is not None
        options = [word for setting in self._settings for word in ("-c", setting)]
        log = (self.folder / "log").open("ab")
        self.process = subprocess.Popen(
            [*self._as, program, "-D", str(self.data), *options], stdout=log, stderr=log, cwd="/"
        )
        for _ in range(200):
            try:
                connect(self.server("x")).close()
            except JournalLostError:
                time.sleep(0.05)
            else:
                return
        raise RuntimeError((self.folder / "log").read_text())

    def kill(self) -> None:
        """End it at once, without a word to its clients or the disk."""
        assert self.process is not None
        self.process.send_signal(signal.SIGQUIT)
        self.process.wait(20)
        self.process = None

    def remove(self) -> None:
        """End it for good, with its files."""
        if self.process is not None:
            self.kill()
        shutil.rmtree(self.folder, ignore_errors=True)

    def server(self, schema: str) -> Server:
        """A schema of it, by the Unix socket."""
        return Server(str(self.folder), self.port, "postgres", "barcast", schema)

    def of(self, path: Path) -> Server:
        """The schema that stands for a journal file."""
        return self.server("barcast_" + hashlib.sha256(str(path.absolute()).encode()).hexdigest()[:16])

    def open(self, path: Path, readonly: bool) -> Postgres:
        """What a journal file is opened as, where PostgreSQL stands in for SQLite."""
        if readonly and not path.is_file():
            raise ConfigError(f"{path}: no journal there; give the journal.db of a state directory")
        server = self.of(path)
        if not path.exists():  # whoever removed the file removed the journal
            made = connect(server)
            made.execute_simple(f'DROP SCHEMA IF EXISTS "{server.schema}" CASCADE')
            made.close()
            path.touch()
        return Postgres(server, journal.TABLES, journal.VERSION, readonly=readonly)

    def _run(self, name: str, *arguments: str) -> None:
        program = executable(name)
        assert program is not None
        done = subprocess.run([*self._as, program, *arguments], capture_output=True, text=True, cwd="/")
        if done.returncode:
            raise RuntimeError(done.stdout + done.stderr)


def image(of: Journal) -> sqlite3.Connection:
    """A copy of a journal as it is on the disk now."""
    copy = sqlite3.connect(":memory:", check_same_thread=False)
    if isinstance(of._db, sqlite3.Connection):
        of._db.backup(copy)
        return copy
    copy.executescript(journal.TABLES)
    for table in TABLES:
        rows = of._db.execute(f"SELECT * FROM {table}").fetchall()
        copy.execute(f"DELETE FROM {table}")
        if rows:
            copy.executemany(f"INSERT INTO {table} VALUES ({', '.join('?' * len(rows[0]))})", rows)
    copy.execute(f"PRAGMA user_version = {journal.VERSION}")
    copy.commit()
    return copy


def put(copy: sqlite3.Connection, path: Path) -> None:
    """Make the journal at a path what a copy is."""
    path.parent.mkdir(exist_ok=True)
    for old in path.parent.glob(f"{path.name}*"):
        old.unlink()
    with closing(Journal(path)) as made:
        if isinstance(made._db, Postgres):
            for table in TABLES:
                made._db.execute(f"DELETE FROM {table}")
                rows = copy.execute(f"SELECT * FROM {table}").fetchall()
                if rows:
                    places = f"({', '.join('?' * len(rows[0]))})"
                    made._db.executemany(f"INSERT INTO {table} VALUES {places}", rows)
            return
        made._db.execute("PRAGMA journal_mode = DELETE")
        copy.backup(made._db)


def change(path: Path, sql: str, *values: object) -> None:
    """Change a journal behind its back."""
    with closing(Journal(path)) as made:
        made._db.execute(sql, values)


def quick(of: Journal) -> Journal:
    """A journal whose disk is not what is tested."""
    if isinstance(of._db, sqlite3.Connection):
        of._db.execute("PRAGMA synchronous = OFF")
    return of


@pytest.fixture(scope="session")
def cluster():
    """A running PostgreSQL. Its absence is a failure: a skipped promise is not a kept one."""
    if executable("initdb") is None:
        pytest.fail(MISSING)
    running = Cluster()
    running.start()
    yield running
    running.remove()


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def each_journal(request, monkeypatch):
    """A test runs twice: with journals in files, and with schemas of a server in their places."""
    if request.param == "postgresql":
        monkeypatch.setattr(journal, "_open", request.getfixturevalue("cluster").open)
    return request.param
