"""What the service manager is told."""

import asyncio
import socket
import time
from dataclasses import replace

import pytest

from barcast.daemon import notify
from barcast.daemon.app import Daemon, Outside
from barcast.daemon.notify import Notifier
from barcast.models import ConfigError
from tests.daemon.living import daemon


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
        assert loaded == [
            ["WATCHDOG=1", "EXTEND_TIMEOUT_USEC=30000000", "STATUS=reading journal and model"]
        ] * len(loaded)
        assert heard(listener)[-1] == ["READY=1", "STATUS=serving"]


def test_start_without_a_service_manager(tmp_path):
    """Without one, or with one that is gone, a start is just a start."""

    async def main(address):
        async with Notifier(address).starting():
            await asyncio.sleep(0)
        return True

    assert asyncio.run(main(None))
    assert asyncio.run(main(str(tmp_path / "gone")))


def test_journal_that_is_copied_asks_for_more_time(tmp_path, monkeypatch):
    """One of an older version has gigabytes: a start that is killed in the copy would never end."""
    monkeypatch.setattr(notify, "ASK_SECONDS", 0.01)
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as listener:
        listener.bind(str(tmp_path / "notify"))
        listener.setblocking(False)
        asked = []

        def slow(_place):
            until = time.monotonic() + 5
            while len(asked) < 2 and time.monotonic() < until:
                asked.extend(heard(listener))
            raise ConfigError("that was enough")

        config = daemon(tmp_path).config
        outside = replace(Outside(), journal=slow)
        with pytest.raises(ConfigError):
            asyncio.run(Daemon(config, {}, asyncio.Event(), str(tmp_path / "notify"), outside).run())
        assert any("EXTEND_TIMEOUT_USEC=30000000" in states for states in asked)
