"""Symbols that appear while the daemon runs: their history is read beside the loop, and journalled."""

import asyncio
from collections.abc import Sequence

import structlog

from barcast.daemon.bars import bars_of
from barcast.daemon.config import Config
from barcast.daemon.events import Warmth
from barcast.daemon.journal import Kind
from barcast.daemon.live import Clock, Decision, LiveSource
from barcast.daemon.pipeline import Pipeline
from barcast.models import DataError

LOOK_SECONDS = 1.0
"""How often it is asked whether a symbol is new."""
RETRY_SECONDS = 60.0
"""Pause after a history that cannot be read."""
AT_ONCE = 50
"""Symbols that are looked up together: their windows are in memory once more meanwhile."""

log = structlog.get_logger()


class Newcomers:
    """Warms each new symbol from `history/` and `archive/`, where files may be added while the daemon runs.

    What was found is decided like a warm-up at the start, for that symbol alone; also that nothing was, upon
    which the path asks for the bars. The state is the symbols that are decided and not taken by the path yet.
    """

    def __init__(self, config: Config, clock: Clock, pipeline: Pipeline, source: LiveSource) -> None:
        self._config, self._clock, self._pipeline, self._source = config, clock, pipeline, source
        self._calendars = config.bar_calendars()
        self._decided: set[str] = set()

    async def run(self) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            try:
                await self.look()
            except DataError as error:
                log.error("history_unusable", reason=str(error))
                await asyncio.sleep(RETRY_SECONDS)

    async def look(self) -> None:
        """Decide on those that are new and lack bars. Raise DataError for files that cannot be used."""
        windows, came = self._pipeline.windows, self._pipeline.newcomers
        self._decided &= came.keys()
        lacking = [s for s in came if s not in self._decided and windows.count(s) < windows.length]
        if not lacking:
            return
        for symbol, warmth, payload in await asyncio.to_thread(self._read, lacking[:AT_ONCE], windows.length):
            log.info("newcomer", symbol=symbol, bars=len(warmth.bars))
            self._decided.add(symbol)
            self._source.decide(Decision(Kind.NEWCOMER, payload, warmth.event))

    def _read(self, symbols: Sequence[str], length: int) -> list[tuple[str, Warmth, bytes]]:
        now = self._clock.now()
        found = bars_of(self._config.state_dir, symbols, self._calendars, now, length)
        warmths = [Warmth("", length, bars, symbol) for symbol, bars in found.items()]
        return [(warmth.symbol or "", warmth, warmth.encode()) for warmth in warmths]
