"""`barcast doctor`: each thing that can be wrong with an instance is found once, with a remedy."""

import asyncio
import errno
import fcntl
import json
import socket
import sqlite3
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from barcast.backtest.cli import doctor
from barcast.backtest.cli.doctor import Case, Finding, _Check, examined
from barcast.daemon import control, http, mqtt, room, store
from barcast.daemon.config import load
from barcast.daemon.events import Champion
from barcast.daemon.journal import Journal, Kind
from barcast.models import ConfigError, open_model
from tests.integration.broker import SHIPPED_ACL, Mosquitto, free_port

LEAST = 'instance = "desk"\nstate_dir = "state"\ntimeframe = "1m"\n[mqtt]\nport = {port}\n'
NOW = 1_790_000_000 * 10**9
Found = list[tuple[str, str, str]]


def case(folder: Path, more: str = "", port: int = 1, *, state: bool = True) -> Case:
    """An instance in a folder, with a state directory."""
    path = folder / "barcast.toml"
    path.write_text(LEAST.format(port=port) + more)
    if state:
        (folder / "state").mkdir(mode=0o700, exist_ok=True)
    return Case(path, load(path))


def one(found: Iterator[tuple[str, str, str]], state: str) -> tuple[str, str]:
    """What the only finding of this state says, and its remedy, which it has."""
    [(_, said, remedy)] = [each for each in found if each[0] == state]
    assert remedy or state == "ok"
    return said, remedy


def recorded(folder: Path, records: list[tuple[int, str, str, bytes]]) -> Path:
    """A journal with these records."""
    made = Journal(folder / "state" / "journal.db")
    made.append(records)
    made.close()
    return made.place


def test_sound_instance_has_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before its first start, with a broker, all is well but that no daemon runs."""
    case(tmp_path, '[[strategy]]\nkind = "median-drift"\n', state=False)
    monkeypatch.setattr(doctor, "CHECKS", tuple(each for each in doctor.CHECKS if each[0] != "broker"))
    findings = list(examined(tmp_path / "barcast.toml"))
    assert [each.check for each in findings if each.state != "ok"] == ["daemon"], findings
    assert {each.check for each in findings} == {"configuration", *(check for check, *_ in doctor.CHECKS)}


def test_bad_configuration_ends_it(tmp_path: Path) -> None:
    """Nothing can be examined behind a configuration that says something else than was meant."""
    (tmp_path / "barcast.toml").write_text("instance = 1\n")
    [finding] = examined(tmp_path / "barcast.toml")
    assert (finding.check, finding.state) == ("configuration", "fail")
    assert "timeframe: missing" in finding.said


def test_foreign_packages_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A package that is missing, or of another version, is told with what to install."""
    asked = ["numpy>=99", "no-such-thing>=1", "rich>=1; extra == 'x'"]
    monkeypatch.setattr(doctor, "requires", lambda _name: asked)
    (_, old, remedy), (_, none, _) = doctor.packages()
    assert "is installed, not >=99" in old
    assert "pip install 'numpy>=99'" in remedy
    assert "no-such-thing none" in none


def test_state_directory_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its mode, its room, and whether its disk knows locks."""
    own = case(tmp_path)
    (tmp_path / "state").chmod(0o755)
    assert one(doctor.state_directory(own), "warn")[1].startswith("chmod 700")
    monkeypatch.setattr(room, "LEAST_FREE", 1 << 62)
    assert "GB free" in one(doctor.state_directory(own), "fail")[0]

    def none(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", none)
    [finding] = _Check("state", 5, partial(doctor.state_directory, own)).result()[-1:]
    assert finding.state == "fail"
    assert "No locks available" in finding.said

    def full(_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(doctor.os, "fsync", full)
    [finding] = _Check("state", 5, partial(doctor.state_directory, own)).result()[-1:]
    assert finding.state == "fail"
    assert finding.remedy == "make room on the disk of the state directory"


def test_directory_that_may_not_be_written_is_a_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The directory is named, and a journal in it that this user may not open is not called damaged."""
    own = case(tmp_path)
    path = recorded(tmp_path, [(NOW, Kind.BARS, "t", b"x")])
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    said, remedy = one(doctor.state_directory(own), "fail")
    assert said == f"this user may not write into {tmp_path / 'state'}"
    assert "as the daemon's" in remedy

    def refused(*_: object, **__: object) -> None:
        error = sqlite3.OperationalError("attempt to write a readonly database")
        error.sqlite_errorcode = sqlite3.SQLITE_READONLY_DIRECTORY
        raise error

    monkeypatch.setattr(sqlite3, "connect", refused)
    check = _Check("journal", 5, partial(doctor.journal, own, lambda: True))
    said, remedy = one(iter([(each.state, each.said, each.remedy) for each in check.result()]), "fail")
    assert said == f"{path}: attempt to write a readonly database"
    assert remedy == "let this user read and write it, or ask as the user of the daemon"


@pytest.mark.parametrize(
    ("number", "what", "remedy"),
    [
        (errno.EACCES, "Permission denied", "let this user do that, or ask as the daemon's"),
        (errno.ENOSPC, "No space left on device", "make room on the disk of /x/lock"),
    ],
)
def test_words_of_the_system_are_no_remedy(number: int, what: str, remedy: str) -> None:
    """A sentence that ends with them is what was found; one that goes on has its own remedy."""
    cause = OSError(number, what, "/x/lock")
    for text, said, own in (
        (f"state_dir: {cause}", f"state_dir: {cause}", remedy),
        (f"/x/lock: {what}", f"/x/lock: {what}", remedy),
        (f"state_dir: {cause}; name another", f"state_dir: {cause}", "name another"),
    ):
        error = ConfigError(text)
        error.__cause__ = cause
        assert doctor.fault("daemon", error) == Finding("daemon", "fail", said, own)
    assert doctor.fault("daemon", cause) == Finding("daemon", "fail", str(cause), remedy)


@pytest.mark.parametrize("above", [False, True])
def test_file_in_the_place_of_the_state_directory_is_a_fault(tmp_path: Path, above: bool) -> None:
    """No start could make the directory, there or below it."""
    (tmp_path / "state").write_text("mine")
    path = tmp_path / "barcast.toml"
    path.write_text(LEAST.format(port=1).replace('"state"', '"state/a/b"' if above else '"state"'))
    said, remedy = one(doctor.state_directory(Case(path, load(path))), "fail")
    assert said == f"{tmp_path / 'state'} is no directory"
    assert "move it away" in remedy


def test_directory_that_nobody_can_make_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A start by this user could not make it; that of a service has its directory made."""
    own = case(tmp_path, state=False)
    monkeypatch.setattr(doctor.os, "access", lambda *_: False)
    said, remedy = one(doctor.state_directory(own), "warn")
    assert said == f"{tmp_path / 'state'} is not there, and this user may not make it in {tmp_path}"
    assert "as the user of the daemon" in remedy


def test_passwords_are_for_nobody_else(tmp_path: Path) -> None:
    """A file that all may read is worth a word, one of this user and a group is none."""
    more = 'username = "u"\npassword_file = "secret"\n[journal]\nurl = "postgresql://a@/b?host=/run"\n'
    own = case(tmp_path, f'{more}password_file = "other"\n')
    for name, mode in (("secret", 0o640), ("other", 0o644)):
        (tmp_path / name).write_text("x")
        (tmp_path / name).chmod(mode)
    said, remedy = one(doctor.passwords(own), "warn")
    assert said == f"journal.password_file: {tmp_path / 'other'} has mode 644: every user may read it"
    assert remedy == f"chmod o= {tmp_path / 'other'}"
    (tmp_path / "other").chmod(0o600)
    assert one(doctor.passwords(own), "ok")[0] == "none that every user may read"


def test_worker_that_does_not_listen_is_a_fault(tmp_path: Path) -> None:
    """Without its socket every training would fail; one that is there is not disturbed."""
    assert "the daemon" in one(doctor.worker(case(tmp_path)), "ok")[0]
    own = case(tmp_path, '[retrain]\nsocket = "run/worker"\n')
    said, remedy = one(doctor.worker(own), "fail")
    assert said == f"there is no socket {tmp_path / 'run' / 'worker'}"
    assert "barcast-retrain@" in remedy
    (tmp_path / "run").mkdir()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(tmp_path / "run" / "worker"))
        assert "is there" in one(doctor.worker(own), "ok")[0]


def test_journal_is_examined(tmp_path: Path) -> None:
    """Damage in it, an older version, what is too long to be checked, and a file that is none."""
    own = case(tmp_path)
    path = recorded(tmp_path, [(NOW + k, Kind.BARS, "t", bytes(2000)) for k in range(2000)])
    found = list(doctor.journal(own, lambda: True))
    assert [state for state, *_ in found] == ["ok", "ok"]
    assert own.stamped == NOW + 1999
    assert "too long" in one(doctor.journal(own, lambda: False), "warn")[0]
    with sqlite3.connect(path) as db:
        db.execute("PRAGMA user_version = 1")
    db.close()
    assert "older Barcast" in one(doctor.journal(own, lambda: True), "warn")[0]
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 9000] = bytes(9000)
    path.write_bytes(content)
    said, remedy = one(doctor.journal(own, lambda: True), "fail")
    assert said.startswith("damaged: ")
    assert "restore a copy" in remedy
    path.write_bytes(b"x" * 5000)
    assert "not a database" in one(doctor.journal(own, lambda: True), "fail")[0]


def test_model_is_tried(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It loads and forecasts; one that is gone is a fault, another fingerprint a word."""
    own = case(tmp_path)
    assert "loads and forecasts" in one(doctor.model(own), "ok")[0]
    card = open_model("fhs", "1m", None, None).card
    own.champion = Champion(card.model, "another machine", 8, "why")
    monkeypatch.setattr(store.ModelStore, "has", lambda _store, _name: True)
    monkeypatch.setattr(store.ModelStore, "path", lambda _store, _name: "fhs")
    assert "another machine" in one(doctor.model(own), "warn")[0]
    monkeypatch.undo()
    own.champion = Champion("0123456789abcdef", "x", 8, "why")
    [finding] = _Check("model", 5, partial(doctor.model, own)).result()
    assert finding.state == "fail"
    assert "0123456789abcdef" in finding.said


def test_history_is_read(tmp_path: Path) -> None:
    """A file of it that holds no bars is a fault that names it."""
    own = case(tmp_path)
    (tmp_path / "state" / "history").mkdir()
    (tmp_path / "state" / "history" / "a.csv").write_text("x,y\n1,2\n")
    [finding] = _Check("history", 20, partial(doctor.history, own)).result()
    assert finding.state == "fail"
    assert "a.csv" in finding.said
    (tmp_path / "state" / "history" / "a.csv").rename(tmp_path / "state" / "history" / "a.parquet")
    [finding] = _Check("history", 20, partial(doctor.history, own)).result()
    assert "a.parquet" in finding.said
    assert finding.remedy
    assert finding.remedy not in finding.said


def test_strategies_are_tried(tmp_path: Path) -> None:
    """One that looks at a horizon which is not forecast is a fault; without a model nothing can be said."""
    own = case(tmp_path, '[[strategy]]\nkind = "median-drift"\nparams = { horizon = 77 }\n')
    assert "no model to try them with" in one(doctor.strategies(own), "warn")[0]
    own.forecaster = open_model("fhs", "1m", None, None)
    [finding] = _Check("strategies", 5, partial(doctor.strategies, own)).result()
    assert finding.state == "fail"
    assert "77" in finding.said


def test_clock_is_examined(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock behind the journal, a little or far, and one that is set while we look."""
    own = case(tmp_path)
    assert [state for state, *_ in doctor.clock(own)] == ["ok"]
    own.stamped = time.time_ns() + 3600 * 10**9
    assert "behind the newest record" in one(doctor.clock(own), "warn")[0]
    own.stamped = time.time_ns() + 10 * 86_400 * 10**9
    assert "set it right" in one(doctor.clock(own), "fail")[1]
    steps = iter([0, 10**10, 2 * 10**10])
    own.stamped = 0
    monkeypatch.setattr(doctor.time, "monotonic_ns", lambda: next(steps))
    assert "was set by" in one(doctor.clock(own), "warn")[0]


def test_daemon_is_asked(tmp_path: Path) -> None:
    """None, one that does not answer, and one that does."""
    own = case(tmp_path)
    assert one(doctor.daemon(own), "warn")[0] == "none runs"
    with (tmp_path / "state" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert "takes no orders" in one(doctor.daemon(own), "warn")[0]
        assert own.running

        async def main() -> Found:
            async def state(*_: object) -> control.Answer:
                return control.Answer(done="fhs serves\npaused: nothing is forecast")

            serving = asyncio.create_task(control.serve(tmp_path / "state", state))
            while not (tmp_path / "state" / control.NAME).exists():  # noqa: ASYNC110
                await asyncio.sleep(0.01)
            try:
                return await asyncio.to_thread(lambda: list(doctor.daemon(own)))
            finally:
                serving.cancel()
                await asyncio.wait([serving])

        found = asyncio.run(main())
        assert "fhs serves" in one(iter(found), "ok")[0]
        said, remedy = one(iter(found), "warn")
        assert said == "paused: nothing is forecast"
        assert remedy == f"barcast ctl {own.path} resume"


def test_absent_broker_is_a_fault(tmp_path: Path) -> None:
    """The address and the reason are told."""
    said, _ = one(doctor.broker(case(tmp_path)), "fail")
    assert said.startswith("127.0.0.1:1: ")
    assert "refused" in said


@pytest.mark.broker
def test_broker_is_visited(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One that delivers is ok, one that lets nobody read is a fault; the visit leaves no session."""
    plain = Mosquitto(tmp_path / "plain")
    plain.start()
    try:
        assert "delivers what is published" in one(doctor.broker(case(tmp_path, port=plain.port)), "ok")[0]
    finally:
        plain.stop()
    monkeypatch.setattr(mqtt, "HEAR_SECONDS", 0.5)
    acl = SHIPPED_ACL.read_text().replace("topic read barcast/v1/bars/#", "")
    strict = Mosquitto(tmp_path / "strict", acl=acl)
    strict.start()
    try:
        (tmp_path / "secret").write_text("barcast")
        more = 'username = "barcast"\npassword_file = "secret"\n'
        said, remedy = one(doctor.broker(case(tmp_path, more, strict.port)), "fail")
    finally:
        strict.stop()
    assert "delivers nothing" in said
    assert "barcast/v1/bars/#" in remedy


def test_port_of_metrics_that_is_taken_is_a_fault(tmp_path: Path) -> None:
    """A start could not listen there."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        own = case(tmp_path, f"[http]\nport = {taken.getsockname()[1]}\n")
        [finding] = _Check("http", 5, partial(doctor.http, own)).result()
    assert finding.state == "fail"
    assert "in use" in finding.said
    assert "is free" in one(doctor.http(case(tmp_path, f"[http]\nport = {free_port()}\n")), "ok")[0]


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_page_of_a_standby_is_asked(tmp_path: Path, host: str) -> None:
    """It has no socket for orders, and the port is its own; without one the port is free."""

    class Page(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200 if self.path == "/readyz" else 404)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            """Say nothing."""

    more = f'[http]\nhost = "{host}"\nport = {free_port()}\n[journal]\nurl = "postgresql://a@127.0.0.1/b"\n'
    own = case(tmp_path, more)
    asked = own.settings.http
    assert asked is not None
    assert "is free" in one(doctor.http(own), "ok")[0]
    with HTTPServer((host, asked.port), Page, bind_and_activate=False) as page:
        page.socket = http.listen(host, asked.port)
        threading.Thread(target=page.handle_request, daemon=True).start()
        said, _ = one(doctor.http(own), "ok")
    shown = "[::1]" if host == "::1" else host
    assert said == f"http://{shown}:{asked.port}/readyz says 200"


def test_failed_unit_is_a_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What systemd gave up is told with the command that says why."""
    said = "LoadState=loaded\nActiveState=failed\nResult=start-limit-hit\nNRestarts=5\n"
    monkeypatch.setattr(doctor.shutil, "which", lambda _name: "/bin/systemctl")
    monkeypatch.setattr(doctor.Path, "is_dir", lambda _path: True)
    own = SimpleNamespace(settings=SimpleNamespace(instance="desk"))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: SimpleNamespace(stdout=said))
    told, remedy = one(doctor.unit(own), "fail")  # type: ignore[arg-type]
    assert "barcast@desk is failed (start-limit-hit), 5 restarts" in told
    assert remedy == "journalctl -u barcast@desk says why"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_check_that_breaks_or_hangs_is_a_finding_of_its_own() -> None:
    """A fault of ours shows its traceback; one that waits for ever holds up nobody."""

    def breaks() -> Iterator[Any]:
        yield "ok", "so far", ""
        raise ValueError("a fault of ours")

    def hangs() -> Iterator[Any]:
        threading.Event().wait(5)
        yield "ok", "late", ""

    before: Callable[..., object] = threading.excepthook
    raised: list[object] = []
    threading.excepthook = lambda hooked: raised.append(hooked.exc_value)
    try:
        first, second = _Check("a", 5, breaks).result()
    finally:
        threading.excepthook = before
    assert (first.said, second.state, second.remedy) == ("so far", "fail", "report it")
    assert str(raised) == "[ValueError('a fault of ours')]"
    [late] = _Check("b", 0.05, hangs).result()
    assert (late.state, late.said) == ("fail", "no answer within 0.05 s")


def test_command_prints_a_table_or_json_and_fails(
    tmp_path: Path, run: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A fault is exit status 1; brackets in a message are no markup."""
    monkeypatch.setattr(doctor, "CHECKS", ())
    case(tmp_path)
    assert run("doctor", str(tmp_path / "barcast.toml"))[0] == 0
    (tmp_path / "barcast.toml").write_text("[retrain]\nx = 1\n")
    status, table, _ = run("doctor", str(tmp_path / "barcast.toml"))
    assert (status, "retrain.x" in table) == (1, True)
    status, text, _ = run("doctor", "--json", str(tmp_path / "barcast.toml"))
    [finding] = json.loads(text)
    assert (status, Finding(**finding).check) == (1, "configuration")
