"""The whole product on real bars in two minutes: broker, daemon, signals, retraining, replay, backtest."""

import asyncio
import contextlib
import json
import math
import shutil
import signal
import socket
import sys
import time
from asyncio.subprocess import Process
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import msgspec
import polars as pl
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.live import Live
from rich.table import Table

from barcast.backtest.replay import run_backtest
from barcast.backtest.report import write_report
from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.backtest.verify import read_capture, verify
from barcast.daemon import wire
from barcast.daemon.app import rehearsal
from barcast.daemon.calendar import Calendar
from barcast.daemon.journal import Journal, State
from barcast.daemon.timeframe import Timeframe
from barcast.models import BarcastError, ConfigError

START = datetime(2012, 8, 1, tzinfo=UTC)
SESSIONS = 125
"""Trading days fed to the daemon: half a year."""
LEADS = (1, 3, 9)
"""How many times its lead a model is given before the first bar: a busy machine has more in another try."""
RETRAIN_SECONDS = 11.0
"""How long after the start of the daemon its retraining begins."""
KINDS = ("signals", "targets", "groups", "backfill", "models", "status")
"""The messages that the subscriber wants."""
PULSE_SECONDS = 0.2
PATIENCE_SECONDS = 600.0
"""How long to wait after the last bar for the retraining to end."""

BROKER_SECONDS = 5.0
"""How long a broker of the user's own may take to answer."""


@dataclass(frozen=True, slots=True)
class Setting:
    """What a demonstration sets for one kind of model.

    `since` is the first day of its bars, `lead` are seconds for the daemon to be ready and its model prepared
    before the first bar that is fed, `steps` those of each phase of the retraining, `sampling` is what
    samples the model, as keys of `[model]` and of `run_backtest`.
    """

    since: datetime
    lead: float
    steps: int
    sampling: Mapping[str, Any]


SETTINGS = {
    "sssd": Setting(datetime(2000, 1, 1, tzinfo=UTC), 8.0, 150, {}),
    # A forecast by it takes some 20 ms: bars before that day would only be there to calibrate by.
    "ldm4ts": Setting(datetime(2007, 6, 1, tzinfo=UTC), 14.0, 6, {"sampler": "angle", "steps": 1}),
}

ROOT = "barcast-demo/v1"
CONFIG = """\
# Written by `barcast demo`. Half a year of real daily bars passes in about a minute: the clock of this
# instance runs faster than the wall's, see [rehearsal].
instance = "demo"
state_dir = "state"
timeframe = "session"
calendar = "XNYS"
symbols = ["AAPL", "FB", "GOOG", "IBM", "MSFT"]
max_wait = "12h"

[mqtt]
host = "{host}"
port = {port}
root = "{root}"

[model]
first = "{model}"
{sampling}
[[strategy]]
kind = "quantile-band"
params = {{ band = 0.1, horizon = 5 }}

[[strategy]]
kind = "median-drift"

[retrain]
cron = "{second} * * * * *"
steps = {steps}
margin = 0.0
nice = 0

[rehearsal]
start = {start}
at = {at}
speed = {speed}
"""

BROKER = """\
id = 0
[router]
id = 0
max_connections = 100
max_outgoing_packet_count = 200
max_segment_size = 104857600
max_segment_count = 10
[v5.1]
name = "v5"
listen = "127.0.0.1:{port}"
next_connection_delay_ms = 1
[v5.1.connections]
connection_timeout_ms = 60000
max_payload_size = 4194304
max_inflight_count = 200
dynamic_filters = true
"""


class Demo:
    """One demonstration in one folder. Every step that fails raises; nothing is made up."""

    def __init__(
        self, folder: Path, broker: str | None, seconds: float, out: Console, model: str = "sssd"
    ) -> None:
        self.folder, self.seconds, self.out = folder.absolute(), seconds, out
        self.model, self.setting = sample_checkpoint(model), SETTINGS[model]
        self.embedded = broker is None
        host, _, port = (broker or f"127.0.0.1:{_free_port()}").rpartition(":")
        if not host or not port.isdigit():
            raise ConfigError(f"--broker: {broker!r} is not HOST:PORT, such as 127.0.0.1:1883")
        self.host, self.port = host, int(port)
        self.state, self.bars = self.folder / "state", self.folder / "bars.parquet"
        self.capture: list[tuple[str, bytes]] = []
        self.latest: dict[str, wire.Signal] = {}
        self.notices: list[wire.ModelNotice] = []
        self.config = str(self.folder / "barcast.toml")
        self.watched, self.ready = asyncio.Event(), asyncio.Event()
        self.processes: list[Process] = []

    def run(self) -> None:
        """Run the demonstration; raise when a promise does not hold, KeyboardInterrupt when it is to end."""
        began = time.monotonic()
        self._prepare()
        with self._broker():
            try:
                asyncio.run(self._live())
            except asyncio.CancelledError:
                raise KeyboardInterrupt from None
        self._replay()
        self._backtest()
        self.out.print(f"[dim]The running part took {time.monotonic() - began:.0f} s.[/]")

    def _prepare(self) -> None:
        """Lay out the folder: bars, history, and a challenger made worse on purpose."""
        config = self.folder / "barcast.toml"
        ours = config.is_file() and config.read_text().startswith(CONFIG.splitlines()[0])
        if self.folder.exists() and not ours and (not self.folder.is_dir() or any(self.folder.iterdir())):
            raise ConfigError(f"--folder: {self.folder} is not empty, and no demo wrote it; name another")
        shutil.rmtree(self.folder, ignore_errors=True)
        self._configure(LEADS[0])
        (self.state / "history").mkdir(parents=True)
        bars = pl.read_parquet(sample_bars()).filter(pl.col("close_time") >= self.setting.since)
        bars.write_parquet(self.bars)
        bars.filter(pl.col("close_time") < START).write_parquet(self.state / "history" / "us_daily.parquet")
        _spoil(self.model, self.state / "challengers" / "planted")

    def _configure(self, times: int) -> float:
        """Write the configuration; return the seconds, so many times the lead, until its clock runs."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.last = _session_after(START, SESSIONS)
        span = (self.last - START).total_seconds()
        setting, lead = self.setting, times * self.setting.lead
        clock = rehearsal(START, math.ceil(span / self.seconds), lead)
        retrain = clock.at + timedelta(seconds=RETRAIN_SECONDS - lead)
        Path(self.config).write_text(
            CONFIG.format(
                host=self.host,
                port=self.port,
                root=ROOT,
                model=self.model,
                sampling="".join(f"{key} = {json.dumps(value)}\n" for key, value in setting.sampling.items()),
                steps=setting.steps,
                second=retrain.second,  # of every minute: a machine may be too slow for the first
                start=START.isoformat(),
                at=clock.at.isoformat(),
                speed=clock.speed,
            )
        )
        return lead

    @contextlib.contextmanager
    def _broker(self) -> Iterator[None]:
        if not self.embedded:
            try:
                socket.create_connection((self.host, self.port), BROKER_SECONDS).close()
            except OSError as error:
                raise ConfigError(f"--broker: {self.host}:{self.port} does not answer ({error})") from error
            self.out.print(f"broker: {self.host}:{self.port}")
            yield
            return
        try:
            from iotcore import Broker
        except ImportError as error:
            raise ConfigError(
                "the embedded broker is missing: pip install '.[demo]' in the checkout, or name a broker of "
                "your own with --broker HOST:PORT"
            ) from error
        config = self.folder / "broker.toml"
        config.write_text(BROKER.format(port=self.port))
        with Broker(config_path=str(config)):
            self.out.print(
                f"broker: embedded, on 127.0.0.1:{self.port} (for trying out: it keeps nothing on disk; "
                "with Debian's mosquitto: --broker 127.0.0.1:1883)"
            )
            yield

    async def _live(self) -> None:
        """Daemon, publisher and an independent subscriber, each a process or client of its own.

        What asks a process to end, or a terminal that is closed, does what Ctrl-C does.
        """
        loop, task = asyncio.get_running_loop(), asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            loop.add_signal_handler(number, task.cancel)
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch())
            try:
                await self.watched.wait()
                daemon = await self._daemon()
                feed = ["--since", f"{START:%Y-%m-%d}", "--until", f"{self.last:%Y-%m-%dT%H:%M:%S}"]
                bars = [str(self.bars), "--stamp", "close", "--config", self.config, *feed]
                publisher = await self._start("publisher", "publish", *bars)
                self.out.print(
                    f"daemon: process {daemon.pid}, log in {self.folder / 'daemon.log'}\n"
                    f"bars: {SESSIONS} sessions from {START:%Y-%m-%d} in about {self.seconds:.0f} s; "
                    "meanwhile a challenger is trained"
                )
                with Live(self._table(), console=self.out, refresh_per_second=4) as live:
                    await self._follow(live, daemon, publisher)
                self.out.print()
            finally:
                running = [process for process in self.processes if process.returncode is None]
                for process in running:  # before any wait, which a second signal would end
                    process.send_signal(signal.SIGTERM)
                for process in running:
                    await process.wait()
                watching.cancel()
        with (self.folder / "capture.jsonl").open("wb") as file:
            for topic, payload in self.capture:
                file.write(msgspec.json.encode((topic, payload.decode())) + b"\n")
        for notice in self.notices:
            if v := notice.verdict:
                word = "[green]accepted[/]" if v["accepted"] else "[red]refused[/]"
                self.out.print(
                    f"challenger {v['challenger']}: {word}; {v['reason']} ({v['origins']} forecasts)"
                )

    async def _daemon(self) -> Process:
        """Start the daemon, early enough to be ready before its clock begins to run."""
        for times in LEADS:
            lead = self._configure(times)
            daemon = await self._start("daemon", "run", self.config)
            waits = [asyncio.create_task(daemon.wait()), asyncio.create_task(self.ready.wait())]
            done, _ = await asyncio.wait(waits, timeout=lead - 1, return_when=asyncio.FIRST_COMPLETED)
            for wait in waits:
                wait.cancel()
            if done:
                return daemon
            daemon.kill()
            await daemon.wait()
        raise BarcastError(f"the daemon was not ready within {lead:.0f} s: see {self.folder / 'daemon.log'}")

    async def _start(self, name: str, *arguments: str) -> Process:
        with (self.folder / f"{name}.log").open("wb") as log:
            command = [sys.executable, "-m", "barcast.backtest.cli", *arguments]
            self.processes.append(await asyncio.create_subprocess_exec(*command, stdout=log, stderr=log))
        return self.processes[-1]

    async def _follow(self, live: Live, daemon: Process, publisher: Process) -> None:
        """Show signals until all bars are sent and both challengers are judged."""
        waited = 0.0
        while publisher.returncode is None or sum(bool(n.verdict) for n in self.notices) < 2:
            await asyncio.sleep(PULSE_SECONDS)
            live.update(self._table())
            if daemon.returncode is not None:
                raise BarcastError(f"the daemon ended: see {self.folder / 'daemon.log'}")
            if publisher.returncode:
                raise BarcastError(f"the publisher failed: see {self.folder / 'publisher.log'}")
            waited += PULSE_SECONDS if publisher.returncode is not None else 0.0
            if waited > PATIENCE_SECONDS:
                raise BarcastError(f"no verdict on both challengers: see {self.folder / 'daemon.log'}")
        await asyncio.sleep(1.5)
        live.update(self._table())

    async def _watch(self) -> None:
        """Subscribe like any trading system would, and write down what comes."""
        import aiomqtt

        topics = [(f"{ROOT}/{kind}/#", 1) for kind in KINDS]
        version = aiomqtt.ProtocolVersion.V5
        async with aiomqtt.Client(self.host, self.port, identifier="demo-watch", protocol=version) as client:
            await client.subscribe(topics)
            self.watched.set()
            async for message in client.messages:
                topic, payload = str(message.topic), bytes(message.payload)
                if message.retain and not self.capture:
                    continue  # left over on a broker of the user's own
                if "/status/" in topic:
                    if msgspec.json.decode(payload)["state"] == "ready":
                        self.ready.set()
                    continue
                if "/models/" in topic:
                    self.notices.append(msgspec.json.decode(payload, type=wire.ModelNotice))
                    continue
                self.capture.append((topic, payload))
                if "/signals/" in topic:
                    found = msgspec.json.decode(payload, type=wire.Signal)
                    self.latest[found.symbol] = found

    def _table(self) -> Table:
        counted = sum("/signals/" in topic for topic, _ in self.capture)
        newest = max((s.close_time[:10] for s in self.latest.values()), default="-")
        models = ", ".join(dict.fromkeys(n.model for n in self.notices)) or "loading"
        table = Table(
            title=f"{counted} signals as a subscriber sees them; bars closed {newest}; model {models}",
            title_justify="left",
            box=SIMPLE_HEAD,
            padding=(0, 0, 0, 1),
        )
        for name in ("symbol", "close", "until", "q05", "q25", "median", "q75", "q95", "rise"):
            table.add_column(name, justify="left" if name == "symbol" else "right", no_wrap=True)
        for symbol in sorted(self.latest):
            s = self.latest[symbol]
            for i, horizon in enumerate(s.horizons):
                prices = dict(zip(s.levels, s.quantiles[i], strict=True))
                table.add_row(
                    symbol if i == 0 else ", ".join(s.flags) if i == 1 else "",
                    f"{s.reference:.1f}" if i == 0 else "",
                    horizon.end_time[:10],
                    *(f"{prices[p]:.1f}" for p in (0.05, 0.25, 0.5, 0.75, 0.95)),
                    f"{s.rise[i]:.2f}",
                )
        return table

    def _replay(self) -> None:
        """Compute every message again from the journal and hold it against what the subscriber wrote down."""
        difference = verify(self.state / "journal.db", captured=read_capture(self.folder / "capture.jsonl"))
        journal = Journal(self.state / "journal.db", readonly=True)
        expired = journal.outbox_counts()[State.EXPIRED]
        journal.close()
        late = f"; {expired} messages expired before delivery" if expired else ""
        self.out.print(
            f"replay of the journal: [bold]{difference.signals} signals, "
            f"{difference.differing} differ[/]{late}"
        )
        if difference.differing or not difference.signals or difference.missing != expired:
            raise BarcastError(difference.sentence())

    def _backtest(self) -> None:
        """Both strategies on the years after the shipped model's training, and the report."""
        result = run_backtest(
            [self.bars],
            stamp="close",
            model=str(self.model),
            **self.setting.sampling,
            timeframe="session",
            calendar="XNYS",
            strategies=["quantile-band", "vol-target", "rank"],
            since=wire.to_ns(datetime(2012, 1, 1, tzinfo=UTC)),
        )
        folder = self.folder / "backtest"
        result.save(folder)
        write_report(result, folder / "report.html")
        for row in result.portfolio.iter_rows(named=True):
            sharpe = "-" if row["sharpe"] is None else f"{row['sharpe']:.2f}"
            self.out.print(
                f"backtest {row['strategy']}: return {100 * row['total_return']:.2f} %, Sharpe {sharpe}, "
                f"drawdown {100 * row['max_drawdown']:.2f} %, {row['fills']} fills"
            )
        self.out.print(f"report: {folder / 'report.html'}")


def _spoil(checkpoint: Path, out: Path) -> None:
    """Write a valid checkpoint whose bands are three times too wide: the gate must refuse it."""
    from barcast.models.checkpoint import load, save
    from barcast.models.ldm4ts.trained import LatentTrained
    from barcast.models.trained import Trained

    trained = load(checkpoint).trained
    assert isinstance(trained, Trained | LatentTrained)
    trained.net.map.static *= 3
    if isinstance(trained, LatentTrained):  # its gate lets the map through alone
        trained.net.gate.weight.data.zero_()
        trained.net.gate.bias.data.fill_(-20.0)
    out.parent.mkdir(parents=True, exist_ok=True)
    save(trained, out)


def _session_after(start: datetime, count: int) -> datetime:
    """The moment just after the `count`-th session close from `start`."""
    closes = Calendar("XNYS", Timeframe.parse("session")).closes_after(wire.to_ns(start), count)
    return datetime.fromtimestamp(closes[-1] // 10**9 + 1, UTC)


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return int(s.getsockname()[1])
