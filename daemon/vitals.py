"""Signs of life: the event loop's lag, whether the path moves, and the watchdog that is fed by it."""

import asyncio
from collections import deque
from dataclasses import asdict

import structlog

from barcast.daemon.distribution import Distribution
from barcast.daemon.live import QUICK, LiveSource
from barcast.daemon.notify import Notifier
from barcast.daemon.pipeline import Pipeline

LAG_SECONDS = 0.05
"""How often the event loop's lag is measured."""
FEED_SECONDS = 1.0
"""How often the watchdog is fed."""
LAGS_KEPT = 20_000
"""Lag measurements kept, at most."""
COUNT_SECONDS = 30.0
"""How often the log says what became of the bars, when there were any."""
STILL_SECONDS = 30.0
"""A path that neither waits nor moves for so long is stuck: to calibrate some symbols takes a while."""

log = structlog.get_logger()


class Vitals:
    """Measures the loop and feeds the watchdog while the path moves, or waits for events or for room.

    It moves when it takes an event, or when the model has answered about some symbols of a group.

    The state is the lags measured last (seconds), how often they were how large, and when the path was last
    seen to move.
    """

    def __init__(self, source: LiveSource, pipeline: Pipeline, notifier: Notifier) -> None:
        self.lags: deque[float] = deque(maxlen=LAGS_KEPT)
        self.lag = Distribution(QUICK)
        self._source, self._pipeline, self._notifier = source, pipeline, notifier
        self._moved = asyncio.get_running_loop().time()

    @property
    def moving(self) -> bool:
        """Whether the path moved, or waited, within `STILL_SECONDS`."""
        return asyncio.get_running_loop().time() - self._moved < STILL_SECONDS

    async def run(self) -> None:
        """Watch until cancelled."""
        loop, source, pipeline, stand = asyncio.get_running_loop(), self._source, self._pipeline, (-1, -1)
        told, fed, counts = loop.time(), 0.0, asdict(pipeline.counts)
        while True:
            asleep = loop.time()
            await asyncio.sleep(LAG_SECONDS)
            self.lags.append(loop.time() - asleep - LAG_SECONDS)
            self.lag.observe(self.lags[-1])
            if loop.time() - told > COUNT_SECONDS:
                before, counts, told = counts, asdict(pipeline.counts), loop.time()
                if counts != before:
                    log.info("bars", **counts)
            now = (source.position, pipeline.forecasts)
            if source.waiting or source.held or now != stand:
                stand, self._moved = now, loop.time()
                if self._moved - fed >= FEED_SECONDS:
                    fed = self._moved
                    self._notifier.send("WATCHDOG=1")
