"""A network that misbehaves between a daemon and its broker, and a witness of who acknowledged what.

It reads MQTT 5 as far as it takes to know where a packet ends, what a publication holds and which of them an
acknowledgement is for.
"""

import asyncio
import random
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, field

PUBLISH, PUBACK = 3, 4
DUP = 0x08
FAILURE = 0x80
"""Reason codes from here on say no."""
PACKETS = 1000
"""Packets on their way in one direction: beyond it nothing more is read."""
FAR = 1 << 15
"""How far the number of a copy is from that of a publication, so that a broker does not come to use it."""
END = b""
"""In the place of a packet: the sender hung up."""
CUT_SECONDS = 1.0
"""How long a cut waits for a packet that it can tear."""


@dataclass(frozen=True, slots=True)
class Publication:
    """A PUBLISH of QoS 1: its number on this connection, topic and payload."""

    mid: int
    topic: str
    payload: bytes


def packets(buffer: bytearray) -> Iterator[bytes]:
    """Take whole packets out of what has come."""
    while len(buffer) >= 2:
        length, at = _varint(buffer, 1)
        if at < 0 or len(buffer) < at + length:
            return
        raw = bytes(buffer[: at + length])
        del buffer[: at + length]
        yield raw


def _varint(data: bytes | bytearray, at: int) -> tuple[int, int]:
    """The number at a place, and the place behind it; -1 for one that is not whole."""
    value = 0
    for k in range(4):
        if at + k >= len(data):
            return 0, -1
        value |= (data[at + k] & 0x7F) << 7 * k
        if not data[at + k] & 0x80:
            return value, at + k + 1
    raise ValueError("a length of more than four bytes is not MQTT")


def publication(raw: bytes) -> Publication | None:
    """What a packet publishes with QoS 1; None for any other packet."""
    if raw[0] >> 4 != PUBLISH or raw[0] >> 1 & 3 != 1:
        return None
    _, at = _varint(raw, 1)
    end = at + 2 + int.from_bytes(raw[at : at + 2], "big")
    length, properties = _varint(raw, end + 2)
    return Publication(
        int.from_bytes(raw[end : end + 2], "big"), raw[at + 2 : end].decode(), raw[properties + length :]
    )


def acknowledged(raw: bytes) -> tuple[int, bool] | None:
    """The number that a PUBACK is for, and whether it says yes; None for any other packet."""
    if raw[0] >> 4 != PUBACK:
        return None
    _, at = _varint(raw, 1)
    code = raw[at + 2] if len(raw) > at + 2 else 0
    return int.from_bytes(raw[at : at + 2], "big"), code < FAILURE


def copy(raw: bytes, mid: int) -> bytes:
    """The same publication once more, marked as a duplicate, under a number."""
    _, at = _varint(raw, 1)
    place = at + 2 + int.from_bytes(raw[at : at + 2], "big")
    return bytes([raw[0] | DUP]) + raw[1:place] + mid.to_bytes(2, "big") + raw[place + 2 :]


@dataclass(slots=True)
class Weather:
    """How the network is now.

    A packet is late by up to `delay` seconds; `rate` bytes a second pass (0: all that come). A publication is
    doubled with the probability `to_daemon` or `to_broker`, or sent to the daemon again some time `later`.
    """

    delay: float = 0.0
    rate: int = 0
    to_daemon: float = 0.0
    to_broker: float = 0.0
    later: float = 0.0


@dataclass(frozen=True, slots=True)
class Told:
    """A publication that its receiver acknowledged, and when (seconds, monotonic)."""

    time: float
    topic: str
    payload: bytes


class Way:
    """One direction of a connection: packets in order, each when it is due.

    The state is what is on its way, when the last of it is due, the publications that the receiver has not
    acknowledged, how many acknowledgements of copies are to be kept from the sender, by number, and the
    newest publications, of which one may be sent again.
    """

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer
        self.queue: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(PACKETS)
        self.due = 0.0
        self.open: dict[int, Publication] = {}
        self.extra: Counter[int] = Counter()
        self.recent: list[tuple[int, bytes]] = []


@dataclass(eq=False)
class Line:
    """One connection of a daemon: up is to the broker. `torn` is the way whose next packet is cut in two."""

    up: Way
    down: Way
    torn: Way | None = None
    silent: bool = False
    ended: asyncio.Event = field(default_factory=asyncio.Event)
    work: list[asyncio.Task[None]] = field(default_factory=list)

    def abort(self) -> None:
        """End it at once on both sides."""
        self.ended.set()
        for way in (self.up, self.down):
            way.writer.transport.abort()
        for task in self.work:
            if task is not asyncio.current_task():
                task.cancel()


class Proxy:
    """Listens where the daemon looks for its broker.

    `taken` is what the daemon acknowledged, `delivered` what the broker acknowledged to it. `done` counts
    what was done to packets.
    """

    def __init__(self, broker: int, seed: int) -> None:
        self.weather = Weather()
        self.taken: list[Told] = []
        self.delivered: list[Told] = []
        self.done: Counter[str] = Counter()
        self.flowing = asyncio.Event()
        self.flowing.set()
        self.port = 0
        self._broker = broker
        self._dice = random.Random(seed)
        self._lines: list[Line] = []
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        """Listen, from the second time on where it did before."""
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, reuse_address=True)
        self.port = self._server.sockets[0].getsockname()[1]

    async def refuse(self) -> None:
        """Refuse connections until it is opened again, and end those that there are."""
        if self._server is not None:
            self._server.close()
            self._server = None
        for line in self._lines:
            line.abort()

    async def cut(self, to_daemon: bool) -> bool:
        """End the newest connection in the middle of its next packet; say whether there was one to end."""
        line = self._newest()
        if line is None:
            return False
        line.torn = line.down if to_daemon else line.up
        with suppress(TimeoutError):
            async with asyncio.timeout(CUT_SECONDS):
                await line.ended.wait()
        line.abort()
        return True

    async def fall_silent(self, seconds: float) -> bool:
        """Swallow what the newest connection sends; say whether the daemon gave it up in that time."""
        line = self._newest()
        if line is None:
            return True
        line.silent = True
        with suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await line.ended.wait()
        noticed = line.ended.is_set()
        line.abort()
        return noticed

    def _newest(self) -> Line | None:
        return next((line for line in reversed(self._lines) if not line.ended.is_set()), None)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            from_broker, to_broker = await asyncio.open_connection("127.0.0.1", self._broker)
        except OSError:
            writer.transport.abort()
            return
        line = Line(Way(reader, to_broker), Way(from_broker, writer))
        self._lines = [*(other for other in self._lines if not other.ended.is_set()), line]
        for way in (line.up, line.down):
            for work in (self._read(line, way), self._write(line, way)):
                line.work.append(asyncio.create_task(work))

    async def _read(self, line: Line, way: Way) -> None:
        buffer = bytearray()
        with suppress(OSError):
            while data := await way.reader.read(1 << 16):
                if line.silent:
                    continue
                buffer += data
                for raw in packets(buffer):
                    for one in self._pass(line, way, raw):
                        late = self._dice.uniform(0, self.weather.delay)
                        way.due = max(way.due, time.monotonic() + late)
                        self.done["packets late"] += late > 0
                        await way.queue.put((way.due, one))
        if line.silent and way is line.down:
            return  # a broker that hangs up is not heard of, either
        await way.queue.put((way.due, END))

    async def _write(self, line: Line, way: Way) -> None:
        with suppress(OSError):
            while not line.ended.is_set():
                due, raw = await way.queue.get()
                await asyncio.sleep(max(0.0, due - time.monotonic()))
                await self.flowing.wait()
                if line.silent and raw is not END:
                    continue
                if line.torn is way or raw is END:
                    way.writer.write(raw[: len(raw) // 2])
                    way.writer.close()
                    await way.writer.wait_closed()
                    self.done["packets torn"] += raw is not END
                    break
                way.writer.write(raw)
                await way.writer.drain()
                if rate := self.weather.rate:
                    await asyncio.sleep(len(raw) / rate)
        line.abort()

    def _pass(self, line: Line, way: Way, raw: bytes) -> Iterator[bytes]:
        """What goes on of a packet: it, copies of it, or nothing."""
        down, back = way is line.down, line.up if way is line.down else line.down
        if (told := publication(raw)) is not None:
            way.open[told.mid] = told
            yield raw
            if self._dice.random() < (self.weather.to_daemon if down else self.weather.to_broker):
                way.extra[told.mid] += 1
                self.done["doubled to the daemon" if down else "doubled to the broker"] += 1
                yield copy(raw, told.mid)
            if down:
                yield from self._again(way, told.mid, raw)
        elif (answer := acknowledged(raw)) is not None:
            mid, yes = answer
            if (meant := back.open.pop(mid, None)) is not None:
                if yes:
                    (self.delivered if down else self.taken).append(
                        Told(time.monotonic(), meant.topic, meant.payload)
                    )
                yield raw
            elif back.extra[mid]:
                back.extra[mid] -= 1
            else:
                yield raw
        else:
            yield raw

    def _again(self, way: Way, mid: int, raw: bytes) -> Iterator[bytes]:
        """Send something older once more, under a number that is nobody's."""
        way.recent = [*way.recent[-50:], (mid, raw)]
        if self._dice.random() < self.weather.later:
            older, packet = self._dice.choice(way.recent)
            free = (older + FAR) % 65535 + 1
            if not way.extra[free]:
                way.extra[free] += 1
                self.done["sent to the daemon again"] += 1
                yield copy(packet, free)
