"""The real daemon as a process, an independent subscriber, and a feed that misbehaves."""

import json
import random
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import groupby
from pathlib import Path

import paho.mqtt.client as paho
import polars as pl
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

from barcast.daemon.journal import Place
from barcast.daemon.postgres import Server
from barcast.daemon.wire import encode_bars
from barcast.models import Bar, Window

BARCAST = (sys.executable, "-m", "barcast.backtest.cli")


def until(holds: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, f"in {seconds} s it did not come to this: {what}"
        time.sleep(0.05)


def client(name: str, port: int, user: str | None = None) -> paho.Client:
    """A paho client of its own thread with a persistent session; a user's password is the name."""
    c = paho.Client(paho.CallbackAPIVersion.VERSION2, name, protocol=paho.MQTTv5, reconnect_on_failure=True)
    c.reconnect_delay_set(1, 1)
    c.max_queued_messages_set(0)
    if user is not None:
        c.username_pw_set(user, user)
    properties = Properties(PacketTypes.CONNECT)
    properties.SessionExpiryInterval = 3600
    c.connect("127.0.0.1", port, clean_start=False, properties=properties)
    return c


class Subscriber:
    """Writes down what it receives, like a trading system that keeps evidence."""

    def __init__(self, port: int, user: str | None = None) -> None:
        self.seen: list[tuple[str, bytes]] = []
        self.subscribed = threading.Event()
        self.client = client("evidence", port, user)
        self.client.on_message = lambda _c, _u, m: self.seen.append((m.topic, m.payload))
        self.client.on_subscribe = lambda *_: self.subscribed.set()
        self.client.subscribe("barcast/v1/#", 1)
        self.client.loop_start()
        assert self.subscribed.wait(10)

    def of(self, kind: str) -> list[tuple[str, bytes]]:
        """What came under one kind of topic."""
        return [(t, p) for t, p in self.seen if t.startswith(f"barcast/v1/{kind}/")]

    def signed(self) -> str:
        """The model of the newest signal."""
        model = json.loads(self.of("signals")[-1][1])["model"]
        return str(model).split("-")[0]

    def states(self) -> list[str]:
        """The daemon's states as they were announced, each as often as it changed to it."""
        said = [json.loads(payload)["state"] for _, payload in self.of("status")]
        return [state for state, _ in groupby(said)]

    def close(self) -> None:
        """Leave the broker."""
        self.client.disconnect()
        self.client.loop_stop()


@dataclass
class Instance:
    """One daemon with its own state directory and a clock that runs `speed` times as fast."""

    folder: Path
    port: int
    symbols: list[str]
    first_model: str
    start: int
    speed: float
    sampler: str | None = "dpmpp"
    cron: str | None = None
    retrain: str = ""
    user: str | None = None
    http: int | None = None
    page: str = ""
    server: Server | None = None
    command: Sequence[str] = BARCAST
    process: subprocess.Popen[bytes] | None = None
    at: datetime = field(default_factory=lambda: datetime.now(UTC) + timedelta(seconds=8))

    @property
    def state(self) -> Path:
        return self.folder / "state"

    @property
    def place(self) -> Place:
        """Where its journal is."""
        return self.server or self.state / "journal.db"

    def write(self) -> Path:
        """Write the configuration as it is now."""
        self.state.mkdir(parents=True, exist_ok=True)
        path = self.folder / "barcast.toml"
        begin = datetime.fromtimestamp(self.start // 10**9, UTC)
        login = ""
        if self.user is not None:
            (self.folder / "secret").write_text(self.user)
            login = f'username = "{self.user}"\npassword_file = "secret"\n'
        path.write_text(
            f'instance = "test"\nstate_dir = "state"\ntimeframe = "1m"\nmax_wait = "15s"\n'
            f"symbols = {json.dumps(self.symbols)}\n"
            f"[mqtt]\nport = {self.port}\n{login}"
            f'[model]\nfirst = "{self.first_model}"\n'
            + (f'sampler = "{self.sampler}"\n' if self.sampler else "")
            + '[[strategy]]\nkind = "median-drift"\n'
            f"[rehearsal]\nstart = {begin.isoformat()}\nat = {self.at.isoformat()}\nspeed = {self.speed}\n"
            + (
                f'[retrain]\ncron = "{self.cron}"\nsteps = 8\nmargin = 0.0\nnice = 0\n'
                if self.cron
                else self.retrain
            )
            + (f"[http]\nport = {self.http}\n{self.page}" if self.http else "")
            + (f'[journal]\nurl = "{url(self.server)}"\n' if self.server else "")
        )
        return path

    def launch(self) -> None:
        """Start the daemon on the configuration as it is now."""
        log = (self.folder / "daemon.log").open("ab")
        self.process = subprocess.Popen([*self.command, "run", str(self.write())], stdout=log, stderr=log)

    def log(self) -> list[dict[str, object]]:
        """The daemon's log lines so far."""
        return self._lines("")

    def _lines(self, word: str) -> list[dict[str, object]]:
        lines = (self.folder / "daemon.log").read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and word in line]

    def wait_for(self, event: str, seconds: float = 60, count: int = 1) -> dict[str, object]:
        """Wait until the log holds an event `count` times; return the last."""
        until = time.monotonic() + seconds
        while time.monotonic() < until:
            if self.process is not None and self.process.poll() is not None:
                raise AssertionError((self.folder / "daemon.log").read_text()[-3000:])
            found = [line for line in self._lines(f'"{event}"') if line["event"] == event]
            if len(found) >= count:
                return found[-1]
            time.sleep(0.1)
        raise AssertionError(f"no {event} in the log:\n{(self.folder / 'daemon.log').read_text()[-3000:]}")

    def kill(self) -> None:
        """kill -9."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    def freeze(self) -> None:
        """Stop it as a machine does that hangs; `thaw` lets it go on."""
        assert self.process is not None
        self.process.send_signal(signal.SIGSTOP)

    def thaw(self) -> None:
        """Let it go on where it was frozen."""
        assert self.process is not None
        self.process.send_signal(signal.SIGCONT)

    def order(self, *words: str) -> subprocess.CompletedProcess[str]:
        """Order something, as an operator on this instance's machine."""
        command = [*BARCAST, "ctl", str(self.folder / "barcast.toml"), *words]
        return subprocess.run(command, capture_output=True, text=True, timeout=540)

    def stop(self) -> int:
        """SIGTERM; return the exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(20)

    def real(self, moment: int) -> float:
        """The wall time at which this instance's clock shows `moment`."""
        return self.at.timestamp() + (moment - self.start) / 1e9 / self.speed


def url(server: Server) -> str:
    """A server as a configuration has it."""
    if server.host.startswith("/"):
        return f"postgresql://{server.user}@:{server.port}/{server.database}?host={server.host}"
    return f"postgresql://{server.user}@{server.host}:{server.port}/{server.database}"


def rough(windows: list[Window], first: int, seed: int) -> list[tuple[int, Bar]]:
    """(when to send, bar) from index `first` on: some twice, late, out of order, corrected, never."""
    dice, plan = random.Random(seed), []
    for w in windows:
        for time_, values in zip(w.close_times[first:].tolist(), w.values[first:].tolist(), strict=True):
            bar, fate = Bar(w.symbol, time_, *values), dice.random()
            delay = dice.uniform(0, 4)
            if fate < 0.01:
                continue  # missing
            if fate < 0.03:
                plan.append((time_ + int(dice.uniform(5, 40) * 1e9), bar))  # duplicate
            elif fate < 0.06:
                delay = dice.uniform(12, 50)  # late: straggles
            elif fate < 0.07:
                delay = dice.uniform(65, 100)  # after its successor
            elif fate < 0.08:
                better = Bar(bar.symbol, time_, bar.open, bar.high * 1.001, bar.low, bar.close, bar.volume)
                plan.append((time_ + int(dice.uniform(20, 90) * 1e9), better))
            plan.append((time_ + int(delay * 1e9), bar))
    return sorted(plan, key=lambda piece: (piece[0], piece[1].symbol))


class Feed(threading.Thread):
    """Publishes a plan on an instance's clock, whatever happens to broker and daemon."""

    def __init__(self, instance: Instance, plan: list[tuple[int, Bar]]) -> None:
        super().__init__(name="feed")
        self.instance, self.plan, self.failed = instance, plan, 0
        self.client = client("feed", instance.port)
        self.client.loop_start()

    def run(self) -> None:
        for moment, bar in self.plan:
            time.sleep(max(0.0, self.instance.real(moment) - time.time()))
            info = self.client.publish(f"barcast/v1/bars/1m/{bar.symbol}", encode_bars([bar]), 1)
            self.failed += info.rc not in (paho.MQTT_ERR_SUCCESS, paho.MQTT_ERR_NO_CONN)

    def close(self) -> None:
        """Wait for the end of the plan and leave."""
        self.join()
        time.sleep(1)
        self.client.disconnect()
        self.client.loop_stop()


def write_history(windows: list[Window], bars: int, folder: Path, first: int = 0) -> None:
    """The bars of each symbol up to a number of them, from the `first` on, as the instance's history."""
    folder.mkdir(parents=True, exist_ok=True)
    names = ("open", "high", "low", "close", "volume")
    frames = [
        pl.DataFrame(
            {"symbol": [w.symbol] * (bars - first), "close_time": w.close_times[first:bars]}
            | {n: w.values[first:bars, i] for i, n in enumerate(names)}
        ).with_columns(pl.col("close_time").cast(pl.Datetime("ns", "UTC")))
        for w in windows
    ]
    pl.concat(frames).write_parquet(folder / f"from{first}.parquet")
