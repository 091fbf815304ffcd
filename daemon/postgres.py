"""The journal in PostgreSQL: the tables of a file, on a server, and the lease of the one who writes them.

Whoever writes has the row of the `writer` for as long as a transaction takes, so that commits are in one
order; its epoch says who may. One who was deposed finds another epoch there, and nothing of his is committed.
"""

import errno
import re
import ssl
import struct
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from barcast.models import ConfigError, DeposedError, JournalLostError

if TYPE_CHECKING:
    from pg8000.core import Context, CoreConnection

ANSWER_SECONDS = 30.0
"""How long the server may be silent until the connection counts as lost."""
OPEN_SECONDS = 2.0
"""How long a writer may leave a transaction open: one who is stopped in it holds up his successor."""
LEASE_SECONDS = 3.0
"""How long a lease lasts that is not renewed, by the server's clock."""
RENEW_SECONDS = 1.0
"""How often it is renewed."""
TAKE_SECONDS = 0.25
"""How often a standby looks whether it has lapsed."""
FEW = 10
"""Values of a statement that the server is to remember: those of more differ in how many."""
VALUES = 10_000
"""Values of one statement, at most; the protocol has room for 65,535."""
BYTES = 250_000
"""Bytes of one statement, about, at most: the server counts the time in which one arrives as idle."""

_LOST = re.compile(r"08...|57P0[1-5]|25P03|25006|53[234]00")
"""SQLSTATEs that pass: no connection, shut down, starting up, read only as after a failover, too many."""
_REFUSED = re.compile(r"28...|3D000|42501|3F000")
"""SQLSTATEs of a login, a database or a privilege that somebody must mend."""
_DAMAGED = re.compile(r"42P01|42703")
"""SQLSTATEs of a table or a column that is not there."""
_FULL = "53100"
_COLUMN_TYPES = {"INTEGER": "BIGINT", "BLOB": "BYTEA", "TEXT": 'TEXT COLLATE "C"'}
"""What the types of SQLite are here; texts are in the order of their code points, as there."""
_LEASE = """
CREATE TABLE version (number INTEGER NOT NULL);
CREATE TABLE writer (one INTEGER PRIMARY KEY CHECK (one = 1), epoch INTEGER NOT NULL);
INSERT INTO writer VALUES (1, 0);
CREATE TABLE lease (
  one INTEGER PRIMARY KEY CHECK (one = 1), holder TEXT NOT NULL, expires TIMESTAMPTZ NOT NULL
);
INSERT INTO lease VALUES (1, '', '-infinity');
"""


@dataclass(frozen=True, slots=True)
class Server:
    """Where a journal is on a PostgreSQL server, and who we are there; a `host` with a slash is a folder.

    That is one with the server's Unix socket.
    """

    host: str
    port: int
    database: str
    user: str
    schema: str
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = field(default=None, repr=False)

    def __str__(self) -> str:
        """As it is told to people: without a password."""
        return f"postgresql://{self.user}@{self.host}:{self.port}/{self.database}, schema {self.schema}"


class Rows:
    """What a statement gave, in the way of a cursor: the rows that are not read yet, and how many it changed.

    `rowcount` is that number.
    """

    def __init__(self, found: "Context") -> None:
        self.rowcount = found.row_count
        self._rows: Iterator[tuple[Any, ...]] = iter([tuple(row) for row in found.rows or ()])

    def __iter__(self) -> Iterator[tuple[Any, ...]]:
        """The rows that are left."""
        return self._rows

    def fetchone(self) -> tuple[Any, ...] | None:
        """The next row, None at the end."""
        return next(self._rows, None)

    def fetchall(self) -> list[tuple[Any, ...]]:
        """All rows that are left."""
        return list(self._rows)


class Session:
    """A connection to a server, made when it is needed, and again when it was lost. Not for several threads.

    The state is the connection, None where there is none, and the statements that it knows.
    """

    def __init__(self, server: Server, seconds: float, *, readonly: bool = False) -> None:
        self._server, self._seconds, self._readonly, self._relaxed = server, seconds, readonly, False
        self._connection: CoreConnection | None = None
        self._statements: dict[str, Any] = {}

    def execute(self, sql: str, values: Sequence[object] = ()) -> Rows:
        """Run a statement with a `?` for each value."""
        with self._watched() as connection:
            if not values:
                return Rows(connection.execute_simple(sql))
            if len(values) > FEW:
                return Rows(connection.execute_unnamed(_numbered(sql), _texts(values)))
            if sql not in self._statements:
                self._statements[sql] = connection.prepare_statement(_numbered(sql), ())
            name, columns, functions = self._statements[sql]
            return Rows(connection.execute_named(name, _texts(values), columns, functions, sql))

    @contextmanager
    def _commit(self, begin: str) -> Iterator[None]:
        """COMMIT after the body, or ROLLBACK when that or the commit raises."""
        self.execute(begin)
        done = False
        try:
            yield
            self.execute("COMMIT")
            done = True
        finally:
            if not done and self._connection is not None:
                self.execute("ROLLBACK")

    def close(self) -> None:
        """End the connection."""
        if self._connection is not None:
            _close(self._connection)
            self._connection = None

    @contextmanager
    def _watched(self) -> Iterator["CoreConnection"]:
        """The connection, made again if need be, and no more when it is lost."""
        if self._connection is None:
            made = connect(self._server, self._seconds)
            with _faults(self._server, made):
                _prepare(made, self._server, self._readonly, self._relaxed)
            self._connection, self._statements = made, {}
        try:
            with _faults(self._server, self._connection):
                yield self._connection
        except (JournalLostError, ConfigError):  # it is closed
            self._connection = None
            raise


class Postgres(Session):
    """A journal's tables on a server, made where there are none. Not for several threads at once.

    The state is the connection with the statements that it knows, None where it was lost: it is made again
    when it is needed; and the `epoch` under which commits are made: None lets a compaction pass, which may
    work beside the writer. Whatever is lost with the connection raises JournalLostError, a commit perhaps
    after it took place; what finds no room on the server's disk raises OSError as of a file; a commit after
    another epoch began raises DeposedError.
    """

    compacted = True

    def __init__(self, server: Server, tables: str, version: int, *, readonly: bool) -> None:
        super().__init__(server, ANSWER_SECONDS, readonly=readonly)
        self.epoch: int | None = None
        found = self._version()
        if found is None and readonly:
            raise ConfigError(f"{server}: no journal there; run the daemon first")
        if found is None:
            self._make(tables, version)
        elif found != version:
            raise ConfigError(
                f"{server}: journal version {found}, not {version}; use the version of barcast that wrote "
                "it, or name another database"
            )

    @staticmethod
    def exists(server: Server) -> bool:
        """Whether there is a journal."""
        return bool(_asked(server, f"SELECT to_regclass('\"{server.schema}\".version') IS NOT NULL"))

    @staticmethod
    def fault(server: Server) -> str | None:
        """What keeps a journal from being made there, if anything."""
        sql = "SELECT has_database_privilege(current_database(), 'CREATE')"
        if _asked(server, sql):
            return None
        return f"{server.user} may not make a schema in {server.database}"

    @staticmethod
    def leader(server: Server) -> str | None:
        """The boot that has the lease of a journal, None while nobody has it."""
        sql = f'SELECT max(holder) FROM "{server.schema}".lease WHERE {_FREE.replace("<", ">=")}'
        found: str | None = _asked(server, sql)
        return found

    def executemany(self, sql: str, rows: Sequence[Sequence[object]]) -> None:
        """Run a statement for each row; one that inserts `VALUES (…)`, for many in one message."""
        parts = re.fullmatch(r"(.* VALUES )(\([?, ]+\))(.*)", sql, re.DOTALL)
        if parts is None:
            for row in rows:
                self.execute(sql, row)
            return
        head, places, tail = parts.groups()
        for part in _parts(rows, max(1, VALUES // places.count("?"))):
            statement = _numbered(head + ", ".join([places] * len(part)) + tail)
            with self._watched() as connection:
                connection.execute_unnamed(statement, _texts([value for row in part for value in row]))

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Nothing to add: a statement names what is wrong by itself."""
        yield

    @contextmanager
    def transaction(self) -> Iterator["Postgres"]:
        """One commit of the body, under our epoch; nothing of it when the body or the commit raises."""
        with self._commit(_begin()):
            row = self.execute("SELECT epoch FROM writer FOR UPDATE").fetchone()
            if self.epoch is not None and row != (self.epoch,):
                raise DeposedError(
                    f"{self._server}: another instance took over, by epoch {row and row[0]} after our "
                    f"{self.epoch}; this one must start again, as a standby"
                )
            yield self

    @contextmanager
    def one_moment(self) -> Iterator[None]:
        """Let all that is read inside be of one moment."""
        self.execute("BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY")
        try:
            yield
        finally:
            if self._connection is not None:
                self.execute("ROLLBACK")

    def relax(self) -> None:
        """Let commits not wait for the disk from now on, as those of a compaction, one of which is at work.

        Raise ConfigError for a second one.
        """
        self._relaxed = True
        self.execute("SET synchronous_commit = off")
        row = self.execute("SELECT pg_try_advisory_lock(hashtext(?), 1)", (self._server.schema,)).fetchone()
        if row != (True,):
            raise ConfigError(f"{self._server}: another compaction is at work on this journal; let it end")

    def size(self) -> int:
        """Bytes of the tables and their indexes."""
        sql = (
            "SELECT COALESCE(SUM(pg_total_relation_size(oid)), 0)::bigint FROM pg_class "
            "WHERE relkind = 'r' AND relnamespace = to_regnamespace(?)"
        )
        return int((self.execute(sql, (f'"{self._server.schema}"',)).fetchone() or (0,))[0])

    def _version(self) -> int | None:
        """The version of the journal, None where there is none."""
        if self.execute("SELECT to_regclass('version')").fetchone() == (None,):
            return None
        row = self.execute("SELECT number FROM version").fetchone()
        return None if row is None else int(row[0])

    def _make(self, tables: str, version: int) -> None:
        """Make the tables, unless another one does so at this moment."""
        text = re.sub(r"\b(INTEGER|BLOB|TEXT)\b", lambda m: _COLUMN_TYPES[m[1]], tables + _LEASE)
        text = text.replace("INSERT OR IGNORE", "INSERT")
        with self._commit("BEGIN"):
            self.execute("SELECT pg_advisory_xact_lock(hashtext(?), 0)", (self._server.schema,))
            if self._version() is None:
                self.execute(f'CREATE SCHEMA IF NOT EXISTS "{self._server.schema}"')
                self.execute(text)
                self.execute("INSERT INTO version VALUES (?)", (version,))


class Lease(Session):
    """The right to write a journal, which one instance at a time has: on a connection of its own.

    The state is, while the lease is ours, its epoch.
    """

    def __init__(self, server: Server, holder: str) -> None:
        super().__init__(server, LEASE_SECONDS)
        self.epoch: int | None = None
        self._holder = holder

    def take(self) -> int | None:
        """Take the lease if nobody has it, and return the new epoch; nothing that came before may write then.

        Raise JournalLostError without a server.
        """
        if self.execute(f"SELECT 1 FROM lease WHERE {_FREE}").fetchone() is None:
            return None
        with self._commit(_begin()):
            # First the row that the last writer may hold: from then on the lease counts.
            self.execute("SELECT epoch FROM writer FOR UPDATE")
            taken = self.execute(f"UPDATE lease SET holder = ?, {_FROM_NOW} WHERE {_FREE}", [self._holder])
            if not taken.rowcount:
                return None
            row = self.execute("UPDATE writer SET epoch = epoch + 1 RETURNING epoch").fetchone() or ()
        [self.epoch] = row
        return self.epoch

    def renew(self) -> bool:
        """Let it last from now on again; say whether it is still ours. Raise JournalLostError."""
        sql = f"UPDATE lease SET {_FROM_NOW} FROM writer WHERE holder = ? AND epoch = ?"
        return bool(self.execute(sql, [self._holder, self.epoch]).rowcount == 1)

    def release(self) -> None:
        """Give it back at once, if it is ours and the server is there."""
        if self.epoch is not None:
            with suppress(OSError):
                self.execute("UPDATE lease SET expires = '-infinity' WHERE holder = ?", [self._holder])
            self.epoch = None
        self.close()


@contextmanager
def leased(server: Server, holder: str) -> Iterator[int]:
    """Take the lease for some short work, and give it back; gives the epoch.

    Raise ConfigError while an instance has it.
    """
    lease = Lease(server, holder)
    try:
        epoch = lease.take()
        if epoch is None:
            raise ConfigError(f"{server}: an instance serves from it; stop that and its standbys first")
        yield epoch
    finally:
        lease.release()


def _asked(server: Server, sql: str) -> Any:
    """The one value of a question, on a connection of its own."""
    made = connect(server)
    try:
        with _faults(server):
            return (made.execute_simple(sql).rows or [[None]])[0][0]
    finally:
        _close(made)


def _parts(rows: Sequence[Sequence[object]], most: int) -> Iterator[Sequence[Sequence[object]]]:
    """Rows in order, in parts of `most` rows and about `BYTES` at most."""
    first = size = 0
    for k, row in enumerate(rows):
        length = sum(len(value) for value in row if isinstance(value, bytes | str))
        if k > first and (k - first == most or size + length > BYTES):
            yield rows[first:k]
            first, size = k, 0
        size += length
    if rows:
        yield rows[first:]


def _begin() -> str:
    """Begin a commit that ends when its writer is stopped in it."""
    return f"BEGIN; SET LOCAL idle_in_transaction_session_timeout = {int(OPEN_SECONDS * 1e3)}"


_FREE = "expires < clock_timestamp()"
_FROM_NOW = f"expires = clock_timestamp() + interval '{LEASE_SECONDS} seconds'"


def connect(server: Server, seconds: float = ANSWER_SECONDS) -> "CoreConnection":
    """Connect to the server. Raise JournalLostError without one, ConfigError where it does not let us in."""
    try:
        from pg8000.core import CoreConnection
        from pg8000.exceptions import DatabaseError, InterfaceError
    except ImportError as error:
        raise ConfigError(
            f"journal.url: {error}; install barcast with its extra, `pip install barcast[postgres]`"
        ) from error
    local = server.host.startswith("/")
    with _faults(server):
        try:
            return CoreConnection(
                server.user,
                host=None if local else server.host,
                unix_sock=f"{server.host}/.s.PGSQL.{server.port}" if local else None,
                port=server.port,
                database=server.database,
                password=server.password or "",
                ssl_context=server.tls or False,
                timeout=seconds,
                application_name="barcast",
            )
        except InterfaceError as error:
            # The driver says good-bye to a server that has hung up, and that fault hides what that one said.
            said: BaseException | None = error
            while said is not None and not isinstance(said, DatabaseError):
                said = said.__context__
            if said is None:
                raise
            raise said from None


def _prepare(connection: "CoreConnection", server: Server, readonly: bool, relaxed: bool) -> None:
    """Set what this session needs. Raise ConfigError for a server on which a commit does not last."""
    words = connection.execute_simple(
        "SELECT current_setting('fsync'), current_setting('synchronous_commit'), "
        "current_setting('server_encoding')"
    ).rows or [[]]
    fsync, commit, encoding = words[0]
    if fsync != "on" or commit == "off":
        setting = "fsync" if fsync != "on" else "synchronous_commit"
        raise ConfigError(
            f"{server}: {setting} is off there, so that a commit may not outlive the power; set it on, for "
            "this user or for the server"
        )
    if encoding != "UTF8":
        raise ConfigError(f"{server}: the database is encoded as {encoding}; make one with ENCODING 'UTF8'")
    connection.execute_simple(
        f"SET search_path TO \"{server.schema}\"; SET client_encoding TO 'UTF8'; SET TimeZone TO 'UTC'; "
        f"SET default_transaction_read_only TO {'on' if readonly else 'off'}; "
        "SET lock_timeout TO '60s'; SET statement_timeout TO 0; "
        "SET idle_in_transaction_session_timeout TO 0; SET client_min_messages TO warning"
        + ("; SET synchronous_commit TO off" if relaxed else "")
    )


@contextmanager
def _faults(server: Server, connection: "CoreConnection | None" = None) -> Iterator[None]:
    """Say what is wrong in our own words; a connection of which that is not known is closed."""
    from pg8000.exceptions import DatabaseError, InterfaceError

    try:
        yield
    except DatabaseError as error:
        said = error.args[0] if error.args and isinstance(error.args[0], dict) else {}
        code, message = said.get("C", ""), said.get("M", str(error))
        if code == _FULL:
            raise OSError(errno.ENOSPC, f"{server}: {message}") from error
        if _LOST.fullmatch(code):
            _close(connection)
            raise JournalLostError(f"{server}: {message}; see to the server") from error
        if _DAMAGED.fullmatch(code):
            _close(connection)
            raise ConfigError(f"{server}: not a journal, or damaged ({message}); restore a copy") from error
        if _REFUSED.fullmatch(code):
            _close(connection)
            raise ConfigError(f"journal.url: {server}: {message}; correct it, or grant it there") from error
        raise
    except ssl.SSLCertVerificationError as error:
        raise ConfigError(
            f"journal.ca_file: {server}: {error.verify_message}; name the authority that signed the server's "
            "certificate, and the server by the name in it"
        ) from error
    except (InterfaceError, OSError, struct.error) as error:
        if "refuses SSL" in str(error):
            raise ConfigError(
                f"journal.url: {server}: it has no TLS, without which no journal leaves this machine; set "
                "ssl = on there"
            ) from error
        if isinstance(error, OSError) and error.errno == errno.ENOSPC:
            raise
        _close(connection)
        reason = error.__cause__ or error
        raise JournalLostError(
            f"{server}: no connection ({reason}); see to the server and the way to it"
        ) from error


def _close(connection: "CoreConnection | None") -> None:
    from pg8000.exceptions import InterfaceError

    if connection is not None:
        with suppress(InterfaceError, OSError):
            connection.close()


def _numbered(sql: str) -> str:
    """A statement with $1, $2 … in the places of its question marks."""
    pieces = sql.split("?")
    return "".join(f"{piece}${k}" for k, piece in enumerate(pieces[:-1], 1)) + pieces[-1]


def _texts(values: Sequence[object]) -> list[str | None]:
    """Values as the protocol's texts."""
    return [_text(value) for value in values]


def _text(value: object) -> str | None:
    match value:
        case None:
            return None
        case bytes():
            return f"\\x{value.hex()}"
        case int():
            return str(int(value))
    return str(value)
