"""The broker as a source of bars and a sink of signals: MQTT 5, persistent session, ack after commit.

aiomqtt connects and feeds paho from the event loop. Three things that it does not offer are taken from
the paho client inside it: acknowledging by hand, the reason code of a PUBACK, and messages without a task
for each. They are set before connecting, because a broker sends the backlog of a session at once.
"""

import asyncio
import math
import ssl
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import aiomqtt
import structlog
from paho.mqtt.client import MQTT_ERR_SUCCESS, MQTTMessage
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties
from paho.mqtt.subscribeoptions import SubscribeOptions

from barcast.daemon.wire import Outgoing

RECEIVE_MAXIMUM = 1000
"""Messages the broker may have sent and not seen acknowledged: beyond it, it waits for us."""
SESSION_SECONDS = 7 * 86_400
"""How long the broker keeps our session, and queues bars for it, while we are away."""
PUBLISH_WINDOW = 64
"""Publications under way at once."""
NOT_CONNECTED = "not connected"
"""The fault of a publication that was not refused: it may be sent again."""
RETRY_SECONDS = (0.2, 0.5, 1.0, 2.0, 5.0)

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Address:
    """Where the broker is and who we are there."""

    host: str
    port: int
    client_id: str
    username: str | None = None
    password: str | None = None
    tls: ssl.SSLContext | None = None


@dataclass(frozen=True, slots=True)
class Delivery:
    """A message from the broker, waiting to be acknowledged on the connection that it came by."""

    topic: str
    payload: bytes
    mid: int
    qos: int
    connection: int


class Link:
    """One lasting connection: connects again after every loss, and never acknowledges on its own.

    The state is the current client (None while there is none), the number of the connection, the
    deliveries that wait to be taken, and the publications that wait for their PUBACK.
    """

    def __init__(self, address: Address, subscriptions: Sequence[str], will: Outgoing | None) -> None:
        self.inbox: deque[Delivery] = deque()
        self.arrived = asyncio.Event()
        self.connected = asyncio.Event()
        self.connection = 0
        self._address, self._subscriptions, self._will = address, subscriptions, will
        self._client: aiomqtt.Client | None = None
        self._waiting: dict[int, asyncio.Future[str | None]] = {}

    async def run(self, on_connect: Callable[[], Awaitable[None]]) -> None:
        """Keep the connection until cancelled; call `on_connect` after each subscription."""
        failures = 0
        while True:
            try:
                async with self._open() as client:
                    self._client = client
                    if self._subscriptions:
                        options = SubscribeOptions(qos=1)
                        await client.subscribe([(topic, options) for topic in self._subscriptions])
                    self.connected.set()
                    failures = 0
                    log.info("broker_connected", host=self._address.host, port=self._address.port)
                    await on_connect()
                    await asyncio.wait([client._disconnected])
                    reason = client._disconnected.exception()
                    log.warning("broker_lost", reason=str(reason))
            except aiomqtt.MqttError as error:
                log.warning(
                    "broker_unreachable", host=self._address.host, port=self._address.port, reason=str(error)
                )
            finally:
                self._lost()
            await asyncio.sleep(RETRY_SECONDS[min(failures, len(RETRY_SECONDS) - 1)])
            failures += 1

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """Acknowledge in the order given; one of an earlier connection will be sent again by the broker."""
        if self._client is not None:
            for delivery in deliveries:
                if delivery.connection == self.connection and delivery.qos:
                    self._client._client.ack(delivery.mid, delivery.qos)

    async def publish(
        self, message: Outgoing, now: int, properties: Sequence[tuple[str, str]] = ()
    ) -> str | None:
        """Publish with QoS 1 and wait for the broker; return None on success, else what was wrong."""
        if self._client is None:
            return NOT_CONNECTED
        extra = Properties(PacketTypes.PUBLISH)  # type: ignore[no-untyped-call]
        extra.ContentType = "application/json"
        if properties:
            extra.UserProperty = list(properties)
        if message.expires is not None:
            extra.MessageExpiryInterval = min(max(1, math.ceil((message.expires - now) / 1e9)), 0xFFFFFFFF)
        info = self._client._client.publish(message.topic, message.payload, 1, message.retain, extra)
        if info.rc != MQTT_ERR_SUCCESS:
            return f"paho error {info.rc}"
        answer: asyncio.Future[str | None] = asyncio.get_running_loop().create_future()
        self._waiting[info.mid] = answer
        return await answer

    def _open(self) -> aiomqtt.Client:
        self.connection += 1
        a = self._address
        connect = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
        # Without subscriptions there is nothing to keep between connections.
        connect.SessionExpiryInterval = SESSION_SECONDS if self._subscriptions else 0
        connect.ReceiveMaximum = RECEIVE_MAXIMUM
        w = self._will
        will = None if w is None else aiomqtt.Will(w.topic, w.payload, 1, w.retain)
        client = aiomqtt.Client(
            a.host,
            a.port,
            username=a.username,
            password=a.password,
            identifier=a.client_id,
            protocol=aiomqtt.ProtocolVersion.V5,
            clean_start=not self._subscriptions,
            properties=connect,
            will=will,
            tls_context=a.tls,
            keepalive=20,
            timeout=10,
        )
        paho = client._client
        paho.manual_ack_set(True)
        paho.on_message = partial(self._on_message, self.connection)
        paho.on_publish = self._on_publish
        return client

    def _on_message(self, connection: int, _client: object, _userdata: object, message: MQTTMessage) -> None:
        self.inbox.append(
            Delivery(message.topic, bytes(message.payload), message.mid, message.qos, connection)
        )
        self.arrived.set()

    def _on_publish(
        self, _client: object, _userdata: object, mid: int, code: Any, _properties: object
    ) -> None:
        answer = self._waiting.pop(mid, None)
        if answer is not None and not answer.done():
            answer.set_result(f"refused by the broker: {code}" if code.is_failure else None)

    def _lost(self) -> None:
        self._client = None
        self.connected.clear()
        for answer in self._waiting.values():
            if not answer.done():
                answer.set_result(NOT_CONNECTED)
        self._waiting.clear()
