"""The live composition root: everything the daemon is made of is built here, and the clock is read here."""

import asyncio
import fcntl
import os
import secrets
import signal
import time
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import structlog

from barcast.daemon import wire
from barcast.daemon.config import Config, Rehearsal
from barcast.daemon.events import Champion, Warmth, events
from barcast.daemon.gate import Verdict
from barcast.daemon.history import bars, digest, history_files, scan
from barcast.daemon.journal import Journal, Kind, Record
from barcast.daemon.live import Courier, Decision, LiveSink, LiveSource, Scribe
from barcast.daemon.mqtt import Canary, Link
from barcast.daemon.notify import Notifier
from barcast.daemon.pipeline import Pipeline, Settings, run, try_strategies
from barcast.daemon.ports import Event, Revision
from barcast.daemon.schedule import Retrainer, scheduler
from barcast.daemon.store import ModelStore
from barcast.daemon.wire import Outgoing
from barcast.models import Bar, ConfigError, Forecaster

LAG_SECONDS = 0.05
"""How often the event loop's lag is measured."""
COUNT_SECONDS = 30.0
"""How often the log says what became of the bars, when there were any."""
LAGS_KEPT = 20_000
"""Lag measurements kept, at most."""
CLOCK_BACK = 86_400 * 10**9
"""How far the clock may be behind the newest record of the journal at a start, in nanoseconds."""
FAREWELL_SECONDS = 5.0
"""How long a stopping daemon goes on delivering what is in its outbox."""

log = structlog.get_logger()


class WallClock:
    """The operating system's clock or, in a rehearsal, one that begins elsewhere and runs faster."""

    def __init__(self, config: Config) -> None:
        r = config.rehearsal
        self._start, self._at = (wire.to_ns(r.start), wire.to_ns(r.at)) if r else (0, 0)
        self._speed = r.speed if r else 1.0

    def now(self) -> int:
        """Nanoseconds since 1970, UTC."""
        since = max(0, time.time_ns() - self._at)
        return self._start + (since if self._speed == 1 else int(since * self._speed))

    def seconds_until(self, moment: int) -> float:
        """Real seconds until the clock shows `moment`."""
        return max(0.0, ((moment - self._start) / self._speed + self._at - time.time_ns()) / 1e9)


def rehearsal(start: datetime, speed: float, delay: float = 0.0) -> Rehearsal:
    """A rehearsal clock that begins at `start` in `delay` real seconds."""
    return Rehearsal(start=start, at=datetime.now(UTC) + timedelta(seconds=delay), speed=speed)


@dataclass(frozen=True, slots=True)
class Commands:
    """How the daemon starts its subprocesses: the argument lists that train and judge a challenger."""

    train: Sequence[str]
    gate: Sequence[str]


def serve(config: Config, commands: Commands) -> None:
    """Run the daemon until SIGTERM or SIGINT."""

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        await Daemon(config, commands, stop, os.environ.get("NOTIFY_SOCKET")).run()

    asyncio.run(main())


class Daemon:
    """One instance at work. Setting `stop` ends it: what is decided is delivered, then the link closes."""

    def __init__(
        self, config: Config, commands: Commands, stop: asyncio.Event, notify_socket: str | None
    ) -> None:
        self.config, self.commands, self.stop = config, commands, stop
        self.clock = WallClock(config)
        self.notifier = Notifier(notify_socket)
        self.state = "starting"
        self.lags: list[float] = []
        self.boot = secrets.token_hex(4)

    async def run(self) -> None:
        """Recover, serve, and stop when asked to."""
        config = self.config
        try:
            config.state_dir.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            raise ConfigError(f"state_dir: {error}; name a directory that this user may write") from error
        with _only_one(config.state_dir / "lock"):
            journal = Journal(config.state_dir / "journal.db")
            self.scribe = Scribe(journal)
            self.store = ModelStore(config.state_dir / "models", config.timeframe)
            self.pipeline = Pipeline(self.store.open)
            self.forecasts = ThreadPoolExecutor(1, "forecast")
            try:
                await self._serve(await asyncio.to_thread(recover, journal, self.pipeline))
            finally:
                self.forecasts.shutdown()
                self.scribe.close()

    async def _serve(self, backlog: list[tuple[int, Event]]) -> None:
        config, journal, topics = self.config, self.scribe.journal, self.config.topics
        address = config.mqtt.address(f"barcast-{config.instance}")
        canary = Canary(f"{config.mqtt.root}/bars/{config.timeframe}", self.boot)
        self.link = Link(address, [topics.bars, topics.adjustments], self._status("lost"), canary)
        self.courier = Courier(self.link, self.scribe, self.clock, config.instance, self.boot)
        self.source = LiveSource(
            self.link,
            self.scribe,
            self.clock,
            root=config.mqtt.root,
            calendars=config.bar_calendars(),
            deadletters=topics.deadletter,
            queued=self.courier.wake,
            backlog=backlog,
            position=journal.progress().seq,
            stamped=max(journal.last_time(), journal.progress().clock),
        )
        self.sink = LiveSink(self.scribe, self.source, self.courier)
        for decision in await asyncio.to_thread(self._decisions):
            self.source.decide(decision)

        async with asyncio.TaskGroup() as group:
            rim = [
                group.create_task(self.link.run(self._announce), name="link"),
                group.create_task(self.courier.run(), name="courier"),
                group.create_task(self._watch(), name="watch"),
                group.create_task(self._prepare_champion(), name="prepare"),
            ]
            path = group.create_task(run(self.source, self.pipeline, self.sink, self.forecasts), name="path")
            planner = scheduler(config.retrain.cron, self._retrain) if config.retrain else None
            if planner:
                planner.start()
            self.state = "ready"
            self.notifier.send("READY=1")
            log.info("ready", instance=config.instance, model=self.champion.model)
            await self.stop.wait()
            log.info("stopping")
            self.notifier.send("STOPPING=1")
            self.state = "stopped"
            if planner:
                planner.shutdown(wait=False)
            path.cancel()
            self.courier.wake()
            with suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self.courier.drained()
            with suppress(TimeoutError):
                async with asyncio.timeout(FAREWELL_SECONDS):
                    await self._announce()
            self.link.leave()
            log.info("stopped", **asdict(self.pipeline.counts))
            for task in rim:
                task.cancel()

    def _decisions(self) -> list[Decision]:
        """What this start decides: settings, model or history other than the journal's last.

        Raise ConfigError for what could not work later, before any of it is journalled.
        """
        config, journal, settings = self.config, self.scribe.journal, self.config.settings()
        stamped, now = journal.last_time(), self.clock.now()
        if stamped > now + CLOCK_BACK:
            raise ConfigError(
                f"{journal.path}: its newest record is of {wire.to_text(stamped)}, and the clock shows "
                f"{wire.to_text(now)}; set the clock right, or name another state_dir"
            )
        last = journal.last(Kind.REVISION)
        before = Settings.decode(last.payload) if last else settings
        if (before.timeframe, before.calendar) != (settings.timeframe, settings.calendar):
            raise ConfigError(
                f"timeframe, calendar: {config.state_dir} holds {before.timeframe} bars on "
                f"{before.calendar}, not {settings.timeframe} on {settings.calendar}; name another state_dir"
            )
        record = journal.last(Kind.ACTIVATION)
        known = Champion.decode(record.payload) if record else None
        model = self.store.resolve(config.model.name, config.model.first, known.model if known else None)
        card = self.store.open(model, config.model.sampler, config.model.steps).card
        try_strategies(settings.build(), card)
        decisions = []
        if last is None or before != settings:
            payload = settings.encode()
            decisions.append(Decision(Kind.REVISION, payload, lambda time: Revision(time, payload)))
        self.activated = record.time if record else now
        if known and (known.model, known.fingerprint) == (model, card.fingerprint):
            self.champion = known
        else:
            self.champion = Champion(model, card.fingerprint, card.window, "the configuration names it")
            decisions.append(self._activation(self.champion, {}))
        warmth = self._warmth(card.window, journal.last(Kind.WARMUP))
        return decisions + ([_warmup(warmth)] if warmth else [])

    def _warmth(self, length: int, record: Record | None) -> Warmth | None:
        """The last `length` bars of each symbol's history, if they were not taken from these files before."""
        files = history_files(self.config.state_dir / "history")
        if not files:
            return None
        found = digest(files)
        if record is not None:
            taken = Warmth.decode(record.payload)
            if taken.digest == found and taken.length >= length:
                return None
        frame = scan(files, "close", self.config.bar_calendars(), until=self.clock.now() + 1)
        return Warmth(found, length, tuple(bars(frame.group_by("symbol").tail(length))))

    def _activation(self, champion: Champion, verdict: dict[str, Any]) -> Decision:
        def notices(time: int) -> list[Outgoing]:
            self.champion, self.activated = champion, time
            return [self._notice(verdict, time)]

        return Decision(
            Kind.ACTIVATION,
            champion.encode(),
            champion.event,
            notices,
        )

    def _notice(self, verdict: dict[str, Any], time: int) -> Outgoing:
        champion = self.champion
        return wire.model_notice(
            champion.model, self.activated, champion.fingerprint, verdict, time, self.config.topics.models
        )

    def _status(self, state: str) -> Outgoing:
        body = {"schema": wire.SCHEMA, "state": state, "instance": self.config.instance, "boot": self.boot}
        return Outgoing("", self.config.topics.status, msgspec.json.encode(body), retain=True, expires=None)

    async def _announce(self) -> None:
        state = "deaf" if self.state == "ready" and self.link.deaf else self.state
        fault = await self.link.publish(self._status(state), self.clock.now())
        if fault and self.link.connected.is_set():
            log.warning("status_not_published", reason=fault)

    async def _watch(self) -> None:
        """Measure the event loop's lag, count bars, and feed the watchdog while the path moves or waits."""
        loop, position = asyncio.get_running_loop(), -1
        told, counts = loop.time(), asdict(self.pipeline.counts)
        while True:
            asleep = loop.time()
            await asyncio.sleep(LAG_SECONDS)
            self.lags.append(loop.time() - asleep - LAG_SECONDS)
            if loop.time() - told > COUNT_SECONDS:
                before, counts, told = counts, asdict(self.pipeline.counts), loop.time()
                if counts != before:
                    log.info("bars", **counts)
            if self.source.waiting or self.source.position != position:
                position = self.source.position
                self.notifier.send("WATCHDOG=1")
            if len(self.lags) > LAGS_KEPT:
                del self.lags[: -LAGS_KEPT // 2]

    async def _retrain(self) -> None:
        """The scheduled job, and what the event loop noticed of it."""
        config = self.config
        assert config.retrain is not None
        retrainer = Retrainer(
            config.state_dir,
            lambda: [*self.commands.train, "--champion", self.champion.model],
            lambda: [*self.commands.gate, "--champion", self.champion.model],
            config.retrain.timeout / 1e9,
            self._promote,
            self._refuse,
        )
        self.lags.clear()
        began = asyncio.get_running_loop().time()
        try:
            await retrainer.run()
        except asyncio.CancelledError:
            if not self.stop.is_set():
                raise
            log.info("retrain_stopped")  # with the daemon; the scheduler would tell it as a fault
            return
        lags = np.array(self.lags or [0.0]) * 1e3
        log.info(
            "retrain_ended",
            seconds=round(asyncio.get_running_loop().time() - began, 1),
            loop_lag_p99_ms=round(float(np.quantile(lags, 0.99)), 1),
            loop_lag_max_ms=round(float(lags.max()), 1),
        )

    async def _promote(self, challenger: Path, verdict: Verdict) -> None:
        """Load and prepare the model beside the serving one, then let the activation take its place."""
        model = await asyncio.to_thread(self.store.adopt, challenger)
        settings = self.config.model
        forecaster = await asyncio.to_thread(self.store.open, model, settings.sampler, settings.steps)
        card = forecaster.card
        champion = Champion(model, card.fingerprint, card.window, verdict.reason)
        # A model that looks back further than its predecessor finds the history in its windows, too.
        last = await self.scribe(self.scribe.journal.last, Kind.WARMUP)
        warmth = await asyncio.to_thread(self._warmth, card.window, last)
        await self._prepare(forecaster, warmth.bars if warmth else ())
        written = self.source.decide(self._activation(champion, msgspec.to_builtins(verdict)))
        if warmth:
            written = self.source.decide(_warmup(warmth))
        await written

    async def _prepare_champion(self) -> None:
        """Prepare the model in force once the path has taken what was there at the start."""
        await self.source.caught_up.wait()
        await self._prepare(self.pipeline.forecaster, ())

    async def _prepare(self, forecaster: Forecaster, history: Iterable[Bar]) -> None:
        """Let a model forecast each symbol once, warmed by a history that the windows do not have yet.

        What it does but once, such as to calibrate by the past, is done then, on the thread of the forecasts:
        symbol by symbol, so that a group waits for one of them at most.
        """
        loop, card, windows = asyncio.get_running_loop(), forecaster.card, self.pipeline.windows
        began, count = loop.time(), 0
        older: dict[str, list[Bar]] = {}
        for bar in history:
            older.setdefault(bar.symbol, []).append(bar)
        for symbol in self.pipeline.settings.symbols or dict.fromkeys([*windows.symbols, *older]):
            window = windows.foreseen(symbol, card.window, older.get(symbol, ()))
            if window is not None and len(window) >= max(2, card.min_window):
                await loop.run_in_executor(self.forecasts, forecaster.forecast, [window])
                count += 1
        log.info("prepared", model=card.model, symbols=count, seconds=round(loop.time() - began, 1))

    async def _refuse(self, verdict: Verdict) -> None:
        notice = self._notice(msgspec.to_builtins(verdict), self.clock.now())
        await self.scribe(self.scribe.journal.append, [], [notice])
        self.courier.wake()


def _warmup(warmth: Warmth) -> Decision:
    return Decision(Kind.WARMUP, warmth.encode(), warmth.event)


def recover(journal: Journal, pipeline: Pipeline) -> list[tuple[int, Event]]:
    """Rebuild the state from the journal; return the events whose outcomes are not in the outbox yet.

    Starting and recovering from a crash are the same: groups that were settled are formed again, so
    that the batcher knows them, and not forecast again.
    """
    settled = journal.progress()
    backlog: list[tuple[int, Event]] = []
    clock = 0
    for seq, event in events(journal.records()):
        if seq > settled.seq:
            backlog.append((seq, event))
            continue
        clock = event.time
        for _ in pipeline.due(event.time):
            pass
        for _ in pipeline.take(event):
            pass
    # A timer released groups after the last event, at a time that no event has.
    if settled.clock > clock:
        for _ in pipeline.due(settled.clock):
            pass
    log.info("recovered", records=settled.seq, backlog=len(backlog))
    return backlog


@contextmanager
def _only_one(path: Path) -> Iterator[None]:
    """Hold a lock on the state directory, so that no second instance writes the same journal."""
    try:
        file = path.open("w")
    except OSError as error:
        raise ConfigError(f"state_dir: {error}; name a directory that this user may write") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ConfigError(
                f"state_dir: {path.parent} is in use by another instance; stop it or name another directory"
            ) from error
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield
