"""The reference of the ingest: a subscriber that takes the same bars with aiomqtt alone, and keeps nothing.

`python -m tests.bench.bare PORT COUNT...` says `ready` once it is subscribed, and the time of the monotonic
clock after each COUNT messages. It acknowledges when a message comes in, as the library does by itself.
"""

import asyncio
import sys
import time
from datetime import datetime
from itertools import accumulate

import aiomqtt
import msgspec
from paho.mqtt.packettypes import PacketTypes
from paho.mqtt.properties import Properties

TOPIC = "barcast/v1/bars/#"


class BareBar(msgspec.Struct, gc=False):
    """A bar as it is on the wire."""

    close_time: datetime
    open: float
    high: float
    low: float
    close: float
    volume: float
    symbol: str | None = None


async def main(port: int, counts: list[int]) -> None:
    """Receive and decode."""
    one, many = msgspec.json.Decoder(BareBar), msgspec.json.Decoder(list[BareBar])
    connect = Properties(PacketTypes.CONNECT)  # type: ignore[no-untyped-call]
    connect.ReceiveMaximum = 1000  # what the daemon asks for
    version = aiomqtt.ProtocolVersion.V5
    marks = set(accumulate(counts))
    async with aiomqtt.Client("127.0.0.1", port, protocol=version, properties=connect) as client:
        await client.subscribe(TOPIC, qos=1)
        print("ready", flush=True)
        seen = bars = 0
        async for message in client.messages:
            payload = message.payload
            found = many.decode(payload) if payload[:1] == b"[" else [one.decode(payload)]
            bars += len(found)
            seen += 1
            if seen in marks:
                print(time.monotonic(), bars, flush=True)
            if seen == sum(counts):
                return


if __name__ == "__main__":
    asyncio.run(main(int(sys.argv[1]), [int(count) for count in sys.argv[2:]]))
