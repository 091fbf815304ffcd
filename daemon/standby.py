"""Two daemons of one instance: who has the lease of the journal serves, the other one is ready to follow.

The lease is a row on the journal's server, by whose clock it lapses, and its epoch is part of each commit: a
daemon that lost it can write nothing more, whatever it believes. It connects to the broker only while it is
sure of it, as both have one client id, and the broker gives bars and session to the one that came last.
"""

import asyncio
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import structlog

from barcast.daemon.notify import Notifier
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.postgres import LEASE_SECONDS, RENEW_SECONDS, TAKE_SECONDS, Lease
from barcast.daemon.start import Following
from barcast.models import CheckpointError, ConfigError, DeposedError, Forecaster, JournalLostError

PREPARE_AT_ONCE = 20
"""Symbols that a standby's model is prepared for until it looks at the journal again."""

log = structlog.get_logger()
T = TypeVar("T")


class Leadership:
    """Takes the lease and keeps it, on a thread of its own.

    The state is its `epoch` (None: it was never ours), and until when it is ours for sure, by the event
    loop's clock: counted from before it was asked for, so that it ends here before it ends on the server.
    """

    def __init__(self, lease: Lease) -> None:
        self.epoch: int | None = None
        self._lease = lease
        self._until = float("-inf")
        self._renewed = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, "lease")

    async def take(self) -> int | None:
        """The epoch of the lease that is ours from now on; None while another one has it, or none can say."""
        asked = asyncio.get_running_loop().time()
        self.epoch = await self._ask(self._lease.take)
        if self.epoch is not None:
            self._until = asked + LEASE_SECONDS
        return self.epoch

    async def keep(self) -> None:
        """Renew it until cancelled. Raise DeposedError when another one has it; without a server try on."""
        away = False
        while True:
            await asyncio.sleep(TAKE_SECONDS if away else RENEW_SECONDS)
            asked = asyncio.get_running_loop().time()
            try:
                ours = await self._ask(self._lease.renew)
            except OSError as error:  # also a server without room
                if not away:
                    log.warning("lease_not_renewed", reason=str(error))
                away = True
                continue
            away = False
            if not ours:
                raise DeposedError("the lease of the journal has passed to another instance; start again")
            self._until = asked + LEASE_SECONDS
            self._renewed.set()

    async def sure(self) -> None:
        """Return once it is certain that the lease is ours at this moment."""
        while asyncio.get_running_loop().time() >= self._until:
            self._renewed.clear()
            await self._renewed.wait()

    async def release(self) -> None:
        """Give it back, if it is ours."""
        await self._ask(self._lease.release)
        self._thread.shutdown()

    def _ask(self, verb: Callable[[], T]) -> "asyncio.Future[T]":
        return asyncio.get_running_loop().run_in_executor(self._thread, verb)


class Standby:
    """Follows the journal of the one who serves, with its model opened and prepared.

    The state is the path as of the last record that is settled, the forecaster that it has and the symbols
    that this one is prepared for, and why it could not serve, if so.
    """

    def __init__(
        self, following: Following, pipeline: Pipeline, notifier: Notifier, leadership: Leadership
    ) -> None:
        self.fault = "it has not read the journal yet"
        self._following, self._pipeline, self._notifier = following, pipeline, notifier
        self._leadership = leadership
        self._forecaster: Forecaster | None = None
        self._prepared: set[str] = set()
        self._unfit = False

    async def take(self) -> int:
        """Take the lease as soon as nobody has it and this one could serve; return its epoch."""
        log.info("standby")
        self._notifier.send("READY=1", "STATUS=standby")
        while True:
            self._notifier.send("WATCHDOG=1")
            await asyncio.sleep(TAKE_SECONDS)
            if self._unfit:  # another one may, or this one once that is mended
                continue
            try:
                epoch = await self._leadership.take()
            except OSError as error:
                self._say(str(error))
            else:
                if epoch is not None:
                    log.info("lease_taken", epoch=epoch)
                    return epoch

    async def follow(self) -> None:
        """Bring the path up to the journal, again and again, and the model to its symbols, until we lead."""
        while self._leadership.epoch is None:
            try:
                await asyncio.to_thread(self._following.catch_up)
                await asyncio.to_thread(self._prepare)
            except (JournalLostError, CheckpointError, ConfigError) as error:
                self._unfit = not isinstance(error, JournalLostError)
                self._say(str(error))
            else:
                self._unfit = False
                self._say("")
            await asyncio.sleep(TAKE_SECONDS)

    def _prepare(self) -> None:
        """Open the model, and let it forecast some more symbols once."""
        pipeline = self._pipeline
        if pipeline.model is None:
            return
        forecaster, windows = pipeline.forecaster, pipeline.windows
        if forecaster is not self._forecaster:
            self._forecaster, self._prepared = forecaster, set()
        card = forecaster.card
        for symbol in [s for s in windows.symbols if s not in self._prepared][:PREPARE_AT_ONCE]:
            if self._leadership.epoch is not None:
                return
            window = windows.foreseen(symbol, card.window, ())
            if window is not None and len(window) >= max(2, card.min_window):
                forecaster.forecast([window])
                self._prepared.add(symbol)

    def _say(self, fault: str) -> None:
        """Say once what keeps it from following, and once that nothing does any more."""
        if fault and fault != self.fault:
            log.error("standby_not_ready", reason=fault, remedy="mend it: it would take over late, or not")
        elif self.fault and not fault:
            log.info("standby_ready", model=self._pipeline.model, symbols=len(self._pipeline.windows.symbols))
        if fault != self.fault:
            self._notifier.send(f"STATUS=standby: {fault or 'ready'}")
        self.fault = fault
