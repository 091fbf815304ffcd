"""Looks now and then whether the champion is too old, or not what it promised any more."""

import asyncio
from collections.abc import Container, Iterable, Iterator, Mapping

import msgspec
import structlog

from barcast.daemon.config import Config
from barcast.daemon.drift import TIMES, Reading, Said, chosen, measure
from barcast.daemon.journal import Journal
from barcast.daemon.live import Clock
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.retraining import Retraining, tried
from barcast.daemon.succession import Succession
from barcast.models import Card, Window

LOOK_SECONDS = 600.0
"""How often it looks."""
REST = 86_400 * 10**9
"""How long age and drift rest after they asked, in nanoseconds: what did not help yesterday may today."""
ROWS = 200_000
"""Newest messages of the outbox that signals are looked for in."""
BARS = 1000
"""Bars of a symbol that outcomes are looked for in."""

log = structlog.get_logger()


class Rests:
    """Lets a reason to train pass, and then none for a `REST`; the state is when one passed last."""

    def __init__(self) -> None:
        self.passed: int | None = None

    def passes(self, reason: str | None, now: int) -> str | None:
        """The reason, if there is one and it need not rest."""
        if reason is None or (self.passed is not None and now - self.passed < REST):
            return None
        self.passed = now
        return reason


class Age(Rests):
    """Asks for a training when the champion is older than `most` nanoseconds, once a `REST`."""

    def __init__(self, most: int) -> None:
        super().__init__()
        self._most = most

    def over(self, since: int, now: int) -> bool:
        """Whether a champion whose age counts from `since` is too old."""
        return now - since > self._most

    def next(self, since: int) -> int:
        """The first moment at which it asks, as long as the champion stays."""
        old = since + self._most + 1
        return old if self.passed is None else max(old, self.passed + REST)

    def due(self, since: int, now: int) -> str | None:
        """The reason to train now, if there is one."""
        old = f"age: the champion is {(now - since) / 86_400e9:.1f} days old"
        return self.passes(old if self.over(since, now) else None, now)


class Drifted(Rests):
    """Asks for a training when a reading leaves its bands, once a `REST`."""

    def __init__(self, coverage: float, crps: float) -> None:
        super().__init__()
        self._coverage, self._crps = coverage, crps

    def due(self, reading: Reading, held_out: float | None, now: int) -> str | None:
        """The reason to train now, if there is one; `held_out` is the CRPS in the champion's verdict."""
        return self.passes(reading.beyond(self._coverage, self._crps, held_out), now)


class Lookout:
    """Tells the triggers the time and what they need to know, and passes their reasons on.

    The state is the triggers, and the last `reading`: None where drift is not looked for, or nothing has
    matured yet. What it reads is in the journal, so that a reading is the same after a restart; when it asked
    last is not, so that it may ask again.
    """

    def __init__(self, config: Config, clock: Clock, succession: Succession, pipeline: Pipeline) -> None:
        self.reading: Reading | None = None
        self._clock, self._succession, self._pipeline = clock, succession, pipeline
        self.configure(config)

    def configure(self, config: Config) -> None:
        """Look for what a configuration wants from now on. A reason that rests may be told once more."""
        retrain = config.retrain
        self._config = config
        self._age = Age(retrain.max_age) if retrain and retrain.max_age else None
        self._drifted = (
            Drifted(retrain.drift.coverage, retrain.drift.crps) if retrain and retrain.drift else None
        )
        if self._drifted is None:
            self.reading = None

    @property
    def since(self) -> int:
        """The newest close that the champion knew, or else when it took over, in nanoseconds.

        When it took over, too, where a rollback brought it: who went back wants the older one.
        """
        champion, activated = self._succession.champion, self._succession.activated
        return max(champion.until, activated) if champion.returned else champion.until or activated

    @property
    def old(self) -> bool:
        """Whether the champion is older than `max_age`."""
        return self._age is not None and self._age.over(self.since, self._clock.now())

    async def run(self, retraining: Retraining) -> None:
        """Look until cancelled."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            reasons = await tried(self.look(), "lookout_failed")
            for reason in [] if isinstance(reasons, Exception) else reasons:
                retraining.ask(reason)

    async def look(self) -> list[str]:
        """The reasons to train now."""
        reasons = [self._age.due(self.since, self._clock.now()) if self._age else None]
        if (drifted := self._drifted) is not None:
            champion = self._succession.champion
            closes: dict[str, Window] = {}
            for symbol in chosen(self._pipeline.windows.symbols):
                window = self._pipeline.windows.foreseen(symbol, BARS, ())
                if window is not None:
                    closes[symbol] = window
                await asyncio.sleep(0)  # a copy takes a moment: bars come first
            reading = None
            if self._pipeline.model == champion.model:  # else it takes over at this moment
                reading = await asyncio.to_thread(self._read, self._pipeline.forecaster.card, closes)
            if drifted is self._drifted:  # else a reload has other bands, or none
                self.reading = reading
                if reading is not None:
                    log.info("drift", **reading.plain())
                    reasons.append(drifted.due(reading, champion.crps, self._clock.now()))
        return [reason for reason in reasons if reason is not None]

    def _read(self, card: Card, closes: Mapping[str, Window]) -> Reading | None:
        journal = Journal(self._config.journal_place, readonly=True)
        try:
            topics = f"{self._config.mqtt.root}/signals/{self._config.timeframe}/"
            return measure(
                reign(journal.sent(topics, ROWS), card.model, closes, TIMES + max(card.horizons)), closes
            )
        finally:
            journal.close()


def reign(
    sent: Iterable[tuple[str, bytes]], model: str, symbols: Container[str], most: int
) -> Iterator[Said]:
    """The signals of some symbols, newest first, back to the first of another model, of `most` closes."""
    closes: set[str] = set()
    for topic, payload in sent:
        if topic.rpartition("/")[2] in symbols:
            said = msgspec.json.decode(payload, type=Said)
            closes.add(said.close_time)
            if said.model != model or len(closes) > most:
                return
            yield said
