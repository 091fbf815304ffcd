"""A broker in memory, under the daemon's own link: sessions, acknowledgements, and all that a network does.

`Client` and `Paho` stand in for aiomqtt's client and the paho client inside it, as far as the link uses them.
A connection is two pipes, each in order; packets on the way are lost with it, or some of them arrive.
"""

import asyncio
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from random import Random
from typing import Any

import aiomqtt
from paho.mqtt.client import MQTT_ERR_NO_CONN, MQTT_ERR_SUCCESS

from barcast.daemon.mqtt import TAKEN_OVER
from tests.simulation.loop import VirtualLoop

REFUSALS = (0x97, 0x87, 0x80)
"""Reasons for which a publication is refused: quota exceeded, not authorised, unspecified."""


class Properties:
    """Stands in for paho's properties: it has what is set, and checks nothing."""

    def __init__(self, _packet: object) -> None:
        """Hold nothing yet."""


@dataclass(frozen=True, slots=True)
class Code:
    """A reason code."""

    value: int

    @property
    def is_failure(self) -> bool:
        """Whether it is a refusal."""
        return self.value >= 0x80


@dataclass(slots=True)
class Stored:
    """A message for a session. `number` counts them: each is one delivery to be acknowledged."""

    number: int
    topic: str
    payload: bytes
    properties: Any
    expires: float | None


@dataclass(slots=True)
class Packet:
    """A message as paho hands it out."""

    topic: str
    payload: bytes
    mid: int
    qos: int
    properties: Any


@dataclass(slots=True)
class Info:
    """What paho says of a publication."""

    rc: int
    mid: int


@dataclass(frozen=True, slots=True)
class Published:
    """A message that the broker took from the daemon, when, and who sent it."""

    time: float
    topic: str
    payload: bytes
    retain: bool
    acknowledged: bool


class Pipe:
    """One direction of a connection: what is put in comes out in order, after a while."""

    def __init__(self, loop: VirtualLoop, latency: Callable[[], float]) -> None:
        self.waiting: deque[Callable[[], None]] = deque()
        self.open = True
        self._loop, self._latency, self._last = loop, latency, 0.0

    def put(self, arrives: Callable[[], None]) -> None:
        """Send something."""
        if self.open:
            self._last = max(self._last, self._loop.time() + self._latency())
            self.waiting.append(arrives)
            self._loop.call_at(self._last, self._next)

    def _next(self) -> None:
        if self.waiting:
            self.waiting.popleft()()

    def cut(self, some: int) -> None:
        """Close it; the first of what is on the way still arrives."""
        self.open = False
        for _ in range(min(some, len(self.waiting))):
            self.waiting.popleft()()
        self.waiting.clear()


class Paho:
    """The paho client inside a client, as far as the link uses it."""

    def __init__(self, client: "Client") -> None:
        self.on_message: Callable[..., None] = lambda *_: None
        self.on_publish: Callable[..., None] = lambda *_: None
        self.loop_write: Callable[[], int] = lambda: 0
        self._client, self._mid = client, 0

    def is_connected(self) -> bool:
        """Whether no end of the connection is known."""
        return not self._client._disconnected.done()

    def manual_ack_set(self, _on: bool) -> None:
        """It is by hand here."""

    def ack(self, mid: int, _qos: int) -> None:
        """Acknowledge a message."""
        client = self._client
        client.broker.acknowledged(client, mid)
        client.up.put(lambda: client.broker.take_ack(client, mid))

    def publish(self, topic: str, payload: bytes, _qos: int, retain: bool, properties: Any) -> Info:
        """Send a message, unless the connection is known to be gone."""
        client = self._client
        if client._disconnected.done():
            return Info(MQTT_ERR_NO_CONN, 0)
        self._mid += 1
        mid = self._mid
        client.up.put(lambda: client.broker.take(client, mid, topic, payload, retain, properties))
        return Info(MQTT_ERR_SUCCESS, mid)

    def disconnect(self, _reason: object = None) -> int:
        """Say good-bye."""
        self._client.broker.leave(self._client)
        return 0


class Client:
    """Stands in for `aiomqtt.Client`; the broker is that of the running loop.

    The state is the two pipes and, done once the client knows of it, the end of the connection.
    """

    def __init__(self, _host: str, _port: int, *, identifier: str, properties: Any, **_: Any) -> None:
        loop = asyncio.get_running_loop()
        assert isinstance(loop, VirtualLoop)
        self.broker: Broker = loop.broker  # type: ignore[attr-defined]
        self.identifier, self.most = identifier, properties.ReceiveMaximum
        self.up, self.down = Pipe(loop, self.broker.latency), Pipe(loop, self.broker.latency)
        self.live = self.dead = False
        self._disconnected: asyncio.Future[None] = loop.create_future()
        self._client = Paho(self)

    async def __aenter__(self) -> "Client":
        await self.broker.connect(self)
        return self

    async def __aexit__(self, *_: object) -> None:
        if not self._disconnected.done():
            self.broker.leave(self)
            self._disconnected.set_result(None)
        elif not self._disconnected.cancelled():
            self._disconnected.exception()

    async def subscribe(self, topics: Sequence[tuple[str, Any]]) -> list[Code]:
        """Subscribe and wait for the answer. Raise MqttError when the connection ends first."""
        answer: asyncio.Future[list[Code]] = asyncio.get_running_loop().create_future()
        self.up.put(lambda: self.broker.subscribe(self, [topic for topic, _ in topics], answer))
        await asyncio.wait([answer, self._disconnected], return_when=asyncio.FIRST_COMPLETED)
        if not answer.done():
            raise aiomqtt.MqttError("Disconnected during message iteration")
        return answer.result()

    def lose(self, error: Exception) -> None:
        """Notice that the connection is gone."""
        if not self._disconnected.done():
            self._disconnected.set_exception(error)
            self._disconnected.exception()


@dataclass
class Session:
    """What the broker keeps of a client between its connections."""

    filters: set[str] = field(default_factory=set)
    queue: deque[Stored] = field(default_factory=deque)
    unacked: dict[int, Stored] = field(default_factory=dict)
    client: Client | None = None
    mid: int = 0


@dataclass
class Weather:
    """What the broker and the network do at the moment; by default, what they should."""

    up: bool = True
    deaf: bool = False
    slow: bool = False
    refusing: float = 0.0
    silent: float = 0.0
    reordering: float = 0.0
    doubling: float = 0.0


class Broker:
    """Keeps sessions, and takes what the daemon publishes.

    The state is the sessions, the weather, all that was published, the numbers of the deliveries that were
    acknowledged by the daemon, whatever became of the packet, how often each message was handed to it, and
    what happened of which kind.
    """

    def __init__(self, loop: VirtualLoop, dice: Random, trace: Callable[[str], None]) -> None:
        self.weather = Weather()
        self.published: list[Published] = []
        self.acked: dict[int, Stored] = {}
        self.handed: Counter[tuple[str, bytes]] = Counter()
        self.happened: Counter[str] = Counter()
        self._loop, self._dice, self._trace = loop, dice, trace
        self._sessions: dict[str, Session] = {}
        self._number = 0

    def latency(self) -> float:
        """Seconds that a packet takes."""
        high = 4.0 if self.weather.slow else 0.05
        self.happened["packets slow"] += self.weather.slow
        return 0.001 + high * self._dice.random() ** 3

    # What a client does.

    async def connect(self, client: Client) -> None:
        """Accept a client, which takes its session over. Raise MqttError when nobody is there."""
        await asyncio.sleep(self.latency())
        if not self.weather.up:
            self.happened["connection refused"] += 1
            raise aiomqtt.MqttError("[Errno 111] Connection refused")
        session = self._sessions.setdefault(client.identifier, Session())
        if session.client is not None:
            self.cut(client.identifier, TAKEN_OVER)
        session.client, client.live = client, True
        self._trace(f"connected {len(session.unacked)} {len(session.queue)}")
        for mid, stored in session.unacked.items():
            self.happened["delivered again"] += 1
            self._send(client, stored, mid)
        self._pump(session)

    def subscribe(self, client: Client, topics: list[str], answer: "asyncio.Future[list[Code]]") -> None:
        """Grant all."""
        if client.live:
            self._sessions[client.identifier].filters.update(topics)
            client.down.put(lambda: answer.done() or answer.set_result([Code(1) for _ in topics]))

    def take(
        self, client: Client, mid: int, topic: str, payload: bytes, retain: bool, properties: Any
    ) -> None:
        """Take a publication and answer, or refuse it, or lose it."""
        dice, weather = self._dice, self.weather
        user = dict(getattr(properties, "UserProperty", ()))
        expiry = getattr(properties, "MessageExpiryInterval", None)
        code = Code(0)
        if weather.refusing and "canary" not in user and dice.random() < weather.refusing:
            self.happened["publication refused"] += 1
            code = Code(dice.choice(REFUSALS))
        silent = bool(weather.silent) and dice.random() < weather.silent
        if not code.is_failure:
            # An answer that does not come is one to a connection that ends.
            self.published.append(Published(self._loop.time(), topic, payload, retain, not silent))
            self._trace(f"published {topic} {hash_of(payload)}")
            self.route(topic, payload, properties, expiry)
        if silent:
            self.happened["answer lost"] += 1
            self.cut(client.identifier)
            return
        paho = client._client
        client.down.put(lambda: paho.on_publish(paho, None, mid, code, None))

    def acknowledged(self, client: Client, mid: int) -> None:
        """Note that the daemon acknowledges a delivery."""
        stored = self._sessions[client.identifier].unacked.get(mid)
        if stored is not None and not client.dead:
            self.acked[stored.number] = stored

    def take_ack(self, client: Client, mid: int) -> None:
        """Forget a delivery that was acknowledged, and go on."""
        session = self._sessions[client.identifier]
        if session.client is client:
            session.unacked.pop(mid, None)
            self._pump(session)

    def leave(self, client: Client) -> None:
        """A client ends its connection."""
        session = self._sessions.get(client.identifier)
        client.up.cut(len(client.up.waiting))
        client.down.cut(0)
        client.live = False
        if session is not None and session.client is client:
            session.client = None

    # What the world does.

    def route(self, topic: str, payload: bytes, properties: Any = None, expiry: int | None = None) -> None:
        """Put a message into the sessions that want it."""
        for session in self._sessions.values():
            if not any(_matches(wanted, topic) for wanted in session.filters):
                continue
            if self.weather.deaf:
                self.happened["kept from the deaf"] += 1
                continue
            for _ in range(1 + (bool(self.weather.doubling) and self._dice.random() < self.weather.doubling)):
                self._number += 1
                expires = None if expiry is None else self._loop.time() + expiry
                session.queue.append(Stored(self._number, topic, payload, properties, expires))
            self._pump(session)

    def cut(self, identifier: str, reason: int | None = None, notice: float = 0.0) -> None:
        """End a connection; its client notices after so many seconds. What is on the way may be lost."""
        session = self._sessions.get(identifier)
        if session is None or session.client is None:
            return
        client, session.client = session.client, None
        client.up.cut(self._dice.randrange(3))
        client.live = False
        client.down.cut(self._dice.randrange(3))
        error: aiomqtt.MqttError = aiomqtt.MqttError("Unexpected disconnection")
        if reason is not None:
            error = aiomqtt.MqttCodeError(Code(reason), "taken over")  # type: ignore[arg-type]
        self._trace(f"cut {reason}")
        self._loop.call_later(notice, client.lose, error)

    def silence(self, identifier: str) -> None:
        """The process behind a connection is gone: nothing that it does counts any more."""
        session = self._sessions.get(identifier)
        if session is not None and session.client is not None:
            session.client.dead = True
            self.cut(identifier)

    def forget(self, identifier: str) -> None:
        """Lose a session with all that waits in it."""
        self.cut(identifier)
        session = self._sessions.get(identifier)
        if session is not None:
            session.queue.clear()
            session.unacked.clear()
            session.mid = 0

    def connected(self, identifier: str) -> bool:
        """Whether a client has a connection."""
        session = self._sessions.get(identifier)
        return session is not None and session.client is not None

    def waiting(self, identifier: str) -> int:
        """Messages that wait for a client, or for its acknowledgement."""
        session = self._sessions.get(identifier)
        return 0 if session is None else len(session.queue) + len(session.unacked)

    def _pump(self, session: Session) -> None:
        """Send what the client may have; out of order across topics, never within one."""
        client, queue = session.client, session.queue
        while client is not None and queue and len(session.unacked) < client.most:
            at = 0
            if self.weather.reordering and len(queue) > 1 and self._dice.random() < self.weather.reordering:
                heads: dict[str, int] = {}
                for k, stored in enumerate(queue):
                    heads.setdefault(stored.topic, k)
                at = self._dice.choice(list(heads.values()))
                self.happened["reordered"] += at > 0
            stored = queue[at]
            del queue[at]
            if stored.expires is not None and stored.expires <= self._loop.time():
                continue
            session.mid = session.mid % 65535 + 1
            session.unacked[session.mid] = stored
            self._send(client, stored, session.mid)

    def _send(self, client: Client, stored: Stored, mid: int) -> None:
        paho = client._client

        def arrives() -> None:
            self.handed[stored.topic, stored.payload] += 1
            paho.on_message(paho, None, Packet(stored.topic, stored.payload, mid, 1, stored.properties))

        client.down.put(arrives)


def _matches(wanted: str, topic: str) -> bool:
    """Whether a filter of the daemon's matches a topic."""
    head, _, tail = wanted.rpartition("/")
    if not topic.startswith(f"{head}/"):
        return False
    return tail == "#" or "/" not in topic.removeprefix(f"{head}/")


def hash_of(payload: bytes) -> int:
    """A number that is the same in every process."""
    return sum(payload) * 31 + len(payload)
