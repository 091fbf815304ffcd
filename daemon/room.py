"""The disk: what is written stays, and a fault is one that passes where room is all that is missing."""

import errno
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from barcast.models import ConfigError, DiskFullError, JournalLostError

LEAST_FREE = 1_000_000
"""Bytes that a start needs."""


def is_full(error: OSError) -> bool:
    """Whether there was no room on the disk, or in the quota."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT)


def free_bytes(folder: Path) -> int:
    """How many bytes are free where a folder is, or is to be."""
    there = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def check_room(folder: Path) -> None:
    """Raise DiskFullError where a start would soon stand still: a journal may have some pages left."""
    if (free := free_bytes(folder)) < LEAST_FREE:
        raise DiskFullError(
            f"{folder}: {free} bytes are free, and a start needs {LEAST_FREE}: make room on its disk, then "
            "start again"
        )


def flush(path: Path) -> None:
    """Bring a file, or what a folder lists, to the disk itself."""
    number = os.open(path, os.O_RDONLY)
    try:
        os.fsync(number)
    finally:
        os.close(number)


def make(folder: Path) -> None:
    """Make a folder, and those above it, so that a lost power does not take them away."""
    missing = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in reversed(missing):
        hand_over(path)
        flush(path.parent)


def hand_over(path: Path) -> None:
    """Give a new file to whom its folder belongs: root may work on the state of a service."""
    owner, own = path.parent.stat(), path.stat()
    if (own.st_uid, own.st_gid) != (owner.st_uid, owner.st_gid):
        try:
            os.chown(path, owner.st_uid, owner.st_gid)
        except OSError as error:
            if error.errno not in (errno.EPERM, errno.EINVAL):  # not root; or the owner is of elsewhere
                raise


@contextmanager
def room(folder: Path) -> Iterator[None]:
    """Say in a sentence what keeps us from writing: DiskFullError where it is room, else ConfigError."""
    try:
        yield
    except JournalLostError:
        raise
    except OSError as error:
        if is_full(error):
            raise DiskFullError(
                f"{folder}: {error}; {free_bytes(folder)} bytes are free: make room on its disk, then start "
                "again"
            ) from error
        raise ConfigError(f"state_dir: {error}; name a directory that this user may write") from error
