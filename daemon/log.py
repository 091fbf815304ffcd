"""Log lines: for people on a terminal, fields for journald, one JSON object a line elsewhere."""

import json
import logging
import os
import socket
import struct
import sys
from collections.abc import Iterable
from typing import Any, TextIO

import structlog

JOURNAL = "/run/systemd/journal/socket"
"""Where journald takes entries of fields: systemd.io/JOURNAL_NATIVE_PROTOCOL."""
PRIORITIES = {"debug": 7, "info": 6, "warning": 4, "error": 3, "critical": 2}
"""The syslog priority of each level."""

Entry = dict[str, Any]


def configure(level: str = "info", journal_stream: str | None = None) -> None:
    """Send log lines to standard error, from `level` up.

    `journal_stream` is what systemd put into JOURNAL_STREAM: device and inode of the stream that it gave.
    Where that is standard error, lines go to journald as entries of fields.
    """
    first: list[Any] = [structlog.processors.add_log_level]
    factory: Any = structlog.PrintLoggerFactory(sys.stderr)
    stamp = structlog.processors.TimeStamper(fmt="iso", utc=True)
    if sys.stderr.isatty():
        # Not the default, which shows the values of local variables: one of them may be a secret.
        first += [stamp, structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)]
    elif journal_stream and journal_stream == _stream(sys.stderr):
        sender = Journald(JOURNAL, sys.stderr)
        first += [structlog.processors.format_exc_info, lambda _logger, _name, entry: ((entry,), {})]

        def factory(*_: Any) -> Journald:
            return sender
    else:
        first += [stamp, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()]
    structlog.configure(
        processors=first,
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelNamesMapping()[level.upper()]),
        logger_factory=factory,
    )


class Journald:
    """Writes entries to journald: each key of an entry is a field, to be asked for by name.

    What the socket does not take, as it is too long or journald is away, goes to the stream as one line of
    JSON behind its priority; journald reads that as well.
    """

    def __init__(self, address: str, stream: TextIO) -> None:
        self._address, self._stream = address, stream
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)

    def msg(self, entry: Entry) -> None:
        """Write one entry: `event`, `level`, and what else is known."""
        try:
            self._socket.sendto(b"".join(_field(*pair) for pair in _fields(entry)), self._address)
        except OSError:
            self._stream.write(f"<{_priority(entry)}>{json.dumps(entry, default=repr)}\n")
            self._stream.flush()

    debug = info = warning = error = critical = exception = msg


def _fields(entry: Entry) -> Iterable[tuple[str, str]]:
    rest = {key: _text(value) for key, value in entry.items() if key not in ("event", "level", "exception")}
    said = [str(entry["event"]), *(f"{key}={text}" for key, text in rest.items())]
    trace = str(entry.get("exception", ""))
    yield "MESSAGE", " ".join(said) + (f"\n{trace}" if trace else "")
    yield "PRIORITY", str(_priority(entry))
    yield "SYSLOG_IDENTIFIER", "barcast"
    yield "BARCAST_EVENT", str(entry["event"])
    for key, text in rest.items():
        yield f"BARCAST_{key.upper()}", text


def _priority(entry: Entry) -> int:
    return PRIORITIES[entry["level"]]


def _text(value: Any) -> str:
    """A value as a person would write it; what has parts as JSON."""
    return json.dumps(value, default=str) if isinstance(value, dict | list | tuple) else str(value)


def _field(name: str, text: str) -> bytes:
    """One field as journald reads it: with its length where the text has several lines."""
    value = text.encode("utf-8", "replace")
    if b"\n" in value:
        return b"%b\n%b%b\n" % (name.encode(), struct.pack("<Q", len(value)), value)
    return b"%b=%b\n" % (name.encode(), value)


def _stream(stream: TextIO) -> str:
    """Device and inode of a stream, as JOURNAL_STREAM names them; empty for one that is no file."""
    try:
        found = os.fstat(stream.fileno())
    except (OSError, ValueError):
        return ""
    return f"{found.st_dev}:{found.st_ino}"
