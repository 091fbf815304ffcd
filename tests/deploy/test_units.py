"""The shipped units as systemd-analyze reads them, without a systemd that runs. Root is not needed."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

SHIPPED = sorted((Path(__file__).parents[2] / "deploy").glob("barcast*.s*"))
EXPOSURE = 10
"""Tenths that systemd-analyze may find: 0 is closed, 100 is open."""

pytestmark = pytest.mark.skipif(
    shutil.which("systemd-analyze") is None, reason="needs systemd-analyze: apt-get install systemd"
)


@pytest.fixture
def units(tmp_path):
    """Copies of the units, whose program is one that is there."""
    for path in SHIPPED:
        text = path.read_text().replace("/opt/barcast/current/bin/barcast", "/bin/true")
        (tmp_path / path.name).write_text(text)
    return tmp_path


def analyze(*arguments):
    """Exit status and words of systemd-analyze."""
    done = subprocess.run(["systemd-analyze", *map(str, arguments)], capture_output=True, text=True)
    return done.returncode, done.stdout + done.stderr


def verify(folder):
    """Whether systemd would load the units of a folder without a word."""
    return analyze("verify", "--recursive-errors=no", *sorted(folder.iterdir()))


def security(unit):
    """Whether a unit's exposure is within the limit."""
    return analyze("security", "--offline=yes", f"--threshold={EXPOSURE}", unit)


def test_units_are_understood(units):
    """systemd knows each key and value of each unit."""
    assert [path.name for path in SHIPPED] == [
        "barcast-retrain.slice",
        "barcast-retrain@.service",
        "barcast-retrain@.socket",
        "barcast@.service",
    ]
    assert verify(units) == (0, "")


@pytest.mark.parametrize("name", ["barcast@.service", "barcast-retrain@.service"])
def test_services_are_closed(units, name):
    """What the services could do is little, by systemd's own count."""
    status, said = security(units / name)
    assert status == 0, said


@pytest.mark.parametrize(
    ("line", "instead"),
    [
        ("Type=notify", "Type=notified"),
        ("WatchdogSec=", "WatchdogSecs="),
        ("WatchdogSec=3min", "WatchdogSec=soon"),
    ],
)
def test_wrong_unit_is_found(units, line, instead):
    """The control: a wrong key or value is not passed over."""
    unit = units / "barcast@.service"
    text = unit.read_text()
    assert line in text
    unit.write_text(text.replace(line, instead))
    status, said = verify(units)
    assert status != 0 or said, said


@pytest.mark.parametrize(
    "lost",
    [
        "DynamicUser=yes\n",
        "SystemCallFilter=.*\n",
        "CapabilityBoundingSet=\n",
        "IPAddressDeny=any\n",
        "Protect.*\n",
    ],
)
def test_weakened_unit_is_found(units, lost):
    """The control: a service that has lost a restriction scores too much."""
    unit = units / "barcast@.service"
    text, found = re.subn(f"^{lost}", "", unit.read_text(), flags=re.MULTILINE)
    assert found
    unit.write_text(text)
    status, said = security(unit)
    assert status != 0, said


def test_both_services_share_user_and_state():
    """The worker trains as the service's user, on its state: else neither could read the other's files."""
    service, worker = ((SHIPPED[n].read_text()) for n in (3, 1))
    for key in ("DynamicUser", "User", "StateDirectory", "StateDirectoryMode", "UMask"):
        [line] = re.findall(f"^{key}=.*$", service, re.MULTILINE)
        assert f"\n{line}\n" in worker
