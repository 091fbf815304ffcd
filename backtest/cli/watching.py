"""The command that shows a running instance in the terminal, by what it says on the broker alone."""

import asyncio
import os
import signal
import sys
import termios
import time
import tty
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.live import Live

from barcast.backtest.cli.terminal import LIVE, ConfigFile, app, out, wide
from barcast.models import ConfigError

if TYPE_CHECKING:
    from rich.text import Text

    from barcast.backtest.cli.screen import View
    from barcast.daemon.config import Config
    from barcast.daemon.watch import Moment

PULSE_SECONDS = 0.25
"""How long what has come waits to be drawn."""
PATIENCE_SECONDS = 10.0
"""How long a table, for what is no terminal, waits for anything to come."""
QUIET_SECONDS = 1.0
"""After so long without a message all has come that the broker kept."""


@app.command(rich_help_panel=LIVE)
def watch(
    config: ConfigFile,
    sort: Annotated[str, typer.Option(help="name, width, skew, rise or staleness.")] = "name",
    prefix: Annotated[str, typer.Option(help="Only symbols that begin with it.")] = "",
    horizon: Annotated[
        int | None, typer.Option(help="In bars, of the columns. \\[default: the nearest]", min=1)
    ] = None,
) -> None:
    """Show signals and state of a running instance in the terminal, from anywhere that reaches its broker.

    It reads as the user of \\[mqtt] in the configuration, and orders nothing; q ends it. Where the output is
    no terminal it prints one table.
    """
    from barcast.backtest.cli.screen import Sort, View
    from barcast.daemon import log
    from barcast.daemon.config import load

    if sort not in list(Sort):
        raise typer.BadParameter(f"{sort!r} is none of {', '.join(Sort)}", param_hint="--sort")
    settings = load(config)
    log.configure("error")
    watcher = Watcher(settings, View(Sort(sort), prefix, horizon))
    # Not what rich takes for a terminal: a variable may force that.
    interactive = sys.stdout.isatty() and not out.is_dumb_terminal
    asyncio.run(watcher.show() if interactive else watcher.tell())


class Watcher:
    """Follows one instance.

    The state is what is seen of it, what a person asked for (None: the end), and the horizon that the command
    line named, until it is known whether there is such a one.
    """

    def __init__(self, settings: "Config", view: "View") -> None:
        from barcast.daemon.app import WallClock
        from barcast.daemon.mqtt import Link
        from barcast.daemon.watch import Seen

        self.clock = WallClock(settings)
        speed = settings.rehearsal.speed if settings.rehearsal else 1.0
        self.seen = Seen(settings.mqtt.root, settings.instance, settings.timeframe, self.now(), speed)
        self.view: View | None = view
        self.named = view.horizon
        self.stirred = asyncio.Event()
        # Without a name of its own: that of the daemon would take its session.
        address = settings.mqtt.address("")
        self.user = address.username
        self.broker = f"{address.host}:{address.port}"
        self.link = Link(address, self.seen.subscriptions, will=None, session=0)

    def now(self) -> "Moment":
        """The moment on the instance's clock and on this machine's."""
        from barcast.daemon.watch import Moment

        return Moment(self.clock.now(), time.monotonic())

    async def tell(self) -> None:
        """Print what there is, once. Raise ConfigError when nothing comes."""
        from barcast.backtest.cli.screen import snapshot

        assert self.view is not None
        with self._following() as connection:
            end = last = time.monotonic()
            end += PATIENCE_SECONDS
            while time.monotonic() < end and not (
                self.seen.anything and time.monotonic() - last > QUIET_SECONDS
            ):
                await asyncio.sleep(PULSE_SECONDS)
                last = time.monotonic() if self._take(connection) else last
        if not self.seen.anything:
            raise ConfigError(self._nothing())
        console = wide()
        for line in snapshot(self.seen, self.view, self.now(), self.broker, console.width):
            console.print(self._drawable(line), highlight=False, soft_wrap=True)

    async def show(self) -> None:
        """Draw until a person ends it; the terminal is left as it was."""
        from rich.console import Group

        from barcast.backtest.cli.screen import draw

        loop = asyncio.get_running_loop()
        live = Live(
            console=out, screen=True, auto_refresh=False, redirect_stdout=False, redirect_stderr=False
        )
        terminal = Terminal(live)
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._end)
        loop.add_signal_handler(signal.SIGWINCH, self.stirred.set)
        loop.add_signal_handler(signal.SIGTSTP, self._rest, terminal)
        drawn, second = None, 0
        with self._following() as connection:
            terminal.enter()
            try:
                if terminal.keys:
                    loop.add_reader(sys.stdin.fileno(), self._press)
                while True:
                    with suppress(TimeoutError):
                        async with asyncio.timeout(PULSE_SECONDS):
                            await self.stirred.wait()
                    at = self.now()
                    news = self._take(connection) or self.stirred.is_set() or int(at.seconds) != second
                    self.stirred.clear()
                    if self.view is None:
                        return
                    if not news:
                        continue
                    second = int(at.seconds)
                    size = (out.size.width, out.size.height)
                    lines = draw(self.seen, self.view, at, self.broker, size, terminal.keys)
                    if (lines, size) != drawn:
                        drawn = (lines, size)
                        live.update(Group(*map(self._drawable, lines)), refresh=True)
            finally:
                terminal.leave()

    @contextmanager
    def _following(self) -> "Iterator[asyncio.Task[None]]":
        """The connection, kept."""
        from barcast.daemon.client import nothing

        connection = asyncio.create_task(self.link.run(nothing), name="link")
        try:
            yield connection
        finally:
            self.link.leave()
            connection.cancel()

    def _take(self, connection: "asyncio.Task[None]") -> bool:
        """Take what has come; return whether that is anything. Raise what ended the connection."""
        link, at = self.link, self.now()
        if connection.done():
            connection.result()
        before = self.seen.linked
        self.seen.link(link.connected.is_set(), link.fault, at)
        news = bool(link.inbox) or before != self.seen.linked
        while link.inbox:
            delivery = link.inbox.popleft()
            self.seen.take(delivery.topic, delivery.payload, at)
            link.ack([delivery])
        if self.named is not None and (known := self.seen.horizons):
            if self.named not in known:
                there = ", ".join(map(str, known))
                raise ConfigError(
                    f"--horizon: {self.named} is none of {there}, which the signals have; name one"
                )
            self.named = None
        return news

    def _press(self) -> None:
        from barcast.backtest.cli.screen import keys, pressed

        typed = os.read(sys.stdin.fileno(), 1024)
        if not typed:
            self._end()
        for key in keys(typed):
            if self.view is not None:
                self.view = pressed(key, self.view, self.seen, out.size.height)
        self.stirred.set()

    def _end(self) -> None:
        self.view = None
        self.stirred.set()

    def _rest(self, terminal: "Terminal") -> None:
        """Ctrl-Z: give the terminal back until the shell lets us go on."""
        terminal.leave()
        os.kill(os.getpid(), signal.SIGSTOP)
        terminal.enter()
        self.stirred.set()

    def _nothing(self) -> str:
        seen, user = self.seen, f"user {self.user}" if self.user else "a user without a name"
        why = f"{user} may read {seen.root}/signals/ and status/" if seen.linked else "the broker runs"
        there = "" if seen.linked else f" (no broker: {self.link.fault})"
        return (
            f"{seen.instance}: nothing came from {self.broker} below {seen.root} within "
            f"{PATIENCE_SECONDS:.0f} s{there}; look whether {why}, and whether the instance has run"
        )

    def _drawable(self, line: "Text") -> "Text":
        from barcast.backtest.cli.screen import ascii_only

        return ascii_only(line) if out.options.ascii_only else line


class Terminal:
    """A screen of its own, and keys as they are pressed, where there are any.

    The state is how the terminal was set before.
    """

    def __init__(self, live: Live) -> None:
        self.keys = sys.stdin.isatty()
        self._live = live
        self._before: list[Any] | None = None

    def enter(self) -> None:
        """Take the terminal."""
        if self.keys:
            self._before = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        self._live.start()

    def leave(self) -> None:
        """Leave it as it was."""
        try:
            self._live.stop()
        finally:
            if self._before is not None:
                termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._before)
