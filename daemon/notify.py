"""Word to systemd: the notification protocol of sd_notify(3)."""

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

ASK_SECONDS = 1.0
"""How often a start asks for more time."""
MORE_SECONDS = 30
"""How much it asks for: a start that no longer asks is ended after it."""


class Notifier:
    """Sends states such as `READY=1` or `WATCHDOG=1` to the service manager, if there is one."""

    def __init__(self, address: str | None) -> None:
        self._address = address

    def send(self, *states: str) -> None:
        """Send one datagram. A service manager that is not there, or gone, is no fault of ours."""
        if self._address:
            with suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as s:
                s.connect(self._address.replace("@", "\0", 1) if self._address[0] == "@" else self._address)
                s.sendall("\n".join(states).encode())

    @asynccontextmanager
    async def starting(self) -> AsyncIterator[None]:
        """As long as the block takes, ask for more time to start: to read a journal may take minutes."""

        async def ask() -> None:
            while True:
                self.send(
                    "WATCHDOG=1",  # of a standby that takes over: it has started already
                    f"EXTEND_TIMEOUT_USEC={MORE_SECONDS * 10**6}",
                    "STATUS=reading journal and model",
                )
                await asyncio.sleep(ASK_SECONDS)

        asking = asyncio.create_task(ask(), name="starting")
        try:
            yield
        finally:
            asking.cancel()
