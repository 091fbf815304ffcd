"""Feeds bars to a broker: each when its close time comes on the clock."""

import asyncio
from collections.abc import Callable, Iterable
from itertools import groupby
from operator import attrgetter

from barcast.daemon.live import Clock
from barcast.daemon.mqtt import NOT_CONNECTED, Address, Link
from barcast.daemon.wire import Outgoing, encode_bars
from barcast.models import Bar, ConfigError

LONG_SECONDS = 61.0
"""A wait that is worth a word: bars of a minute, in real time, are none."""


async def publish(
    bars: Iterable[Bar],
    address: Address,
    root: str,
    timeframe: str,
    clock: Clock,
    sent: Callable[[int, int], None],
    waits: Callable[[int, float], None],
) -> None:
    """Publish bars, sorted by close time, one message a bar, and wait for the broker to have each.

    What a lost connection interrupted is sent again; what the broker refuses raises ConfigError.
    `sent(count, close_time)` is called after each close, and `waits(close_time, seconds)` before a long wait,
    in real seconds.
    """
    link = Link(address, (), None)

    async def deliver(bar: Bar) -> None:
        topic = f"{root}/bars/{timeframe}/{bar.symbol}"
        message = Outgoing("", topic, encode_bars([bar]), retain=False, expires=None)
        while fault := await link.publish(message, clock.now()):
            if fault != NOT_CONNECTED:
                raise ConfigError(f"{topic}: {fault}; let the broker's access list allow it")
            await link.connected.wait()

    async def connected() -> None:
        pass

    async with asyncio.TaskGroup() as group:
        connection = group.create_task(link.run(connected), name="link")
        await link.connected.wait()
        for close_time, together in groupby(bars, attrgetter("close_time")):
            seconds = clock.seconds_until(close_time)
            if seconds > LONG_SECONDS:
                waits(close_time, seconds)
            await asyncio.sleep(seconds)
            due = list(together)
            await asyncio.gather(*(deliver(bar) for bar in due))
            sent(len(due), close_time)
        connection.cancel()
