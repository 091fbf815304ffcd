"""The link to a broker that misbehaves: it never hangs, and never claims what is not so."""

import asyncio
from contextlib import suppress

import pytest
from structlog.testing import capture_logs

from barcast.daemon import mqtt
from barcast.daemon.mqtt import NOT_CONNECTED, Address, Canary, Link
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError

STATUS = Outgoing("", "r/status/x", b"{}", True, None)
CONNECT, PUBLISH, PUBACK, SUBSCRIBE, DISCONNECT = 1, 3, 4, 8, 14


def publication(topic, payload, qos=0, mid=0):
    """A PUBLISH packet without properties."""
    body = len(topic).to_bytes(2, "big") + topic.encode()
    body += (mid.to_bytes(2, "big") if qos else b"") + b"\x00" + payload
    assert len(body) < 128
    return bytes([0x30 | qos << 1, len(body)]) + body


class Broker:
    """A few packets of MQTT 5: enough to accept, to refuse, to hang up, and to send.

    `backlog` is sent with the answer to CONNECT, and the subscription is granted once `acks_first` of it is
    acknowledged. `echo` sends what comes for `r/bars` back. `evicts` is a reason to hang up then.
    """

    def __init__(self, suback=1, puback=0, hang_up=None, backlog=b"", acks_first=0, echo=False, evicts=None):
        self.suback, self.puback, self.hang_up = suback, puback, hang_up
        self.backlog, self.acks_first, self.echo, self.evicts = backlog, acks_first, echo, evicts
        self.packets, self.connections = [], 0
        self.writer = None

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        self.connections += 1
        self.writer, acks, granted = writer, 0, None
        with suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                first = (await reader.readexactly(1))[0]
                length, shift = 0, 0
                while True:
                    byte = (await reader.readexactly(1))[0]
                    length |= (byte & 127) << shift
                    shift += 7
                    if byte < 128:
                        break
                body = await reader.readexactly(length)
                kind = first >> 4
                self.packets.append((kind, body))
                if kind == self.hang_up:
                    self.hang_up = None
                    break
                acks += kind == PUBACK
                if kind == CONNECT:
                    writer.write(b"\x20\x03\x00\x00\x00" + self.backlog)
                elif kind == SUBSCRIBE:
                    granted = b"\x90\x04" + body[:2] + b"\x00" + bytes([self.suback])
                elif kind == PUBLISH:
                    at = 2 + int.from_bytes(body[:2], "big")
                    writer.write(b"\x40\x03" + body[at : at + 2] + bytes([self.puback]))
                    if self.echo and body[2:at].startswith(b"r/bars/"):
                        writer.write(bytes([first & 0xF0 | 2, length]) + body)
                if granted and acks >= self.acks_first:
                    writer.write(granted)
                    granted = None
                    if self.evicts is not None:
                        writer.write(b"\xe0\x01" + bytes([self.evicts]))
                        break
        writer.close()


def link(broker, canary=None):
    return Link(Address("127.0.0.1", broker.port, "x"), ["r/bars/#"], STATUS, canary)


async def until(condition, seconds=10):
    async with asyncio.timeout(seconds):
        while not condition():  # noqa: ASYNC110 - conditions of other threads and tasks
            await asyncio.sleep(0.02)


def test_connection_lost_before_the_greeting_is_answered_is_made_again():
    """A broker that hangs up between the subscription and the first PUBACK is connected to again."""

    async def play():
        async with Broker(hang_up=PUBLISH) as broker:
            connection = link(broker)
            greeted = []

            async def greet():
                greeted.append(await connection.publish(STATUS, 0))

            task = asyncio.create_task(connection.run(greet))
            await until(lambda: None in greeted)
            assert broker.connections == 2
            connection.leave()
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(play(), debug=True)


@pytest.mark.parametrize("packet", [CONNECT, SUBSCRIBE])
def test_connection_that_ends_without_an_answer_is_not_waited_for(packet):
    """A broker that hangs up instead of answering is connected to again at once, not after ten seconds."""

    async def play():
        async with Broker(hang_up=packet) as broker:
            connection = link(broker)
            with capture_logs() as logs:
                task = asyncio.create_task(connection.run(lambda: asyncio.sleep(0)))
                await until(connection.connected.is_set, seconds=60)
            connection.leave()
            task.cancel()
            await asyncio.wait([task])
            reasons = [line["reason"] for line in logs if line["event"] == "broker_unreachable"]
            assert [reason.startswith(mqtt.UNANSWERED) for reason in reasons] == [True]
            assert broker.connections == 2

    asyncio.run(play(), debug=True)


@pytest.mark.parametrize("code", [0x87, 0x80, 0x00])
def test_refused_or_lesser_subscription_is_named(code):
    """A broker that does not grant QoS 1 on the bars is an error that names the topic: nothing would come."""

    async def play():
        async with Broker(suback=code) as broker:
            connection = link(broker)
            with pytest.raises(ConfigError, match=r"r/bars/#.*access list"):
                await asyncio.wait_for(connection.run(lambda: asyncio.sleep(0)), 10)

    asyncio.run(play(), debug=True)


@pytest.mark.parametrize(("leaves", "reason"), [(True, b""), (False, b"\x04")])
def test_only_a_farewell_keeps_the_last_will_back(leaves, reason):
    """A link that is cancelled by a fault has the broker publish the last will; one that leaves has not."""

    async def play():
        async with Broker() as broker:
            connection = link(broker)
            task = asyncio.create_task(connection.run(lambda: asyncio.sleep(0)))
            await until(connection.connected.is_set)
            if leaves:
                connection.leave()
            task.cancel()
            await asyncio.wait([task])
            assert task.cancelled()
            await until(lambda: any(kind == DISCONNECT for kind, _ in broker.packets))
            [body] = [body for kind, body in broker.packets if kind == DISCONNECT]
            assert body[:1].strip(b"\x00") == reason

    asyncio.run(play(), debug=True)


def test_refused_publication_says_so_and_a_lost_one_can_be_told_from_it():
    """The reason code of a PUBACK is a fault; without a connection the fault is that there is none."""

    async def play():
        async with Broker(puback=0x87) as broker:
            connection = link(broker)
            assert await connection.publish(STATUS, 0) == NOT_CONNECTED
            task = asyncio.create_task(connection.run(lambda: asyncio.sleep(0)))
            await until(connection.connected.is_set)
            assert "Not authorized" in (await connection.publish(STATUS, 0) or "")
            connection.leave()
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(play(), debug=True)


def test_session_is_kept_and_flow_is_bounded():
    """The session outlives the connection, and the broker may send only so much before it is acknowledged."""

    async def play():
        async with Broker() as broker:
            connection = link(broker)
            task = asyncio.create_task(connection.run(lambda: asyncio.sleep(0)))
            await until(connection.connected.is_set)
            connection.leave()
            task.cancel()
            await asyncio.wait([task])
            return broker.packets[0][1]

    connect = asyncio.run(play())
    flags = connect[7]
    assert not flags & 0x02  # clean start
    assert b"\x11" + mqtt.SESSION_SECONDS.to_bytes(4, "big") in connect
    assert b"\x21" + mqtt.RECEIVE_MAXIMUM.to_bytes(2, "big") in connect
    assert b"\x27" + mqtt.LONGEST_PACKET.to_bytes(4, "big") in connect


def test_backlog_is_acknowledged_before_the_subscription_is_granted():
    """What a kept session brings at once can be acknowledged at once: later it would not be."""

    async def play():
        backlog = b"".join(publication("r/bars/1m/A", b"{}", 1, mid) for mid in (1, 2, 3))
        async with Broker(backlog=backlog, acks_first=3) as broker:
            connection = link(broker)
            task = asyncio.create_task(connection.run(lambda: asyncio.sleep(0)))
            await until(lambda: len(connection.inbox) == 3)
            assert not connection.connected.is_set()
            connection.ack(list(connection.inbox))
            await until(connection.connected.is_set)
            assert [body[:2] for kind, body in broker.packets if kind == PUBACK] == [
                mid.to_bytes(2, "big") for mid in (1, 2, 3)
            ]
            connection.leave()
            task.cancel()
            await asyncio.wait([task])

    asyncio.run(play(), debug=True)


def test_what_a_dead_broker_had_sent_is_read_before_anything_is_written():
    """A write to a broker that died closes the connection; what came before is taken all the same."""
    sent = 50

    async def play():
        async with Broker() as broker:
            connection = link(broker)
            task = asyncio.create_task(connection.run(lambda: asyncio.sleep(0)))
            await until(connection.connected.is_set)
            broker.writer.write(
                b"".join(publication("r/bars/1m/A", b"%d" % mid, 1, mid) for mid in range(1, sent + 1))
            )
            broker.writer.close()
            taken = []

            async def take():
                while len(taken) < sent:
                    await connection.arrived.wait()
                    connection.arrived.clear()
                    while connection.inbox:
                        delivery = connection.inbox.popleft()
                        taken.append(delivery.payload)
                        connection.ack([delivery])

            with suppress(TimeoutError):
                await asyncio.wait_for(take(), 5)
            task.cancel()
            await asyncio.wait([task])
            return taken

    assert asyncio.run(play()) == [b"%d" % mid for mid in range(1, sent + 1)]


BARS = "r/bars/1m"


def hearing(broker, canary, during):
    """Run a link and note, at each greeting, whether it is deaf; return the notes and the log."""

    async def play(logs):
        async with broker:
            connection, greeted = link(broker, canary), []

            async def greet():
                greeted.append(connection.deaf)

            task = asyncio.create_task(connection.run(greet))
            await during(connection, greeted, logs)
            connection.leave()
            task.cancel()
            await asyncio.wait([task])
            return greeted

    with capture_logs() as logs:
        return asyncio.run(play(logs), debug=True), logs


def test_canary_that_comes_back_proves_hearing():
    """The greeting waits for a canary, marked as ours, harmless, and left for nobody who is away."""

    async def hears(connection, greeted, _logs):
        await until(lambda: greeted)
        [delivery] = connection.inbox
        assert (delivery.topic, delivery.payload, delivery.canary) == (BARS, b"[]", True)
        [body] = [body for kind, body in broker.packets if kind == PUBLISH]
        assert b"\x26\x00\x06canary\x00\x04boot" in body
        assert b"\x02" + int(mqtt.HEAR_SECONDS).to_bytes(4, "big") in body

    broker = Broker(echo=True)
    greeted, logs = hearing(broker, Canary(BARS, "boot"), hears)
    assert greeted == [False]
    assert [line["event"] for line in logs] == ["broker_connected"]


def test_silence_is_named_and_ends_when_something_comes(monkeypatch):
    """Nothing delivered is an error that names filter and remedy; canaries go on until one comes back."""
    monkeypatch.setattr(mqtt, "HEAR_SECONDS", 0.1)

    async def hears(_connection, greeted, _logs):
        await until(lambda: greeted)
        await until(lambda: [kind for kind, _ in broker.packets].count(PUBLISH) >= 3)
        assert greeted == [True]
        broker.echo = True
        await until(lambda: len(greeted) == 2)

    broker = Broker()
    greeted, logs = hearing(broker, Canary(BARS, "boot"), hears)
    assert greeted == [True, False]
    assert [(line["log_level"], line["event"]) for line in logs] == [
        ("info", "broker_connected"),
        ("error", "subscription_denied"),
        ("info", "subscription_heard"),
    ]
    assert logs[1]["topic"] == "r/bars/#"
    assert "access list" in logs[1]["remedy"]


def test_hearing_is_proved_anew_on_each_connection(monkeypatch):
    """What came by an earlier connection says nothing about this one: access lists change."""
    monkeypatch.setattr(mqtt, "HEAR_SECONDS", 0.1)

    async def hears(_connection, greeted, _logs):
        await until(lambda: greeted)
        broker.echo = False
        broker.writer.close()
        await until(lambda: len(greeted) == 2)

    broker = Broker(echo=True)
    greeted, _ = hearing(broker, Canary(BARS, "boot"), hears)
    assert greeted == [False, True]


def test_any_delivery_proves_hearing(monkeypatch):
    """Where a canary does not come back but bars do, the link hears."""
    monkeypatch.setattr(mqtt, "HEAR_SECONDS", 30.0)

    async def hears(connection, greeted, _logs):
        await until(connection.connected.is_set)
        assert greeted == []
        broker.writer.write(publication("r/bars/1m/A", b"{}", 1, 7))
        await until(lambda: greeted)

    broker = Broker()
    greeted, _ = hearing(broker, Canary(BARS, "boot"), hears)
    assert greeted == [False]


def test_refused_canary_is_said_once_and_holds_up_nothing():
    """Who may not write a canary is told once what to grant, and is taken to hear."""

    async def hears(_connection, greeted, _logs):
        await until(lambda: greeted)
        broker.writer.close()
        await until(lambda: len(greeted) == 2)

    broker = Broker(puback=0x87)
    greeted, logs = hearing(broker, Canary(BARS, "boot"), hears)
    assert greeted == [False, False]
    [line] = [line for line in logs if line["event"] == "canary_refused"]
    assert line["log_level"] == "info"
    assert "write r/bars/1m" in line["remedy"]
    assert "0x87" in line["reason"]


@pytest.mark.parametrize(
    ("payload", "mark", "canary"),
    [(b"[]", "canary", True), (b"[]", "other", False), (b"[{}]", "canary", False), (b"[]", None, False)],
)
def test_canary_is_known_by_its_mark_and_emptiness(payload, mark, canary):
    """Nothing that has a bar in it passes for a canary, and no empty array that is not marked."""

    async def hears(connection, greeted, _logs):
        await until(lambda: greeted)
        connection.inbox.clear()
        properties = [(mark, "x")] if mark else []
        assert await connection.publish(Outgoing("", BARS, payload, False, None), 0, properties) is None
        await until(lambda: connection.inbox)
        assert [delivery.canary for delivery in connection.inbox] == [canary]

    hearing(Broker(echo=True), None, hears)


def test_eviction_is_named_once(monkeypatch):
    """A broker that gives the session to another connection is believed; the remedy is said, once."""
    monkeypatch.setattr(mqtt, "RETRY_SECONDS", (0.01,))

    async def comes(connection, greeted, _logs):
        await until(lambda: broker.connections >= 3)

    broker = Broker(evicts=0x8E)
    _, logs = hearing(broker, None, comes)
    [line] = [line for line in logs if line["event"] == "session_taken_over"]
    assert line["log_level"] == "warning"
    assert line["client_id"] == "x"
    assert "`instance`" in line["remedy"]


def test_connections_that_do_not_last_are_named_once(monkeypatch):
    """Where a broker just closes, the third time in a row is told with the likely cause."""
    monkeypatch.setattr(mqtt, "RETRY_SECONDS", (0.01,))
    after = []

    async def comes(_connection, greeted, logs):
        for n in range(1, 6):
            await until(lambda n=n: len(greeted) >= n)
            after.append(sum(line["event"] == "connections_cut_short" for line in logs))
            broker.writer.close()
            await until(lambda n=n: broker.connections > n)

    broker = Broker()
    hearing(broker, None, comes)
    assert after == [0, 0, 0, 1, 1]


def test_flood_of_quality_0_is_bounded_counted_and_named(monkeypatch):
    """Messages that no window holds back are dropped beyond a bound; those of QoS 1 are never dropped."""
    monkeypatch.setattr(mqtt, "INBOX", 10)
    monkeypatch.setattr(mqtt, "SHED_SECONDS", 0.1)

    async def floods(connection, greeted, _logs):
        await until(lambda: greeted)
        broker.writer.write(publication(BARS, b"0") * 25 + publication(BARS, b"1", 1, 9))
        await until(lambda: connection.shed == 15 and len(connection.inbox) == 11)
        assert connection.inbox[-1].payload == b"1"
        await asyncio.sleep(0.3)
        broker.writer.write(publication(BARS, b"0") * 2)
        await until(lambda: connection.shed == 17)

    broker = Broker()
    _, logs = hearing(broker, None, floods)
    told = [line for line in logs if line["event"] == "qos0_shed"]
    assert [line["count"] for line in told] == [15, 2]
    assert all("QoS 1" in line["remedy"] for line in told)


def test_flood_of_long_messages_is_bounded_by_their_bytes(monkeypatch):
    """Few messages may take much memory; what was taken makes room again."""
    monkeypatch.setattr(mqtt, "INBOX_BYTES", 100)

    async def floods(connection, greeted, _logs):
        await until(lambda: greeted)
        for _ in range(2):
            shed = connection.shed
            broker.writer.write(publication(BARS, b"0" * 50) * 5)
            await until(lambda dropped=shed + 3: connection.shed == dropped)
            assert len(connection.inbox) == 2
            connection.inbox.popleft()
            connection.inbox.popleft()

    broker = Broker()
    hearing(broker, None, floods)
