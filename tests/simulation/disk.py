"""A disk under the real journal: it fills up, is slow, and forgets what was not synced when the power fails.

The journal is a real file of SQLite. What a crash leaves is a copy of the state directory: after `kill -9`
all that was written, after a power cut the log of SQLite as of the last sync, and of what was written since
any sectors.
"""

import os
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

from barcast.daemon.journal import Journal

SECTOR = 512
HEADER = 32
"""Bytes of the header of SQLite's log: it is synced by itself when the log begins anew."""
WRITES = ("INSERT", "UPDATE", "DELETE")
VOLATILE = {"journal.db-shm", "lock", "compaction.lock", "control"}


class Disk:
    """The state is whether there is room, whether it is slow, up to where the log is synced, what happened.

    `committed` is called after each commit of the daemon; `unsynced` says whether anybody writes without a
    sync, as compactions do.
    """

    def __init__(self, dice: Random) -> None:
        self.full = self.slow = False
        self.unsynced = True
        self.happened: Counter[str] = Counter()
        self.committed: Callable[[], None] = lambda: None
        self._dice = dice
        self._synced = (b"", 0)

    def journal(self, path: Path) -> Journal:
        """Open a journal on this disk."""
        if self.full:
            self.happened["start on a full disk"] += 1
        journal = Journal(path)
        # A log of few pages begins anew again and again.
        journal._db.execute(f"PRAGMA wal_autocheckpoint = {self._dice.choice((8, 60, 1000))}")
        journal._db = Platter(journal._db, self)  # type: ignore[assignment]
        self.sync(path.parent)
        return journal

    def some(self) -> bool:
        """Now and then."""
        return self._dice.random() < 0.5

    def sync(self, folder: Path) -> None:
        """All that was written is on the disk: what a commit of the daemon returns from."""
        if not self.unsynced:
            return
        try:
            with (folder / "journal.db-wal").open("rb") as log:
                self._synced = (log.read(HEADER), os.fstat(log.fileno()).st_size)
        except FileNotFoundError:
            self._synced = (b"", 0)

    def after_kill(self, folder: Path, to: Path) -> None:
        """What is left when the process ends: all that it wrote."""
        _copy(folder, to)

    def after_power_cut(self, folder: Path, to: Path) -> None:
        """What is left without power: all that was synced, and any sectors of the rest."""
        _copy(folder, to)
        if not self.unsynced:
            return
        log, (header, synced) = _log(folder), self._synced
        keep = synced if log[:HEADER] == header else HEADER
        if len(log) > keep:
            self.happened["unsynced log torn"] += 1
            (to / "journal.db-wal").write_bytes(self._torn(log[:keep].ljust(len(log), b"\0"), log, keep))

    def kill_amid(self, folder: Path, to: Path, job: Callable[[], Any]) -> None:
        """What a kill leaves right after the first commit of a job, or without any."""

        def committed() -> None:
            self.committed = lambda: None
            self.happened["killed after the first commit of a job"] += 1
            shutil.rmtree(to)
            _copy(folder, to)

        _copy(folder, to)
        self.committed = committed
        try:
            job()
        finally:
            self.committed = lambda: None

    def power_cut_amid(self, folder: Path, to: Path, job: Callable[[], Any]) -> None:
        """What a power cut leaves amid a job."""
        _copy(folder, to)
        before = _log(folder)
        job()
        after = _log(folder)
        if after == before or not after:
            return
        if after[:HEADER] != before[:HEADER]:
            start, base = HEADER, after[:HEADER] + before[HEADER:]
        else:
            start = next(
                (i for i, (a, b) in enumerate(zip(after, before, strict=False)) if a != b), len(before)
            )
            base = before
        self.happened["commit torn"] += 1
        torn = self._torn(base.ljust(len(after), b"\0")[: max(len(after), len(base))], after, start)
        (to / "journal.db-wal").write_bytes(torn)

    def _torn(self, before: bytes, after: bytes, start: int) -> bytes:
        """Sectors of either, from `start` on; one may be neither, and the end may be missing."""
        found, dice = bytearray(before), self._dice
        if dice.random() < 0.5:
            return after[: dice.randrange(start, len(after) + 1)]
        for at in range(start - start % SECTOR, len(after), SECTOR):
            low, high = max(at, start), min(at + SECTOR, len(after))
            kind = dice.random()
            if kind < 0.6:
                found[low:high] = after[low:high]
            elif kind < 0.65:
                found[low:high] = dice.randbytes(high - low)
        return bytes(found[: dice.choice((len(found), dice.randrange(start, len(found) + 1)))])


class Platter:
    """A connection to SQLite over a disk that may be full."""

    def __init__(self, db: sqlite3.Connection, disk: Disk) -> None:
        self._connection, self._disk, self._writing = db, disk, False

    def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
        """Execute, unless it writes and there is no room."""
        if sql.startswith("BEGIN"):
            self._writing = sql.endswith("IMMEDIATE")
        elif self._disk.full and self._writing:
            self._needs_room(sql)
        done = self._connection.execute(sql, *parameters)
        if self._writing and sql.startswith("COMMIT"):
            self._disk.committed()
        return done

    def transaction(self) -> Any:
        """As the journal's own, by way of the disk."""
        return type(self._connection).transaction(self)  # type: ignore[attr-defined]

    def executemany(self, sql: str, parameters: Any) -> sqlite3.Cursor:
        """Execute for each, unless there is no room."""
        if self._disk.full:
            self._needs_room(sql)
        return self._connection.executemany(sql, parameters)

    def _needs_room(self, sql: str) -> None:
        """Fail at any row, and at the commit for certain."""
        if sql.startswith("COMMIT") or (sql.startswith(WRITES) and self._disk.some()):
            self._disk.happened["disk full"] += 1
            error = sqlite3.OperationalError("database or disk is full")
            error.sqlite_errorcode = sqlite3.SQLITE_FULL
            raise error

    def __getattr__(self, name: str) -> Any:
        return getattr(self._connection, name)


def _log(folder: Path) -> bytes:
    log = folder / "journal.db-wal"
    return log.read_bytes() if log.is_file() else b""


def _copy(folder: Path, to: Path) -> None:
    shutil.copytree(folder, to, ignore=lambda _folder, names: VOLATILE.intersection(names))
