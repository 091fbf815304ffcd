"""Which model serves: a better challenger takes over by an event of the journal, and subscribers are told."""

import asyncio
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

import msgspec
import structlog

from barcast.daemon import wire
from barcast.daemon.config import Config
from barcast.daemon.events import Champion, Warmth
from barcast.daemon.gate import Verdict
from barcast.daemon.journal import Kind
from barcast.daemon.live import Clock, Courier, Decision, LiveSource, Scribe
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Revision
from barcast.daemon.start import Opening, warmth
from barcast.daemon.store import ModelStore
from barcast.daemon.wire import Outgoing
from barcast.models import Bar, Forecaster

log = structlog.get_logger()


class Runs:
    """What retrainings since the start came to.

    The state is how many `runs` had which result, and how many `seconds` the last one took (0: none yet). A
    run is `promoted` when a challenger took over, else `refused` when one was judged, else `failed`.
    """

    def __init__(self) -> None:
        self.runs: Counter[str] = Counter()
        self.seconds = 0.0

    def ended(self, promoted: int, refused: int, seconds: float) -> None:
        """A run of so many verdicts ended after so long."""
        self.runs["promoted" if promoted else "refused" if refused else "failed"] += 1
        self.seconds = seconds


class Succession:
    """Activates models, and prepares each for its symbols before it serves them.

    The state is the champion, since when it serves (nanoseconds), how long it took to prepare a model last
    (seconds, None: none was yet), and how many challengers took over and were refused since the start.
    """

    def __init__(
        self,
        config: Config,
        clock: Clock,
        scribe: Scribe,
        store: ModelStore,
        pipeline: Pipeline,
        source: LiveSource,
        courier: Courier,
        forecasts: Executor,
        found: Opening,
    ) -> None:
        self.champion, self.activated = found.champion, found.activated or 0
        self.prepared: float | None = None
        self.promoted = self.refused = 0
        self._config, self._clock, self._scribe, self._store = config, clock, scribe, store
        self._pipeline, self._source, self._courier = pipeline, source, courier
        self._forecasts = forecasts
        self._found = found

    def open(self) -> None:
        """Decide what the start found to have changed."""
        found = self._found
        if (settings := found.settings) is not None:
            self._source.decide(Decision(Kind.REVISION, settings, lambda time: Revision(time, settings)))
        if found.activated is None:
            self._source.decide(self._activation(found.champion, {}))
        if found.warmth:
            self._source.decide(_warmup(found.warmth))

    async def prepare_champion(self) -> None:
        """Prepare the model in force once the path has taken what was there at the start."""
        await self._source.caught_up.wait()
        await self._prepare(self._pipeline.forecaster, ())

    async def promote(self, challenger: Path, verdict: Verdict) -> None:
        """Load and prepare the model beside the serving one, then let the activation take its place."""
        settings, store = self._config.model, self._store
        model = await asyncio.to_thread(store.adopt, challenger)
        forecaster = await asyncio.to_thread(store.open, model, settings.sampler, settings.steps)
        card = forecaster.card
        champion = Champion(model, card.fingerprint, card.window, verdict.reason)
        # A model that looks back further than its predecessor finds the history in its windows, too.
        last = await self._scribe(self._scribe.journal.last, Kind.WARMUP)
        found = await asyncio.to_thread(warmth, self._config, card.window, last, self._clock.now())
        await self._prepare(forecaster, found.bars if found else ())
        written = self._source.decide(self._activation(champion, msgspec.to_builtins(verdict)))
        if found:
            written = self._source.decide(_warmup(found))
        await written
        self.promoted += 1

    async def refuse(self, verdict: Verdict) -> None:
        """Tell subscribers of a verdict that changes nothing."""
        self.refused += 1
        notice = self._notice(msgspec.to_builtins(verdict), self._clock.now())
        await self._scribe(self._scribe.journal.append, [], [notice])
        self._courier.wake()

    def _activation(self, champion: Champion, verdict: dict[str, Any]) -> Decision:
        def notices(time: int) -> list[Outgoing]:
            self.champion, self.activated = champion, time
            return [self._notice(verdict, time)]

        return Decision(Kind.ACTIVATION, champion.encode(), champion.event, notices)

    def _notice(self, verdict: dict[str, Any], time: int) -> Outgoing:
        champion = self.champion
        return wire.model_notice(
            champion.model, self.activated, champion.fingerprint, verdict, time, self._config.topics.models
        )

    async def _prepare(self, forecaster: Forecaster, history: Iterable[Bar]) -> None:
        """Let a model forecast each symbol once, warmed by a history that the windows do not have yet.

        What it does but once, such as to calibrate by the past, is done then, on the thread of the forecasts:
        symbol by symbol, so that a group waits for one of them at most.
        """
        loop, card, windows = asyncio.get_running_loop(), forecaster.card, self._pipeline.windows
        began, count = loop.time(), 0
        older: dict[str, list[Bar]] = {}
        for bar in history:
            older.setdefault(bar.symbol, []).append(bar)
        for symbol in self._pipeline.settings.symbols or dict.fromkeys([*windows.symbols, *older]):
            window = windows.foreseen(symbol, card.window, older.get(symbol, ()))
            if window is not None and len(window) >= max(2, card.min_window):
                await loop.run_in_executor(self._forecasts, forecaster.forecast, [window])
                count += 1
        self.prepared = loop.time() - began
        log.info("prepared", model=card.model, symbols=count, seconds=round(self.prepared, 1))


def _warmup(found: Warmth) -> Decision:
    return Decision(Kind.WARMUP, found.encode(), found.event)
