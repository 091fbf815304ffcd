"""A daemon that is built and at work in this process, with a broker that is only pretended."""

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from types import MappingProxyType

from barcast.daemon.app import Daemon, Outside
from barcast.daemon.config import is_loopback, load
from barcast.daemon.control import Answer, Order
from barcast.daemon.http import Shown
from barcast.daemon.journal import Journal
from barcast.daemon.live import Scribe
from barcast.daemon.mqtt import Delivery
from barcast.daemon.pipeline import run
from barcast.daemon.view import View
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError
from tests.rim import Message

LEAST = 'instance = "me"\nstate_dir = "state"\ntimeframe = "1m"\n[mqtt]\nroot = "t"\n'


def daemon(folder: Path, text: str = LEAST, clock: int | None = None) -> Daemon:
    """A daemon of a configuration, whose clock begins at `clock` (nanoseconds) and runs as ours does."""
    if clock is not None:
        start = datetime.fromtimestamp(clock / 1e9, UTC).isoformat()
        text += f"[rehearsal]\nstart = {start}\nat = {datetime.now(UTC).isoformat()}\nspeed = 1\n"
    path = folder / "barcast.toml"
    path.write_text(text)
    made = Daemon(load(path), {}, asyncio.Event(), None, Outside())
    made.config.state_dir.mkdir(exist_ok=True)
    return made


@asynccontextmanager
async def at_work(made: Daemon) -> AsyncIterator[list[Outgoing]]:
    """Build it, and let path, courier and vitals run; gives what the broker was sent.

    The broker refuses what is sent to a topic with `refused` in it.
    """
    made.scribe = Scribe(Journal(made.config.state_dir / "journal.db"))
    made.forecasts = ThreadPoolExecutor(1)
    sent: list[Outgoing] = []

    async def publish(
        message: Outgoing, _now: int, _properties: Sequence[tuple[str, str]] = (), **_: object
    ) -> str | None:
        await asyncio.sleep(0)
        sent.append(message)
        return "refused" if "REFUSED" in message.topic else None

    try:
        await made.build()
        made.succession.open()
        made.link.publish = publish  # type: ignore[method-assign]
        made.link.connected.set()
        made.link.greeted = True
        made.metrics.serving = True
        tasks = [
            asyncio.create_task(run(made.source, made.pipeline, made.sink, made.forecasts)),
            asyncio.create_task(made.courier.run()),
            asyncio.create_task(made.vitals.run()),
            asyncio.create_task(made.desk.run()),
            asyncio.create_task(made.succession.prepare_champion()),
        ]
        try:
            await settled(made)
            yield sent
        finally:
            for task in tasks:
                task.cancel()
            for task in tasks:
                with suppress(asyncio.CancelledError):
                    await task
    finally:
        made.forecasts.shutdown()
        made.scribe.close()


def showing(
    view: View | None = None,
    charts: Mapping[str, bytes] = MappingProxyType({}),
    reports: Mapping[str, bytes] = MappingProxyType({}),
    token: str | None = None,
) -> Shown:
    """What a page shows without a daemon: a view, charts by symbol, reports, and that all is well."""

    async def activations() -> bytes:
        return b"[]"

    async def beat() -> bytes:
        return b'{"now":"2023-11-14T22:20:00Z","not":[],"paused":false}'

    async def order(given: Order) -> Answer:
        return Answer(refused=f"{given.verb}: nobody is at work")

    async def reckoning() -> bytes:
        raise ConfigError("nobody is at work")

    async def nothing() -> bytes:
        return b"null"

    async def report(name: str) -> bytes | None:
        return reports.get(name)

    return Shown(
        view or View("t", "1m", {}),
        charts.get,
        activations,
        lambda: b"{}",
        reckoning,
        beat,
        nothing,
        nothing,
        report,
        is_loopback,
        order,
        token,
    )


async def deliver(made: Daemon, *messages: Message) -> None:
    """Let messages arrive, and wait until all that follows from them is done."""
    made.link.inbox.extend(Delivery(m.topic, m.payload, i, 1, 1) for i, m in enumerate(messages))
    made.link.arrived.set()
    await settled(made)


async def until(holds: Callable[[], bool]) -> None:
    """Wait for something that the daemon does by itself."""
    while True:
        if holds():
            return
        await asyncio.sleep(0.005)


async def settled(made: Daemon) -> None:
    """Wait until the path waits for more and the outbox has been offered to the broker."""
    made.source.waiting = False
    made.link.arrived.set()
    await until(lambda: made.source.waiting and not made.link.inbox)
    offered = made.courier.delivered + made.courier.failed
    while True:
        await asyncio.sleep(0.02)
        if offered == (offered := made.courier.delivered + made.courier.failed):
            return
