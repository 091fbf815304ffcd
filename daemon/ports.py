"""The outside world as the path sees it: events come from a source, outcomes go to a sink.

A source is also the clock. Live it waits; in a replay it jumps simulated time. Nothing else tells the
path what time it is, so the same events give the same outcomes in both.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Protocol

import msgspec

from barcast.models import Adjustment, Bar, Card, Forecast
from barcast.models.joint import Outlook


@dataclass(frozen=True, slots=True)
class Arrival:
    """Bars that came together, and when they were taken in (nanoseconds since 1970, UTC)."""

    time: int
    bars: tuple[Bar, ...]


@dataclass(frozen=True, slots=True)
class Declaration:
    """A changed price basis that was declared, and when that was taken in."""

    time: int
    adjustment: Adjustment


@dataclass(frozen=True, slots=True)
class Revision:
    """The settings of the path from this moment on, as canonical JSON."""

    time: int
    settings: bytes


@dataclass(frozen=True, slots=True)
class Warmup:
    """History put into the windows: the SHA-256 of what was read, and the bars.

    With a symbol it is what was found of this one, after its first bar came; it may be nothing.
    """

    time: int
    digest: str
    bars: tuple[Bar, ...]
    symbol: str | None = None


@dataclass(frozen=True, slots=True)
class Activation:
    """A model takes over: its id, the fingerprint it is activated under, the window it needs, in bars."""

    time: int
    model: str
    fingerprint: str
    window: int


@dataclass(frozen=True, slots=True)
class Shed:
    """What came after record `after`, and was due after `clock` (nanoseconds), is not forecast, up to now.

    Bars are in the windows all the same. The path itself does nothing: recovery and replay pass over it.
    """

    time: int
    after: int
    clock: int


@dataclass(frozen=True, slots=True)
class Pause:
    """From now on groups are formed and, if `paused`, not forecast. Bars are in the windows all the same."""

    time: int
    paused: bool


Event = Arrival | Declaration | Revision | Warmup | Activation | Shed | Pause


class Group(msgspec.Struct, frozen=True, gc=False):
    """The symbols of one close time that are forecast together, and those that were waited for in vain.

    A straggler is a group of its own. `due` is when the group was complete or its wait ended, by recorded
    arrivals, never when somebody woke up to it. `previous` is the close of the group that left before it
    (None: it is the first); all but stragglers form a chain by it.
    """

    close_time: int
    due: int
    symbols: tuple[str, ...]
    missing: tuple[str, ...] = ()
    straggler: bool = False
    previous: int | None = None

    @property
    def key(self) -> str:
        """What names it among all groups: its close, and the symbol of a straggler."""
        return f"{self.close_time} {self.symbols[0]}" if self.straggler else str(self.close_time)


@dataclass(frozen=True, slots=True)
class Hole:
    """Bars that should have closed between two closes of a symbol (nanoseconds), and how many."""

    after: int
    before: int
    bars: int


class Term(msgspec.Struct, frozen=True, gc=False):
    """The closes (nanoseconds) that a symbol's horizons end with, and until when its signal may be used.

    A signal that becomes due at or after the close of the symbol's `following` bar is not tradable.
    """

    ends: tuple[int, ...]
    following: int
    valid_until: int


class Outcome(msgspec.Struct, frozen=True):
    """Everything the path decided about one group.

    `forecasts` holds the symbols that were forecast, in order; `withheld` says why the others were not, and
    `degraded` what is wrong with the bars of those that were. `holes` are the gaps right before the bars of
    this group, and before the first bar of a new symbol, to be asked for. `targets` is strategy -> symbol ->
    wanted exposure from -1 to 1, empty for a straggler; `refused` says why a strategy has none in this group
    although it was asked, and `raised` holds what those that failed raised, for the log: it is not published.
    `outlooks` holds what the paths of each forecast say, where that is asked for; the forecasts come without
    them. `root` is the root topic it is published under. One that is `shed` was not forecast at all.
    """

    root: str
    timeframe: str
    group: Group
    card: Card
    forecasts: Mapping[str, Forecast]
    degraded: Mapping[str, tuple[str, ...]]
    withheld: Mapping[str, str]
    holes: Mapping[str, tuple[Hole, ...]]
    targets: Mapping[str, Mapping[str, float]]
    terms: Mapping[str, Term]
    refused: Mapping[str, str] = msgspec.field(default_factory=dict)
    raised: Mapping[str, Exception] = msgspec.field(default_factory=dict)
    outlooks: Mapping[str, Outlook] = msgspec.field(default_factory=dict)
    shed: bool = False

    def tradable(self, symbol: str) -> bool:
        """Whether the group was due before the symbol's next bar should have closed: news, not a backlog."""
        return self.group.due < self.terms[symbol].following


class Source(Protocol):
    """Where events come from, and what time it is."""

    def now(self) -> int:
        """The time in nanoseconds; never before an event that was handed out."""
        ...

    async def next(self, deadline: int | None) -> Event | None:
        """The next event, or None once `deadline` has passed first. Raise `EndOfSource` at the end."""
        ...

    async def sheds(self, group: Group, valid_until: Callable[[Group], int]) -> bool:
        """Whether a group is not to be forecast, as its signals would not be valid any more."""
        ...


class Sink(Protocol):
    """Where outcomes go."""

    def accepted(self, bar: Bar) -> None:
        """Take note of a bar that became the newest of its symbol."""
        ...

    def adjusted(self, adjustment: Adjustment) -> None:
        """Take note of a changed price basis."""
        ...

    async def emit(self, outcome: Outcome) -> None:
        """Take the outcome of a due group. Called in the order in which groups become due."""
        ...

    async def settle(self, now: int) -> None:
        """Make everything up to the last event and `now` durable."""
        ...


class EndOfSource(Exception):  # noqa: N818 - an end, not an error
    """The source has no further event and never will."""
