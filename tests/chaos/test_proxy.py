"""The misbehaving network does what it says, and notes who acknowledged what."""

import asyncio
from collections.abc import Awaitable, Callable

import pytest

from tests.chaos.proxy import DUP, Proxy, Publication, acknowledged, copy, packets, publication
from tests.daemon.test_mqtt import publication as publish

BAR = publish("r/bars/1m/A", b"{}", qos=1, mid=7)
YES, NO = b"\x40\x02\x00\x07", b"\x40\x03\x00\x07\x87"


def test_packets_are_found_however_they_come() -> None:
    """Cut anywhere, a stream gives the same packets."""
    stream = BAR + YES + publish("r/b", b"x" * 90) + NO
    whole = list(packets(bytearray(stream)))
    assert b"".join(whole) == stream
    for place in range(len(stream)):
        buffer = bytearray(stream[:place])
        found = list(packets(buffer))
        buffer += stream[place:]
        assert [*found, *packets(buffer)] == whole


def test_publications_and_answers_are_read() -> None:
    """Number, topic, payload and reason code; a copy differs in its mark and number alone."""
    assert publication(BAR) == Publication(7, "r/bars/1m/A", b"{}")
    assert publication(publish("r/b", b"x")) is None
    assert acknowledged(YES) == (7, True)
    assert acknowledged(NO) == (7, False)
    assert acknowledged(BAR) is None
    again = copy(BAR, 300)
    assert publication(again) == Publication(300, "r/bars/1m/A", b"{}")
    assert again[0] == BAR[0] | DUP


class Wire:
    """One end."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.reader, self.writer = reader, writer

    async def hears(self, *expected: bytes) -> None:
        """Read just that."""
        for each in expected:
            async with asyncio.timeout(10):
                assert await self.reader.readexactly(len(each)) == each


def play(story: Callable[[Wire, Wire, Proxy], Awaitable[None]]) -> None:
    """Connect a daemon to a broker by way of a proxy, and tell the story of the three."""

    async def plays() -> None:
        accepted: asyncio.Queue[Wire] = asyncio.Queue()

        async def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            accepted.put_nowait(Wire(reader, writer))

        server = await asyncio.start_server(accept, "127.0.0.1", 0)
        proxy = Proxy(server.sockets[0].getsockname()[1], seed=1)
        await proxy.open()
        daemon = Wire(*await asyncio.open_connection("127.0.0.1", proxy.port))
        broker = await accepted.get()
        await story(daemon, broker, proxy)
        daemon.writer.close()
        broker.writer.close()
        await proxy.refuse()
        server.close()

    asyncio.run(plays())


def test_doubled_bar_is_acknowledged_once() -> None:
    """The daemon hears it twice; the broker, who sent it once, hears of one acknowledgement."""

    async def story(daemon: Wire, broker: Wire, proxy: Proxy) -> None:
        proxy.weather.to_daemon = 1.0
        broker.writer.write(BAR)
        await daemon.hears(BAR, copy(BAR, 7))
        assert proxy.taken == []
        daemon.writer.write(YES + YES + b"\xc0\x00")
        await broker.hears(YES, b"\xc0\x00")
        assert [(told.topic, told.payload) for told in proxy.taken] == [("r/bars/1m/A", b"{}")]

    play(story)


def test_bar_that_comes_later_again_has_a_number_of_its_own() -> None:
    """What the daemon answers to that is kept from the broker, which knows no such number."""

    async def story(daemon: Wire, broker: Wire, proxy: Proxy) -> None:
        proxy.weather.later = 1.0
        broker.writer.write(BAR)
        again = copy(BAR, 7 + (1 << 15) + 1)
        await daemon.hears(BAR, again)
        found = publication(again)
        assert found is not None
        daemon.writer.write(b"\x40\x02" + found.mid.to_bytes(2, "big") + YES)
        await broker.hears(YES)

    play(story)


def test_doubled_signal_is_answered_once_and_a_refusal_is_no_delivery() -> None:
    """What the broker refuses was not delivered."""

    async def story(daemon: Wire, broker: Wire, proxy: Proxy) -> None:
        proxy.weather.to_broker = 1.0
        daemon.writer.write(BAR)
        await broker.hears(BAR, copy(BAR, 7))
        broker.writer.write(NO + NO + b"\xd0\x00")
        await daemon.hears(NO, b"\xd0\x00")
        assert proxy.delivered == []

    play(story)


@pytest.mark.parametrize("to_daemon", [True, False])
def test_cut_comes_in_the_middle_of_a_packet(to_daemon: bool) -> None:
    """Half of it arrives, and the connection ends on both sides."""

    async def story(daemon: Wire, broker: Wire, proxy: Proxy) -> None:
        sender, hearer = (broker, daemon) if to_daemon else (daemon, broker)
        cut = asyncio.create_task(proxy.cut(to_daemon))
        await asyncio.sleep(0)
        sender.writer.write(BAR)
        assert await hearer.reader.read() == BAR[: len(BAR) // 2]
        assert await cut
        assert proxy.done["packets torn"] == 1

    play(story)


def test_silent_connection_stays_open_until_the_daemon_gives_it_up() -> None:
    """Nothing passes, nothing ends; that the daemon hangs up is noticed."""

    async def story(daemon: Wire, broker: Wire, proxy: Proxy) -> None:
        silence = asyncio.create_task(proxy.fall_silent(60))
        await asyncio.sleep(0)
        broker.writer.write(BAR)
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(daemon.reader.read(1), 0.2)
        assert not silence.done()
        daemon.writer.close()
        assert await silence

    play(story)


def test_refusal_ends_and_forbids_connections() -> None:
    """Until it is opened again, nobody listens there."""

    async def story(daemon: Wire, _broker: Wire, proxy: Proxy) -> None:
        await proxy.refuse()
        with pytest.raises((ConnectionError, asyncio.IncompleteReadError)):
            await daemon.reader.readexactly(1)
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection("127.0.0.1", proxy.port)
        port = proxy.port
        await proxy.open()
        assert proxy.port == port

    play(story)
