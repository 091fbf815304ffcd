"""The demonstration does what it says, on a broker of one's own."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

from barcast.backtest.verify import read_capture
from tests.integration.broker import Mosquitto, free_port


def barcast(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the command line as a user would, without a terminal."""
    env = os.environ | {"COLUMNS": "200", "NO_COLOR": "1"}
    command = [sys.executable, "-m", "barcast.backtest.cli", *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=env, timeout=540)


class Loads(HTMLParser):
    """What a browser would fetch to show a page."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self._style = False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._style = tag == "style"
        for name, value in attrs:
            reference = name in ("src", "srcset", "data", "poster") or (tag == "link" and name == "href")
            if reference and value and not value.startswith(("data:", "#")):
                self.found.append(value)

    def handle_data(self, data: str) -> None:
        if self._style:
            self.found += re.findall(r"url\(\s*['\"]?(?!data:)([^)'\"]+)|@import\s+['\"]([^'\"]+)", data)


@pytest.mark.parametrize(
    "page",
    [
        '<script src="https://cdn.example/plotly.js"></script>',
        '<link rel="stylesheet" href="//cdn.example/a.css">',
        '<img src="chart.png">',
        "<style>@import 'https://fonts.example/x.css';</style>",
        "<style>body { background: url(http://example/x.png) }</style>",
    ],
)
def test_page_that_loads_something_is_found(page: str) -> None:
    """The control: scripts, styles, images and fonts from elsewhere are found; links to follow are not."""
    assert Loads(page).found
    assert Loads('<a href="https://example.org">x</a><link rel="icon" href="data:,">').found == []


def test_address_that_is_none_is_said(tmp_path: Path) -> None:
    """A broker without a port is a fault in one sentence, before anything is written."""
    run = barcast("demo", "--folder", str(tmp_path / "demo"), "--broker", "localhost")
    assert run.returncode == 78
    assert "HOST:PORT" in run.stderr
    assert "Traceback" not in run.stderr
    assert not (tmp_path / "demo").exists()


def test_folder_of_somebody_else_is_left_alone(tmp_path: Path) -> None:
    """A folder that no demonstration wrote is refused, and everything in it stays."""
    (tmp_path / "thesis.txt").write_text("years of work")
    run = barcast("demo", "--folder", str(tmp_path), "--broker", "127.0.0.1:1")
    assert run.returncode == 78
    assert "--folder" in run.stderr
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_broker_that_does_not_answer_is_said(tmp_path: Path) -> None:
    """Without a broker at the address the demonstration ends at once, in one sentence."""
    run = barcast("demo", "--folder", str(tmp_path / "demo"), "--broker", f"127.0.0.1:{free_port()}")
    assert run.returncode == 78
    assert "does not answer" in run.stderr
    assert "Traceback" not in run.stderr


@pytest.mark.long
def test_demo_shows_what_it_promises(broker: Mosquitto, tmp_path: Path) -> None:
    """Signals replay without a difference, the planted model is refused, and the report needs no network.

    A byte of a captured signal that is changed afterwards is found by the same command.
    """
    folder = tmp_path / "demo"
    run = barcast("demo", "--folder", str(folder), "--broker", f"127.0.0.1:{broker.port}", "--seconds", "40")
    logs = "".join(path.read_text()[-2000:] for path in folder.glob("*.log"))
    assert run.returncode == 0, run.stdout + run.stderr + logs
    signals = re.search(r"replay of the journal: (\d+) signals, 0 differ", run.stdout)
    assert signals is not None
    assert int(signals[1]) > 400
    assert "refused" in run.stdout
    page = (folder / "backtest" / "report.html").read_text()
    assert len(page) > 100_000
    assert Loads(page).found == []

    journal, capture = str(folder / "state" / "journal.db"), folder / "capture.jsonl"
    agrees = barcast("verify", journal, "--capture", str(capture))
    assert agrees.returncode == 0, agrees.stderr
    assert f"{signals[1]} signals captured, 0 messages differ" in agrees.stdout
    content = capture.read_bytes()
    at = content.index(b"/signals/")
    digit = content.index(b"reference", at)
    while not content[digit : digit + 1].isdigit():
        digit += 1
    other = b"7" if content[digit : digit + 1] != b"7" else b"8"
    capture.write_bytes(content[:digit] + other + content[digit + 1 :])
    assert len(read_capture(capture)) == content.count(b"\n")
    differs = barcast("verify", journal, "--capture", str(capture))
    assert differs.returncode == 1
    assert " 1 messages differ" in differs.stdout
