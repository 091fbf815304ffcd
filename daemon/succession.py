"""Which model serves: a better challenger takes over by an event of the journal, and subscribers are told."""

import asyncio
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Executor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import msgspec
import structlog

from barcast.daemon import wire
from barcast.daemon.bars import serves_nothing
from barcast.daemon.config import Config
from barcast.daemon.events import Answered, Champion, Ordered, Reign, Warmth, events
from barcast.daemon.gate import Verdict
from barcast.daemon.journal import Journal, Kind, Record, exists
from barcast.daemon.live import Clock, Courier, Decision, LiveSource, Scribe
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Event, Revision
from barcast.daemon.postgres import Server, leased
from barcast.daemon.room import room
from barcast.daemon.start import Following, Opening, fitting, keep_strategies, only_one, warmth
from barcast.daemon.store import ModelStore
from barcast.daemon.wire import Outgoing
from barcast.models import Bar, Card, ConfigError, Forecaster

log = structlog.get_logger()


class Succession:
    """Activates models, and prepares each for its symbols before it serves them.

    The state is the champion, since when it serves (nanoseconds), the one that was decided on last, and how
    long it took to prepare a model last (seconds, None: none was yet).
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
        self._latest = found.champion
        self._config, self._clock, self._scribe, self._store = config, clock, scribe, store
        self._pipeline, self._source, self._courier = pipeline, source, courier
        self._forecasts = forecasts
        self._found = found
        self._changing = asyncio.Lock()

    def open(self) -> None:
        """Decide what the start found to have changed."""
        found = self._found
        if (settings := found.settings) is not None:
            self._source.decide(_revision(settings))
        if found.activated is None:
            self._source.decide(self._activation(found.champion, {}))
        for part in found.warmth:
            self._source.decide(_warmup(part))

    async def prepare_champion(self) -> None:
        """Prepare the model in force once the path has taken what was there at the start."""
        await self._source.caught_up.wait()
        await self._prepare(self._pipeline.forecaster, {})

    async def promote(self, challenger: Path, verdict: Verdict, champion: str) -> bool:
        """Load and prepare the model beside the serving one, then let the activation take its place.

        Say no when `champion`, which it was judged against, is not in force any more by then.
        """
        model = await asyncio.to_thread(self._store.adopt, challenger)
        until = await asyncio.to_thread(self._store.known_until, model)
        reign = Reign(model, verdict.challenger_crps, until)

        def follows(card: Card) -> Champion | None:
            latest = self._latest
            return latest.succeeded_by(reign, card, verdict.reason) if latest.model == champion else None

        return await self._take_over(model, follows, verdict) is not None

    async def rollback(self, to: str | None) -> str:
        """Let the model that served before, or `to`, serve again; return a sentence. Raise ConfigError."""
        champion = self._latest
        reign = way_back(self._config, champion, self._store, to)

        def follows(card: Card) -> Champion | None:
            if self._latest is not champion:
                return None
            return champion.rolled_back(reign, card, f"rolled back from {champion.model}")

        after = await self._take_over(reign.model, follows, rolled_back(champion.model, reign.model))
        if after is None:
            raise ConfigError(f"{self._latest.model} took over meanwhile; look, and ask again")
        return f"{after.model} serves again; {champion.model} is left behind"

    async def _take_over(
        self, model: str, follows: Callable[[Card], Champion | None], verdict: Verdict
    ) -> Champion | None:
        """Prepare a model of the store and activate it, unless nobody is to follow by then."""
        async with self._changing:
            return await self._taken_over(model, follows, verdict)

    async def _taken_over(
        self, model: str, follows: Callable[[Card], Champion | None], verdict: Verdict
    ) -> Champion | None:
        settings, now = self._config.settings(), self._clock.now()
        forecaster = await asyncio.to_thread(fitting, settings, self._store, model, now)
        warmups = await self._warmed(forecaster)
        champion = follows(forecaster.card)
        if champion is None:
            return None
        # In one commit, as all decisions that wait together are.
        written = self._source.decide(self._activation(champion, msgspec.to_builtins(verdict)))
        for warmup in warmups:
            written = self._source.decide(warmup)
        await written
        return champion

    async def revise(self, config: Config) -> None:
        """Let the path go on by the settings of another configuration, of the same models.

        Raise ConfigError for what could not work later, DiskFullError without room: then nothing changes.
        """
        async with self._changing:
            settings, champion = config.settings(), self._latest
            if settings != self._config.settings():
                served, now = champion.model, self._clock.now()
                forecaster = await asyncio.to_thread(fitting, settings, self._store, served, now)
                card = forecaster.card
                await asyncio.to_thread(keep_strategies, settings, config.state_dir / "strategies")
                warmups = await self._warmed(forecaster)
                written = self._source.decide(_revision(settings.encode()))
                if card.fingerprint != champion.fingerprint:
                    reason = "the configuration has other settings"
                    after = champion.succeeded_by(champion.reign, card, reason)
                    written = self._source.decide(self._activation(after, {}))
                for warmup in warmups:
                    written = self._source.decide(warmup)
                await written
            self._config = config

    async def _warmed(self, forecaster: Forecaster) -> list[Decision]:
        """Prepare a model, one that looks back further than its predecessor with windows as long as it likes.

        Return what has to be decided for that.
        """
        last = await self._scribe(self._scribe.journal.last, Kind.WARMUP)
        have, now = self._pipeline.windows.length, self._clock.now()
        warmups, older = await asyncio.to_thread(
            _lacking, self._config, forecaster.card.window, have, last, now
        )
        await self._prepare(forecaster, older)
        return warmups

    async def refuse(self, verdict: Verdict) -> None:
        """Tell subscribers of a verdict that changes nothing."""
        notice = self._notice(msgspec.to_builtins(verdict), self._clock.now())
        await self._scribe(self._scribe.journal.append, [], [notice])
        self._courier.wake()

    def _activation(self, champion: Champion, verdict: dict[str, Any]) -> Decision:
        self._latest = champion

        def notices(time: int) -> list[Outgoing]:
            self.champion, self.activated = champion, time
            return [self._notice(verdict, time)]

        return Decision(Kind.ACTIVATION, champion.encode(), champion.event, notices)

    def _notice(self, verdict: dict[str, Any], time: int) -> Outgoing:
        champion = self.champion
        return wire.model_notice(
            champion.model, self.activated, champion.fingerprint, verdict, time, self._config.topics.models
        )

    async def _prepare(self, forecaster: Forecaster, older: Mapping[str, Sequence[Bar]]) -> None:
        """Let a model forecast each symbol once, warmed by older bars that the windows do not have yet.

        What it does but once, such as to calibrate by the past, is done then, on the thread of the forecasts:
        symbol by symbol, so that a group waits for one of them at most.
        """
        loop, card, windows = asyncio.get_running_loop(), forecaster.card, self._pipeline.windows
        began, count = loop.time(), 0
        for symbol in self._pipeline.settings.symbols or dict.fromkeys([*windows.symbols, *older]):
            window = windows.foreseen(symbol, card.window, older.get(symbol, ()))
            if window is not None and len(window) >= max(2, card.min_window):
                await loop.run_in_executor(self._forecasts, forecaster.forecast, [window])
                count += 1
        self.prepared = loop.time() - began
        log.info("prepared", model=card.model, symbols=count, seconds=round(self.prepared, 1))


def _lacking(
    config: Config, length: int, have: int, record: Record | None, now: int
) -> tuple[list[Decision], dict[str, list[Bar]]]:
    """What windows lack for a model that looks back over `length` bars: as decisions, and by symbol."""
    parts = warmth(config, length, have, record, now)
    older: dict[str, list[Bar]] = {}
    for part in parts:
        for bar in part.bars:
            older.setdefault(bar.symbol, []).append(bar)
    return [_warmup(part) for part in parts], older


def _revision(settings: bytes) -> Decision:
    return Decision(Kind.REVISION, settings, lambda time: Revision(time, settings))


def _warmup(found: Warmth) -> Decision:
    return Decision(Kind.WARMUP, found.encode(), found.event)


def rolled_back(champion: str, to: str) -> Verdict:
    """What subscribers are told of a rollback, in the form of a verdict."""
    reason = f"rolled back from {champion}"
    return Verdict(accepted=True, reason=reason, challenger=to, champion=champion, triggers=("rollback",))


def way_back(config: Config, champion: Champion, store: ModelStore, to: str | None) -> Reign:
    """The model that a rollback leads to. Raise ConfigError where there is none."""
    if config.model.name != "champion":
        raise ConfigError(
            f"model.name = {config.model.name!r} pins the model, so that a rollback would change nothing; "
            "name another model there and restart"
        )
    if to == champion.model:
        raise ConfigError(f"{to} serves already; name another model")
    reign = champion.behind(to)
    if reign is None and to is None:
        raise ConfigError(
            f"no model served before {champion.model}, and none is named: nothing to roll back to"
        )
    found = reign or Reign(str(to))
    if not store.hold(found.model):
        raise ConfigError(
            f"{found.model}: no such model in {store.directory}; name one of its folders, or a baseline"
        )
    return found if reign else Reign(found.model, until=store.known_until(found.model))


def rollback_journal(config: Config, now: int, ordered: Ordered) -> str:
    """Roll back an instance that does not run: the next start serves the model. Return a sentence.

    Where the journal is on a server, its lease is taken for as long as that takes.

    What has come and is not forecast yet is passed over, by a decision of its own: the champion may be the
    one that cannot. Raise ConfigError when the instance runs, where there is nothing to roll back to and for
    a journal that cannot be read, DiskFullError without room.
    """
    place = config.journal_place
    with ExitStack() as stack:
        if not isinstance(place, Server):
            stack.enter_context(only_one(config.state_dir / "lock"))
        stack.enter_context(room(config.state_dir))
        if not exists(place):
            raise ConfigError(f"{place}: no journal there, so there is nothing to roll back")
        journal = Journal(place)
        try:
            if isinstance(place, Server):
                journal.write_as(stack.enter_context(leased(place, "rollback")))
            record = journal.last(Kind.ACTIVATION)
            if record is None:
                raise ConfigError(
                    f"{journal.place}: no model was ever activated, so there is nothing to roll back"
                )
            list(events([record]))  # names the record if it is damaged
            champion = Champion.decode(record.payload)
            store = ModelStore(config.state_dir / "models", config.timeframe)
            reign = way_back(config, champion, store, ordered.to)
            card = fitting(config.settings(), store, reign.model, now).card
            after = champion.rolled_back(reign, card, f"rolled back from {champion.model}")
            time = max(now, journal.last_time(), journal.progress().clock)
            verdict = msgspec.to_builtins(rolled_back(champion.model, after.model))
            notice = wire.model_notice(
                after.model, time, after.fingerprint, verdict, time, config.topics.models
            )
            pipeline = Pipeline(serves_nothing)
            backlog = Following(journal, pipeline).recover()
            groups = _formed(pipeline, backlog, time)
            have, last = pipeline.windows.length, journal.last(Kind.WARMUP)
            warmups, _ = _lacking(config, card.window, have, last, time)
            records = [
                (time, Kind.ORDERED, "", ordered.encode()),
                (time, Kind.ACTIVATION, "", after.encode()),
            ]
            records += [(time, warmup.kind, "", warmup.payload) for warmup in warmups]
            said = f"{after.model} will serve from the next start on; {champion.model} is left behind"
            if groups:
                said += f"; {groups} groups of bars, in {len(backlog)} records, are passed over without a "
                said += "forecast"
            order = journal.last_seq() + 1 + bool(groups)  # behind the record of what is passed over
            records.append((time, Kind.ANSWERED, "", Answered(order, done=said).encode()))
            if groups:
                journal.shed(time, records, [notice])
            else:
                journal.append(records, [notice])
        finally:
            journal.close()
    return said


def _formed(pipeline: Pipeline, backlog: Iterable[tuple[int, Event]], now: int) -> int:
    """How many groups leave until `now` while the path takes events."""
    groups = 0
    for _, event in backlog:
        groups += sum(1 for _ in pipeline.due(event.time))
        groups += sum(1 for _ in pipeline.take(event))
    return groups + sum(1 for _ in pipeline.due(now))
