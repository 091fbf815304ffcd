"""What the measurements share: random bars, a broker, a raw MQTT client, and the daemon as a process.

Nothing here must cost more than what is measured: packets are built beforehand and sent by the kernel's
calls alone, and processes are read from /proc.
"""

import json
import os
import select
import signal
import socket
import sqlite3
import struct
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.daemon.journal import Kind
from barcast.daemon.wire import encode_bars
from barcast.models import Bar
from tests.integration.broker import Mosquitto

MINUTE = 60 * 10**9
DEPLOYED = Path(__file__).parents[2] / "deploy"
ROOT = "barcast/v1"
PROBE = "PROBE"
"""Symbols that begin with it ask the daemon whether it has come so far: see `Daemon.probe`."""
NOW = 29_000_000 * MINUTE
"""What the clock of a daemon shows for which time does not matter: a minute in 2025."""
NEVER = datetime(2100, 1, 1, tzinfo=UTC)
PATIENCE_SECONDS = 120.0
PULSE_SECONDS = 0.4
QUIET_SHARE = 0.08
"""Of a core: a daemon that takes less is waiting."""
TICKS = os.sysconf("SC_CLK_TCK")


def walk(symbols: int, count: int, seed: int = 1) -> NDArray[np.float64]:
    """Random walks with four decimals, (count, symbols, 5): open, high, low, close and volume."""
    steps = np.random.default_rng(seed).normal(0, 1e-3, (count, symbols)).cumsum(0)
    price = (100 * np.exp(steps)).round(4)
    volume = np.random.default_rng(seed + 1).integers(1, 10_000, (count, symbols)).astype(float)
    return np.stack([price, (price * 1.001).round(4), (price * 0.999).round(4), price, volume], -1)


def name(symbol: int) -> str:
    """The name of the n-th symbol."""
    return f"S{symbol:04d}"


def bars(values: NDArray[np.float64], closes: Sequence[int]) -> Iterator[Bar]:
    """Bars in order of their close."""
    for close, row in zip(closes, values.tolist(), strict=True):
        for symbol, five in enumerate(row):
            yield Bar(name(symbol), close, *five)


def write_history(values: NDArray[np.float64], closes: Sequence[int], folder: Path) -> None:
    """Bars as the history of a state directory."""
    folder.mkdir(parents=True, exist_ok=True)
    count, symbols, _ = values.shape
    columns = {n: values[:, :, i].ravel() for i, n in enumerate(("open", "high", "low", "close", "volume"))}
    frame = pl.DataFrame(
        {
            "symbol": [name(s) for s in range(symbols)] * count,
            "close_time": np.repeat(np.asarray(closes, np.int64), symbols),
            **columns,
        }
    )
    cast = pl.col("close_time").cast(pl.Datetime("ns", "UTC"))
    frame.with_columns(cast).write_parquet(folder / "history.parquet")


def minutes(first: int, count: int) -> list[int]:
    """Closes of one-minute bars."""
    return list(range(first, first + count * MINUTE, MINUTE))


def rehearsal(start: int, at: datetime = NEVER, speed: float = 1.0) -> str:
    """The clock of a daemon, as its configuration says it: it shows `start` until the real moment `at`."""
    begin = datetime.fromtimestamp(start // 10**9, UTC)
    return f"[rehearsal]\nstart = {begin.isoformat()}\nat = {at.isoformat()}\nspeed = {speed:f}\n"


class Broker(Mosquitto):
    """A mosquitto with the settings of deploy/mosquitto.conf, but a longer queue, and that in memory.

    A queue of tens of megabytes, saved each second, would measure the broker's disk.
    """

    OURS = ("listener", "persistence", "persistence_location", "autosave_interval", "max_queued_messages")

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        lines = (DEPLOYED / "mosquitto.conf").read_text().splitlines()
        kept = [line for line in lines if line.partition(" ")[0] not in self.OURS]
        ours = [f"listener {self.port} 127.0.0.1", "persistence false", "max_queued_messages 200000"]
        self.config.write_text("\n".join([*ours, *kept, ""]))

    def __enter__(self) -> "Broker":
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


def packet(topic: str, payload: bytes, number: int) -> bytes:
    """A PUBLISH with QoS 1 of MQTT 3.1.1, whose publishers a broker lets run ahead."""
    text = topic.encode()
    body = struct.pack("!H", len(text)) + text + struct.pack("!H", number % 65535 + 1) + payload
    return b"\x32" + _varint(len(body)) + body


def packets(groups: Iterable[list[Bar]], timeframe: str) -> list[bytes]:
    """One PUBLISH for each list of bars of one symbol."""
    return [
        packet(f"{ROOT}/bars/{timeframe}/{group[0].symbol}", encode_bars(group), number)
        for number, group in enumerate(groups)
    ]


@dataclass(frozen=True, slots=True)
class Received:
    """A message, and when the bytes that ended it came in (seconds of the monotonic clock)."""

    at: float
    topic: str
    payload: bytes


class Raw:
    """An MQTT client on a blocking socket, for one purpose each: MQTT 3.1.1 to publish, 5 to subscribe.

    The state is the socket, the bytes of a packet that is not complete, and how many PUBACKs came.
    """

    def __init__(
        self, port: int, client_id: str, *, subscribe: Sequence[str] = (), resume: bool = False
    ) -> None:
        self.five = bool(subscribe) or resume
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4 << 20)
        self.acked = 0
        self._rest = b""
        # Properties of MQTT 5: session expiry in seconds, Receive Maximum.
        properties = b"\x08\x11" + struct.pack("!I", 60) + b"\x21" + struct.pack("!H", 1000)
        body = b"\x00\x04MQTT" + bytes([5 if self.five else 4, 0 if resume else 2]) + struct.pack("!H", 600)
        body += (properties if self.five else b"") + struct.pack("!H", len(client_id)) + client_id.encode()
        self.socket.sendall(b"\x10" + _varint(len(body)) + body)
        self._expect(0x20)
        if subscribe:
            filters = b"".join(struct.pack("!H", len(t)) + t.encode() + b"\x01" for t in subscribe)
            self.socket.sendall(b"\x82" + _varint(3 + len(filters)) + b"\x00\x01\x00" + filters)
            self._expect(0x90)

    def send(self, one: bytes) -> None:
        """Send a packet."""
        self.socket.sendall(one)

    def confirm(self, count: int) -> None:
        """Wait until the broker has acknowledged `count` more messages."""
        until = self.acked + count
        while self.acked < until:
            self._take(PATIENCE_SECONDS)

    def send_all(self, many: Sequence[bytes], window: int = 400) -> None:
        """Send packets as fast as the broker takes them; return when it has acknowledged all."""
        for start in range(0, len(many), window):
            part = many[start : start + window]
            self.socket.sendall(b"".join(part))
            self.confirm(len(part))

    def receive(self, seconds: float) -> list[Received]:
        """The messages that come next, acknowledged; none when nothing comes for so long."""
        return self._take(seconds)

    def close(self) -> None:
        """Leave."""
        self.socket.close()

    def _expect(self, kind: int) -> None:
        seen: list[int] = []
        while kind not in seen:
            self._take(PATIENCE_SECONDS, seen)

    def _take(self, seconds: float, seen: list[int] | None = None) -> list[Received]:
        """Read once and go through the packets; note their kinds in `seen`."""
        if not select.select([self.socket], [], [], seconds)[0]:
            if seconds == PATIENCE_SECONDS:
                raise TimeoutError("the broker is silent")
            return []
        data = self.socket.recv(1 << 20)
        if not data:
            raise ConnectionError("the broker hung up")
        at = time.monotonic()
        buffer, position, found, acks = self._rest + data, 0, [], bytearray()
        while (split := _split(buffer, position)) is not None:
            kind, start, end = split
            position = end
            if kind == 0x40:
                self.acked += 1
            elif kind & 0xF0 == 0x30:
                length = int.from_bytes(buffer[start : start + 2], "big")
                start += 2
                topic = buffer[start : start + length].decode()
                start += length
                if kind & 0x06:
                    acks += b"\x40\x02" + buffer[start : start + 2]
                    start += 2
                if self.five:
                    size, start = _read_varint(buffer, start)
                    start += size
                found.append(Received(at, topic, buffer[start:end]))
            if seen is not None:
                seen.append(kind & 0xF0)
        self._rest = buffer[position:]
        if acks:
            self.socket.sendall(acks)
        return found


def _varint(number: int) -> bytes:
    out = bytearray()
    while True:
        number, low = divmod(number, 128)
        out.append(low | 0x80 if number else low)
        if not number:
            return bytes(out)


def _read_varint(buffer: bytes, position: int) -> tuple[int, int]:
    number = shift = 0
    while True:
        byte = buffer[position]
        number |= (byte & 0x7F) << shift
        position += 1
        if byte < 0x80:
            return number, position
        shift += 7


def _split(buffer: bytes, position: int) -> tuple[int, int, int] | None:
    """First byte, start and end of the packet at `position`, or None when it is not complete."""
    try:
        length, start = _read_varint(buffer, position + 1)
    except IndexError:
        return None
    return None if start + length > len(buffer) else (buffer[position], start, start + length)


def cpu_seconds(pid: int) -> float:
    """CPU time of a process, user and system, all threads."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / TICKS


def memory(pid: int) -> dict[str, float]:
    """Megabytes of memory in use now, and at most so far."""
    lines = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines())
    return {
        "rss_mb": int(lines["VmRSS"].split()[0]) * 1.024e-3,
        "peak_mb": int(lines["VmHWM"].split()[0]) * 1.024e-3,
    }


_COMMAND = """
import json, os, resource, sys, time
from barcast.backtest.cli import main
from tests.bench.rig import memory
try:
    main()
except SystemExit as end:
    if end.code:
        raise
if "joblib.externals.loky" in sys.modules:
    sys.modules["joblib.externals.loky"].get_reusable_executor().shutdown(wait=True)
workers = resource.getrusage(resource.RUSAGE_CHILDREN)
cpu = time.process_time() + workers.ru_utime + workers.ru_stime
print(json.dumps([cpu, memory(os.getpid())["peak_mb"]]))
"""


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that ended: what it printed, how long it took, the CPU time of it and its workers, and the
    most memory that it took itself, mapped files with it.
    """

    said: list[str]
    seconds: float
    cpu_seconds: float
    peak_mb: float


def run(*words: str) -> Ran:
    """Run `barcast` in a process of its own; raise `RuntimeError` with what it said if it fails."""
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", _COMMAND, *words], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError(f"{words[0]} failed:\n{done.stdout[-1000:]}{done.stderr[-2000:]}")
    *said, figures = done.stdout.splitlines()
    return Ran(said, time.monotonic() - began, *json.loads(figures))


class Daemon:
    """`barcast run` as a process, with a state directory of its own under `folder`."""

    CLIENT = "barcast-bench"

    def __init__(
        self,
        folder: Path,
        broker: Broker,
        *,
        symbols: Sequence[str],
        timeframe: str = "1m",
        calendar: str = "24x7",
        model: str = "fhs",
        max_wait: str = "60s",
        clock: str = "",
    ) -> None:
        self.folder, self.broker = folder, broker
        self.state = folder / "state"
        self.config = folder / "barcast.toml"
        self.process: subprocess.Popen[bytes] | None = None
        self.started_in = 0.0
        self._probes = 0
        self.state.mkdir(parents=True, exist_ok=True)
        self.config.write_text(
            f'instance = "bench"\nstate_dir = "state"\ntimeframe = "{timeframe}"\ncalendar = "{calendar}"\n'
            f'max_wait = "{max_wait}"\nsymbols = {json.dumps(list(symbols))}\n'
            f'[mqtt]\nport = {broker.port}\nroot = "{ROOT}"\n[model]\nfirst = "{model}"\n'
            f"{clock or rehearsal(NOW)}"
        )

    def __enter__(self) -> "Daemon":
        began = time.monotonic()
        log = (self.folder / "daemon.log").open("wb")
        command = [sys.executable, "-m", "barcast.backtest.cli", "run", str(self.config)]
        self.process = subprocess.Popen(command, stdout=log, stderr=log)
        while not {"ready", "broker_connected"} <= self._events():
            if self.process.poll() is not None or time.monotonic() - began > PATIENCE_SECONDS:
                self.process.kill()
                raise RuntimeError(f"the daemon did not start:\n{self._log()[-3000:]}")
            time.sleep(0.02)
        self.started_in = time.monotonic() - began
        return self

    def __exit__(self, _kind: object, error: BaseException | None, _trace: object) -> None:
        assert self.process is not None
        if error is not None:
            self.process.kill()
            self.process.wait()
            error.add_note(f"The daemon said last:\n{self._log()[-2000:]}")
            return
        self.process.send_signal(signal.SIGTERM)
        if self.process.wait(30):
            raise RuntimeError(
                f"the daemon ended with status {self.process.returncode}:\n{self._log()[-3000:]}"
            )

    @property
    def pid(self) -> int:
        """The process."""
        assert self.process is not None
        return self.process.pid

    def probe(self) -> bytes:
        """A bar that is current on the standing clock: the daemon answers it with a group message.

        The first completes its group, each other one is a straggler of a symbol of its own. The answer
        leaves by the connection that took the PUBACKs before it, after the path has seen the bar: all
        that was sent before is in the journal, acknowledged and in the windows by then.
        """
        symbol = PROBE + (str(self._probes) if self._probes else "")
        self._probes += 1
        return packets([[Bar(symbol, NOW, 1.0, 1.0, 1.0, 1.0, 1.0)]], "1m")[0]

    def settle(self) -> None:
        """Wait until it has nothing to do: it warms up after it says that it is ready."""
        until, cpu = time.monotonic() + PATIENCE_SECONDS, -1.0
        while time.monotonic() < until:
            before, cpu = cpu, cpu_seconds(self.pid)
            if cpu - before <= QUIET_SHARE * PULSE_SECONDS:
                return
            time.sleep(PULSE_SECONDS)
        raise TimeoutError("the daemon is never quiet")

    def records(self, kind: str = Kind.BARS) -> int:
        """Records of a kind in the journal: of bars, messages."""
        return self._ask(f"SELECT COUNT(*) FROM record WHERE kind = '{kind}'")

    def journal_bytes(self) -> int:
        """The size of the journal, whether its pages are in the file yet or still in its log."""
        return int(self._ask("PRAGMA page_count")) * int(self._ask("PRAGMA page_size"))

    def _ask(self, question: str) -> int:
        db = sqlite3.connect(f"{(self.state / 'journal.db').as_uri()}?mode=ro", uri=True)
        try:
            return int(db.execute(question).fetchone()[0])
        finally:
            db.close()

    def _log(self) -> str:
        return (self.folder / "daemon.log").read_text()

    def _events(self) -> set[str]:
        return {json.loads(line)["event"] for line in self._log().splitlines() if line.endswith("}")}


class Clock:
    """The clock of a rehearsal: it shows `start` for `lead` real seconds, then runs `speed` times as fast.

    With a speed of 0 it stands.
    """

    def __init__(self, start: int, speed: float, lead: float) -> None:
        self.start, self.speed = start, speed
        self.at = datetime.now(UTC) + timedelta(seconds=lead)

    def table(self) -> str:
        """As the configuration says it."""
        return rehearsal(self.start, self.at, self.speed) if self.speed else rehearsal(self.start)

    @property
    def late(self) -> bool:
        """Whether it runs already."""
        return bool(self.speed) and time.time() > self.at.timestamp()

    def real(self, moment: int) -> float:
        """When it shows `moment`, in real seconds since 1970; it must run."""
        return self.at.timestamp() + (moment - self.start) / 1e9 / self.speed

    def wait(self, moment: int) -> None:
        """Until the clock shows `moment`, if it runs."""
        if self.speed:
            time.sleep(max(0.0, self.real(moment) - time.time()))


def publish_close(
    publisher: Raw, watcher: Raw, some: Sequence[bytes], mark: bytes, patience: float
) -> tuple[list[float], dict[int, float]]:
    """Publish the bars of a close; return when each was sent, and when the signal of each symbol came.

    A signal without the mark is one of an earlier close that is late.
    """
    numbers = {name(symbol): symbol for symbol in range(len(some))}
    sent: list[float] = []
    arrived: dict[int, float] = {}
    for one in some:
        sent.append(time.monotonic())
        publisher.send(one)
    while len(arrived) < len(some) and (left := sent[-1] + patience - time.monotonic()) > 0:
        for message in watcher.receive(left):
            if mark in message.payload:
                arrived[numbers[message.topic.rpartition("/")[2]]] = message.at
    publisher.confirm(len(some))
    return sent, arrived
