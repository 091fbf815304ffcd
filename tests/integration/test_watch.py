"""`barcast watch` on a real broker: in a terminal, in a pipe, and when the broker goes and comes back."""

import contextlib
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from functools import partial

import msgspec
import pytest

from barcast.backtest.cli.terminal import price
from barcast.daemon.wire import to_text
from tests import seen
from tests.integration.broker import ROOT
from tests.integration.instance import client
from tests.seen import HOUR, notice, status, target, topic

ENV = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
ENV |= {"PYTHONPATH": f"{ROOT}/.dev:{ROOT}", "TERM": "xterm-256color"}
ESCAPES = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")


@pytest.fixture
def desk(broker, tmp_path):
    """The command that watches an instance with two symbols, whose messages the broker keeps."""
    config = tmp_path / "barcast.toml"
    config.write_text(f'instance = "desk"\nstate_dir = "s"\ntimeframe = "1h"\n[mqtt]\nport = {broker.port}\n')
    close = time.time_ns() // HOUR * HOUR
    reasons = {"flags": ["degraded"], "reasons": ["2 of the last 85 bars are missing"]}
    bodies = [seen.signal("BTCUSD", close), seen.signal("ETHUSD", close, reference=99.25, **reasons)]
    bodies += [target("BTCUSD", close=close, target=-0.4), notice()]
    bodies += [status(time=to_text(time.time_ns()), interval=600.0, processed=to_text(close))]
    tell(broker, bodies)
    return [sys.executable, "-m", "barcast.backtest.cli", "watch", str(config)], bodies


def tell(broker, bodies):
    """Publish what a daemon would, to be kept."""
    feed = client("feed", broker.port)
    feed.loop_start()
    for body in bodies:
        feed.publish(topic(body), msgspec.json.encode(body), 1, retain=True).wait_for_publish(5)
    feed.disconnect()
    feed.loop_stop()


class Pty:
    """A program on a terminal of its own, and what it has written there."""

    def __init__(self, command):
        self.ours, self.theirs = pty.openpty()
        termios.tcsetwinsize(self.theirs, (24, 80))
        self.before = termios.tcgetattr(self.theirs)
        self.written = ""
        # Its controlling terminal, so that Ctrl-C is a signal.
        self.process = subprocess.Popen(command, env=ENV, preexec_fn=partial(os.login_tty, self.theirs))

    def wait_for(self, text, seconds=60):
        """Read until a text was written after what was read before."""
        end, begin = time.monotonic() + seconds, len(self.written)
        while text not in ESCAPES.sub("", self.written[begin:]):
            assert time.monotonic() < end, ESCAPES.sub("", self.written[-5000:])
            if select.select([self.ours], [], [], 0.2)[0]:
                self.written += os.read(self.ours, 65536).decode()

    def type(self, keys):
        """What a person presses."""
        os.write(self.ours, keys.encode())

    def end(self, seconds=60):
        """Read its last words; give its exit status."""
        end = time.monotonic() + seconds
        while self.process.poll() is None or select.select([self.ours], [], [], 0)[0]:
            assert time.monotonic() < end, ESCAPES.sub("", self.written[-5000:])
            if select.select([self.ours], [], [], 0.2)[0]:
                self.written += os.read(self.ours, 65536).decode()
        return self.process.returncode

    def close(self):
        """Leave nothing."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        os.close(self.ours)
        os.close(self.theirs)


def test_pipe_gets_one_table(desk):
    """What is no terminal gets one plain table with every symbol, and the end."""
    command, bodies = desk
    found = subprocess.run(command, capture_output=True, text=True, env=ENV, timeout=120)
    assert (found.returncode, found.stderr) == (0, "")
    assert "\x1b" not in found.stdout
    lines = found.stdout.splitlines()
    assert lines[0].startswith("desk  LIVE ")
    for body in bodies[:2]:
        row = next(line for line in lines if line.startswith(body.symbol))
        assert price(body.reference) in row
        assert f"{100 * body.rise[0]:.0f}%" in row
    assert "-0.40" in next(line for line in lines if line.startswith("BTCUSD"))
    assert lines[-1] == "! ETHUSD: 2 of the last 85 bars are missing"


@pytest.mark.parametrize("key", ["q", "\x03"])
def test_terminal_is_left_as_it_was(desk, broker, request, key):
    """It follows the messages, tells of a broker that goes and comes, and gives the terminal back."""
    command, bodies = desk
    terminal = Pty(command)
    request.addfinalizer(terminal.close)
    terminal.wait_for("LIVE")
    terminal.wait_for("100.50")
    terminal.type("/ET\r")
    terminal.wait_for("1-1 of 1 by name, +1, ET*")
    if key == "q":
        tell(broker, [status("lost")])
        terminal.wait_for("OFFLINE")
        broker.kill()
        terminal.wait_for("NO BROKER")
        broker.start()
        tell(broker, [bodies[-1]])
        terminal.wait_for("LIVE")
    assert termios.tcgetattr(terminal.theirs) != terminal.before
    terminal.type(key)
    assert terminal.end() == 0
    assert termios.tcgetattr(terminal.theirs) == terminal.before
    modes = {
        mode: terminal.written.rfind(mode)
        for mode in ("\x1b[?1049h", "\x1b[?1049l", "\x1b[?25l", "\x1b[?25h")
    }
    assert 0 <= modes["\x1b[?1049h"] < modes["\x1b[?1049l"]  # the screen of its own, and the one before
    assert 0 <= modes["\x1b[?25l"] < modes["\x1b[?25h"]  # the cursor
    assert "Traceback" not in terminal.written
