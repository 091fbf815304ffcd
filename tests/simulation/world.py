"""One schedule: the real daemon between a market, a broker, a disk and a trainer that misbehave, by a seed.

Faults come for a while; then the world is calm, so that all that is due can be done. Then it is asked whether
every promise was kept.
"""

import asyncio
import gc
import hashlib
import shutil
import sqlite3
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager, suppress
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import count
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import structlog

from barcast.backtest import verify
from barcast.daemon import live, lookout, mqtt, newcomers, retention, schedule, start, vitals
from barcast.daemon.app import Daemon, Outside
from barcast.daemon.config import Config, parse
from barcast.daemon.control import Order
from barcast.daemon.journal import Journal, Record, State
from barcast.daemon.live import Scribe
from barcast.daemon.mqtt import TAKEN_OVER
from barcast.daemon.wire import Outgoing
from barcast.models import Bar, DiskFullError
from tests.simulation import oracle
from tests.simulation.broker import Broker, Client, Properties, Weather
from tests.simulation.disk import Disk
from tests.simulation.loop import Hang, Lane, Sleeping, VirtualLoop, Waits
from tests.simulation.market import BAR, ROOT, SECOND, START, TIMEFRAME, Sent, feed
from tests.simulation.trainer import Children, Store

WHO = "barcast-me"
"""The daemon's client id."""
CALM_SECONDS = 200.0
"""How long all that is due may take once nothing goes wrong any more."""
KEEP = 30 * SECOND
"""What stays in the journal."""
SPOILT = (
    "late bar",
    "sent twice",
    "correction",
    "hole",
    "older bar",
    "garbage",
    "bad bar in an array",
    "array",
    "adjustment",
)
"""What a feed does."""
WORLDLY = (
    "broker away",
    "connection cut",
    "connection half open",
    "session taken over",
    "session lost",
    "deaf",
    "slow network",
    "publications refused",
    "answers lost",
    "deliveries reordered",
    "deliveries doubled",
    "disk full for a while",
    "disk slow",
    "forecasts slow",
    "forecasts far too slow",
    "clock set forward",
    "clock set back",
    "killed",
    "killed at a commit",
    "power cut",
    "power cut at a commit",
    "killed at a compaction",
    "power cut at a compaction",
    "stopped",
    "other settings",
    "retrain ordered",
    "rollback ordered",
    "pause ordered",
    "resume ordered",
)
"""What the world does."""
CRASHES = (
    "killed",
    "killed at a commit",
    "killed at a compaction",
    "power cut",
    "power cut at a commit",
    "power cut at a compaction",
)
"""How the daemon ends without being asked."""
MOMENTS = (
    "between callbacks",
    "before a commit",
    "amid a commit",
    "after a commit",
    "amid a compaction",
)
"""When a crash comes."""
QUICK = (0.0, 0.02)
"""Seconds that a forecast takes, from and to."""
LASTING = {
    "broker away": 9.0,
    "deaf": 8.0,
    "slow network": 20.0,
    "publications refused": 15.0,
    "answers lost": 10.0,
    "deliveries reordered": 60.0,
    "deliveries doubled": 60.0,
    "disk full for a while": 9.0,
    "disk slow": 20.0,
    "forecasts slow": 30.0,
    "forecasts far too slow": 60.0,
}
"""For about how many seconds."""
EXPECTED_ERRORS = {
    "disk_full",
    "compaction_failed",
    "subscription_denied",
    "train_failed",
    "train_stalled",
    "gate_failed",
    "retrain_given_up",
    "promotion_postponed",
    "challenger_unusable",
}
"""What the log may say at level error."""


@dataclass
class Outcome:
    """What became of a schedule: a hash of all that happened, in order; how much; what was not kept."""

    seed: int
    trace: str
    steps: int
    happened: Counter[str]
    violations: list[str]
    events: int = 0
    history: list[str] = field(default_factory=list, repr=False)


class Clock:
    """The daemon's clock: virtual time, and how far somebody has set it."""

    def __init__(self, loop: VirtualLoop) -> None:
        self.offset, self.latest = 0.0, START
        self._loop = loop

    def now(self) -> int:
        """Nanoseconds since 1970."""
        now = START + int((self._loop.time() + self.offset) * 1e9)
        self.latest = max(self.latest, now)
        return now

    def seconds_until(self, moment: int) -> float:
        """Virtual seconds."""
        return max(0.0, (moment - self.now()) / 1e9)


@lru_cache
def settings(symbols: tuple[str, ...], wait: str, retrain: bool) -> Config:
    """A configuration; the state directory is another one in each life."""
    values: dict[str, Any] = {
        "instance": "me",
        "state_dir": Path("/nowhere"),
        "timeframe": TIMEFRAME,
        "symbols": list(symbols),
        "max_wait": wait,
        "keep": f"{KEEP // SECOND}s",
        "mqtt": {"root": ROOT},
        "strategy": [{"kind": "median-drift", "name": "drift"}],
    }
    if retrain:
        values["retrain"] = {"max_age": "50s", "stall": "15s"}
    return parse(values, "the simulation")


class Schedule:
    """The state is the world, the daemon in it and its life, what was seen of its journal, and the trace.

    `told` are the messages that were ever in the outbox by their number, `records` those of the journal.
    Those up to the number `promised` were there when the daemon was told to stop.
    """

    def __init__(self, seed: int, root: Path) -> None:
        dice = self.dice = Random(f"schedule {seed}")
        self.seed, self.trace = seed, [f"seed {seed}"]
        self.happened: Counter[str] = Counter()
        self.violations: list[str] = []
        self.told: dict[int, Outgoing] = {}
        self.states: dict[int, State] = {}
        self.promised = 0
        self.records: dict[int, Record] = {}
        self.answers: list[tuple[str, str]] = []
        self.loop = VirtualLoop(
            Random(f"loop {seed}"), dice.choice((0.0, 0.3, 1.0)), dice.choice((0.0, 0.0, 0.01))
        )
        self.clock = Clock(self.loop)
        self.broker = Broker(self.loop, Random(f"broker {seed}"), self.note)
        self.loop.broker = self.broker  # type: ignore[attr-defined]
        self.disk = Disk(Random(f"disk {seed}"))
        kinds = {kind for kind in (*SPOILT, *WORLDLY) if dice.random() < (0.4 if kind in CRASHES else 0.3)}
        self.symbols = dice.choice((("A",), ("A", "B"), ("A", "B"), ("A", "B", "C"), ("A", "B", "D")))
        self.retrains = dice.random() < 0.4
        self.config = self._settings()
        self.bars = dice.randrange(3, 8)
        self.until = (self.bars + 1) * BAR + 2.0
        self.sent = feed(dice, self.symbols, self.bars + 2, kinds, self.happened)
        self.planned = sorted(
            (dice.uniform(0.0, self.until), kind)
            for kind in WORLDLY
            if kind in kinds
            for _ in range(dice.choice((1, 2, 3) if kind in CRASHES else (1, 1, 2)))
        )
        self.compacts = self.disk.unsynced = dice.random() < 0.2
        self._root, self._folders = root, count()
        self.folder = self._fresh()
        self.folder.mkdir(parents=True)
        self.calm = self.alive = self.over = False
        self.life = 0
        self.forecasting = QUICK
        self._armed: tuple[str, int] | None = None
        self._steps_left: int | None = None
        self._jobs_left: int | None = None
        self._rests_left: int | None = None
        self._power = False
        self._lanes: list[Lane] = []
        self._orders: set[asyncio.Task[None]] = set()
        self.daemon: Daemon | None = None

    # What happens.

    def play(self) -> Outcome:
        """Let it all happen, and say what became of it."""
        try:
            with _hearing(self):
                self.loop.run_until_complete(self._play())
        except Hang as hang:
            self.violate(f"it hangs: {hang}")
        finally:
            self.loop.close()
        # What nobody heard of is told when it is collected: now, not in the time of a later schedule.
        self.daemon, self._orders, self._lanes = None, set(), []
        del self.main, self.writing
        gc.collect()
        self.violations += [f"in a callback: {fault}" for fault in self.loop.faults]
        if not self.violations:
            oracle.judge(self)
        shutil.rmtree(self._root / str(self.seed), ignore_errors=True)
        self.happened.update(self.broker.happened)
        self.happened.update(self.disk.happened)
        self.happened["loop stalled"] += self.loop.stalls
        self.happened["shuffled"] += self.loop.shuffled > 0
        self.note(
            f"end {self.loop.time():.6f} {self.loop.steps} {self.dice.random()} {self.loop.dice.random()}"
        )
        digest = hashlib.sha256("\n".join(self.trace).encode()).hexdigest()[:16]
        return Outcome(
            self.seed, digest, self.loop.steps, self.happened, self.violations, len(self.trace), self.trace
        )

    def note(self, what: str) -> None:
        """Add to the trace."""
        self.trace.append(f"{self.loop.time():.6f} {what}")

    def violate(self, what: str) -> None:
        """A promise was not kept."""
        self.violations.append(what)
        self.note(f"violation: {what}")

    async def _play(self) -> None:
        loop = self.loop
        for one in self.sent:
            loop.call_at(one.at, self._send, one)
        for at, kind in self.planned:
            loop.call_at(at, self._befall, kind)
        loop.call_at(self.until, self._calm)
        living = asyncio.ensure_future(self._live())
        last = max(self.until, self.sent[-1].at if self.sent else 0.0) + 8.0  # until the last group is due
        while not self.violations and loop.time() < last:  # noqa: ASYNC110 - what is waited for is the time
            await asyncio.sleep(min(BAR, last - loop.time() + 0.001))
        end = loop.time() + CALM_SECONDS
        while not self.violations and not self._quiet():
            if loop.time() > end:
                self.violate(f"not done {CALM_SECONDS:.0f} s after the last fault: {self._open()}")
                break
            await asyncio.sleep(3.0)
        self.over = True
        for order in self._orders:
            order.cancel()
        if self.daemon is not None:
            self.look()
            self.promised = max(self.told, default=0)
            self.stop.set()
            if self.violations:
                self.main.cancel()
        await living
        if not self.violations:
            self.look()

    def _quiet(self) -> bool:
        """Whether the daemon has done all that it can."""
        daemon = self.daemon
        if daemon is None or daemon.state != "ready" or not self.alive or self.broker.waiting(WHO):
            return False
        source, journal = daemon.source, daemon.scribe.journal
        return (
            source.waiting
            and not daemon.link.inbox
            and daemon.pipeline.deadline is None
            and journal.waiting() == 0
        )

    def _open(self) -> str:
        daemon = self.daemon
        if daemon is None or daemon.state != "ready":
            return f"the daemon is {daemon and daemon.state}"
        return (
            f"{self.broker.waiting(WHO)} messages at the broker, {len(daemon.link.inbox)} in the inbox, "
            f"{daemon.scribe.journal.waiting()} in the outbox, deadline {daemon.pipeline.deadline}, "
            f"waiting {daemon.source.waiting}, connected {daemon.link.connected.is_set()}"
        )

    def _send(self, sent: Sent) -> None:
        """The feed sends, again and again until the broker has it."""
        if self.broker.weather.up:
            self.note(f"feed {sent.topic}")
            self.broker.route(sent.topic, sent.payload)
        else:
            self.loop.call_later(1.0, self._send, sent)

    def _befall(self, kind: str) -> None:
        """Let something happen."""
        if self.calm:
            return
        dice, broker, weather, disk = self.dice, self.broker, self.broker.weather, self.disk
        self.note(kind)
        self.happened[kind] += 1
        match kind:
            case "broker away":
                weather.up = False
                broker.cut(WHO)
            case "connection cut":
                broker.cut(WHO, notice=dice.choice((0.0, 0.0, 0.2)))
            case "connection half open":
                broker.cut(WHO, notice=dice.uniform(1, 9))
            case "session taken over":
                broker.cut(WHO, TAKEN_OVER)
            case "session lost":
                broker.forget(WHO)
            case "deaf":
                weather.deaf = True
                broker.cut(WHO)
            case "slow network":
                weather.slow = True
            case "publications refused":
                weather.refusing = dice.choice((0.2, 0.6, 1.0))
            case "answers lost":
                weather.silent = 0.15
            case "deliveries reordered":
                weather.reordering = 0.7
            case "deliveries doubled":
                weather.doubling = 0.3
            case "disk full for a while":
                disk.full = True
            case "disk slow":
                disk.slow = True
            case "forecasts slow":
                self.forecasting = (0.1, 4.0)
            case "forecasts far too slow":
                self.forecasting = (4.0, 22.0)
            case "clock set forward":
                self.clock.offset = dice.choice((1.0, 7.0, 20.0, 50.0))
            case "clock set back":
                self.clock.offset = dice.choice((-1.0, -7.0, -20.0, -45.0))
            case "killed" | "power cut":
                self._armed, self._power = ("steps", dice.randrange(0, 40)), kind == "power cut"
            case "killed at a commit" | "power cut at a commit":
                self._armed, self._power = ("jobs", dice.randrange(0, 8)), kind == "power cut at a commit"
            case "killed at a compaction" | "power cut at a compaction":
                self._rests_left, self._power = dice.randrange(1, 8), kind == "power cut at a compaction"
            case "stopped":
                if self.alive:
                    self.stop.set()
            case "other settings":
                self.config = self._settings()
                if self.alive:
                    self.stop.set()
            case "retrain ordered":
                self._order(Order("retrain", wait=True))
            case "rollback ordered":
                self._order(Order("rollback", to=dice.choice((None, "hs", "fhs"))))
            case "pause ordered" | "resume ordered":
                self._order(Order(kind.split()[0]))
        if kind in LASTING:
            self.loop.call_later(LASTING[kind] * dice.uniform(0.1, 1.5), self._pass, kind)

    def _pass(self, kind: str) -> None:
        """Let it be over."""
        weather, default = self.broker.weather, Weather()
        match kind:
            case "broker away":
                weather.up = True
            case "deaf":
                weather.deaf = False
            case "slow network":
                weather.slow = False
            case "publications refused":
                weather.refusing = default.refusing
            case "answers lost":
                weather.silent = default.silent
            case "deliveries reordered":
                weather.reordering = default.reordering
            case "deliveries doubled":
                weather.doubling = default.doubling
            case "disk full for a while":
                self.disk.full = False
            case "disk slow":
                self.disk.slow = False
            case "forecasts slow" | "forecasts far too slow":
                self.forecasting = QUICK

    def _calm(self) -> None:
        """Nothing goes wrong any more."""
        self.note("calm")
        self.calm = True
        for kind in LASTING:
            self._pass(kind)
        self._armed = self._steps_left = self._jobs_left = self._rests_left = None
        self.loop.stalling = 0.0
        self.clock.offset = max(0.0, self.clock.offset)
        self._go_on()

    def _go_on(self) -> None:
        """Order until the end that it is not paused."""
        if self.daemon is not None and self.daemon.state == "ready" and self.daemon.pipeline.paused:
            self._order(Order("resume"))
        if not self.over:
            self.loop.call_later(2.0, self._go_on)

    # The daemon's lives.

    def _settings(self) -> Config:
        named = self.dice.choice((self.symbols[:2], (), self.symbols))
        return settings(named, self.dice.choice(("500ms", "2s", "6s")), self.retrains)

    def _fresh(self) -> Path:
        return self._root / str(self.seed) / str(next(self._folders))

    async def _live(self) -> None:
        """Start the daemon again whenever it ends."""
        while not self.over:
            folder = self.folder
            await self._one_life()
            if self.folder != folder:
                shutil.rmtree(folder)
            if not self.over:
                await asyncio.sleep(self.dice.choice((0.2, 1.0, 4.0)))

    async def _one_life(self) -> None:
        loop, dice = self.loop, Random(f"life {self.seed} {self.life}")
        self.life += 1
        self.note(f"life {self.life}")
        self.stop = asyncio.Event()
        self.writing = Lane(loop, lambda: (0.1, 2.0) if self.disk.slow else (0.0, 0.01), self._perform)
        thinking = Lane(loop, lambda: self.forecasting)
        self._lanes = [self.writing, thinking]
        self.children = Children(
            dice, lambda: self.folder, self.clock.now, KEEP, self._compacting, lambda: self.disk.full
        )
        self.children.compacts = self.compacts
        outside = Outside(
            clock=lambda _: self.clock,
            journal=self.disk.journal,
            scribe=self._scribe,
            store=Store,
            forecasts=lambda: thinking,  # type: ignore[arg-type, return-value]
            children=lambda _: self.children,
            boot=lambda: f"{self.life:08x}",
        )
        config = self.config.model_copy(update={"state_dir": self.folder})
        self.daemon = Daemon(config, {}, self.stop, None, outside)
        self.main = asyncio.ensure_future(self.daemon.run())
        self.alive = True
        await asyncio.wait([self.main])
        crashed, self.alive = not self.alive, False
        self.children.kill()
        self.happened.update(self.children.happened)
        for order in self._orders:
            order.cancel()
        error = None if self.main.cancelled() else self.main.exception()
        if error is None and self.main.cancelled() and not crashed and not self.over:
            self.violate("the daemon was cancelled")
        if error is not None and not crashed:
            self.note(f"died {type(error).__name__}")
            if isinstance(error, DiskFullError):
                self.happened["no room for a start"] += 1
            else:
                self.violate(f"the daemon died: {_plain(error)}")
                self.over = True
        self.note("dead")

    def _scribe(self, journal: Journal) -> Scribe:
        """The real one, on a thread of virtual time."""
        scribe = Scribe(journal)
        scribe._thread.shutdown()
        scribe._thread, scribe._closing = self.writing, Sleeping()  # type: ignore[assignment]
        return scribe

    def _before(self) -> None:
        """Crash between two callbacks, when it is time."""
        if self._steps_left is None or not self.alive:
            self.loop.before = None
        elif self._steps_left:
            self._steps_left -= 1
        else:
            self._steps_left = self.loop.before = None
            self._crash("between callbacks")

    def _perform(self, job: Callable[[], Any]) -> Any:
        """Do a job of the journal; crash before it, amid it or after it, when it is time."""
        if self._armed is not None and self.alive:  # something happens: that is where it hurts
            what, left = self._armed
            self._armed = None
            if what == "steps":
                self._steps_left, self.loop.before = left, self._before
            else:
                self._jobs_left = left
        if self._jobs_left is not None and self.alive:
            self._jobs_left -= 1
            if self._jobs_left < 0:
                self._jobs_left = None
                self._crash_at(job)
                return None
        done = job()
        self.disk.sync(self.folder)
        return done

    def _crash_at(self, job: Callable[[], Any]) -> None:
        where, left = self.dice.choice(("before", "amid", "amid", "after")), None
        if where == "amid":
            left = self._fresh()
            amid = self.disk.power_cut_amid if self._power else self.disk.kill_amid
            with suppress(Exception, Waits):
                amid(self.folder, left, job)
        elif where == "after":
            with suppress(Exception, Waits):
                job()
            self.disk.sync(self.folder)
        self._crash(f"{where} a commit", left)

    def _compacting(self) -> None:
        """A compaction goes on: what it removes is seen before; crash, when it is time."""
        self.look()
        if self._rests_left is not None and self.alive:
            self._rests_left -= 1
            if self._rests_left < 0:
                self._rests_left = None
                self._crash("amid a compaction")

    def _crash(self, where: str, left: Path | None = None) -> None:
        """End the daemon at once: only what is on the disk, or was written, is left."""
        how = "power cut" if self._power else "killed"
        self.happened[f"{how} {where}"] += 1
        self.note(f"{how} {where}")
        if left is None:
            left = self._fresh()
            (self.disk.after_power_cut if self._power else self.disk.after_kill)(self.folder, left)
        self.alive = False
        for lane in self._lanes:
            lane.dead = True
        self.children.kill()
        self.broker.silence(WHO)
        self.folder = left
        self.main.cancel()

    def _order(self, order: Order) -> None:
        """Let an operator order something."""
        if self.daemon is None or self.daemon.state != "ready" or not self.alive:
            return
        daemon = self.daemon

        async def give() -> None:
            answer = await daemon.desk.order(order, "uid 0", lambda _line: None)
            if answer.done is None:
                self.happened[f"{order.verb} refused"] += 1
                self.note(f"refused {order.verb}: {answer.refused}")
            else:
                self.happened[f"{order.verb} done"] += 1
                self.answers.append((order.verb, answer.done))
                self.note(f"done {order.verb}: {answer.done}")

        task = asyncio.ensure_future(give())
        self._orders.add(task)
        task.add_done_callback(self._orders.discard)

    # What others see of the journal.

    def look(self) -> None:
        """Read what is new in the journal; it may leave soon."""
        path = self.folder / "journal.db"
        if not path.is_file():
            return
        with closing(sqlite3.connect(path)) as db:
            last = max(self.told, default=0)
            rows = db.execute(
                "SELECT n, id, topic, payload, retain, expires FROM outbox WHERE n > ? ORDER BY n", (last,)
            )
            self.told.update((n, Outgoing(i, t, p, bool(r), e)) for n, i, t, p, r, e in rows)
            self.states = {n: State(s) for n, s in db.execute("SELECT n, state FROM outbox")}
            rows = db.execute(
                "SELECT seq, time, kind, topic, payload FROM record WHERE seq > ? ORDER BY seq",
                (max(self.records, default=0),),
            )
            self.records.update((row[0], Record(*row)) for row in rows)

    def heard(self, level: str, entry: dict[str, Any]) -> None:
        """The daemon logs something."""
        if not self.alive:
            return
        event = entry["event"]
        if event == "group_shed":
            self.happened["group shed"] += 1
        self.trace.append(f"{self.loop.time():.6f} log {event}")
        if level in ("error", "critical") and event not in EXPECTED_ERRORS:
            self.violate(f"log: {event}: { {k: v for k, v in entry.items() if k != 'event'} }")
        if entry.get("exc_info"):
            self.violate(f"log: an exception in {event}: {entry['exc_info']!r}")


def _plain(error: BaseException) -> str:
    if isinstance(error, BaseExceptionGroup):
        return " | ".join(_plain(one) for one in error.exceptions)
    return repr(error)


_listener: Schedule | None = None


def _capture(_logger: object, method: str, entry: dict[str, Any]) -> dict[str, Any]:
    if _listener is not None:
        _listener.heard(method, entry)
    raise structlog.DropEvent


@contextmanager
def _hearing(listener: Schedule) -> Iterator[None]:
    global _listener
    _listener = listener
    try:
        yield
    finally:
        _listener = None


class Planner:
    """Stands in for the scheduler, which asks the machine what time it is: nothing is due by cron."""

    def __init__(self, **_: object) -> None:
        """There is nothing to set up."""

    def add_job(self, *_: object, **__: object) -> None:
        """It never comes."""

    def start(self) -> None:
        """Nothing begins."""

    def shutdown(self, *_: object, **__: object) -> None:
        """Nothing ends."""


@contextmanager
def prepared() -> Iterator[None]:
    """What schedules need of the process: what the daemon does now and then it does more often."""
    with ExitStack() as stack:
        for module, name, value in (
            (mqtt.aiomqtt, "Client", Client),
            (mqtt, "Properties", Properties),
            (schedule, "AsyncIOScheduler", Planner),
            (verify, "ModelStore", Store),
            (vitals, "LAG_SECONDS", 4.0),
            (newcomers, "LOOK_SECONDS", 2.0),
            (live, "PROGRESS_EVERY", 5),
            (live, "TAKE", 4),
            (lookout, "LOOK_SECONDS", 20.0),
            (retention, "FIRST_SECONDS", 25.0),
            (retention, "EVERY_SECONDS", 30.0),
            (retention, "SIGNALS_KEPT", 3),
            (start, "last_bars", _few_last_bars),
            (newcomers, "bars_of", _few_bars_of),
        ):
            stack.enter_context(mock.patch.object(module, name, value))
        structlog.configure(processors=[_capture], cache_logger_on_first_use=False)
        stack.callback(structlog.reset_defaults)
        gc.freeze()  # each schedule collects what is left of it
        stack.callback(gc.unfreeze)
        yield


# To plan a query of no rows takes milliseconds: it is looked first whether there are any.

_bars_of, _last_bars = newcomers.bars_of, start.last_bars


def _few_bars_of(state_dir: Path, symbols: Sequence[str], *rest: Any) -> dict[str, tuple[Bar, ...]]:
    archived = (state_dir / "archive").is_dir()
    return _bars_of(state_dir, symbols, *rest) if archived else dict.fromkeys(symbols, ())


def _few_last_bars(state_dir: Path, *rest: Any) -> Iterator[tuple[Bar, ...]]:
    with closing(sqlite3.connect(state_dir / "journal.db")) as db:
        found = db.execute("SELECT 1 FROM record WHERE kind NOT IN ('revision', 'activation')").fetchone()
    return _last_bars(state_dir, *rest) if found else iter(())


def play(seed: int, root: Path) -> Outcome:
    """Play the schedule of a seed in a folder, which should be in memory; `prepared` is in force."""
    return Schedule(seed, root).play()
