"""The runbook's way to the first signal, command by command, on a new machine."""

import json
import re
import shutil
from pathlib import Path

import pytest

from tests.deploy.machine import NO_NETWORK, PACKAGES, PYTHON, SOURCE, Machine, obstacle

pytestmark = pytest.mark.broker
RUNBOOK = (Path(__file__).parents[2] / "deploy/RUNBOOK.md").read_text()


def test_first_signal(tmp_path):
    """The commands of the first part, as they stand there, end in a signal of the shipped model."""
    if reason := obstacle():
        pytest.skip(reason)
    for needed in ("/lib/systemd/system/mosquitto.service", shutil.which("mosquitto_sub") or "mosquitto_sub"):
        if not Path(needed).exists():
            pytest.skip(f"{needed} is missing: apt-get install mosquitto mosquitto-clients")
    part = RUNBOOK.split("## The first signal")[1].split("\n### ")[0]
    commands = "".join(re.findall(r"^```sh\n(.*?)^```$", part, re.MULTILINE | re.DOTALL))
    for here, there in (
        ("apt-get install", ": apt-get install"),  # a network
        ("+60 seconds", "+15 seconds"),
        ("rm -r /etc/barcast/try.toml", ": rm -r /etc/barcast/try.toml"),  # is looked at below
    ):
        assert commands.count(here) == 1
        commands = commands.replace(here, there)
    machine = Machine(tmp_path)
    try:
        machine.boot()
        for unit in ("barcast@.service", "barcast-retrain@.service"):
            machine.drop_in(unit, f"Environment={' '.join(PACKAGES)}")
        machine.write("/tmp/commands", f"set -eu\ncd {SOURCE}\n{commands}")
        shell = ("env", *PACKAGES, *NO_NETWORK, f"PYTHON={PYTHON}", "bash", "/tmp/commands")
        done = machine.run(*shell, check=False, seconds=180)
        said = done.stdout + done.stderr
        assert done.returncode == 0, said + machine.journal("barcast@try") + machine.journal("mosquitto")
        assert "written: /etc/barcast/try.toml" in said
        assert "/etc/barcast/try.toml is in order" in said
        [signal] = [json.loads(line) for line in done.stdout.splitlines() if line.startswith('{"')]
        assert signal["close_time"] == "2012-01-03T21:00:00Z"
        assert signal["reasons"] == []
        assert machine.show("barcast@try", "Result") == "success"
    finally:
        machine.off()


def test_each_alert_is_in_the_runbook():
    """What an alert links to is there."""
    rules = (Path(__file__).parents[2] / "deploy/prometheus/rules.yml").read_text()
    links = re.findall(r"runbook_url: deploy/RUNBOOK\.md#(.*)", rules)
    headings = {
        re.sub("[^a-z -]", "", h.lower()).replace(" ", "-") for h in re.findall("^#+ (.*)$", RUNBOOK, re.M)
    }
    assert len(links) > 10
    assert set(links) - headings == set()


def test_events_of_the_runbook_are_logged_somewhere():
    """No row explains a line that the program does not write."""
    sources = "".join(path.read_text() for path in (Path(__file__).parents[2] / "daemon").glob("*.py"))
    table = RUNBOOK.split("Log lines from `warning` up:")[1].split("\n## ")[0]
    events = [
        event
        for row in re.findall(r"^\| (`.*?) \|", table, re.MULTILINE)
        for event in re.findall(r"`([a-z_0-9]+)`", row)
    ]
    assert len(events) > 10
    made = {f"{what}_{how}" for what in ("train", "gate") for how in ("failed", "timed_out", "stalled")}
    assert [event for event in events if f'"{event}"' not in sources and event not in made] == []
