"""Room on the disk: where it is all that is missing, a fault is one that passes."""

import errno
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from barcast.models import ConfigError, DiskFullError

NO_ROOM = (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR_WRITE, sqlite3.SQLITE_IOERR_SHMSIZE)
"""What SQLite says when the disk, or the quota, is full."""


def is_full(error: OSError | sqlite3.Error) -> bool:
    """Whether there was no room on the disk."""
    if isinstance(error, OSError):
        return error.errno in (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "sqlite_errorcode", None) in NO_ROOM


def free_bytes(folder: Path) -> int:
    """How many bytes are free where a folder is, or is to be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Say in a sentence what keeps us from writing: DiskFullError where it is room, else ConfigError."""
    try:
        yield
    except (OSError, sqlite3.OperationalError) as error:
        if is_full(error):
            raise DiskFullError(
                f"{folder}: {error}; {free_bytes(folder)} bytes are free: make room on its disk, then start "
                "again"
            ) from error
        if isinstance(error, sqlite3.Error):
            raise
        raise ConfigError(f"state_dir: {error}; name a directory that this user may write") from error
