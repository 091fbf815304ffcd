"""The units on a real systemd, installed by the shipped script: sandboxed, hung, killed, stopped."""

import json
import re
import subprocess
import sys
import time
from datetime import UTC, datetime

import polars as pl
import pytest

from barcast.backtest.sample import sample_bars
from barcast.daemon.wire import encode_bars
from barcast.models import Bar
from tests.deploy.machine import NO_NETWORK, PACKAGES, PYTHON, SOURCE, Machine, obstacle
from tests.integration.broker import SHIPPED, SHIPPED_ACL, executable, password_line

pytestmark = [pytest.mark.broker, pytest.mark.long]
SYMBOLS = ("AAPL", "IBM", "MSFT")
FIRST = datetime(2007, 1, 1, tzinfo=UTC)
CLOSE = datetime(2011, 3, 1, 21, tzinfo=UTC)
CHECKPOINT = "/opt/barcast/current/lib/python{}.{}/site-packages/barcast/backtest/sample/checkpoint"
CONFIG = """
instance = "{name}"
state_dir = "/var/lib/barcast/{name}"
timeframe = "session"
calendar = "XNYS"
symbols = ["AAPL", "IBM", "MSFT"]
[mqtt]
root = "barcast/{name}"
username = "barcast"
password_file = "{name}.password"
[model]
first = "{model}"
[[strategy]]
kind = "median-drift"
[rehearsal]
start = 2011-03-01T21:00:01Z
at = {at}
speed = 1
[retrain]
cron = "17 3 * * *"
steps = 8
"""
ASK = """
import asyncio, sys
from pathlib import Path
from barcast.daemon.worker import call
try:
    print(asyncio.run(call(Path(sys.argv[1]), sys.argv[2], sys.argv[3:], print)))
except OSError as refusal:
    print(refusal)
"""
LOCK = """
import os, sqlite3, sys, time
journal = sqlite3.connect(sys.argv[1], isolation_level=None)
journal.execute("BEGIN IMMEDIATE")
print(os.getpid(), flush=True)
time.sleep(60)
"""


@pytest.fixture(scope="module")
def machine(tmp_path_factory):
    """A machine with a broker that asks for passwords, and Barcast installed by its script."""
    if reason := obstacle():
        pytest.skip(reason)
    if executable() is None:
        pytest.fail(
            "mosquitto is missing: run `make test`, which installs it, or `apt-get install mosquitto`"
        )
    machine = Machine(tmp_path_factory.mktemp("machine"))
    bars = pl.read_parquet(sample_bars()).filter(pl.col("symbol").is_in(SYMBOLS))
    bars.filter(pl.col("close_time").is_between(FIRST, CLOSE, closed="left")).write_parquet(
        machine.feed / "history.parquet"
    )
    machine.bars = {}
    for row in bars.filter(pl.col("close_time") == CLOSE).iter_rows(named=True):
        values = [row[key] for key in ("open", "high", "low", "close", "volume")]
        machine.bars[row["symbol"]] = Bar(row["symbol"], int(CLOSE.timestamp()) * 10**9, *values)
    try:
        machine.boot()
        machine.run("systemctl", "log-level", "debug")
        start_broker(machine)
        yield machine
    finally:
        machine.off()


def start_broker(machine):
    """The shipped configuration, with passwords and rights for two root topics."""
    acl = "".join(
        SHIPPED_ACL.read_text().replace("barcast/v1", f"barcast/{name}") for name in ("plain", "deep")
    )
    machine.write("/etc/mosquitto/acl", acl)
    users = "".join(password_line(user, user) for user in ("barcast", "feed", "reader"))
    machine.write("/etc/mosquitto/passwords", users)
    config = SHIPPED.read_text().replace("allow_anonymous true", "allow_anonymous false")
    config += "password_file /etc/mosquitto/passwords\nacl_file /etc/mosquitto/acl\n"
    machine.write("/etc/mosquitto/test.conf", config)
    machine.run("systemd-run", "--unit=broker", executable(), "-c", "/etc/mosquitto/test.conf")


def install(machine, name, model):
    """Install from this tree as an operator would, and let the instance have history."""
    machine.write(f"/etc/barcast/{name}.password", "barcast\n", 0o600)
    script = ("sh", f"{SOURCE}/deploy/install.sh", "install", name)
    said = machine.run("env", *PACKAGES, *NO_NETWORK, f"PYTHON={PYTHON}", *script).stdout
    at = datetime.now(UTC).isoformat()
    machine.write(f"/etc/barcast/{name}.toml", CONFIG.format(name=name, model=model, at=at))
    for unit in ("barcast@.service", "barcast-retrain@.service"):
        machine.drop_in(unit, f"Environment={' '.join(PACKAGES)}", "RestartSec=1")
    history = f"/var/lib/private/barcast/{name}/history"
    machine.run("install", "-d", "-m", "700", "/var/lib/private", history)
    machine.run("cp", "/opt/feed/history.parquet", history)
    return said


def python(machine, *arguments):
    """A command that runs the installed Python there."""
    return machine.command("env", *PACKAGES, "/opt/barcast/current/bin/python", *arguments)


def market(machine, name, symbols):
    """Publish the bars of some symbols, and print the signals that follow."""
    (machine.feed / "bars").write_bytes(encode_bars([machine.bars[symbol] for symbol in symbols]))
    script = (f"{SOURCE}/tests/deploy/market.py", f"barcast/{name}", "/opt/feed/bars", *symbols)
    return subprocess.Popen(python(machine, *script), stdout=subprocess.PIPE)


def signals(trading):
    """The signals that a market has seen, by symbol."""
    with trading:
        return {signal["symbol"]: signal for signal in map(json.loads, trading.stdout)}


def restarts(machine, unit):
    """How often systemd has started a unit anew, and whether it is up now."""
    return int(machine.show(unit, "NRestarts")), machine.show(unit, "ActiveState")


def main_pid(machine, unit):
    """The number of a unit's main process."""
    number = machine.show(unit, "MainPID")
    assert int(number) > 0, machine.journal(unit)  # to kill 0 is to kill whoever runs the tests
    return number


def status_of(machine, unit):
    """What the kernel says of a unit's main process."""
    lines = machine.run("cat", f"/proc/{main_pid(machine, unit)}/status").stdout.splitlines()
    return {key: value.split() for key, value in (line.split(":", 1) for line in lines)}


def test_daemon_serves_in_its_sandbox(machine):
    """Installed by the script, services start, read their password, and publish forecasts of both kinds."""
    said = install(machine, "plain", "fhs")
    assert "systemctl enable --now barcast@plain" in said
    install(machine, "deep", CHECKPOINT.format(*sys.version_info))
    machine.drop_in("barcast@plain.service", "WatchdogSec=3")
    for name in ("plain", "deep"):
        machine.run("systemctl", "start", f"barcast@{name}")
        assert restarts(machine, f"barcast@{name}") == (0, "active")
        machine.wait("the broker", lambda name=name: machine.show(f"barcast@{name}", "StatusText") == "ready")
    for name, symbols in (("plain", ["AAPL"]), ("deep", SYMBOLS)):
        seen = signals(market(machine, name, symbols))
        assert sorted(seen) == sorted(symbols), machine.journal(f"barcast@{name}")
        for signal in seen.values():
            assert signal["close_time"] == "2011-03-01T21:00:00Z"
            assert len(signal["quantiles"][0]) == 7
    assert machine.show("barcast@deep", "NRestarts") == "0"
    words = machine.run("journalctl", "-o", "cat", "_PID=1").stdout
    assert "(WATCHDOG=1, EXTEND_TIMEOUT_USEC=30000000, STATUS=reading journal and model)" in words
    assert "(WATCHDOG=1)" in words


def test_running_process_may_do_little(machine):
    """It is no root, has no capabilities, filters its system calls, and scores what the units are held to."""
    for unit in ("barcast@plain.service", "barcast@deep.service"):
        status = status_of(machine, unit)
        assert status["Uid"][0] != "0"
        assert (int(status["CapEff"][0], 16), int(status["CapBnd"][0], 16)) == (0, 0)
        assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
        machine.run("systemd-analyze", "security", "--threshold=10", unit)
    threads = int(status_of(machine, "barcast@deep")["Threads"][0])
    assert threads < int(machine.show("barcast@deep", "TasksMax"))


def test_password_is_seen_by_the_service_alone(machine):
    """The file is root's; the service has a copy of its own; no argument and no environment holds it."""
    pid = main_pid(machine, "barcast@plain")
    root = f"/proc/{pid}/root"
    assert machine.run("stat", "-c", "%a %U", "/etc/barcast/plain.password").stdout == "600 root\n"
    inside = machine.run("stat", "-c", "%a %u %s", f"{root}/etc/barcast/plain.password").stdout.split()
    assert inside == ["400", status_of(machine, "barcast@plain")["Uid"][0], str(len("barcast\n"))]
    secret = "7Hj-only-in-this-test"
    machine.write("/etc/barcast/plain.password", secret, 0o600)
    machine.run("systemctl", "restart", "barcast@plain")
    shown = machine.run("sh", "-c", "cat /proc/[0-9]*/cmdline /proc/[0-9]*/environ 2>/dev/null; true").stdout
    assert "barcast@" in shown or "/etc/barcast/plain.toml" in shown
    assert secret not in shown
    machine.wait("a refusal", lambda: "broker_unreachable" in machine.journal("barcast@plain"))
    assert secret not in machine.journal("barcast@plain")
    machine.write("/etc/barcast/plain.password", "barcast\n", 0o600)
    machine.run("systemctl", "restart", "barcast@plain")


def test_path_that_hangs_is_restarted(machine):
    """When a commit does not return, the loop turns but the path stands: the watchdog says where."""
    lock = ("-c", LOCK, "/var/lib/private/barcast/plain/journal.db")
    with subprocess.Popen(python(machine, *lock), stdout=subprocess.PIPE, text=True) as locked:
        number = locked.stdout.readline().strip()
        trading = market(machine, "plain", ["IBM"])
        machine.wait("the watchdog", lambda: "Watchdog timeout" in machine.journal("barcast@plain"))
        machine.run("kill", "-9", number)
    assert list(signals(trading)) == ["IBM"]
    assert restarts(machine, "barcast@plain") == (1, "active")
    log = machine.journal("barcast@plain")
    assert "Fatal Python error: Aborted" in log
    assert re.search(r'File ".*/barcast/daemon/journal\.py", line \d+ in append', log)


def test_loop_that_stands_is_restarted(machine):
    """A process that is stopped is ended by the watchdog, too."""
    machine.run("kill", "-STOP", main_pid(machine, "barcast@plain"))
    machine.wait("a restart", lambda: restarts(machine, "barcast@plain") == (2, "active"))


def test_killed_daemon_is_back(machine):
    """After kill -9 it starts again, and goes on with what it has on disk."""
    machine.run("kill", "-9", main_pid(machine, "barcast@plain"))
    machine.wait("a restart", lambda: restarts(machine, "barcast@plain") == (3, "active"))
    assert list(signals(market(machine, "plain", ["MSFT"]))) == ["MSFT"]


def test_training_runs_in_its_slice(machine):
    """The worker trains as the service's user, in the trainings' slice, without a network, and then ends."""
    socket, unit = "/run/barcast-retrain/deep", "barcast-retrain@deep.service"
    out = "/var/lib/barcast/deep/challengers/trained"
    asked = ("-c", ASK, socket, "train", "--champion", "fhs", "--out", out)
    as_service = ("systemd-run", "--quiet", "--pipe", "-p", "DynamicUser=yes", "-p", "User=barcast-deep")
    settings = [piece for setting in PACKAGES for piece in ("-E", setting)]
    command = machine.command(*as_service, *settings, "/opt/barcast/current/bin/python", *asked)
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as client:
        machine.wait("a training", lambda: machine.show(unit, "ActiveState") == "active")
        assert machine.show(unit, "ControlGroup").startswith("/barcast.slice/barcast-retrain.slice/")
        assert (machine.show(unit, "Nice"), machine.show("barcast-retrain.slice", "CPUWeight")) == (
            "10",
            "20",
        )
        machine.run("systemd-analyze", "security", "--threshold=10", unit)
        said, _ = client.communicate(timeout=120)
    assert said.splitlines()[-1] == "(0, b'')", said
    assert "model" in said
    owner = machine.run(
        "stat", "-c", "%u", "/var/lib/private/barcast/deep/challengers/trained/model.json"
    ).stdout
    assert owner.split() == status_of(machine, "barcast@deep")["Uid"][:1]
    machine.wait("its end", lambda: machine.show(unit, "ActiveState") == "inactive")
    assert machine.show("barcast@deep", "NRestarts") == "0"


def test_stranger_gets_no_training(machine):
    """Another user may connect, and is refused in one line."""
    stranger = ("systemd-run", "--quiet", "--pipe", "--wait", "-p", "DynamicUser=yes", "-p", "User=stranger")
    settings = [piece for setting in PACKAGES for piece in ("-E", setting)]
    asked = ("/opt/barcast/current/bin/python", "-c", ASK, "/run/barcast-retrain/deep", "gate")
    said = machine.run(*stranger, *settings, *asked).stdout
    assert "may not ask for anything here" in said


def test_wrong_configuration_is_not_tried_again(machine):
    """A fault that a person must mend ends the service in one sentence, once."""
    before = machine.run("cat", "/etc/barcast/plain.toml").stdout
    machine.write("/etc/barcast/plain.toml", before.replace('kind = "median-drift"', 'kind = "median-drft"'))
    machine.run("systemctl", "restart", "barcast@plain", check=False)
    machine.wait("the end", lambda: machine.show("barcast@plain", "ActiveState") == "failed")
    assert machine.show("barcast@plain", "ExecMainStatus") == "78"
    time.sleep(1.5)  # RestartSec
    assert machine.show("barcast@plain", "ActiveState") == "failed"
    assert "error: /etc/barcast/plain.toml: strategy.0" in machine.journal("barcast@plain")
    machine.write("/etc/barcast/plain.toml", before)
    machine.run("systemctl", "start", "barcast@plain")


def test_stop_is_clean(machine):
    """A stop is announced, ends well, and nothing is started again."""
    machine.run("systemctl", "stop", "barcast@plain", "barcast@deep")
    for name in ("plain", "deep"):
        assert machine.show(f"barcast@{name}", "ActiveState") == "inactive"
        assert machine.show(f"barcast@{name}", "Result") == "success"
        assert machine.events(f"barcast@{name}", "stopped")
    assert "(STOPPING=1)" in machine.run("journalctl", "-o", "cat", "_PID=1").stdout


def test_backup_comes_back(machine):
    """A copy of the state that root has put back belongs to the service again, and is what it starts from."""
    state = "/var/lib/private/barcast/plain"
    machine.run("cp", "-r", state, "/opt/feed/backup")
    machine.run("rm", "-r", state)
    machine.run("cp", "-r", "/opt/feed/backup", state)
    assert machine.run("stat", "-c", "%U", f"{state}/journal.db").stdout == "root\n"
    machine.run("systemctl", "start", "barcast@plain")
    last = machine.events("barcast@plain", "recovered")[-1]
    assert int(last["BARCAST_RECORDS"]) >= 5  # three bars, and what the first start decided
    machine.run("systemctl", "stop", "barcast@plain")


def test_removal_keeps_what_is_the_operator_s(machine):
    """After an uninstall programs and units are gone; configuration, password and state are there."""
    machine.run("sh", f"{SOURCE}/deploy/install.sh", "uninstall")
    units = machine.run("ls", "/etc/systemd/system").stdout
    assert not re.search(r"barcast[a-z@-]*\.(service|socket|slice)$", units, re.MULTILINE)
    assert machine.run("ls", "/opt/barcast", check=False).returncode != 0
    machine.run("ls", "/etc/barcast/plain.toml", "/etc/barcast/plain.password")
    machine.run("ls", "/var/lib/private/barcast/plain/journal.db")
