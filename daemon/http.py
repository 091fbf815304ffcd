"""What is asked by HTTP: /metrics, /healthz, /readyz, the page and orders; in the daemon's own event loop."""

import asyncio
import hashlib
import hmac
import json
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import msgspec
import uvicorn
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.requests import Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from barcast.daemon.control import VERBS, Answer, Order
from barcast.daemon.panel import TrainingSettings
from barcast.daemon.view import CrowdedError, View, event
from barcast.daemon.wire import UNDECODABLE
from barcast.models import BarcastError, ConfigError

AT_ONCE = 64
"""Connections at once; one more is answered with 503. A browser that looks takes two, at first six."""
IDLE_SECONDS = 30
"""How long a connection may take until its first or next request: longer than between two scrapes, mostly."""
STALLED_SECONDS = 60
"""How long a client may take less than `LEAST_TAKEN` of what waits for it."""
LEAST_TAKEN = 16_384
"""Bytes: slower than the slowest line of a phone, faster than who only wants to hold memory."""
ENDING_SECONDS = 0.1
"""How long answers under way have at the end to notice that nobody hears them any more."""
BEAT_SECONDS = 5
"""How often a viewer is told the time, so that it knows whether it still hears."""

ASSETS = Path(__file__).with_name("page")
"""Where the files of the page are, of these kinds; what else lies there is none of them."""
KINDS = {
    ".html": "text/html",
    ".css": "text/css",
    ".mjs": "text/javascript",
    ".svg": "image/svg+xml",
    ".txt": "text/plain",
}
HEADERS = {
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self' data:; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; "
        "trusted-types 'none'"
    ),
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(), geolocation=(), microphone=()",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}
"""What every answer tells a browser: run only what is served here, ask nobody else, be shown in no frame."""
REPORT_POLICY = (
    "sandbox allow-scripts; default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; "
    "img-src data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
"""What a browser is told of a backtest's report, which has its scripts in itself: it is of no origin, so that
it knows nothing of the page, and asks nobody."""
FORM = 'an object with `reason`, `to` of rollback or `training` of retrain, such as {"reason": "..."}'
MOST_BODY, SHOWN = 100_000, 100
"""The longest body of an order, in bytes, and characters of it that are shown where it is wrong."""


@dataclass(frozen=True, slots=True)
class Shown:
    """What the page shows.

    `chart` gives what is drawn of a symbol, None of one without bars; `activations` who served since when;
    `trust` what was verified and how far forecasts drifted; `reckoning` how these held what they promised;
    `beat` the time and what does not hold; `choices` what can be set of a training; `backtests` those in the
    folder of reports: all as JSON. `report` is the page of a backtest, None of one that is not there.
    `answers_to` says of a name in a Host header whether it may stand for this machine.

    `order` carries out what somebody orders who knows the `token`; without one nobody may.
    """

    view: View
    chart: Callable[[str], bytes | None]
    activations: Callable[[], Awaitable[bytes]]
    trust: Callable[[], bytes]
    reckoning: Callable[[], Awaitable[bytes]]
    beat: Callable[[], Awaitable[bytes]]
    choices: Callable[[], Awaitable[bytes]]
    backtests: Callable[[], Awaitable[bytes]]
    report: Callable[[str], Awaitable[bytes | None]]
    answers_to: Callable[[str], bool]
    order: Callable[[Order], Awaitable[Answer]]
    token: str | None


class _Server(uvicorn.Server):
    """Leaves the signals to the daemon."""

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        yield


class _Protocol(H11Protocol):
    """Closes a connection whose request does not come, or whose client hardly reads.

    uvicorn waits for good for the first one, and for the second. What waits for a client is one answer or
    event at most: nothing is written while the transport is full.
    """

    _stalled: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._stalled is not None:
            self._stalled.cancel()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._await_request()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._allow(self.transport.get_write_buffer_size())

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stalled is not None:
            self._stalled.cancel()

    def _allow(self, waiting: int) -> None:
        self._stalled = self.loop.call_later(STALLED_SECONDS, self._look, waiting)

    def _look(self, before: int) -> None:
        """Give a client that reads slowly more time, for as long as it does."""
        waiting = self.transport.get_write_buffer_size()
        if before - waiting < LEAST_TAKEN:
            self.transport.abort()
        else:
            self._allow(waiting)

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


class _Headers:
    """Puts `HEADERS` on every answer, also on those that nobody here wrote, and on faults."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def answer(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = MutableHeaders(scope=message)
                for name, value in HEADERS.items():
                    own.setdefault(name, value)
            await send(message)

        await self._app(scope, receive, answer)


class _Events(StreamingResponse):
    """The state and then what changes, until the client goes."""

    media_type = "text/event-stream"

    def __init__(self, shown: Shown) -> None:
        super().__init__(self._told(shown), headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        self._view = shown.view

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            with self._view.watched() as self._viewer:
                await super().__call__(scope, receive, send)
        except CrowdedError:
            await _crowded()(scope, receive, send)

    async def _told(self, shown: Shown) -> AsyncIterator[bytes]:
        yield await self._viewer.next()
        loop, beat = asyncio.get_running_loop(), 0.0
        while True:
            try:
                async with asyncio.timeout_at(beat):
                    update = await self._viewer.next()
            except TimeoutError:
                update = event("beat", await shown.beat())
                beat = loop.time() + BEAT_SECONDS
            yield update


def page(
    metrics: Callable[[], Awaitable[bytes]],
    alive: Callable[[], Mapping[str, bool]],
    ready: Callable[[], Awaitable[Mapping[str, bool]]],
    shown: Shown,
) -> ASGIApp:
    """All addresses. `metrics` gives Prometheus' text.

    `alive` and `ready` give conditions by name: 200 when all of them hold, else 503, and which do not. The
    page and what it asks for is below `/`; what changes anything is below `/orders/`.
    """

    async def scraped(_: Request) -> Response:
        return Response(await metrics(), media_type="text/plain; version=0.0.4")

    async def healthz(_: Request) -> Response:
        return _answer(alive())

    async def readyz(_: Request) -> Response:
        return _answer(await ready())

    async def events(request: Request) -> Response:
        if request.method == "HEAD":  # a browser does not tell a page why it was refused: it asks this
            return _crowded() if shown.view.crowded else Response(media_type="text/event-stream")
        return _Events(shown)

    async def symbol(request: Request) -> Response:
        # Without bars it is null and not an error, which a browser would put on its console.
        return _fresh(shown.chart(request.path_params["symbol"]) or b"null")

    async def told(what: Awaitable[bytes]) -> Response:
        try:
            return _fresh(await what)
        except BarcastError as error:
            return _fresh(msgspec.json.encode({"error": str(error)}))

    async def activations(_: Request) -> Response:
        return _fresh(await shown.activations())

    async def trust(_: Request) -> Response:
        return _fresh(shown.trust())

    async def reckoning(_: Request) -> Response:
        return await told(shown.reckoning())

    async def training(_: Request) -> Response:
        return await told(shown.choices())

    async def backtests(_: Request) -> Response:
        return await told(shown.backtests())

    async def report(request: Request) -> Response:
        found = await shown.report(request.path_params["name"])
        if found is None:
            return _refused(404, "no such backtest")
        return Response(found, headers={"Content-Security-Policy": REPORT_POLICY}, media_type="text/html")

    async def orders(request: Request) -> Response:
        if shown.token is None:
            return _refused(403, "no orders are taken here: name a token_file in [http]")
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, f"Bearer {shown.token}".encode()):
            return _refused(401, "orders need the token of [http]", {"WWW-Authenticate": "Bearer"})
        try:
            order = await _ordered(request)
        except ValueError as error:
            return _refused(400, str(error))
        answer = await shown.order(order)
        if answer.refused is not None:
            return _refused(409, answer.refused)
        return _fresh(msgspec.json.encode({"done": answer.done}))

    def local(endpoint: Callable[[Request], Awaitable[Response]]) -> Callable[[Request], Awaitable[Response]]:
        """Refuse who comes by another name: a page elsewhere could point its own name at this machine."""

        async def asked(request: Request) -> Response:
            if shown.answers_to(_host(request.headers.get("host", ""))):
                return await endpoint(request)
            return _refused(421, "ask for localhost or 127.0.0.1; a proxy must send such a Host")

        return asked

    files = {path.name: _Asset(path) for path in ASSETS.iterdir() if path.suffix in KINDS}

    async def index(request: Request) -> Response:
        return files["index.html"].answer(request)

    async def asset(request: Request) -> Response:
        found = files.get(request.path_params["name"])
        return _refused(404, "no such file") if found is None else found.answer(request)

    app = Starlette(
        routes=[
            Route("/metrics", scraped),
            Route("/healthz", healthz),
            Route("/readyz", readyz),
            Route("/", local(index)),
            Route("/page/{name}", local(asset)),
            Route("/events", local(events)),
            Route("/symbols/{symbol}", local(symbol)),
            Route("/activations", local(activations)),
            Route("/trust", local(trust)),
            Route("/reckoning", local(reckoning)),
            Route("/training", local(training)),
            Route("/backtests", local(backtests)),
            Route("/backtests/{name}", local(report)),
            Route("/orders/{verb}", local(orders), methods=["POST"]),
        ],
    )
    app.router.redirect_slashes = False  # it reads queries of any bytes as text, and raises
    return _Headers(app)  # not as its middleware, which an answer to a fault does not pass


class _Asset:
    """A file of the page, read once."""

    def __init__(self, path: Path) -> None:
        self._content, self._kind = path.read_bytes(), KINDS[path.suffix]
        self._tag = f'"{hashlib.sha256(self._content).hexdigest()[:16]}"'

    def answer(self, request: Request) -> Response:
        headers = {"Cache-Control": "no-cache", "ETag": self._tag}
        if request.headers.get("if-none-match") == self._tag:
            return Response(status_code=304, headers=headers)
        return Response(self._content, headers=headers, media_type=self._kind)


@asynccontextmanager
async def serving(listening: socket.socket, what: ASGIApp) -> AsyncIterator[None]:
    """Answer as long as the body runs; then close at once, whoever is still asking."""
    task = asyncio.create_task(_serve(listening, what), name="http")
    try:
        yield
    finally:
        task.cancel()
        with suppress(asyncio.CancelledError):
            await task


async def _serve(listening: socket.socket, what: ASGIApp) -> None:
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
        if server.server_state.tasks:
            await asyncio.wait(server.server_state.tasks, timeout=ENDING_SECONDS)


def _answer(conditions: Mapping[str, bool]) -> Response:
    held = all(conditions.values())
    reasons = [name for name, holds in conditions.items() if not holds]
    body = {"ok": held, "not": reasons, "conditions": dict(conditions)}
    return Response(json.dumps(body) + "\n", 200 if held else 503, media_type="application/json")


def _host(header: str) -> str:
    """The name or address in a Host header, without the port."""
    return header[1:].partition("]")[0] if header.startswith("[") else header.partition(":")[0]


def _fresh(body: bytes) -> Response:
    return Response(body, headers={"Cache-Control": "no-store"}, media_type="application/json")


def _crowded() -> Response:
    return _refused(429, "as many look on as may; try again later")


def _refused(status: int, reason: str, headers: Mapping[str, str] | None = None) -> Response:
    return Response(json.dumps({"error": reason}) + "\n", status, headers, media_type="application/json")


async def _ordered(request: Request) -> Order:
    """The order of a request. Raise ValueError for what is none."""
    verb, body = request.path_params["verb"], b""
    if verb not in VERBS:
        raise ValueError(f"verb {verb[:SHOWN]!r} is none of {', '.join(VERBS)}")
    async for part in request.stream():
        body += part
        if len(body) > MOST_BODY:
            raise ValueError(f"the body has more than {MOST_BODY} bytes; say less")
    try:
        wanted = msgspec.json.decode(body or b"{}", type=_Wanted)
    except UNDECODABLE as error:
        raise ValueError(f"{error}; send {FORM}") from error
    return Order(verb, to=wanted.to, reason=wanted.reason, training=wanted.training)


class _Wanted(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The body of an order, see `Order`."""

    to: str | None = None
    reason: str | None = None
    training: TrainingSettings | None = None
