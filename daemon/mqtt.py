"""The broker as a source of bars and a sink of signals: MQTT 5, persistent session, ack after commit.

aiomqtt connects and feeds paho from the event loop. Four things that it does not offer are taken from
the paho client inside it: acknowledging by hand, the reason code of a PUBACK, messages without a task
for each, and reading before writing. They are set before connecting, because a broker sends the backlog of a
session at once.
"""

import asyncio
import math
import select
import socket
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import aiomqtt
import structlog
from paho.mqtt.client import MQTT_ERR_CONN_LOST, MQTT_ERR_NO_CONN, MQTT_ERR_SUCCESS, MQTTMessage
from paho.mqtt.client import Client as PahoClient
from paho.mqtt.enums import MQTTErrorCode
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.reasoncodes import ReasonCode
from paho.mqtt.subscribeoptions import SubscribeOptions

from barcast.daemon.wire import MOST_BYTES, Outgoing
from barcast.models import ConfigError

RECEIVE_MAXIMUM = 1000
"""Messages the broker may have sent and not seen acknowledged: beyond it, it waits for us."""
SESSION_SECONDS = 7 * 86_400
"""How long the broker keeps our session, and queues bars for it, while we are away."""
GONE = (MQTT_ERR_NO_CONN, MQTT_ERR_CONN_LOST)
LASTING_SECONDS = 10.0
"""A connection that ends sooner counts as a failure: two instances of one name evict each other."""
UNANSWERED = "the connection ended before the broker had answered"
NOT_CONNECTED = "not connected"
"""The fault of a publication that was not refused: it may be sent again."""
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)
NO_BARS = b"[]"
"""An array without bars: whoever takes bars may take it, and nothing comes of it."""
OPERATOR_PROPERTY = "operator"
"""The MQTT user property by which a request says whose it is. Nothing proves it."""
CANARY_PROPERTY = "canary"
"""The MQTT user property that marks a canary; its value is the boot that sent it."""
HEAR_SECONDS = 10.0
"""How long a canary may take to come back; then the next one is sent."""
INBOX = 100_000
"""Messages that may wait before more of QoS 0 are dropped. Of QoS 1, the broker holds back the rest."""
INBOX_BYTES = 64_000_000
"""Bytes of payload that may wait before more of QoS 0 are dropped."""
LONGEST_PACKET = 2 * MOST_BYTES
"""Bytes of a packet: what is longer, a broker keeps from us.

It is the broker's own limit in `deploy/`, and not less, as mosquitto disconnects who sends with QoS 1 what it
may not pass on: a dead letter is the better answer.
"""
SHED_SECONDS = 5.0
"""How long dropped messages are counted before the log says how many."""
AT_ONCE = (socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
"""Socket option: otherwise a small packet waits 40 ms for the TCP ACK of the one before it."""
TAKEN_OVER = 0x8E
"""The reason of a broker that closes a connection because another one has the same client id."""
CUT_SHORT = 3
"""Connections in a row that end too soon, after which the log names the likely cause."""

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Address:
    """Where the broker is and who we are there."""

    host: str
    port: int
    client_id: str
    username: str | None = None
    password: str | None = field(default=None, repr=False)
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Canary:
    """An array without bars, sent to a topic of the subscription: when it comes back, we hear.

    `boot` marks it in a user property.
    """

    topic: str
    boot: str


@dataclass(frozen=True, slots=True)
class Request:
    """What came with a message that is to be answered.

    That is the topic for answers (None: it named none), and by what its sender knows them; who it claims to
    be from; whether the broker keeps it for each new connection; and when it is of no use any more (seconds
    on the event loop's clock, None: never).
    """

    answers: str | None
    correlation: bytes
    claims: str
    retained: bool
    expires: float | None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the broker, waiting to be acknowledged on the connection that it came by.

    A canary, ours or that of another daemon, and a `request`, which was handed out when it came, are only to
    be acknowledged in their turn.
    """

    topic: str
    payload: bytes
    mid: int
    qos: int
    connection: int
    canary: bool = False
    request: Request | None = None


class Link:
    """One lasting connection: connects again after every loss, and never acknowledges on its own.

    A broker may grant a subscription that its access list forbids, and then deliver nothing. With a canary
    the link finds out: it is `deaf` from when nothing came back until something does. The broker keeps our
    session for `session` seconds while we are away.

    The state is the client that receives, the same client once it has its subscriptions and may publish (None
    while there is none), the number of the connection, whether anything came by it, whether that is known by
    now (`greeted`), why there was no broker the last time (`fault`), the deliveries that wait to be taken and
    the sizes of those and of some that were taken, the publications that wait for their PUBACK, how many
    messages of QoS 0 were dropped and of how many the log told, and what was said that is said once. What
    is `permitted` is awaited before each connection.
    """

    def __init__(
        self,
        address: Address,
        subscriptions: Sequence[str],
        will: Outgoing | None,
        canary: Canary | None = None,
        session: int = SESSION_SECONDS,
    ) -> None:
        self.inbox: deque[Delivery] = deque()
        self.arrived = asyncio.Event()
        self.connected = asyncio.Event()
        self.connection = 0
        self.greeted = self.deaf = False
        self.fault = "connecting"
        self.permitted: Callable[[], Awaitable[None]] = _at_once
        self.shed = 0
        self._address, self._subscriptions, self._will = address, subscriptions, will
        self._canary = canary
        # Without subscriptions there is nothing to keep between connections.
        self._session = session if subscriptions else 0
        self._receiving: aiomqtt.Client | None = None
        self._client: aiomqtt.Client | None = None
        self._leaving = False
        self._heard = asyncio.Event()
        self._sizes: deque[int] = deque()
        self._bytes = 0
        self._waiting: dict[int, asyncio.Future[str | None]] = {}
        self._shed_told = 0
        self._said: set[str] = set()
        self._requests = ""
        self._hand_out: Callable[[Delivery], None] | None = None

    async def run(self, on_connect: Callable[[], Coroutine[None, None, None]]) -> None:
        """Keep the connection until cancelled; call `on_connect` after each subscription.

        With a canary it is called once it is known whether the link is deaf, and again when it hears.
        A cancellation without `leave` is a fault of ours: the broker is told to publish the last will.
        Raise ConfigError when the broker refuses a subscription.
        """
        failures = cut_short = 0
        while True:
            await self.permitted()
            began = asyncio.get_running_loop().time()
            try:
                async with self._open() as client:
                    await self._serve(client, on_connect)
            except aiomqtt.MqttError as error:
                address = f"{self._address.host}:{self._address.port}"
                log.warning("broker_unreachable", broker=address, reason=str(error))
                self.fault = str(error)
                cut_short = -1
            finally:
                self._lost()
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise asyncio.CancelledError
            lasted = asyncio.get_running_loop().time() - began
            failures = 0 if lasted > LASTING_SECONDS else failures + 1
            cut_short = 0 if lasted > LASTING_SECONDS else cut_short + 1
            if cut_short == CUT_SHORT:
                # Not every broker gives the reason: mosquitto 2.0 just closes.
                reason = f"{CUT_SHORT} connections in a row were closed within {LASTING_SECONDS:.0f} s"
                self._contested("connections_cut_short", reason)
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])

    def requests(self, prefix: str, hand_out: Callable[[Delivery], None]) -> None:
        """Hand out messages under topics that begin with `prefix` as they come; they must be subscribed to.

        Each waits in the inbox as well, to be acknowledged in its turn.
        """
        self._requests, self._hand_out = prefix, hand_out

    def leave(self) -> None:
        """Expect the end: the next cancellation says good-bye to the broker, without the last will."""
        self._leaving = True

    async def _serve(
        self, client: aiomqtt.Client, on_connect: Callable[[], Coroutine[None, None, None]]
    ) -> None:
        """Subscribe, and stay until the connection ends."""
        if not client._client.is_connected():
            raise aiomqtt.MqttError(UNANSWERED)  # between its answer and now; aiomqtt forgets such an end
        if self._subscriptions:
            for topic, code in zip(self._subscriptions, await self._subscribe(client), strict=True):
                if getattr(code, "value", code) != 1:
                    raise ConfigError(
                        f"mqtt: the broker does not grant {topic!r} with QoS 1 but answers {code}; "
                        "let its access list allow it"
                    )
        self._client = client
        self.connected.set()
        log.info("broker_connected", host=self._address.host, port=self._address.port)
        greeting = asyncio.create_task(self._greet(on_connect), name="greeting")
        try:
            await asyncio.wait([client._disconnected])
            reason = client._disconnected.exception()
            log.warning("broker_lost", reason=str(reason))
            self.fault = str(reason)
            if isinstance(reason, aiomqtt.MqttCodeError) and getattr(reason.rc, "value", None) == TAKEN_OVER:
                self._contested("session_taken_over", "the broker gave the session to another connection")
        except asyncio.CancelledError:
            if not self._leaving:
                client._client.disconnect(ReasonCode(PacketTypes.DISCONNECT, identifier=0x04))
            raise
        finally:
            self._lost()
            greeting.cancel()

    async def _subscribe(self, client: aiomqtt.Client) -> Sequence[object]:
        """What the broker grants; an end of the connection ends the wait for it, too."""
        options = SubscribeOptions(qos=1, retainAsPublished=True)
        granted = asyncio.ensure_future(client.subscribe([(topic, options) for topic in self._subscriptions]))
        either: list[asyncio.Future[Any]] = [granted, client._disconnected]
        try:
            await asyncio.wait(either, return_when=asyncio.FIRST_COMPLETED)
            if not granted.done():
                raise aiomqtt.MqttError(f"{UNANSWERED}: {client._disconnected.exception()}")
            return granted.result()
        finally:
            granted.cancel()

    async def _greet(self, on_connect: Callable[[], Coroutine[None, None, None]]) -> None:
        """Call `on_connect` when it is known whether anything is heard, and again when a deaf link hears."""
        self.deaf = not await self._hears()
        self.greeted = True
        if self.deaf:
            filters = ", ".join(self._subscriptions)
            log.error(
                "subscription_denied",
                topic=filters,
                reason=f"nothing came by it within {HEAR_SECONDS:.0f} s, not even what we sent ourselves",
                remedy=f"let the broker's access list allow this user to read {filters}",
            )
            await on_connect()
            while self.deaf:
                self.deaf = not await self._hears()
            log.info("subscription_heard", topic=filters)
        await on_connect()

    async def _hears(self) -> bool:
        """Send a canary and wait for any delivery. True as well where no canary may be sent."""
        if self._canary is None:
            return True
        topic, boot = self._canary.topic, self._canary.boot
        # It expires, so that it does not wait in the queue of a daemon that is away.
        canary = Outgoing("", topic, NO_BARS, retain=False, expires=int(HEAR_SECONDS * 1e9))
        fault = await self.publish(canary, 0, [(CANARY_PROPERTY, boot)])
        if fault not in (None, NOT_CONNECTED):
            self._say_once(
                log.info,
                "canary_refused",
                topic=topic,
                reason=fault,
                remedy=f"to have it checked that bars can be read, let this user write {topic}, too",
            )
            return True
        with suppress(TimeoutError):
            async with asyncio.timeout(HEAR_SECONDS):
                await self._heard.wait()
        return self._heard.is_set()

    def _contested(self, event: str, reason: str) -> None:
        """Name what two daemons of one instance name do: each takes session and bars from the other."""
        self._say_once(
            log.warning,
            event,
            client_id=self._address.client_id,
            reason=reason,
            remedy="if two daemons have this instance name, stop one of them or give it another `instance`",
        )

    def _say_once(self, level: Callable[..., None], event: str, **what: str) -> None:
        """Log what would only be repeated at each connection."""
        if event not in self._said:
            self._said.add(event)
            level(event, **what)

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge in the order given; one of an earlier connection will be sent again by the broker."""
        if self._receiving is not None:
            for delivery in deliveries:
                if delivery.connection == self.connection and delivery.qos:
                    self._receiving._client.ack(delivery.mid, delivery.qos)

    async def publish(
        self,
        message: Outgoing,
        now: int,
        properties: Sequence[tuple[str, str]] = (),
        *,
        answers: str | None = None,
        correlation: bytes = b"",
    ) -> str | None:
        """Publish with QoS 1 and wait for the broker; return None on success, else what was wrong.

        A request names the topic of its `answers`, and a `correlation` that each of them repeats.
        """
        if self._client is None:
            return NOT_CONNECTED
        extra = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        extra.ContentType = "application/json"
        if properties:
            extra.UserProperty = list(properties)
        if answers is not None:
            extra.ResponseTopic = answers
        if correlation:
            extra.CorrelationData = correlation
        if message.expires is not None:
            extra.MessageExpiryInterval = min(max(1, math.ceil((message.expires - now) / 1e9)), 0xFFFFFFFF)
        info = self._client._client.publish(message.topic, message.payload, 1, message.retain, extra)
        if info.rc != MQTT_ERR_SUCCESS:
            return NOT_CONNECTED if info.rc in GONE else f"paho error {info.rc}"
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting[info.mid] = answer
        return await answer

    def _open(self) -> aiomqtt.Client:
        if len(self.inbox) > RECEIVE_MAXIMUM:
            self._forget_copies()
        self.connection += 1
        self._heard.clear()
        a = self._address
        connect = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        connect.SessionExpiryInterval = self._session
        connect.ReceiveMaximum = RECEIVE_MAXIMUM
        connect.MaximumPacketSize = LONGEST_PACKET
        w = self._will
        will = None if w is None else aiomqtt.Will(w.topic, w.payload, 1, w.retain)
        client = aiomqtt.Client(
            a.host,
            a.port,
            username=a.username,
            password=a.password,
            identifier=a.client_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=not self._session,
            properties=connect,
            will=will,
            tls_context=a.tls,
            keepalive=20,
            timeout=10,
            socket_options=[AT_ONCE],
        )
        paho = client._client
        paho.manual_ack_set(True)
        paho.on_message = partial(self._on_message, self.connection)
        paho.on_publish = self._on_publish
        paho.on_disconnect = partial(_on_disconnect, client)
        paho.loop_write = partial(_read_and_write, paho, paho.loop_write)  # type: ignore[method-assign]
        # The backlog of a session may come, be committed and be acknowledged before the subscription is
        # granted: what is not acknowledged then takes room in its window for as long as we are connected.
        self._receiving = client
        return client

    def _forget_copies(self) -> None:
        """Keep the last of deliveries that came again, so that no number of connections fills the memory.

        While nothing can be taken, each connection brings all that was not acknowledged once more.
        """
        last = {(d.mid, d.topic, d.payload): d for d in self.inbox if d.qos}
        self.inbox = deque(d for d in self.inbox if not d.qos or last[d.mid, d.topic, d.payload] is d)
        self._sizes = deque(len(d.payload) for d in self.inbox)
        self._bytes = sum(self._sizes)

    def _on_message(self, connection: int, _client: object, _userdata: object, message: MQTTMessage) -> None:
        topic, request = message.topic, None
        if not self._heard.is_set() and self._proves_hearing(topic):
            self._heard.set()
        while len(self._sizes) > len(self.inbox):  # they were taken, in their order
            self._bytes -= self._sizes.popleft()
        if message.qos == 0 and (len(self.inbox) >= INBOX or self._bytes >= INBOX_BYTES):
            self._drop()
            return
        self._sizes.append(len(message.payload))
        self._bytes += self._sizes[-1]
        canary = message.payload == NO_BARS and _is_canary(message)
        if self._hand_out is not None and topic.startswith(self._requests):
            request = _request(message)
        delivery = Delivery(
            topic, bytes(message.payload), message.mid, message.qos, connection, canary, request
        )
        if self._hand_out is not None and request is not None:
            self._hand_out(delivery)
        self.inbox.append(delivery)
        self.arrived.set()

    def _proves_hearing(self, topic: str) -> bool:
        """Bars do; what comes by another subscription says nothing about theirs."""
        return self._canary is None or topic.startswith(self._canary.topic)

    def _drop(self) -> None:
        """Count a message of QoS 0 that finds no room: nothing holds back who sends it."""
        if self.shed == self._shed_told:
            asyncio.get_running_loop().call_later(SHED_SECONDS, self._tell_shed)
        self.shed += 1

    def _tell_shed(self) -> None:
        dropped, self._shed_told = self.shed - self._shed_told, self.shed
        if dropped:
            log.warning(
                "qos0_shed",
                count=dropped,
                waiting=len(self.inbox),
                remedy="publish bars with QoS 1: then the broker holds them until they are taken",
            )

    def _on_publish(
        self, _client: object, _userdata: object, mid: int, code: Any, _properties: object
    ) -> None:
        answer = self._waiting.pop(mid, None)
        if answer is not None and not answer.done():
            refusal = f"refused by the broker: {code} (reason code 0x{code.value:02X})"
            answer.set_result(refusal if code.is_failure else None)

    def _lost(self) -> None:
        self._receiving = self._client = None
        self._tell_shed()
        self.connected.clear()
        self.greeted = False
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(NOT_CONNECTED)
        self._waiting.clear()


def _on_disconnect(client: aiomqtt.Client, paho: PahoClient, *what: Any) -> None:
    """Let who waits for the broker's answer know that none will come: aiomqtt would wait its time out."""
    if not client._connected.done():
        client._connected.set_exception(aiomqtt.MqttError(UNANSWERED))
    client._on_disconnect(paho, *what)


async def _at_once() -> None:
    """Nothing is to be awaited."""


def _is_canary(message: MQTTMessage) -> bool:
    given = getattr(message.properties, "UserProperty", ())
    return any(name == CANARY_PROPERTY for name, _ in given)


def _request(message: MQTTMessage) -> Request:
    p = message.properties
    expiry = getattr(p, "MessageExpiryInterval", None)
    return Request(
        getattr(p, "ResponseTopic", None),
        bytes(getattr(p, "CorrelationData", b"")),
        next((value for name, value in getattr(p, "UserProperty", ()) if name == OPERATOR_PROPERTY), ""),
        message.retain,
        None if expiry is None else asyncio.get_running_loop().time() + expiry,
    )


def _read_and_write(client: PahoClient, write: Callable[[], MQTTErrorCode]) -> MQTTErrorCode:
    """Read what has come, then write.

    Writing to a broker that died closes the connection, and with it goes what it had sent before: bars that a
    feed was told are safe.
    """
    taken = 0
    while (sock := client.socket()) is not None and _unread(sock, taken < RECEIVE_MAXIMUM):
        client.loop_read()
        taken += 1
    return write()


def _unread(sock: Any, more: bool) -> bool:
    """Whether there is something to read, on the wire if `more`; TLS has decrypted it already, or not."""
    if isinstance(sock, ssl.SSLSocket) and sock.pending():
        return True
    waiting = select.poll()
    waiting.register(sock, select.POLLIN)
    return more and bool(waiting.poll(0))
