"""Journal records back to the events they were: used by recovery and by every replay of a journal."""

from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from barcast.daemon import wire
from barcast.daemon.calendar import Calendar
from barcast.daemon.history import bars, digest, files, scan
from barcast.daemon.journal import Kind, Record
from barcast.daemon.pipeline import Settings
from barcast.daemon.ports import Activation, Arrival, Event, Revision, Warmup
from barcast.daemon.timeframe import Timeframe
from barcast.models import Bar, DataError


class Warmth(msgspec.Struct, frozen=True):
    """The payload of a warm-up: the content hash of the history, and how many bars a symbol took of it."""

    digest: str
    bars: int


ReadHistory = Callable[[Warmth], Sequence[Bar]]
"""Gives the bars of a warm-up."""


class Champion(msgspec.Struct, frozen=True):
    """The payload of an activation: the model, the fingerprint it serves under, and why it was chosen."""

    model: str
    fingerprint: str
    reason: str


def events(records: Iterable[Record], history: ReadHistory) -> Iterator[tuple[int, Event]]:
    """Decode records in order; yield each event with its number.

    Bars are decoded under the settings that were in force when they were received, as the live daemon
    decoded them.
    """
    root, calendar = "", Calendar("24x7", Timeframe.parse("1m"))
    for record in records:
        match record.kind:
            case Kind.BARS:
                came, _ = wire.decode(record.topic, record.payload, record.time, root, calendar)
                yield record.seq, Arrival(record.time, tuple(came))
            case Kind.REVISION:
                settings = Settings.decode(record.payload)
                root, calendar = settings.root, settings.bar_calendar()
                yield record.seq, Revision(record.time, record.payload)
            case Kind.WARMUP:
                warmth = msgspec.json.decode(record.payload, type=Warmth)
                yield record.seq, Warmup(record.time, warmth.digest, tuple(history(warmth)))
            case Kind.ACTIVATION:
                champion = msgspec.json.decode(record.payload, type=Champion)
                yield record.seq, Activation(record.time, champion.model, champion.fingerprint)
            case kind:
                raise ValueError(f"record {record.seq} of the journal is of unknown kind {kind!r}")


def history_files(folder: Path) -> list[Path]:
    """The Parquet and CSV files of a history folder; their bars are stamped by the close."""
    return files([folder]) if folder.is_dir() and any(folder.iterdir()) else []


def read_history(folder: Path, warmth: Warmth, calendar: Calendar) -> Sequence[Bar]:
    """The last bars of each symbol in the history. Raise DataError when its content is another by now."""
    found = history_files(folder)
    if not found or digest(found) != warmth.digest:
        raise DataError(
            f"{folder}: the history is not what the journal was warmed up from (SHA-256 {warmth.digest}); "
            "put the files back as they were"
        )
    return list(bars(scan(found, "close", calendar).group_by("symbol").tail(warmth.bars)))
