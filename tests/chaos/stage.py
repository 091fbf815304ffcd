"""The machine that breaks: a broker, a network, a disk, a clock and a daemon that is started again."""

import asyncio
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from contextlib import AsyncExitStack, closing, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from sqlite3 import OperationalError, connect

from barcast.daemon import control
from barcast.daemon.app import WallClock
from barcast.daemon.config import load
from barcast.daemon.control import Order
from barcast.daemon.mqtt import NO_BARS
from barcast.daemon.wire import to_text
from barcast.models import Bar, ConfigError
from tests.chaos.daemon import CLOCK
from tests.chaos.evidence import Evidence, copy
from tests.chaos.feed import MINUTE, Feeder, Witness, message
from tests.chaos.proxy import Proxy
from tests.garch import simulate
from tests.integration.broker import Mosquitto
from tests.integration.instance import BARCAST, Instance, rough, write_history

HISTORY, LONG_HISTORY = 300, 1450
"""Bars before the live ones: a baseline forecasts from some 250 on, and a training needs more."""
LEARNT = 2
"""Symbols that have enough for a training."""
SECONDS_A_BAR = 1.5
"""Real time that a bar of a minute takes: the two bars that a signal is valid outlast a restart."""
OLD_RATE, FLOOD_RATE = 30.0, 300.0
"""Messages with old bars a second, and that until a full disk is noticed: a journal has pages left."""
DISK = "96m"
SHORT_SECONDS = 60.0
"""Faults of a run that is shorter last shorter: there is one of each kind at least."""
NO_ROOM_STATUS = 74
NO_ROOM = "starts on a full disk"
FULL_SECONDS = 12.0
"""How long the disk stays full if the daemon does not notice."""
PATIENCE_SECONDS = 40.0
"""How long a fault waits for what it is to break."""
AGAIN_SECONDS = 0.3
"""After which the daemon is started again, as systemd would."""
SERVING = ("hs", "fhs", "ewma")
NOTICE = 60.0
"""Within which a daemon must give up a connection that says nothing: it asks every 20 seconds."""
QUIET_SECONDS = 90.0
"""Within which all must be well after the last fault."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One kind: how often (seconds), how long it lasts (least and most seconds), and what it is done to.

    What is done to one thing is done one after another. A kind with `least` is for runs of so many seconds.
    """

    every: float
    holds: tuple[float, float]
    to: tuple[str, ...]
    least: float = 0.0


FAULTS = {
    "daemon killed": Fault(15, (0, 0), ("daemon",)),
    "daemon stopped": Fault(45, (0.5, 4), ("daemon",)),
    "broker killed": Fault(40, (0, 1.5), ("broker",)),
    "broker stopped": Fault(60, (0.3, 3), ("broker",)),
    "disk full": Fault(45, (1, 5), ("disk",)),
    "clock ahead": Fault(40, (1, 5), ("clock",)),
    "clock behind": Fault(40, (1, 5), ("clock",)),
    "connection cut in a packet": Fault(15, (0, 0), ("line",)),
    "connections refused": Fault(45, (0.5, 4), ("line",)),
    "connection stalled": Fault(30, (0.5, 6), ("line",)),
    "connection half open": Fault(300, (NOTICE, NOTICE), ("broker", "daemon", "line"), least=200),
    "packets late": Fault(20, (2, 8), ("delay",)),
    "network slow": Fault(30, (2, 6), ("rate",)),
    "bars doubled": Fault(15, (1, 6), ("to_daemon",)),
    "bars sent again": Fault(15, (1, 6), ("later",)),
    "signals doubled": Fault(15, (1, 6), ("to_broker",)),
    "model swapped": Fault(25, (0, 0), ("model",)),
    "training": Fault(300, (0, 0), ("daemon", "model"), least=200),
    "daemon killed in a training": Fault(300, (2, 10), ("daemon", "model"), least=200),
    "compaction": Fault(120, (0, 3), ("compaction",), least=100),
}


@dataclass(frozen=True, slots=True, order=True)
class Planned:
    """A fault to come: when (seconds from the begin), which, for how long, and the seed of its dice."""

    at: float
    kind: str
    seconds: float
    seed: int


def schedule(seconds: float, seed: int, kinds: list[str]) -> list[Planned]:
    """All faults of a run: of each kind one in each of even parts of the time."""
    dice, plan = random.Random(seed), []
    for kind in kinds:
        fault = FAULTS[kind]
        count = max(1, round(seconds / fault.every))
        for n in range(count):
            at = (n + dice.uniform(0.05, 0.95)) * seconds / count
            holds = dice.uniform(*fault.holds) * min(1.0, seconds / SHORT_SECONDS)
            plan.append(Planned(at, kind, holds, dice.getrandbits(32)))
    return sorted(plan)


@dataclass
class Stage:
    """One run in a folder: everything that breaks, the faults so far, and what was noticed on the way.

    With `small_disk` the state lies on one that can be filled. `planted` is the first word for a daemon that
    is wrong on purpose.
    """

    folder: Path
    seed: int
    seconds: float
    symbols: int
    small_disk: bool
    planted: str = ""
    faults: Counter[str] = field(default_factory=Counter)
    evidence: Evidence = field(default_factory=Evidence)

    async def run(self) -> Evidence:
        """Break things for as long as it was said, let them mend, and look at what is left."""
        kinds = [kind for kind, fault in FAULTS.items() if fault.least <= self.seconds]
        if not self.small_disk:
            kinds.remove("disk full")
        self.faults.update(dict.fromkeys(kinds, 0))
        self._copies: list[Path] = []
        self._stopping = False
        async with AsyncExitStack() as stack:
            await self._build(stack)
            self._locks = {name: asyncio.Lock() for fault in FAULTS.values() for name in fault.to}
            began = time.monotonic()
            async with asyncio.TaskGroup() as group:
                supervisor = group.create_task(self._supervise())
                faults = [
                    group.create_task(self._happen(began, planned))
                    for planned in schedule(self.seconds, self.seed, kinds)
                ]
                await asyncio.sleep(self.seconds)
                await asyncio.gather(*faults)
                well = to_text(WallClock(load(self.config)).now())
                await self._until(lambda: self.witness.newest() > well, "a signal after the last fault")
                await self._mend()
                self._stopping = True
                await self._end()
                await supervisor
        await asyncio.to_thread(self._collect)
        return self.evidence

    async def _build(self, stack: AsyncExitStack) -> None:
        names = [f"S{i:02d}" for i in range(self.symbols)]
        closes = int(self.seconds / SECONDS_A_BAR) + 40
        windows = [simulate(name, LONG_HISTORY + closes, seed=8, step=MINUTE).window for name in names]
        start = int(windows[0].close_times[LONG_HISTORY - 1])
        self.broker = Mosquitto(self.folder / "broker")
        with self.broker.config.open("a") as file:
            file.write("user root\n")  # which it may not leave where users are mapped
        stack.callback(self.broker.kill)
        await asyncio.to_thread(self.broker.start)
        self.proxy = Proxy(self.broker.port, self.seed)
        await self.proxy.open()
        self.instance = Instance(
            self.folder / "i",
            self.proxy.port,
            names,
            "hs",
            start,
            speed=60 / SECONDS_A_BAR,
            sampler=None,
            retrain="[retrain]\nsteps = 2\nmargin = 0.5\n",
        )
        self.instance.at = datetime.now(UTC) + timedelta(seconds=2)
        self.state = self.instance.state
        self.state.mkdir(parents=True)
        if self.small_disk:
            mount = ["mount", "-t", "tmpfs", "-o", f"size={DISK}", "tmpfs", str(self.state)]
            await asyncio.to_thread(subprocess.run, mount, check=True)
        write_history(windows[:LEARNT], LONG_HISTORY, self.state / "history")
        if windows[LEARNT:]:
            write_history(windows[LEARNT:], LONG_HISTORY, self.state / "history", LONG_HISTORY - HISTORY)
        self.config = self.instance.write()
        self.config.write_text(f'keep = "30m"\n{self.config.read_text()}')
        (self.instance.folder / CLOCK).write_bytes(bytes(8))
        plan = rough(windows, LONG_HISTORY, self.seed)
        self._bars = {message(bar): (bar.symbol, to_text(bar.close_time)) for _, bar in plan}
        self.witness = Witness(self.broker.port)
        stack.callback(self.witness.close)
        self.feeder = Feeder(self.instance, self.broker.port, plan, OLD_RATE)
        stack.callback(self.feeder.close)
        self._launch()
        stack.callback(self._kill)
        await self._until(lambda: self.witness.state() == "ready", "the daemon is ready")
        self.feeder.start()

    # The daemon

    def _launch(self) -> None:
        words = [self.planted] if self.planted else []
        command = [sys.executable, "-m", "tests.chaos.daemon", *words, "run"]
        with (self.instance.folder / "daemon.log").open("ab") as log:
            self.daemon = subprocess.Popen([*command, str(self.config)], stdout=log, stderr=log)

    async def _supervise(self) -> None:
        """Start the daemon again whenever it has ended, as systemd would, and note an end of its own."""
        while not self._stopping:
            await asyncio.sleep(0.05)
            status = self.daemon.poll()
            if status is None or self._stopping:
                continue
            if status == NO_ROOM_STATUS and self.small_disk:
                self.evidence.ends[NO_ROOM] += 1
            elif status != -signal.SIGKILL:
                self.evidence.said.append(
                    f"the daemon ended by itself, status {status}: {self._last_words()}"
                )
            await asyncio.sleep(AGAIN_SECONDS)
            self._launch()

    def _last_words(self) -> str:
        return (self.instance.folder / "daemon.log").read_text()[-1500:]

    # The faults

    async def _happen(self, began: float, planned: Planned) -> None:
        """Let a fault happen in its time; one that finds nothing to break waits for it."""
        await asyncio.sleep(max(0.0, began + planned.at - time.monotonic()))
        async with AsyncExitStack() as stack:
            for name in sorted(FAULTS[planned.kind].to):
                await stack.enter_async_context(self._locks[name])
            dice, patience = random.Random(planned.seed), time.monotonic() + PATIENCE_SECONDS
            while not await self._inflict(planned.kind, planned.seconds, dice):
                if time.monotonic() > patience:
                    return
                await asyncio.sleep(0.2)
        self.faults[planned.kind] += 1

    async def _inflict(self, kind: str, seconds: float, dice: random.Random) -> bool:
        """Try to let a fault happen, for so long; say whether it did."""
        proxy, weather = self.proxy, self.proxy.weather
        match kind:
            case "daemon killed":
                alive = self.daemon.poll() is None
                self.daemon.kill()
                return alive
            case "daemon stopped":
                return await self._paused(self.daemon, seconds)
            case "broker killed":
                self.evidence.broker_down.append(time.monotonic())
                self.broker.kill()
                await asyncio.sleep(seconds)
                await asyncio.to_thread(self.broker.start)
            case "broker stopped":
                self.evidence.broker_down.append(time.monotonic())
                assert self.broker.process is not None
                return await self._paused(self.broker.process, seconds)
            case "disk full":
                return await self._full(seconds)
            case "clock ahead":
                await self._clock(dice.randrange(20, 180) * 10**9, seconds)
            case "clock behind":
                await self._clock(-dice.randrange(10, 180) * 10**9, seconds)
            case "connection cut in a packet":
                return await proxy.cut(to_daemon=dice.random() < 0.5)
            case "connections refused":
                await proxy.refuse()
                await asyncio.sleep(seconds)
                await proxy.open()
            case "connection stalled":
                proxy.flowing.clear()
                await asyncio.sleep(seconds)
                proxy.flowing.set()
            case "connection half open":
                if not await proxy.fall_silent(seconds):
                    self.evidence.said.append(f"a connection that said nothing was kept for {seconds} s")
            case "packets late":
                before, weather.delay = proxy.done["packets late"], dice.uniform(0.05, 0.4)
                await asyncio.sleep(seconds)
                weather.delay = 0.0
                return proxy.done["packets late"] > before
            case "network slow":
                weather.rate = dice.randrange(5_000, 50_000)
                await asyncio.sleep(seconds)
                weather.rate = 0
            case "bars doubled":
                before, weather.to_daemon = proxy.done["doubled to the daemon"], dice.uniform(0.1, 0.9)
                await asyncio.sleep(seconds)
                weather.to_daemon = 0.0
                return proxy.done["doubled to the daemon"] > before
            case "bars sent again":
                before, weather.later = proxy.done["sent to the daemon again"], dice.uniform(0.1, 0.9)
                await asyncio.sleep(seconds)
                weather.later = 0.0
                return proxy.done["sent to the daemon again"] > before
            case "signals doubled":
                before, weather.to_broker = proxy.done["doubled to the broker"], dice.uniform(0.1, 0.9)
                await asyncio.sleep(seconds)
                weather.to_broker = 0.0
                return proxy.done["doubled to the broker"] > before
            case "model swapped":
                return await asyncio.to_thread(self._order, Order("rollback", to=dice.choice(SERVING)))
            case "training":
                return await asyncio.to_thread(self._order, Order("retrain", wait=True))
            case "daemon killed in a training":
                if not await asyncio.to_thread(self._order, Order("retrain")):
                    return False
                await asyncio.sleep(seconds)
                self.daemon.kill()
            case "compaction":
                return await asyncio.to_thread(self._compact, seconds if dice.random() < 0.5 else None)
        return True

    async def _paused(self, process: subprocess.Popen[bytes], seconds: float) -> bool:
        alive = process.poll() is None
        process.send_signal(signal.SIGSTOP)
        await asyncio.sleep(seconds)
        process.send_signal(signal.SIGCONT)
        return alive

    async def _full(self, seconds: float) -> bool:
        """Take all room from the disk until the daemon has noticed, and for so long; say whether it has.

        It is taken again and again: a daemon that starts may free some.
        """
        filler, before, noticed = self.state / "filler", self._noticed_full(), False
        until, self.feeder.rate = time.monotonic() + FULL_SECONDS, FLOOD_RATE
        with filler.open("wb", buffering=0) as file:
            while time.monotonic() < until:
                if not noticed and self._noticed_full() > before:
                    noticed, until, self.feeder.rate = True, time.monotonic() + seconds, OLD_RATE
                for size in (1 << 20, 4096):
                    with suppress(OSError):
                        while True:
                            os.posix_fallocate(file.fileno(), os.fstat(file.fileno()).st_size, size)
                await asyncio.sleep(0.1)
        filler.unlink()
        self.feeder.rate = OLD_RATE
        return noticed

    def _noticed_full(self) -> int:
        """How often the daemon said that its disk is full, or did not start for it."""
        said = (self.instance.folder / "daemon.log").read_bytes().count(b'"disk_full"')
        return said + self.evidence.ends[NO_ROOM]

    async def _clock(self, ahead: int, seconds: float) -> None:
        """Step the daemon's clock, and back."""
        page = self.instance.folder / CLOCK
        for step in (ahead, 0):
            with page.open("r+b") as file:
                file.write(step.to_bytes(8, "little", signed=True))
            await asyncio.sleep(seconds if step else 0)

    def _order(self, order: Order) -> bool:
        """Give an order; say whether it was carried out: the daemon may be dead, or the model serve."""
        try:
            return control.ask(self.state, order, lambda _: None) is not None
        except (ConfigError, OSError):
            return False

    def _compact(self, killed_after: float | None) -> bool:
        """Compact the journal beside the daemon, after a copy was made; perhaps it is killed."""
        self._keep_copy()
        command = [*BARCAST, "compact", str(self.config)]
        with (
            (self.instance.folder / "compactions.log").open("ab") as log,
            suppress(subprocess.TimeoutExpired),
        ):
            subprocess.run(command, stdout=log, stderr=log, timeout=killed_after)
        return True

    def _keep_copy(self) -> None:
        self._copies.append(copy(self.state / "journal.db", self.folder / "copies" / str(len(self._copies))))
        self.evidence.look(self._copies[-1])

    # The end

    async def _mend(self) -> None:
        """Wait until the daemon has what the broker has, send what that forgot again, and wait once more."""
        self.feeder.enough.set()
        self.feeder.join()
        await self._until(lambda: not self.feeder.waiting, "the broker has every bar")
        await self._last("END0")
        await asyncio.to_thread(self._keep_copy)
        evidence = self.evidence
        kept = evidence.stored | evidence.refused
        gone = {m: when for m, when in self.feeder.acknowledged().items() if m not in kept}
        evidence.gone = gone.keys() & {(told.topic, told.payload) for told in self.proxy.taken}
        evidence.lost = {m: when for m, when in gone.items() if m not in evidence.gone}
        self.feeder.send(*gone)
        await self._last("END1")
        await self._until(lambda: self._ask("SELECT 1 FROM outbox WHERE state = 0") == [], "all is delivered")

    async def _last(self, symbol: str) -> None:
        """Send a bar and wait for it in the journal: the broker delivers in order."""
        self.feeder.send(message(Bar(symbol, self.instance.start - 600 * MINUTE, 1.0, 1.0, 1.0, 1.0, 1.0)))
        found = f"SELECT 1 FROM record WHERE topic LIKE '%/{symbol}'"
        await self._until(lambda: self._ask(found) != [], f"the daemon has {symbol}")

    async def _until(self, holds: Callable[[], bool], what: str) -> None:
        """Wait until something holds that must come to hold."""
        end = time.monotonic() + QUIET_SECONDS
        while not await asyncio.to_thread(holds):
            if time.monotonic() > end:
                self.evidence.said.append(f"in {QUIET_SECONDS} s not: {what}; {self._last_words()}")
                return
            await asyncio.sleep(0.2)

    def _ask(self, question: str) -> list[tuple[object, ...]] | None:
        """Look into the journal, also while the daemon writes it; None while it cannot be read."""
        try:
            with closing(connect(f"{(self.state / 'journal.db').as_uri()}?mode=ro", uri=True)) as db:
                return db.execute(question).fetchall()
        except OperationalError:
            return None

    async def _end(self) -> None:
        """The daemon lives, and stops when it is told to."""
        if self.daemon.poll() is not None:
            self.evidence.said.append(f"the daemon is not alive at the end: {self._last_words()}")
            return
        self.daemon.terminate()
        status = await asyncio.to_thread(self.daemon.wait, 20)
        if status:
            self.evidence.said.append(f"the daemon ended with status {status}: {self._last_words()}")
        await self._until(lambda: self.witness.state() == "stopped", "the subscriber has everything")

    def _kill(self) -> None:
        self._stopping = True
        self.daemon.kill()
        self.daemon.wait()

    def _collect(self) -> None:
        """Put together what is known, and compute every copy of the journal again."""
        evidence = self.evidence
        self._keep_copy()
        for journal in self._copies:
            evidence.replay(journal)
        evidence.read_archive(self.state / "archive", self._copies[-1])
        evidence.fed = self.feeder.acknowledged()
        evidence.taken = [told for told in self.proxy.taken if told.payload != NO_BARS]
        evidence.delivered = self.proxy.delivered
        evidence.seen = self.witness.seen
        evidence.faults = self.faults
        for sent in self.feeder.sent:
            if (key := self._bars.get(sent.message)) is not None:
                evidence.sent.setdefault(key, sent.time)

    def progress(self) -> str:
        """How it goes, in a line."""
        signals = sum("/signals/" in topic for _, topic, _ in self.witness.seen)
        return (
            f"{sum(self.faults.values())} faults, {len(self.feeder.sent)} messages fed, "
            f"{len(self.proxy.taken)} acknowledged, {signals} signals seen, "
            f"{len(self.evidence.said)} violations so far"
        )
