"""Where log lines go, and that journald gets fields that it can be asked for."""

import json
import os
import socket
import struct
import subprocess
import sys

import pytest
import structlog

from barcast.daemon import log


def fields(datagram):
    """The fields of an entry, read as journald reads them."""
    found = {}
    while datagram:
        head, _, rest = datagram.partition(b"\n")
        name, equals, value = head.partition(b"=")
        if not equals:
            (length,) = struct.unpack("<Q", rest[:8])
            value, datagram = rest[8 : 8 + length], rest[8 + length + 1 :]
        else:
            datagram = rest
        found[name.decode()] = value.decode()
    return found


@pytest.fixture
def journald(tmp_path, monkeypatch):
    """A socket in journald's place."""
    monkeypatch.setattr(log, "JOURNAL", str(tmp_path / "journal"))
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as receiver:
        receiver.bind(str(tmp_path / "journal"))
        receiver.settimeout(5)
        yield receiver


@pytest.fixture
def stream(tmp_path):
    """A file for standard error, and what JOURNAL_STREAM would call it."""
    with (tmp_path / "stderr").open("w+") as file:
        found = os.fstat(file.fileno())
        yield file, f"{found.st_dev}:{found.st_ino}"


@pytest.fixture
def configure(stream, monkeypatch):
    """Configures the log with standard error in that file; pytest has its own in place before the test."""

    def configured(name):
        monkeypatch.setattr("sys.stderr", stream[0])
        log.configure("info", name)

    return configured


def written(file):
    """What stands in the file."""
    file.flush()
    file.seek(0)
    return file.read()


def test_journald_gets_fields(journald, stream, configure):
    """Under systemd each key of a line is a field, its level the priority, and nothing else is written."""
    file, name = stream
    configure(name)
    logger = structlog.get_logger()
    logger.warning("late", symbol="BTCUSD", count=3, share=0.5, parts={"a": [1]})
    logger.debug("unseen")
    logger.info("fine")
    assert fields(journald.recv(65536)) == {
        "MESSAGE": 'late symbol=BTCUSD count=3 share=0.5 parts={"a": [1]}',
        "PRIORITY": "4",
        "SYSLOG_IDENTIFIER": "barcast",
        "BARCAST_EVENT": "late",
        "BARCAST_SYMBOL": "BTCUSD",
        "BARCAST_COUNT": "3",
        "BARCAST_SHARE": "0.5",
        "BARCAST_PARTS": '{"a": [1]}',
    }
    told = fields(journald.recv(65536))
    assert (told["MESSAGE"], told["PRIORITY"]) == ("fine", "6")
    assert written(file) == ""


@pytest.mark.parametrize("text", ["two\nlines", "\n", "a=b\nPRIORITY=0\n", "ends\n"])
def test_several_lines_stay_one_value(journald, stream, configure, text):
    """A value of several lines is sent with its length: no line of it becomes a field."""
    configure(stream[1])
    structlog.get_logger().error("said", last_words=text, after="x")
    found = fields(journald.recv(65536))
    assert (found["BARCAST_LAST_WORDS"], found["BARCAST_AFTER"], found["PRIORITY"]) == (text, "x", "3")
    assert found["MESSAGE"] == f"said last_words={text} after=x"


def test_a_traceback_is_in_the_message(journald, stream, configure):
    """What went wrong in a job is told with its traceback, in one entry."""
    configure(stream[1])
    try:
        raise ValueError("no such thing")
    except ValueError:
        structlog.get_logger().exception("retrain_failed")
    found = fields(journald.recv(65536))
    assert found["MESSAGE"].startswith("retrain_failed\nTraceback")
    assert found["MESSAGE"].endswith("ValueError: no such thing")
    assert (found["PRIORITY"], found["BARCAST_EVENT"]) == ("3", "retrain_failed")


@pytest.mark.parametrize("why", ["too long", "away"])
def test_what_the_socket_does_not_take_goes_to_the_stream(
    journald, stream, configure, tmp_path, monkeypatch, why
):
    """An entry is never lost: as a line of JSON behind its priority, journald reads it from the stream."""
    file, name = stream
    monkeypatch.setattr(log, "JOURNAL", str(tmp_path / ("journal" if why == "too long" else "nobody")))
    configure(name)
    text = "x" * (10_000_000 if why == "too long" else 5)
    structlog.get_logger().warning("long", text=text)
    line = written(file)
    assert line.startswith("<4>{")
    assert line.count("\n") == 1
    assert json.loads(line[3:]) == {"event": "long", "level": "warning", "text": text}


@pytest.mark.parametrize("name", [None, "", "1:2"])
def test_elsewhere_lines_are_json(journald, stream, configure, name):
    """Where standard error is not journald's, as in a subprocess of the daemon, a line is one JSON object."""
    configure(name)
    structlog.get_logger().warning("late", symbol="BTCUSD")
    line = json.loads(written(stream[0]))
    assert line.pop("timestamp").endswith("Z")
    assert line == {"event": "late", "level": "warning", "symbol": "BTCUSD"}


def test_the_command_line_reads_the_variable(tmp_path):
    """`barcast run` under systemd writes to journald: what it is told there is not on standard error."""
    program = (
        "import os, sys, structlog\nfrom barcast.backtest import cli\nfrom barcast.daemon import app, log\n"
        "found = os.fstat(2)\nos.environ['JOURNAL_STREAM'] = f'{found.st_dev}:{found.st_ino}'\n"
        f"log.JOURNAL = {str(tmp_path / 'nobody')!r}\n"
        "app.serve = lambda *_: structlog.get_logger().info('here')\n"
        "cli.main()\n"
    )
    config = tmp_path / "barcast.toml"
    config.write_text('instance = "desk"\nstate_dir = "state"\ntimeframe = "1m"\n')
    with (tmp_path / "stderr").open("wb") as stderr:
        subprocess.run([sys.executable, "-c", program, "run", str(config)], stderr=stderr, check=True)
    assert '<6>{"event": "here", "level": "info"}' in (tmp_path / "stderr").read_text()
