"""Whether the journal, computed again, says what was published: looked for by a process of its own."""

import asyncio
from collections import Counter, deque
from datetime import UTC, datetime
from enum import StrEnum

import msgspec
import structlog

from barcast.daemon.live import Clock
from barcast.daemon.trainer import Run

LONGEST_SECONDS = 6 * 3600.0
"""How long a verification may take before it is killed."""
WORDS = 5
"""Last lines of its process that are logged."""

log = structlog.get_logger()


class Place(msgspec.Struct, frozen=True):
    """Where a difference is: topic, symbol (empty for a group), close, and what differs."""

    topic: str
    symbol: str
    close_time: str
    what: str

    def sentence(self) -> str:
        """What a person wants to know."""
        whose = f", symbol {self.symbol}" if self.symbol else ""
        return f"{self.topic}{whose}, close {self.close_time}: {self.what}"


class Report(msgspec.Struct, frozen=True):
    """What a verification found, as its process prints it: see `barcast.backtest.verify.Difference`.

    `seconds` is how long it took; `apart` are the largest differences of figures across fingerprints.
    """

    agrees: bool
    signals: int
    differing: int
    missing: int
    older: int
    fingerprints: tuple[tuple[str, str], ...]
    seconds: float
    apart: dict[str, float | str] | None
    places: tuple[Place, ...]


class Result(StrEnum):
    """How a verification ended."""

    agrees = "agrees"
    differs = "differs"
    failed = "failed"


class Verification:
    """Verifies the last `since` nanoseconds of the journal each time that it is asked to, one at a time.

    Nobody asks it where the configuration says no `since`. `process` runs the verb `verify`, which prints a
    `Report`. What is asked for during one is done with it. The state is what metrics are made of: `runs` by
    result, the `last` report, and `ended`, the instance's time of it (nanoseconds).
    """

    def __init__(self, process: Run, clock: Clock, since: int | None) -> None:
        self.since = since
        self.runs: Counter[Result] = Counter()
        self.last: Report | None = None
        self.ended = 0
        self._process, self._clock = process, clock
        self._asked = asyncio.Event()

    async def ask(self) -> None:
        """Want a verification."""
        self._asked.set()

    async def run(self) -> None:
        """Verify as often as it is wanted, until cancelled; that ends a process that is at work, too."""
        while True:
            await self._asked.wait()
            if self.since is not None:
                self.runs[await self._verify(self.since)] += 1
            self._asked.clear()

    async def _verify(self, ago: int) -> Result:
        since = datetime.fromtimestamp(max(0, self._clock.now() - ago) // 10**9, UTC)
        words = deque[str](maxlen=WORDS)
        try:
            async with asyncio.timeout(LONGEST_SECONDS):
                status, out = await self._process(
                    "verify", ["--json", "--since", f"{since:%Y-%m-%dT%H:%M:%SZ}"], words.append
                )
            report = msgspec.json.decode(out, type=Report)
        except TimeoutError:
            log.error("verify_failed", reason=f"no end after {LONGEST_SECONDS:.0f} s; it was killed")
            return Result.failed
        except OSError as error:  # such as no memory for another process
            log.error("verify_failed", reason=str(error))
            return Result.failed
        except msgspec.DecodeError:
            log.error("verify_failed", exit_status=status, last_words="\n".join(words))
            return Result.failed
        self.last, self.ended = report, self._clock.now()
        counts = {"signals": report.signals, "seconds": report.seconds}
        if report.agrees:
            log.info("verified", **counts, fingerprints=len(report.fingerprints))
            return Result.agrees
        places = [place.sentence() for place in report.places]
        log.error(
            "verify_differs", **counts, differing=report.differing, missing=report.missing, places=places
        )
        return Result.differs
