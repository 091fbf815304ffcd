"""Word to systemd: the notification protocol of sd_notify(3)."""

import socket
from contextlib import suppress


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
