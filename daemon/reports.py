"""Backtests in a folder, for the page: what each was of, and its figures."""

import json
from pathlib import Path
from typing import Any

from barcast.daemon.wire import to_text
from barcast.models import DataError

INDEX, REPORT = "result.json", "report.html"
"""What `barcast backtest --out FOLDER` writes into it."""
MOST, MOST_BYTES = 200, 20_000_000
"""Backtests that are listed, the newest ones, and bytes of an index that is read."""
ALL = "all"
"""How an index calls the scores of all symbols together."""
TOLD = ("model", "kind", "sampler", "steps", "timeframe", "calendar", "files", "trials", "warning")
"""What is told of a backtest's meta."""


def listed(folder: Path) -> bytes:
    """The newest backtests in folders of a folder, as JSON. One that cannot be read is named with the reason.

    Raise DataError where the folder cannot be read.
    """
    try:
        found = [path / INDEX for path in folder.iterdir() if (path / INDEX).is_file()]
        times = {path: path.stat().st_mtime_ns for path in found}
    except OSError as error:
        raise DataError(f"{folder}: {error.strerror}; name a folder that the daemon may read") from error
    newest = sorted(found, key=lambda path: (-times[path], path))[:MOST]
    return json.dumps([_told(path, times[path]) for path in newest], allow_nan=False).encode()


def report(folder: Path, name: str) -> bytes | None:
    """The page of a backtest, None where there is none of this name."""
    found = next((path for path in folder.iterdir() if path.name == name), None)
    if found is None or not (found / REPORT).is_file():
        return None
    return (found / REPORT).read_bytes()


def _told(path: Path, time: int) -> dict[str, Any]:
    about: dict[str, Any] = {"name": path.parent.name, "written": to_text(time), "report": False}
    try:
        if path.stat().st_size > MOST_BYTES:
            raise ValueError(f"more than {MOST_BYTES} bytes")
        told = json.loads(path.read_bytes(), parse_constant=lambda name: None)
        meta = told["meta"]
        about |= {name: meta.get(name) for name in TOLD}  # an older one lacks some
        about["strategies"] = [book["strategy"] for book in told["portfolio"]]
        about["portfolio"] = told["portfolio"]
        about["scores"] = [row for row in told["scores"] if row["symbol"] == ALL]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        return about | {"fault": f"{path.name} cannot be read: {error}"}
    return about | {"report": (path.parent / REPORT).is_file()}
