"""The ordinary command line on a clock that somebody else steps.

The file `clock` beside the state directory holds by how many nanoseconds the daemon's clock is ahead of where
it should be, as eight bytes. With `hasty` as the first word it is wrong on purpose: it acknowledges bars
before they are on disk.
"""

import mmap
import sys
from functools import partial

from barcast.backtest.cli import main
from barcast.daemon import app
from barcast.daemon.app import WallClock
from barcast.daemon.config import Config
from tests.integration.hasty import Hasty, Slow

CLOCK = "clock"


class Stepped(WallClock):
    """The instance's clock, ahead of it or behind it."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        with (config.state_dir.parent / CLOCK).open("rb") as file:
            self._page = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)

    @property
    def _ahead(self) -> int:
        return int.from_bytes(self._page[:8], "little", signed=True)

    def now(self) -> int:
        """Nanoseconds since 1970, UTC."""
        return super().now() + self._ahead

    def seconds_until(self, moment: int) -> float:
        """Real seconds until the clock shows `moment`."""
        return super().seconds_until(moment - self._ahead)


if __name__ == "__main__":
    wrong = {"link": Hasty, "journal": Slow} if sys.argv[1:2] == ["hasty"] else {}
    del sys.argv[1 : 1 + bool(wrong)]
    app.Outside = partial(app.Outside, clock=Stepped, **wrong)
    main()
