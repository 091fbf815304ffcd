"""Signs of life: the event loop's lag, whether the path moves, and the watchdog that is fed by it."""

import asyncio
from collections import deque
from dataclasses import asdict

import structlog

from barcast.daemon.distribution import Distribution
from barcast.daemon.live import QUICK, LiveSource
from barcast.daemon.notify import Notifier
from barcast.daemon.pipeline import Counts

LAG_SECONDS = 0.05
"""How often the event loop's lag is measured."""
LAGS_KEPT = 20_000
"""Lag measurements kept, at most."""
COUNT_SECONDS = 30.0
"""How often the log says what became of the bars, when there were any."""
STILL_SECONDS = 30.0
"""A path that neither waits nor takes an event for so long is stuck: a group of many symbols takes some."""

log = structlog.get_logger()


class Vitals:
    """Measures the loop and feeds the watchdog while the path takes events, or waits for them or for room.

    The state is the lags measured last (seconds), how often they were how large, and when the path was last
    seen to move.
    """

    def __init__(self, source: LiveSource, counts: Counts, notifier: Notifier) -> None:
        self.lags: deque[float] = deque(maxlen=LAGS_KEPT)
        self.lag = Distribution(QUICK)
        self._source, self._counts, self._notifier = source, counts, notifier
        self._moved = asyncio.get_running_loop().time()

    @property
    def moving(self) -> bool:
        """Whether the path took an event, or waited for one, within `STILL_SECONDS`."""
        return asyncio.get_running_loop().time() - self._moved < STILL_SECONDS

    async def run(self) -> None:
        """Watch until cancelled."""
        loop, position = asyncio.get_running_loop(), -1
        told, counts = loop.time(), asdict(self._counts)
        while True:
            asleep = loop.time()
            await asyncio.sleep(LAG_SECONDS)
            self.lags.append(loop.time() - asleep - LAG_SECONDS)
            self.lag.observe(self.lags[-1])
            if loop.time() - told > COUNT_SECONDS:
                before, counts, told = counts, asdict(self._counts), loop.time()
                if counts != before:
                    log.info("bars", **counts)
            if self._source.waiting or self._source.full or self._source.position != position:
                position, self._moved = self._source.position, loop.time()
                self._notifier.send("WATCHDOG=1")
