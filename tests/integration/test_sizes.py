"""Messages that are too long: a broker keeps them away, and they cost nobody a connection."""

import asyncio

import pytest

from barcast.daemon.mqtt import LONGEST_PACKET, Address, Link
from barcast.daemon.wire import MOST_BYTES
from tests.daemon.living import until
from tests.integration.instance import client

TOPIC = "r/bars/1m/A"


def received(broker, sizes, qos):
    """The lengths that arrive of payloads of given sizes, the connections, and the PUBACKs' reason codes."""

    async def story():
        link = Link(Address("127.0.0.1", broker.port, "me"), ["r/bars/#"], None)
        running = asyncio.create_task(link.run(lambda: asyncio.sleep(0)))
        await link.connected.wait()
        feed, codes = client("feed", broker.port), []
        feed.on_publish = lambda _client, _data, _mid, code, _properties: codes.append(code.value)
        feed.loop_start()
        await until(feed.is_connected)
        for size in (*sizes, 5):
            await asyncio.to_thread(feed.publish(TOPIC, b"x" * size, qos).wait_for_publish, 10)
        await until(lambda: link.inbox and len(link.inbox[-1].payload) == 5)
        feed.disconnect()
        feed.loop_stop()
        link.ack(list(link.inbox))
        link.leave()
        running.cancel()
        await asyncio.wait([running])
        return [len(delivery.payload) for delivery in link.inbox], link.connection, codes

    return asyncio.run(story())


@pytest.mark.parametrize("qos", [0, 1])
def test_longer_than_we_take_is_dropped_by_the_broker(brokers, qos):
    """A broker without a limit of its own keeps from us what we said not to take; we stay connected."""
    broker = brokers(without=["message_size_limit"])
    taken, connections, _ = received(broker, [LONGEST_PACKET + 1, MOST_BYTES + 1, 2 * LONGEST_PACKET], qos)
    assert (taken, connections) == ([MOST_BYTES + 1, 5], 1)


def test_feed_learns_that_it_was_too_long(broker):
    """As shipped, the broker refuses a payload beyond its limit by a reason code: Packet too large."""
    taken, connections, codes = received(broker, [MOST_BYTES + 1, LONGEST_PACKET], 1)
    assert (taken, connections) == ([MOST_BYTES + 1, 5], 1)
    assert codes == [0, 0x95, 0]
