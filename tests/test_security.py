"""What a stranger on the network, or on the machine, must not get: each promise of the security pass."""

import ast
import asyncio
import signal
import socket
import ssl
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import pytest
import structlog
from structlog.testing import capture_logs

from barcast.daemon import log, mqtt, wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.config import parse
from barcast.daemon.mqtt import Address, Link
from barcast.daemon.timeframe import Timeframe
from barcast.models import ConfigError
from tests.fakes import START
from tests.test_hygiene import SOURCES, dotted, names

LEAST = {"instance": "x", "state_dir": Path(), "timeframe": "1h"}
SECRET = "tr0ub4dor-and-3-of-a-kind"


# --- TLS


class Authority:
    """An authority of our own and servers that it vouches for, by the openssl command."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir()
        self._key("ca")
        self._openssl("req -new -x509 -key ca.key -days 30 -subj /CN=test -out ca.pem")

    def server(self, name: str, days: int) -> ssl.SSLContext:
        """The context of a server of this name, whose certificate ends in so many days."""
        self._key("server")
        (self.folder / "ext").write_text(f"subjectAltName = DNS:{name}\nextendedKeyUsage = serverAuth\n")
        self._openssl(f"req -new -key server.key -subj /CN={name} -out csr")
        signed = "x509 -req -in csr -CA ca.pem -CAkey ca.key -set_serial 7 -extfile ext -out server.pem"
        self._openssl(f"{signed} -days {days}")
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(self.folder / "server.pem", self.folder / "server.key")
        return context

    def _key(self, name: str) -> None:
        self._openssl(f"genpkey -algorithm EC -pkeyopt ec_paramgen_curve:P-256 -out {name}.key")

    def _openssl(self, arguments: str) -> None:
        subprocess.run(["openssl", *arguments.split()], cwd=self.folder, check=True, capture_output=True)


class Listener:
    """A server that writes down what it is told over TLS, and answers nothing."""

    def __init__(self, context: ssl.SSLContext) -> None:
        self.heard = b""
        self._socket = context.wrap_socket(socket.create_server(("127.0.0.1", 0)), server_side=True)
        self.port = self._socket.getsockname()[1]
        self._thread = threading.Thread(target=self._listen)
        self._thread.start()

    def _listen(self) -> None:
        with suppress(OSError):  # a handshake that was refused, or the end
            connection, _ = self._socket.accept()
            with connection:
                self.heard = connection.recv(1000)

    def close(self) -> None:
        self._socket.close()
        self._thread.join(10)


@pytest.mark.parametrize(
    ("case", "reason"),
    [
        ("sound", None),
        ("host", "Hostname mismatch"),
        ("authority", "unable to get local issuer certificate"),
        ("expired", "certificate has expired"),
        ("system", "unable to get local issuer certificate"),
    ],
)
def test_password_goes_to_nobody_but_the_broker_that_was_named(
    tmp_path: Path, case: str, reason: str | None
) -> None:
    """A wrong name, a foreign or an old certificate ends it before a word was said; ours hears all."""
    own, other = Authority(tmp_path / "own"), Authority(tmp_path / "other")
    server = own.server("other.example" if case == "host" else "localhost", -1 if case == "expired" else 30)
    listener = Listener(server)
    trusted = other if case == "authority" else own
    (tmp_path / "password").write_text(SECRET)
    settings = {
        "host": "localhost",
        "port": listener.port,
        "username": "u",
        "password_file": tmp_path / "password",
    }
    settings |= {"tls": True} if case == "system" else {"ca_file": trusted.folder / "ca.pem"}
    address = parse(LEAST | {"mqtt": settings}, "x").mqtt.address("x")

    async def tried() -> None:
        link = Link(address, [], None)

        async def greeted() -> None: ...

        task = asyncio.create_task(link.run(greeted))
        while link.fault == "connecting" and not listener.heard:  # noqa: ASYNC110
            await asyncio.sleep(0.01)
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task

    with capture_logs() as said:
        asyncio.run(asyncio.wait_for(tried(), 30))
    listener.close()
    if reason is None:
        assert SECRET.encode() in listener.heard
    else:
        assert listener.heard == b""
        assert reason in said[0]["reason"]
    assert SECRET not in str(said)


@pytest.mark.parametrize(
    ("given", "goes"),
    [
        ({}, False),
        ({"tls": True}, True),
        ({"ca_file": "ca.pem"}, True),
        ({"plain_password": True}, True),
        ({"host": "127.0.0.1"}, True),
        ({"host": "::1"}, True),
        ({"host": "localhost"}, True),
        ({"host": "127.example.com"}, False),
        ({"host": "10.0.0.7"}, False),
        ({"password_file": None}, True),
    ],
)
def test_password_to_another_machine_needs_tls(given: dict[str, object], goes: bool) -> None:
    """Off loopback, a password without TLS is refused unless somebody says that it is meant."""
    mqtt_table = {"host": "broker.example", "username": "u", "password_file": "secret"} | given
    if goes:
        parse(LEAST | {"mqtt": mqtt_table}, "x")
        return
    with pytest.raises(
        ConfigError, match=r"mqtt\.plain_password: .*mqtt\.tls = true.*mqtt\.plain_password = true"
    ):
        parse(LEAST | {"mqtt": mqtt_table}, "x")


def test_tls_is_not_off_and_on() -> None:
    """An authority beside tls = false is a fault: one of the two would be ignored."""
    with pytest.raises(ConfigError, match=r"mqtt\.tls: .*drop one of the two"):
        parse(LEAST | {"mqtt": {"tls": False, "ca_file": "ca.pem"}}, "x")


# --- secrets


def test_secret_is_in_no_log_and_no_process_list(tmp_path: Path) -> None:
    """A daemon with a password, at its most talkative: neither its words nor what `ps` shows hold it."""
    (tmp_path / "password").write_text(SECRET)
    (tmp_path / "barcast.toml").write_text(
        'instance = "x"\nstate_dir = "state"\ntimeframe = "1h"\nlog_level = "debug"\n'
        '[mqtt]\nport = 1\nusername = "u"\npassword_file = "password"\n'
    )
    command = [sys.executable, "-m", "barcast.backtest.cli", "run", str(tmp_path / "barcast.toml")]
    said = b""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as daemon:
        assert daemon.stderr is not None
        for line in daemon.stderr:
            said += line
            if b"broker_unreachable" in line:
                break
        shown = b"".join(Path(f"/proc/{daemon.pid}/{name}").read_bytes() for name in ("cmdline", "environ"))
        daemon.send_signal(signal.SIGTERM)
        said += daemon.communicate(timeout=30)[1]
    assert b"broker_unreachable" in said
    assert SECRET.encode() not in said + shown
    assert (tmp_path / "state").stat().st_mode & 0o777 == 0o700


def test_secret_is_in_no_traceback(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither the text of an address nor a traceback on a terminal, which could show variables, holds it."""
    address = Address("h", 1, "x", "u", SECRET)
    assert SECRET not in repr(address)
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    log.configure("debug")
    try:
        password = address.password
        raise ValueError(f"of {len(str(password))} characters")
    except ValueError:
        structlog.get_logger().exception("failed")
    said = capsys.readouterr().err
    assert "of 25 characters" in said
    assert SECRET not in said


# --- limits


def test_root_topic_is_bounded() -> None:
    """A root of 200 bytes is taken, a longer one is not."""
    parse(LEAST | {"mqtt": {"root": "r" * 200}}, "x")
    with pytest.raises(ConfigError, match=r"mqtt\.root: the root has 201 bytes; use at most 200"):
        parse(LEAST | {"mqtt": {"root": "é" * 100 + "r"}}, "x")


def test_payloads_are_bounded() -> None:
    """A longer payload is refused unread, a packet beyond twice that is not even sent to us."""
    calendars = Calendars("24x7", Timeframe.parse("1m"))
    _, [reject] = wire.decode("t/bars/1m", b"[" * (wire.MOST_BYTES + 1), START, "t", calendars)
    assert "1000001 bytes, more than 1000000" in reject.reason
    link = Link(Address("127.0.0.1", 1, "x"), [], None)

    async def opened() -> object:
        return link._open()._properties

    assert asyncio.run(opened()).MaximumPacketSize == mqtt.LONGEST_PACKET == 2 * wire.MOST_BYTES


def test_names_that_a_feed_invents_take_no_memory() -> None:
    """What is no symbol is not remembered, however long and however many."""
    wire._is_symbol.cache_clear()
    for k in range(10):
        assert not wire.is_symbol(f"{k}" * 100_000)
    assert wire._is_symbol.cache_info().currsize == 0
    assert wire.is_symbol("A" * 32)
    assert not wire.is_symbol("A" * 33)


# --- what no source may hold

RUNS_CODE = ("pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml")
PROCESSES = ("joblib.Parallel", "joblib.delayed", "joblib.parallel_config")
"""Of joblib: they read no file, and speak with processes begun here, or on a cluster that was named."""


def unsafe(source: str) -> Iterator[str]:
    """What could run the code of a file that is read, or would take any certificate."""
    tree = ast.parse(source)
    known = names(tree)
    modules = (module for module in known.values() if module not in PROCESSES)
    yield from (module for module in modules if module.split(".")[0] in RUNS_CODE)
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            head, _, rest = (dotted(node.func) or "").partition(".")
            name = f"{known.get(head, head)}.{rest}".rstrip(".")
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            if name == "torch.load" and given.get("weights_only") != "True":
                yield "torch.load without weights_only=True"
            if given.get("allow_pickle", "False") != "False":
                yield "allow_pickle"
            if name in ("ssl._create_unverified_context", "pandas.read_pickle"):
                yield name
        if isinstance(node, ast.Assign | ast.keyword):
            targets = node.targets if isinstance(node, ast.Assign) else [ast.Name(node.arg or "")]
            said = {ast.unparse(target).rpartition(".")[2]: ast.unparse(node.value) for target in targets}
            if said.get("check_hostname") == "False" or "CERT_NONE" in said.get("verify_mode", ""):
                yield "a certificate that nobody looks at"


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "from shelve import open",
        "from joblib import load",
        "import joblib",
        "import torch\ntorch.load(path)",
        "import torch as t\nt.load(path, weights_only=False)",
        "from torch import load\nload(path)",
        "import numpy as np\nnp.load(path, allow_pickle=True)",
        "context.check_hostname = False",
        "import ssl\ncontext.verify_mode = ssl.CERT_NONE",
        "import ssl\nssl._create_unverified_context()",
    ],
)
def test_planted_danger_is_found(source: str) -> None:
    """The search below sees what it looks for."""
    assert list(unsafe(source))


@pytest.mark.parametrize("name", SOURCES)
def test_no_file_that_is_read_can_run_code(name: str) -> None:
    """No pickle or the like in any package, and TLS is never half on."""
    assert list(unsafe(SOURCES[name])) == []
