"""What operators and their tools ask by HTTP: /metrics, /healthz, /readyz; in the daemon's own event loop."""

import asyncio
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress

import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route
from uvicorn.protocols.http.h11_impl import H11Protocol

from barcast.models import ConfigError

AT_ONCE = 32
"""Connections at once; one more is answered with 503."""
IDLE_SECONDS = 30
"""How long a connection may take until its first or next request: longer than between two scrapes, mostly."""


class _Server(uvicorn.Server):
    """Leaves the signals to the daemon."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Closes a connection whose request does not come; uvicorn waits for the first one for good."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def _await_request(self) -> None:
        self.loop.call_later(IDLE_SECONDS, self._expire, self.cycle)

    def _expire(self, last: object) -> None:
        if self.cycle is last:
            self.transport.abort()


def listen(host: str, port: int) -> socket.socket:
    """Take the port, before anything is served on it. Raise ConfigError when it cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family)
    except (OSError, UnicodeError) as error:
        reason = (getattr(error, "strerror", None) or str(error)).partition(" (")[0]
        raise ConfigError(
            f"http: {host}:{port}: {reason}; name a host of this machine and a port that nobody else has"
        ) from error


def page(
    metrics: Callable[[], Awaitable[bytes]],
    alive: Callable[[], Mapping[str, bool]],
    ready: Callable[[], Awaitable[Mapping[str, bool]]],
) -> Starlette:
    """The three addresses. `metrics` gives Prometheus' text.

    The other two give conditions by name: 200 when all of them hold, else 503, and which do not.
    """

    async def scraped(_: Request) -> Response:
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    async def healthz(_: Request) -> Response:
        return _answer(alive())

    async def readyz(_: Request) -> Response:
        return _answer(await ready())

    return Starlette(
        routes=[Route("/metrics", scraped), Route("/healthz", healthz), Route("/readyz", readyz)],
    )


@asynccontextmanager
async def serving(listening: socket.socket, what: Starlette) -> AsyncIterator[None]:
    """Answer as long as the body runs; then close at once, whoever is still asking."""
    task = asyncio.create_task(_serve(listening, what), name="http")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _serve(listening: socket.socket, what: Starlette) -> None:
    server = _Server(
        uvicorn.Config(
            what,
            loop="none",
            http=_Protocol,
            ws="none",
            lifespan="off",
            log_config=None,
            access_log=False,
            server_header=False,
            limit_concurrency=AT_ONCE,
            timeout_keep_alive=IDLE_SECONDS,
        )
    )
    try:
        await server.serve(sockets=[listening])
    finally:
        for own in getattr(server, "servers", ()):
            own.close()
        for connection in list(server.server_state.connections):
            connection.transport.abort()
        listening.close()


def _answer(conditions: Mapping[str, bool]) -> Response:
    held = all(conditions.values())
    reasons = [name for name, holds in conditions.items() if not holds]
    body = {"ok": held, "not": reasons, "conditions": dict(conditions)}
    return Response(json.dumps(body) + "\n", 200 if held else 503, media_type="application/json")
