"""Messages that are too long: a broker keeps them away, and they cost nobody a connection."""

import asyncio

from barcast.daemon.mqtt import LONGEST_PACKET, Address, Link
from barcast.daemon.wire import MOST_BYTES
from tests.daemon.living import until
from tests.integration.instance import client

TOPIC = "r/bars/1m/A"


def received(broker, sizes):
    """The lengths that arrive of payloads of given sizes, and how many connections it took."""

    async def story():
        link = Link(Address("127.0.0.1", broker.port, "me"), ["r/bars/#"], None)
        running = asyncio.create_task(link.run(lambda: asyncio.sleep(0)))
        await link.connected.wait()
        feed = client("feed", broker.port)
        feed.loop_start()
        await until(feed.is_connected)
        for size in (*sizes, 5):
            await asyncio.to_thread(feed.publish(TOPIC, b"x" * size).wait_for_publish, 10)
        await until(lambda: link.inbox and len(link.inbox[-1].payload) == 5)
        feed.disconnect()
        feed.loop_stop()
        link.ack(list(link.inbox))
        link.leave()
        running.cancel()
        await asyncio.wait([running])
        return [len(delivery.payload) for delivery in link.inbox], link.connection

    return asyncio.run(story())


def test_longer_than_we_take_is_dropped_by_the_broker(brokers):
    """A broker without a limit of its own keeps from us what we said not to take; we stay connected."""
    broker = brokers(without=["max_packet_size"])
    taken, connections = received(broker, [LONGEST_PACKET + 1, MOST_BYTES + 1, 2 * LONGEST_PACKET])
    assert (taken, connections) == ([MOST_BYTES + 1, 5], 1)
