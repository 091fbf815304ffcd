"""Backtests in a folder, for the page: what each was of, and its figures."""

from contextlib import suppress
from pathlib import Path
from typing import Any

import msgspec

from barcast.daemon.wire import to_text
from barcast.models import DataError

INDEX, REPORT = "result.json", "report.html"
"""What `barcast backtest --out FOLDER` writes into it."""
MOST, MOST_BYTES, MOST_REPORT = 200, 2_000_000, 100_000_000
"""Backtests that are listed, the newest ones, and bytes of an index and of a report that are read."""
ALL = "all"
"""How an index calls the scores of all symbols together."""
TOLD = ("model", "kind", "sampler", "steps", "timeframe", "calendar", "files", "trials", "warning")
"""What is told of a backtest's meta."""


class _Index(msgspec.Struct):
    meta: dict[str, Any]
    portfolio: list[dict[str, Any]]
    scores: list[dict[str, Any]]


_index = msgspec.json.Decoder(_Index)


def listed(folder: Path) -> bytes:
    """The newest backtests in folders of a folder, as JSON. One that cannot be read is named with the reason.

    A folder that may not be looked into is none.
    Raise DataError where the folder cannot be read.
    """
    times: dict[Path, int] = {}
    try:
        for path in folder.iterdir():
            with suppress(OSError):  # there is none, none any more, or it may not be looked into
                times[path / INDEX] = (path / INDEX).stat().st_mtime_ns
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; name a folder that the daemon may read") from error
    newest = sorted(times, key=lambda path: (-times[path], path))[:MOST]
    return msgspec.json.encode([_told(path, times[path]) for path in newest])


def report(folder: Path, name: str) -> bytes | None:
    """The page of a backtest, None where there is none of this name that can be read."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.name == name and (path / REPORT).stat().st_size <= MOST_REPORT:
                return (path / REPORT).read_bytes()
    return None


def _told(path: Path, time: int) -> dict[str, Any]:
    about: dict[str, Any] = {"name": path.parent.name, "written": to_text(time), "report": False}
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        told = _index.decode(path.read_bytes())
        about |= {name: told.meta.get(name) for name in TOLD}  # an older one lacks some
        about["strategies"] = [book["strategy"] for book in told.portfolio]
        about["portfolio"] = told.portfolio
        about["scores"] = [row for row in told.scores if row.get("symbol") == ALL]
    except (OSError, ValueError, KeyError, RecursionError) as error:
        return about | {"fault": f"{path.name} cannot be read: {error}"}
    return about | {"report": (path.parent / REPORT).is_file()}
