"""The addresses that operators ask: what they answer, and that they never stand in the daemon's way."""

import asyncio
import json
import signal
import socket
import urllib.error
import urllib.request
from contextlib import suppress
from types import SimpleNamespace

import pytest
import uvicorn
from uvicorn.server import ServerState

from barcast.daemon import http
from barcast.daemon.http import AT_ONCE, listen, page, serving
from barcast.models import ConfigError
from tests.daemon.living import showing
from tests.rim import play

WELL = {"moving": True}


async def text():
    """Some metrics."""
    return b"barcast_ready 1\n"


def pages(alive=WELL, ready=WELL, metrics=text):
    """A page that says so."""

    async def is_ready():
        return ready

    return page(metrics, lambda: alive, is_ready, showing())


async def get(port, path):
    """Status, content type and body of an address."""

    def ask():
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{port}{path}", timeout=5) as answer:
                return answer.status, answer.headers["content-type"], answer.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.headers["content-type"], error.read().decode()

    return await asyncio.to_thread(ask)


def asked(what, *paths):
    """What a server on a free port answers."""

    async def story():
        listening = listen("127.0.0.1", 0)
        async with serving(listening, what):
            return [await get(listening.getsockname()[1], path) for path in paths]

    return play(story())


def test_three_addresses_answer():
    """Metrics are Prometheus' text; health and readiness are JSON with conditions; the rest is not found."""
    metrics, *conditions, other = asked(pages(), "/metrics", "/healthz", "/readyz", "/metric")
    assert metrics == (200, "text/plain; version=0.0.4; charset=utf-8", "barcast_ready 1\n")
    for status, kind, body in conditions:
        assert (status, kind) == (200, "application/json")
        assert json.loads(body) == {"ok": True, "not": [], "conditions": WELL}
    assert other[0] == 404


@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_what_does_not_hold_is_503_and_named(path):
    """One condition that does not hold is enough, and it is named."""
    sick = {"moving": True, "hearing": False}
    [(status, _, body)] = asked(pages(sick, sick), path)
    assert status == 503
    assert json.loads(body) == {"ok": False, "not": ["hearing"], "conditions": sick}


def test_a_port_in_use_is_one_sentence():
    """A port that somebody has, and a host that is not of this machine, are faults of the configuration."""
    with listen("127.0.0.1", 0) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"^http: 127.0.0.1:{port}: Address already in use; name a"):
            listen("127.0.0.1", port)
    for host in ("192.0.2.1", "no such host", "x" * 70 + ".example", "\udce9"):
        with pytest.raises(ConfigError, match=r"^http: "):
            listen(host, port)


def test_the_signals_stay_the_daemons():
    """While it serves, SIGTERM and SIGINT are handled as before: the daemon stops, not the server."""

    def handlers():
        return [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]

    async def story():
        before, listening = handlers(), listen("127.0.0.1", 0)
        async with serving(listening, pages()):
            await get(listening.getsockname()[1], "/healthz")
            assert handlers() == before

    play(story())


def test_nobody_who_asks_delays_the_end():
    """A request that is never answered and one that is never finished end with the server."""
    asked_for, port = asyncio.Event(), 0

    async def never():
        asked_for.set()
        await asyncio.Event().wait()
        return b""

    async def story():
        nonlocal port
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        async with serving(listening, pages(metrics=never)):
            _, slow = await asyncio.open_connection("127.0.0.1", port)
            slow.write(b"GET /healthz HT")
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET /metrics HTTP/1.1\r\nhost: me\r\n\r\n")
            await asked_for.wait()
        with suppress(ConnectionResetError):
            assert await reader.read() == b""
        for one in (slow, writer):
            one.close()

    play(story())
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", port), 1)


@pytest.mark.parametrize("said", [b"", b"GET /healthz HT", b"GET / HTTP/1.1\r\nhost: me\r\n\r\nGET /"])
def test_a_silent_crowd_is_sent_away(monkeypatch, said):
    """Connections that never finish a first or a next request do not keep the others out for good."""
    monkeypatch.setattr(http, "IDLE_SECONDS", 0.2)

    async def story():
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        async with serving(listening, pages()):
            crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(AT_ONCE)]
            for _, writer in crowd:
                writer.write(said)
            for reader, writer in crowd:
                with suppress(ConnectionResetError):
                    await reader.read()
                writer.close()
            status, _, _ = await get(port, "/healthz")
            return status

    assert play(story()) == 200


def test_a_crowd_is_turned_away():
    """Beyond so many connections the next request is answered with 503: sockets are not without end."""

    async def story():
        listening = listen("127.0.0.1", 0)
        port = listening.getsockname()[1]
        async with serving(listening, pages()):
            crowd = [await asyncio.open_connection("127.0.0.1", port) for _ in range(AT_ONCE)]
            status, _, _ = await get(port, "/healthz")
            for _, writer in crowd:
                writer.close()
            return status

    assert play(story()) == 503


class Line:
    """A transport to a client that takes so many bytes in each span, and the loop that lets these pass."""

    def __init__(self, waiting, *taken):
        self.waiting, self._taken, self.aborted, self._calls = waiting, list(taken), False, []

    def get_write_buffer_size(self):
        """What waits."""
        return self.waiting

    def get_extra_info(self, _name):
        """Nothing is known of it."""

    def abort(self):
        """It is cut."""
        self.aborted = True

    def call_later(self, seconds, call, *arguments):
        """What is to be done after a span."""
        handle = SimpleNamespace(cancel=lambda: self._calls.remove(what))
        if seconds == http.STALLED_SECONDS:
            self._calls.append(what := (call, arguments))
        return handle

    def run(self):
        """Let all spans pass; give how many did."""
        spans = 0
        while self._calls:
            self.waiting -= self._taken[spans]
            spans += 1
            call, arguments = self._calls.pop()
            call(*arguments)
        return spans


@pytest.mark.parametrize(
    ("taken", "spans"),
    [((0,), 1), ((100,), 1), ((http.LEAST_TAKEN,) * 5 + (0,), 6), ((10**6, 10**6, http.LEAST_TAKEN - 1), 3)],
)
def test_who_reads_slowly_is_given_time(taken, spans):
    """As long as something worth it is taken in each span; who takes nothing, or bytes, is cut off."""
    line = Line(3_000_000, *taken)
    protocol = http._Protocol(uvicorn.Config(pages()), ServerState(), {}, line)
    protocol.connection_made(line)
    protocol.pause_writing()
    assert (line.run(), line.aborted) == (spans, True)


@pytest.mark.parametrize("then", [lambda p: p.resume_writing(), lambda p: p.connection_lost(OSError())])
def test_who_has_read_all_or_gone_is_not_looked_at(then):
    """The span ends with what waited, and with the connection."""
    line = Line(100)
    protocol = http._Protocol(uvicorn.Config(pages()), ServerState(), {}, line)
    protocol.connection_made(line)
    protocol.pause_writing()
    then(protocol)
    assert (line.run(), line.aborted) == (0, False)
