"""Two daemons of one instance on one journal: whatever becomes of the one that serves, the other goes on."""

import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest

from barcast.models import Bar
from tests.integration.broker import Mosquitto, free_port
from tests.integration.instance import Instance, Subscriber
from tests.integration.test_durability import (
    Stage,
    ask,
    bars_kept,
    begin,
    settle,
    signals_delivered,
    stage,
    until,
)
from tests.postgres import Cluster

__all__ = ["stage"]

pytestmark = pytest.mark.postgres
WITHIN = 15.0
"""Seconds until the other one speaks, on a machine that is busy; else it takes less than five."""
EX_IOERR = 74


class Proxy:
    """A way to the server that can be cut: connections end, and no new one is taken."""

    def __init__(self, to: str) -> None:
        self._to, self._open = to, True
        self._pairs: list[socket.socket] = []
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port = self._listener.getsockname()[1]
        threading.Thread(target=self._accept, daemon=True).start()

    def cut(self) -> None:
        """End all connections, and take none from now on."""
        self._open = False
        for end in self._pairs:
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()
        self._pairs.clear()

    def mend(self) -> None:
        """Take connections again."""
        self._open = True

    def close(self) -> None:
        """End it."""
        self.cut()
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                if not self._open:
                    client.close()
                    continue
                server = socket.socket(socket.AF_UNIX)
                server.connect(self._to)
                self._pairs += [client, server]
                for a, b in ((client, server), (server, client)):
                    threading.Thread(target=self._pass, args=(a, b), daemon=True).start()

    @staticmethod
    def _pass(a: socket.socket, b: socket.socket) -> None:
        with suppress(OSError):
            while data := a.recv(65536):
                b.sendall(data)
        for end in (a, b):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


class Timed(Subscriber):
    """Also writes down when each signal came, and of which boot."""

    def __init__(self, port: int) -> None:
        super().__init__(port)
        self.came: list[tuple[float, str]] = []
        self.client.on_message = self._note

    def _note(self, _client: object, _user: object, message: object) -> None:
        self.seen.append((message.topic, message.payload))
        if message.topic.startswith("barcast/v1/signals/"):
            self.came.append((time.monotonic(), dict(message.properties.UserProperty)["boot"]))

    def after(self, moment: float) -> float:
        """Seconds until the first signal of a boot that had not spoken by a moment."""
        known = {boot for at, boot in self.came if at <= moment}
        until(lambda: any(boot not in known for _, boot in list(self.came)), "the other one speaks", 30)
        return next(at - moment for at, boot in self.came if boot not in known)


def asked(instance: Instance, path: str) -> tuple[int, str]:
    """What it answers by HTTP."""
    try:
        with urlopen(f"http://127.0.0.1:{instance.http}/{path}", timeout=10) as answer:
            return answer.status, answer.read().decode()
    except HTTPError as refusal:
        return refusal.code, refusal.read().decode()


@pytest.fixture
def proxy(cluster: Cluster) -> Iterator[Proxy]:
    """A way to the server."""
    made = Proxy(f"{cluster.folder}/.s.PGSQL.{cluster.port}")
    yield made
    made.close()


@pytest.fixture
def pair(
    broker: Mosquitto, stage: Stage, cluster: Cluster, proxy: Proxy, request: pytest.FixtureRequest
) -> tuple[Instance, Instance, list[Bar]]:
    """Two daemons of one instance that share a state directory, the first by a way that can be cut."""
    first, current = stage.instance(broker, 12)
    server = replace(cluster.server("barcast_test"), host="127.0.0.1")
    first.server = replace(server, port=proxy.port)
    second = replace(first, folder=first.folder.with_name("second"), server=server, http=free_port())
    second.folder.mkdir()
    second.state.symlink_to(first.state)
    stage.instances.append(second)
    return first, second, current


def test_each_takes_over_from_the_other(
    pair: tuple[Instance, Instance, list[Bar]], stage: Stage, broker: Mosquitto, proxy: Proxy
) -> None:
    """Killed, frozen, cut from the journal or stopped: the other speaks within seconds, and nothing is lost.

    One that was frozen or cut finds out that it was deposed, and ends to be started again; none of its bars
    and signals contradicts its successor's.
    """
    first, second, current = pair
    stage.clients.append(subscriber := Timed(broker.port))
    begin(first)
    second.at = first.at
    second.launch()
    second.wait_for("standby_ready")
    assert asked(second, "readyz")[0] == 503
    assert '"leading"' in asked(second, "readyz")[1].partition('"conditions"')[0]
    waits = asked(second, "metrics")[1]
    assert 'barcast_leader{name="test"} 0.0' in waits
    assert "barcast_standby_ready 1.0" in waits
    feed = stage.feed(first, current, 300)
    feed.start()
    until(lambda: len(subscriber.came) > 20, "the first one speaks")
    took: dict[str, float] = {}

    def passes(how: str, one: Instance, harm: Callable[[], object], status: int | None = EX_IOERR) -> None:
        """Let harm come to the one that leads, and start it again as the standby."""
        moment = time.monotonic()
        harm()
        took[how] = subscriber.after(moment)
        second.thaw()
        proxy.mend()
        assert one.process is not None
        assert one.process.wait(20) == status
        ready = sum(line["event"] == "standby_ready" for line in one.log())
        one.launch()
        one.wait_for("standby_ready", count=ready + 1)

    passes("kill -9", first, first.kill, -signal.SIGKILL)
    assert 'barcast_leader{name="test"} 1.0' in asked(second, "metrics")[1]
    passes("frozen", second, second.freeze)
    passes("cut off", first, proxy.cut)
    passes("stopped", second, second.stop, 0)
    assert second.stop() == 0  # as a standby
    settle(first, feed)
    until(lambda: subscriber.states()[-1:] == ["stopped"], "the subscriber has everything")

    kept, delivered = bars_kept(first, feed), signals_delivered(first, subscriber)
    epochs = ask(first, "SELECT epoch FROM writer")
    print(f"\n{ {how: round(seconds, 2) for how, seconds in took.items()} }; {kept}, {delivered}")
    assert epochs == [(5,)]
    assert kept.acknowledged >= 1000
    assert kept.lost == 0
    assert delivered.signals >= 60
    assert max(took.values()) < WITHIN
