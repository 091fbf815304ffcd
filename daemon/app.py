"""The live composition root: everything the daemon is made of is built here, and the clock is read here."""

import asyncio
import json
import os
import secrets
import signal
import time
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import AsyncExitStack, nullcontext, suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime, timedelta
from importlib.metadata import version
from pathlib import Path

import msgspec
import numpy as np
import structlog

from barcast.daemon import control, http, reports, view, wire
from barcast.daemon.config import Config, Rehearsal, Retrain, is_loopback
from barcast.daemon.control import Answer, Order, Tell
from barcast.daemon.desk import Desk
from barcast.daemon.events import Champion, shed_groups
from barcast.daemon.journal import Journal, Kind, Place
from barcast.daemon.live import Clock, Courier, Decision, LiveSink, LiveSource, Scribe
from barcast.daemon.lookout import Lookout
from barcast.daemon.metrics import Metrics, Parts
from barcast.daemon.mqtt import Canary, Link
from barcast.daemon.newcomers import Newcomers
from barcast.daemon.notify import Notifier
from barcast.daemon.panel import Board, Choices
from barcast.daemon.pipeline import Pipeline, run
from barcast.daemon.ports import Pause
from barcast.daemon.postgres import Lease, Server
from barcast.daemon.reckoning import Reckoning
from barcast.daemon.retention import daily
from barcast.daemon.retraining import WORDS, Result, Retraining, Serving
from barcast.daemon.room import check_room, room
from barcast.daemon.schedule import Planner, scheduler
from barcast.daemon.standby import Leadership, Standby
from barcast.daemon.start import Following, handed_down, only_one, opening
from barcast.daemon.store import ModelStore
from barcast.daemon.succession import Succession
from barcast.daemon.trainer import Run, children, worker
from barcast.daemon.verification import Verification
from barcast.daemon.vitals import Vitals
from barcast.models import BarcastError, ConfigError, DataError

FAREWELL_SECONDS = 5.0
"""How long a stopping daemon goes on delivering what is in its outbox."""
RECKONED_SECONDS = 600.0
"""How long is told what was reckoned of the same model's forecasts."""
FAILED_SECONDS = 60.0
"""How long it is told why nothing was, before it is tried again."""
RECKONING_SECONDS = 600.0
"""How long a reckoning may take before it is killed."""
HEARTBEAT_SECONDS = 10.0
"""How often the status is published while bars are processed."""

ASKED = "an operator asked"

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


Commands = Mapping[str, Sequence[str]]
"""The argument list that begins each subprocess: `train`, `gate`, `choices`, `compact`, `verify`
and `reckon`."""


@dataclass(frozen=True, slots=True)
class Outside:
    """What the daemon takes from its machine, its network and from chance: each as what makes it."""

    clock: Callable[[Config], Clock] = WallClock
    journal: Callable[[Place], Journal] = Journal
    scribe: Callable[[Journal], Scribe] = Scribe
    link: type[Link] = Link
    store: Callable[[Path, str], ModelStore] = ModelStore
    forecasts: Callable[[], Executor] = lambda: ThreadPoolExecutor(1, "forecast")
    children: Callable[[Commands], Run] = lambda commands: children(commands, os.environ)
    boot: Callable[[], str] = lambda: secrets.token_hex(4)


def serve(config: Config, commands: Commands) -> None:
    """Run the daemon until SIGTERM or SIGINT, and end the process then.

    Threads that still read, such as a long history, are not waited for: a start writes nothing that cannot be
    done again, and at the end of a stop the journal is closed.
    """

    async def main() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        daemon = Daemon(config, commands, stop, os.environ.get("NOTIFY_SOCKET"), Outside())

        def asked() -> None:
            if daemon.state == "starting":
                log.info("stopped", starting=True)
                os._exit(0)
            stop.set()

        def read_again() -> None:
            if daemon.state == "ready":
                daemon.desk.signalled("reload")
            else:
                log.warning(
                    "signal_ignored", reason=f"the daemon is {daemon.state}; send it when it is ready"
                )

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, asked)
        loop.add_signal_handler(signal.SIGHUP, read_again)
        await daemon.run()
        os._exit(0)

    asyncio.run(main())


class Daemon:
    """One instance at work. Setting `stop` ends it: what is decided is delivered, then the link closes."""

    def __init__(
        self,
        config: Config,
        commands: Commands,
        stop: asyncio.Event,
        notify_socket: str | None,
        outside: Outside,
    ) -> None:
        self.config, self.stop, self.outside = config, stop, outside
        self.children = outside.children(commands)
        self.clock = outside.clock(config)
        self.notifier = Notifier(notify_socket)
        self.state: wire.State = "starting"
        self.boot = outside.boot()
        self.leadership: Leadership | None = None
        self.following: Following | None = None
        self.metrics = Metrics(config, self.clock)
        self.view = view.View(config.mqtt.root, config.timeframe, _identity(config)) if config.http else None
        self._planner: Planner | None = None
        self._told: tuple[Champion, bytes] | None = None
        self.board = Board(self.clock.now, self.view.train if self.view else lambda: None)
        if self.view:
            self.view.training = self.board.encode
        self._choices: Choices | None = None
        self._reckoning: tuple[str, float, bytes | BarcastError] | None = None
        self._reloading, self._choosing, self._reckons = asyncio.Lock(), asyncio.Lock(), asyncio.Lock()

    async def run(self) -> None:
        """Recover, serve, and stop when asked to."""
        config = self.config
        with room(config.state_dir):
            try:
                config.state_dir.mkdir(mode=0o700, parents=True, exist_ok=True)
            except ValueError as error:
                raise ConfigError(f"state_dir: {error}; name a directory that this user may write") from error
        place = config.journal_place
        # On a server it is the lease that keeps a second one from serving: they may share the directory.
        with nullcontext() if isinstance(place, Server) else only_one(config.state_dir / "lock"):
            async with self.notifier.starting():  # one of an older version is copied
                with room(config.state_dir):
                    journal = await asyncio.to_thread(self.outside.journal, place)
            self.scribe = self.outside.scribe(journal)
            self.forecasts = self.outside.forecasts()
            if isinstance(place, Server):
                self.leadership = Leadership(Lease(place, self.boot))
            try:
                async with AsyncExitStack() as stack:
                    if config.http:
                        metrics = self.metrics
                        page = http.page(metrics.text, metrics.alive, metrics.ready, self.shown())
                        listening = http.listen(config.http.host, config.http.port)
                        await stack.enter_async_context(http.serving(listening, page))
                    if self.leadership is None:
                        await self._serve()
                    else:
                        await self._serve_in_turn(self.leadership)
            finally:
                self.forecasts.shutdown()
                self.scribe.close()
                if self.leadership is not None:
                    await self.leadership.release()

    def shown(self) -> http.Shown:
        """What the page shows, where the configuration has [http]."""
        assert self.config.http is not None
        assert self.view is not None
        names = is_loopback if is_loopback(self.config.http.host) else lambda _: True
        return http.Shown(
            self.view,
            self._chart,
            self._activations,
            self._trust,
            self._reckoned,
            self._beat,
            self._choosable,
            self._backtests,
            self._report,
            names,
            self._ordered,
            self.config.http.token(),
        )

    def follow(self) -> Following:
        """Make the path, in the state of an empty journal."""
        config = self.config
        self.store = self.outside.store(config.state_dir / "models", config.timeframe)
        self.pipeline = Pipeline(self.store.open, config.state_dir / "strategies")
        self.following = Following(self.scribe.journal, self.pipeline)
        return self.following

    async def _serve_in_turn(self, leadership: Leadership) -> None:
        """Serve when the lease is ours, until it is another one's, which raises DeposedError."""
        standby = Standby(self.follow(), self.pipeline, self.notifier, leadership)
        async with asyncio.TaskGroup() as group:
            epoch = await leadership.take()
            reading: Awaitable[None] | None = None
            if epoch is None:
                self.metrics.standby = standby
                reading = group.create_task(standby.follow(), name="standby")
                epoch = await standby.take()
            keeping = group.create_task(leadership.keep(), name="lease")
            self.metrics.standby = None
            async with self.notifier.starting():
                if reading is not None:
                    await reading
                await self._read_while_waiting()
            self.scribe.journal.write_as(epoch)
            await self._serve()
            keeping.cancel()

    async def _read_while_waiting(self) -> None:
        """Take what the file says now, as the one before may have been reloaded with it."""
        try:
            config, changed = await asyncio.to_thread(self.config.reread)
            if changed:  # also what a reload would refuse
                now = self.clock.now()
                await asyncio.to_thread(opening, config, self.scribe.journal, self.store, now)
        except (BarcastError, OSError) as error:
            log.error("configuration_not_read", reason=str(error), remedy="mend it, and order `reload`")
        else:
            self.config = config
            self.metrics.configure(config)

    async def build(self) -> None:
        """Recover from the journal, and build the parts; nothing runs yet."""
        config, journal, topics = self.config, self.scribe.journal, self.config.topics
        following = self.following or self.follow()
        with room(config.state_dir):
            journal.write()
        check_room(config.state_dir)
        backlog = await asyncio.to_thread(following.recover)
        address = config.mqtt.address(f"barcast-{config.instance}")
        canary = Canary(f"{config.mqtt.root}/bars/{config.timeframe}", self.boot)
        lost = wire.Status(state="lost", instance=config.instance, boot=self.boot)
        subscriptions = [topics.bars, topics.adjustments, f"{topics.control}+"]
        self.link = self.outside.link(address, subscriptions, wire.status(lost, topics.status), canary)
        if self.leadership is not None:
            self.link.permitted = self.leadership.sure
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
            shed=shed_groups(journal, journal.progress().seq),
        )
        if self.view is None:
            self.sink = LiveSink(self.scribe, self.source, self.courier)
        else:
            self.view.remember(await asyncio.to_thread(list, journal.sent(self.view.prefix, view.REMEMBERED)))
            self.sink = LiveSink(self.scribe, self.source, self.courier, self.view.told)
        self.vitals = Vitals(self.source, self.pipeline, self.notifier)
        self.newcomers = Newcomers(config, self.clock, self.pipeline, self.source)
        with handed_down(config):
            found = await asyncio.to_thread(opening, config, journal, self.store, self.clock.now())
        self.succession = Succession(
            config,
            self.clock,
            self.scribe,
            self.store,
            self.pipeline,
            self.source,
            self.courier,
            self.forecasts,
            found,
        )
        self.lookout = Lookout(config, self.clock, self.succession, self.pipeline)
        process, timeout, stall = self._trainer()
        self.retraining = Retraining(
            config.state_dir,
            process,
            self._serving,
            timeout,
            stall,
            self.succession.promote,
            self.succession.refuse,
            self.board,
        )
        verify = config.verify
        self.verification = Verification(self.children, self.clock, verify.since if verify else None)
        self.desk = Desk(topics, self.boot, self.link, self.scribe, self.source, self.courier, self._order)
        self.metrics.watch(
            Parts(
                self.link,
                self.scribe,
                self.source,
                self.courier,
                self.sink,
                self.pipeline,
                self.vitals,
                self.succession,
                self.retraining,
                self.lookout,
                self.verification,
            )
        )

    async def _serve(self) -> None:
        async with self.notifier.starting():
            await self.build()
        self.succession.open()
        async with asyncio.TaskGroup() as group:
            rim = [
                group.create_task(self.link.run(self._announce), name="link"),
                group.create_task(self.courier.run(), name="courier"),
                group.create_task(self.vitals.run(), name="vitals"),
                group.create_task(self._heartbeat(), name="heartbeat"),
                group.create_task(self.succession.prepare_champion(), name="prepare"),
                group.create_task(self.newcomers.run(), name="newcomers"),
                group.create_task(daily(self.children), name="compaction"),
                group.create_task(self._retrain(), name="retrain"),
                group.create_task(self.lookout.run(self.retraining), name="lookout"),
                group.create_task(self.verification.run(), name="verification"),
                group.create_task(self.desk.run(), name="desk"),
                group.create_task(control.serve(self.config.state_dir, self.desk.order), name="control"),
            ]
            path = group.create_task(run(self.source, self.pipeline, self.sink, self.forecasts), name="path")
            self._plan()
            self.state = "ready"
            self.metrics.serving = True
            self.notifier.send("READY=1", f"STATUS=no broker: {self.link.fault}")
            log.info("ready", instance=self.config.instance, model=self.succession.champion.model)
            await self.stop.wait()
            log.info("stopping")
            self.notifier.send("STOPPING=1")
            self.state = "stopped"
            self.metrics.serving = False
            if self._planner:
                self._planner.shutdown(wait=False)
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

    async def _heartbeat(self) -> None:
        """Publish the status again and again while bars are processed; a path that is stuck falls silent."""
        while True:
            with suppress(TimeoutError):
                async with asyncio.timeout(HEARTBEAT_SECONDS):
                    await self.scribe.turned.wait()
            self.scribe.turned.clear()
            if self.scribe.lost:
                self.notifier.send("STATUS=the journal's server is not there")
            elif self.state == "ready" and self.link.greeted and self.vitals.moving:
                await self._announce()
            elif not self.link.connected.is_set():
                self.notifier.send(f"STATUS=no broker: {self.link.fault}")

    async def _announce(self) -> None:
        now, processed = self.clock.now(), self.sink.processed
        state = self.state
        if state == "ready" and self.scribe.full:
            state = "full"
        elif state == "ready" and self.link.deaf:
            state = "deaf"
        paused = self.pipeline.paused
        self.notifier.send(f"STATUS={state}{', paused' * paused}")
        status = wire.Status(
            state=state,
            instance=self.config.instance,
            boot=self.boot,
            time=wire.to_text(now),
            interval=HEARTBEAT_SECONDS,
            processed=wire.to_text(processed) if processed else None,
            waiting=len(self.link.inbox),
            paused=paused,
        )
        # A `ready` that nobody renews vanishes; that a daemon stopped stays said.
        expires = None if state == "stopped" else now + int(3 * HEARTBEAT_SECONDS * 1e9)
        fault = await self.link.publish(wire.status(status, self.config.topics.status, expires), now)
        if fault and self.link.connected.is_set():
            log.warning("status_not_published", reason=fault)

    def _chart(self, symbol: str) -> bytes | None:
        """What the page draws of a symbol; nothing while another thread reads the journal."""
        if self.view is None or not self.metrics.serving:
            return None
        windows, signals = self.pipeline.windows, self.view.signals(symbol)
        newest = windows.newest(symbol)
        window = windows.cut(symbol, newest, view.CANDLES)
        if window is None:
            return None
        ahead: tuple[int, ...] = ()
        if signals:
            with suppress(DataError):  # the calendar ends
                ahead = self.pipeline.calendars.of(symbol).closes_after(newest, view.reach(signals[-1]))
        return view.chart(window, ahead, signals)

    async def _activations(self) -> bytes:
        """Who served since when, as the journal has it; nothing before it is read."""
        if not self.metrics.serving:
            return b"[]"
        if self._told is None or self._told[0] is not self.succession.champion:
            champion = self.succession.champion
            self._told = champion, await self.scribe(_activations, self.scribe.journal)
        return self._told[1]

    def _trust(self) -> bytes:
        """What was verified last, and how far the signals drifted from what they promise."""
        if not self.metrics.serving:
            return b"{}"
        verification, reading = self.verification, self.lookout.reading
        told = {
            "verify": None if verification.last is None else msgspec.to_builtins(verification.last),
            "verified": wire.to_text(verification.ended) if verification.ended else None,
            "verifies": None if self.config.verify is None else self.config.verify.cron,
            "drift": None if reading is None else reading.plain(),
            "drifts": bool(self.config.retrain and self.config.retrain.drift),
        }
        return msgspec.json.encode(told)

    async def _reckoned(self) -> bytes:
        """How the signals of the model that serves held what they promised; of the last minutes.

        It is found out by one process at a time. Raise BarcastError where there is nothing to tell.
        """
        if not self.metrics.serving:
            raise ConfigError("the daemon is not serving yet; ask again")
        async with self._reckons:
            if self.pipeline.model != self.succession.champion.model:
                raise ConfigError("another model takes over at this moment; ask again")
            model, now = self.pipeline.forecaster.card.model, asyncio.get_running_loop().time
            if self._reckoning is None or self._reckoning[0] != model or now() > self._reckoning[1]:
                try:
                    found: bytes | BarcastError = await self._reckon(model)
                except BarcastError as error:
                    found = error
                kept = RECKONED_SECONDS if isinstance(found, bytes) else FAILED_SECONDS
                self._reckoning = model, now() + kept, found
            answer = self._reckoning[2]
        if isinstance(answer, BarcastError):
            raise answer
        return answer

    async def _reckon(self, model: str) -> bytes:
        """A `Reckoning`, by a process of its own."""
        words = deque[str](maxlen=WORDS)
        try:
            async with asyncio.timeout(RECKONING_SECONDS):
                status, out = await self.children("reckon", ["--model", model], words.append)
            if status:
                raise OSError(f"exit status {status}")
            return msgspec.json.encode(msgspec.json.decode(out, type=Reckoning))
        except (TimeoutError, OSError, msgspec.DecodeError) as error:
            log.error("reckoning_failed", reason=str(error), last_words="\n".join(words))
            why = words[-1] if words else str(error) or f"no end after {RECKONING_SECONDS:.0f} s"
            raise DataError(f"forecasts were not held against outcomes: {why}") from error

    async def _choosable(self) -> bytes:
        """What can be set of a training, and of which symbols. Raise BarcastError where none can be."""
        choices = await self._chosen_from()
        symbols = sorted(self.pipeline.windows.symbols)
        return msgspec.json.encode(msgspec.to_builtins(choices) | {"symbols": symbols})

    async def _chosen_from(self) -> Choices:
        """What whoever trains offers; it is asked once."""
        if not self.metrics.serving:
            raise ConfigError("the daemon is not serving yet; ask again")
        if self.config.retrain is None:
            raise ConfigError("the configuration has no [retrain]: add it, and order `reload`")
        async with self._choosing:
            if self._choices is None:
                if self.retraining.running:  # whoever trains may do one thing at a time
                    raise ConfigError("a training is under way: ask what can be set when it has ended")
                words = deque[str](maxlen=WORDS)
                process, _, stall = self._trainer()
                try:
                    async with asyncio.timeout(stall):
                        status, out = await process("choices", [], words.append)
                    if status:
                        raise OSError(f"exit status {status}")
                    self._choices = msgspec.json.decode(out, type=Choices)
                except (TimeoutError, OSError, msgspec.DecodeError) as error:
                    log.error("choices_failed", reason=str(error), last_words="\n".join(words))
                    reason = words[-1] if words else str(error) or "it says nothing"
                    raise ConfigError(f"whoever trains does not say what it can: {reason}") from error
            return self._choices

    async def _backtests(self) -> bytes:
        """Those in the folder of reports; none where there is no folder."""
        folder = self.config.http and self.config.http.reports
        return await asyncio.to_thread(reports.listed, folder) if folder else b"null"

    async def _report(self, name: str) -> bytes | None:
        folder = self.config.http and self.config.http.reports
        return await asyncio.to_thread(reports.report, folder, name) if folder else None

    async def _ordered(self, order: Order) -> Answer:
        """What came by the page of somebody who knows the token."""
        if not self.metrics.serving:
            return Answer(refused="the daemon is not serving; order again when it is")
        return await self.desk.order(order, "page", lambda _line: None)

    async def _beat(self) -> bytes:
        """What time it is on the instance's clock, and what does not hold."""
        ready = await self.metrics.lately()
        said = {
            "now": wire.to_text(self.clock.now()),
            "not": [name for name, holds in ready.items() if not holds],
            "paused": self.metrics.serving and self.pipeline.paused,
        }
        return json.dumps(said).encode()

    def _jobs(self) -> dict[str, tuple[str, Callable[[], Awaitable[None]]]]:
        """What is done by cron: of each table the expression, and what."""
        jobs: dict[str, tuple[str, Callable[[], Awaitable[None]]]] = {}
        retrain, verify = self.config.retrain, self.config.verify
        if retrain and retrain.cron:
            jobs["retrain"] = retrain.cron, self._scheduled
        if verify:
            jobs["verify"] = verify.cron, self.verification.ask
        return jobs

    async def _scheduled(self) -> None:
        assert self.config.retrain is not None
        self.retraining.ask(f"schedule: {self.config.retrain.cron}")

    async def _retrain(self) -> None:
        """Train as often as it is wanted, and log what the event loop noticed of it."""
        retraining = self.retraining
        while True:
            reasons = await retraining.wanted()
            self.vitals.lags.clear()
            result = await retraining.run(reasons)
            lags = np.array(self.vitals.lags or [0.0]) * 1e3
            log.info(
                "retrain_ended",
                result=result,
                seconds=round(retraining.seconds, 1),
                loop_lag_p99_ms=round(float(np.quantile(lags, 0.99)), 1),
                loop_lag_max_ms=round(float(lags.max()), 1),
            )

    def _serving(self) -> Serving:
        """What a challenger is up against: one that is no worse may follow a champion that is too old.

        Not one that somebody went back to: a training on much the same bars would undo that.
        """
        champion, retrain = self.succession.champion, self.config.retrain
        eased = self.lookout.old and not champion.returned
        margin = 0.0 if retrain is None or eased else retrain.margin
        return Serving(champion.model, margin, champion.left)

    async def _order(self, order: Order, tell: Tell) -> str:
        """What an operator wants of the daemon. Raise BarcastError for what cannot be done, or was not."""
        match order.verb:
            case "state":
                return self._about()
            case "pause":
                await self._pause(True)
                return "paused: bars are taken, and nothing is forecast until `resume`"
            case "resume":
                await self._pause(False)
                return "forecasts go on with the next group"
            case "reload":
                return await self._reload()
            case "rollback":
                return await self.succession.rollback(order.to)
            case "stop":
                return self.retraining.stop()
        if self.config.retrain is None:
            raise ConfigError("the configuration has no [retrain]: add it, and order `reload`")
        if order.training is not None:
            (await self._chosen_from()).check(order.training, self.pipeline.windows.symbols)
        if not order.wait:
            self.retraining.ask(ASKED, order.training)
            return "asked for; the log and the model's topic will say what comes of it"
        result = await self.retraining.follow(ASKED, tell, order.training)
        said = f"{result}; {self.succession.champion.model} serves"
        if result is Result.failed:
            raise BarcastError(f"{said}; the log says why, and `retrain` tries again")
        return said

    def _about(self) -> str:
        """Who serves since when, how trainings went, and what operators did, in lines."""
        retraining, champion = self.retraining, self.succession.champion
        since = wire.to_text(self.succession.activated)
        runs = ", ".join(f"{count} {result}" for result, count in retraining.runs.items()) or "none"
        work = "a training is under way" if retraining.running else "no training is under way"
        lines = [
            f"{champion.model} serves since {since}: {champion.reason}",
            f"{work}; trainings since the start: {runs}",
        ]
        if self.scribe.held:
            why = "its server is away" if self.scribe.lost else "the disk is full"
            lines.append(f"the journal cannot be written, {why}: no bar is taken until then")
        if self.pipeline.paused:
            lines.append("paused: nothing is forecast until `resume`")
        if self.desk.last:
            lines.append(f"the last order: {self.desk.last}")
        return "\n".join(lines)

    async def _pause(self, paused: bool) -> None:
        """Decide it, wait until the path has come there, and tell subscribers."""
        kind = Kind.PAUSE if paused else Kind.RESUME
        number = await self.source.decide(Decision(kind, b"", lambda time: Pause(time, paused)))
        while self.sink.reached < number:
            self.sink.moved.clear()
            await self.sink.moved.wait()
        self.scribe.turned.set()

    async def _reload(self) -> str:
        """Go on by what the configuration says now, all of it or nothing."""
        async with self._reloading:
            config, changed = await asyncio.to_thread(self.config.reread)
            if not changed:
                return "nothing has changed"
            with handed_down(config):
                await self.succession.revise(config)
            self.config = config
            self.metrics.configure(config)
            if "retrain" in changed:
                self.retraining.configure(*self._trainer())
                self._choices = None
                self.lookout.configure(config)
            if "verify" in changed:
                self.verification.since = config.verify.since if config.verify else None
            self._plan()
            return f"{', '.join(changed)}: as the file says now"

    def _trainer(self) -> tuple[Run, float, float]:
        """Who trains, and the limits of a training in seconds: at its end, and without a word."""
        retrain = self.config.retrain or Retrain()
        process = worker(retrain.socket) if retrain.socket else self.children
        return process, retrain.timeout / 1e9, retrain.stall / 1e9

    def _plan(self) -> None:
        """Ask for trainings and verifications when the configuration says so."""
        if self._planner:
            self._planner.shutdown(wait=False)
        self._planner = scheduler(self._jobs())
        self._planner.start()


def _activations(journal: Journal) -> bytes:
    return view.activations(journal.of_kind(Kind.ACTIVATION))


def _identity(config: Config) -> dict[str, object]:
    """What the page says of itself."""
    return {
        "instance": config.instance,
        "timeframe": config.timeframe,
        "bars": f"{config.mqtt.root}/bars/{config.timeframe}",
        "speed": config.rehearsal.speed if config.rehearsal else 1,
        "version": version("barcast"),
        "orders": config.http is not None and config.http.token_file is not None,
    }
