"""What the service manager is told."""

import asyncio
import socket

from barcast.daemon import notify
from barcast.daemon.notify import Notifier


def heard(listener):
    """The datagrams that have come, each a list of states."""
    found = []
    while True:
        try:
            found.append(listener.recv(1000).decode().split("\n"))
        except BlockingIOError:
            return found


def test_start_asks_for_more_time_as_long_as_it_takes(tmp_path, monkeypatch):
    """A long start asks again and again, and no more once it is over."""
    monkeypatch.setattr(notify, "ASK_SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        notifier, loaded = Notifier(str(tmp_path / "notify")), []

        async def main():
            async with notifier.starting():
                while len(loaded) < 3:
                    await asyncio.sleep(0.01)
                    loaded.extend(heard(listener))
            notifier.send("READY=1", "STATUS=serving")
            await asyncio.sleep(0.05)

        asyncio.run(main())
        assert loaded == [["EXTEND_TIMEOUT_USEC=30000000", "STATUS=reading journal and model"]] * len(loaded)
        assert heard(listener)[-1] == ["READY=1", "STATUS=serving"]


def test_start_without_a_service_manager(tmp_path):
    """Without one, or with one that is gone, a start is just a start."""

    async def main(address):
        async with Notifier(address).starting():
            await asyncio.sleep(0)
        return True

    assert asyncio.run(main(None))
    assert asyncio.run(main(str(tmp_path / "gone")))
