"""A daemon that is wrong on purpose: it runs the ordinary command line with one promise broken.

The library acknowledges each bar when it comes, before it is on disk; and the commit takes a while, as on a
slow disk, so that what a kill costs is no matter of luck.
"""

import time
from collections.abc import Sequence
from functools import partial
from typing import Any

import aiomqtt

from barcast.backtest.cli import main
from barcast.daemon import app
from barcast.daemon.journal import Journal
from barcast.daemon.mqtt import Delivery, Link

COMMIT_SECONDS = 0.05


class Hasty(Link):
    """A link that leaves the acknowledgement to the library."""

    def _open(self) -> aiomqtt.Client:
        client = super()._open()
        client._client.manual_ack_set(False)
        return client

    def ack(self, deliveries: Sequence[Delivery]) -> None:
        """It was done already."""


class Slow(Journal):
    """A journal whose commits take a while."""

    def append(self, *what: Any) -> list[int]:
        """Write after a pause."""
        time.sleep(COMMIT_SECONDS)
        return super().append(*what)


if __name__ == "__main__":
    app.Outside = partial(app.Outside, link=Hasty, journal=Slow)
    main()
