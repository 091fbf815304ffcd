"""The broker as it is shipped for production, with a real mosquitto: TLS, passwords, rights."""

import json
import signal
import ssl
import subprocess
import sys
import threading
from pathlib import Path

import paho.mqtt.client as paho
import pytest

from tests.integration.broker import SHIPPED_ACL, Mosquitto, executable, free_port

pytestmark = pytest.mark.broker
DEPLOY = Path(__file__).parents[2] / "deploy"
CONFIG = """
instance = "desk"
state_dir = "state"
timeframe = "1m"
[mqtt]
host = "{host}"
port = {port}
username = "barcast"
password_file = "password"
{ca}
"""


def certificates(folder, *hosts):
    """Run the shipped script."""
    script = ["sh", str(DEPLOY / "certificates.sh"), str(folder), *hosts]
    return subprocess.run(script, capture_output=True, text=True, check=True).stdout


class Production(Mosquitto):
    """A broker on the shipped configuration for production, below a folder, with ports of its own."""

    def __init__(self, folder):
        super().__init__(folder, acl=SHIPPED_ACL.read_text())
        self.tls_port, self.certs = free_port(), folder / "certs"
        certificates(self.certs, "localhost")
        for path in (self.certs, *self.certs.iterdir()):
            path.chmod(0o755)  # outside of tests the script lets mosquitto's group read the key
        text = (DEPLOY / "mosquitto-tls.conf").read_text()
        for here, there in (
            ("listener 1883 ", f"listener {self.port} "),
            ("listener 8883", f"listener {self.tls_port} 127.0.0.1"),
            ("/etc/mosquitto/certs/", f"{self.certs}/"),
            ("/etc/mosquitto/", f"{folder}/"),
            ("/var/lib/mosquitto/", f"{folder}/"),
        ):
            assert here in text, here
            text = text.replace(here, there)
        self._give(self.config, text)


@pytest.fixture(scope="module")
def broker(tmp_path_factory):
    """A running broker for production."""
    if executable() is None:
        pytest.fail(
            "mosquitto is missing: run `make test`, which installs it, or `apt-get install mosquitto`"
        )
    server = Production(tmp_path_factory.mktemp("production") / "broker")
    server.start()
    yield server
    server.stop()


class Daemon:
    """The real daemon, on a configuration of its own."""

    def __init__(self, folder, port, ca=None, password="barcast", host="localhost"):
        (folder / "password").write_text(password)
        ca_file = "" if ca is None else f'ca_file = "{ca}"'
        config = folder / "barcast.toml"
        config.write_text(CONFIG.format(host=host, port=port, ca=ca_file))
        self.process = subprocess.Popen(
            [sys.executable, "-m", "barcast.backtest.cli", "run", str(config)], stderr=subprocess.PIPE
        )

    def says(self, event):
        """The first log line of an event."""
        for line in self.process.stderr:
            said = json.loads(line) if line.startswith(b"{") else {}  # paho has its own words
            if said.get("event") == event:
                return said
        raise AssertionError(f"the daemon ended without {event}")

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.process.send_signal(signal.SIGTERM)
        self.process.communicate(timeout=20)


def client(broker, user, password=None):
    """A client over TLS, in a thread of its own."""
    c = paho.Client(paho.CallbackAPIVersion.VERSION2, protocol=paho.MQTTv5)
    c.username_pw_set(user, password or user)
    c.tls_set_context(ssl.create_default_context(cafile=broker.certs / "ca.pem"))
    c.connect("localhost", broker.tls_port)
    c.loop_start()
    return c


def test_daemon_serves_over_tls_with_a_password(broker, tmp_path):
    """It logs in, hears what it may hear, and a reader with a password of its own sees that it is ready."""
    states, ready = [], threading.Event()

    def note(_client, _data, message):
        states.append(json.loads(message.payload)["state"])
        if states[-1] == "ready":
            ready.set()

    reader = client(broker, "reader")
    reader.on_message = note
    reader.subscribe("barcast/v1/status/desk", 1)
    with Daemon(tmp_path, broker.tls_port, broker.certs / "ca.pem") as daemon:
        assert daemon.says("broker_connected")["port"] == broker.tls_port
        assert ready.wait(20), states
    reader.disconnect()
    reader.loop_stop()


@pytest.mark.parametrize("case", ["password", "authority", "host"])
def test_wrong_credentials_are_named(broker, tmp_path, case):
    """What is wrong about a password, an authority or a name is a log line; the daemon goes on trying."""
    certificates(tmp_path / "other", "localhost")
    daemon, reason = {
        "password": ({"ca": broker.certs / "ca.pem", "password": "guess"}, "Not authorized"),
        "authority": ({"ca": tmp_path / "other/ca.pem"}, "CERTIFICATE_VERIFY_FAILED"),
        "host": ({"ca": broker.certs / "ca.pem", "host": "127.0.0.1"}, "IP address mismatch"),
    }[case]
    port = broker.tls_port
    with Daemon(tmp_path, port, **daemon) as tried:
        said = tried.says("broker_unreachable")
        assert reason in said["reason"]
        assert tried.process.poll() is None
        tried.process.kill()


def test_reader_may_not_write(broker):
    """Rights are held by the broker: a reader's bar, or signal, is refused, a feed's bar is not.

    Only an operator orders, and only the daemon answers.
    """
    answers, complete = {}, threading.Event()
    for user, topic, code in (
        ("reader", "barcast/v1/bars/1m/AAPL", 0x87),
        ("reader", "barcast/v1/signals/1m/AAPL", 0x87),
        ("feed", "barcast/v1/signals/1m/AAPL", 0x87),
        ("reader", "barcast/v1/control/desk/pause", 0x87),
        ("feed", "barcast/v1/control/desk/pause", 0x87),
        ("barcast", "barcast/v1/control/desk/pause", 0x87),
        ("operator", "barcast/v1/control/desk/pause", 0),
        ("operator", "barcast/v1/bars/1m/AAPL", 0x87),
        ("operator", "barcast/v1/answers/desk/1", 0x87),
        ("barcast", "barcast/v1/answers/desk/1", 0),
        ("feed", "barcast/v1/bars/1m/AAPL", 0),
    ):
        sender, complete = client(broker, user), threading.Event()

        def note(_client, _data, _mid, reason, _properties, key=(user, topic), done=complete):
            answers[key] = reason.value
            done.set()

        sender.on_publish = note
        sender.publish(topic, b"[]", 1)
        assert complete.wait(10)
        # 0x10 is a success, too: nobody has subscribed.
        assert answers[user, topic] & ~0x10 == code
        sender.disconnect()
        sender.loop_stop()


def test_authority_is_kept(tmp_path):
    """A new certificate of the broker is of the same authority, so that clients need nothing new."""
    certificates(tmp_path, "localhost")
    before = {name: (tmp_path / name).read_bytes() for name in ("ca.pem", "ca.key", "server.pem")}
    certificates(tmp_path, "broker.example", "10.0.0.7", "fe80::1")
    assert {name: (tmp_path / name).read_bytes() == old for name, old in before.items()} == {
        "ca.pem": True,
        "ca.key": True,
        "server.pem": False,
    }
    strict = ["openssl", "verify", "-x509_strict", "-CAfile", str(tmp_path / "ca.pem")]
    subprocess.run([*strict, str(tmp_path / "server.pem")], check=True, capture_output=True)
    shown = subprocess.run(
        ["openssl", "x509", "-in", str(tmp_path / "server.pem"), "-noout", "-ext", "subjectAltName"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    assert "DNS:broker.example, IP Address:10.0.0.7, IP Address:FE80:0:0:0:0:0:0:1" in shown
    assert (tmp_path / "ca.key").stat().st_mode & 0o077 == 0
    assert (tmp_path / "server.key").stat().st_mode & 0o007 == 0
