"""Journal records back to the events they were: used by recovery and by every replay of a journal."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import msgspec

from barcast.daemon import wire
from barcast.daemon.calendar import Calendars
from barcast.daemon.journal import Journal, Kind, Progress, Record
from barcast.daemon.panel import TrainingSettings
from barcast.daemon.pipeline import Pipeline, PipelineState, Settings
from barcast.daemon.ports import (
    Activation,
    Arrival,
    Declaration,
    Event,
    Pause,
    Revision,
    Shed,
    Warmup,
)
from barcast.daemon.timeframe import Timeframe
from barcast.models import Adjustment, Bar, Card, ConfigError

T = TypeVar("T")

TOLD = (Kind.OVERLOAD, Kind.ORDERED, Kind.ANSWERED)
"""Kinds of records that tell of a group or an order, and are nothing that comes to the path."""
REMEMBERED = 16
"""Models that a champion stands on, and those left behind, of which an activation tells."""


class Warmth(msgspec.Struct, frozen=True):
    """The payload of a warm-up: the history's content hash, how many bars a symbol took of it, the bars.

    The bars are part of the journal, so that a replay needs no file that an operator may have changed since.
    With a symbol it is the warm-up of that one, which appeared while the daemon ran.
    """

    digest: str
    length: int
    bars: tuple[Bar, ...]
    symbol: str | None = None

    def encode(self) -> bytes:
        """As msgpack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, payload: bytes) -> "Warmth":
        """Read what `encode` wrote."""
        return msgspec.msgpack.decode(payload, type=cls)

    def event(self, time: int) -> Warmup:
        """The event that this payload is."""
        return Warmup(time, self.digest, self.bars, self.symbol)


class Reign(msgspec.Struct, frozen=True):
    """A model that served: its id, its CRPS in the verdict it came by, and the newest bar that it knew.

    CRPS is divided by the mean absolute outcome, None without a verdict; the bar's close is in nanoseconds, 0
    where no training says.
    """

    model: str
    crps: float | None = None
    until: int = 0


class Champion(msgspec.Struct, frozen=True):
    """The payload of an activation: the model, the fingerprint it serves under, its window in bars, why.

    `crps` and `until` are those of `Reign`. `before` are the models that it stands on, the newest last: where
    a rollback leads to. `left` are those that were rolled back from: no verdict brings them back. `returned`
    says that a rollback brought this one, whose age then counts from its return.
    """

    model: str
    fingerprint: str
    window: int
    reason: str
    crps: float | None = None
    until: int = 0
    before: tuple[Reign, ...] = ()
    left: tuple[str, ...] = ()
    returned: bool = False

    @property
    def reign(self) -> Reign:
        """What is remembered of it under its successor."""
        return Reign(self.model, self.crps, self.until)

    def succeeded_by(self, reign: Reign, card: Card, reason: str) -> "Champion":
        """Another model in its place, on top of it, or the same under another fingerprint."""
        same = reign.model == self.model
        return Champion(
            reign.model,
            card.fingerprint,
            card.window,
            reason,
            reign.crps,
            reign.until,
            before=self.before if same else (*self.before, self.reign)[-REMEMBERED:],
            left=tuple(model for model in self.left if model != reign.model),
            returned=same and self.returned,
        )

    def behind(self, to: str | None) -> Reign | None:
        """The model to roll back to: the one below, or the newest one of that id; None if there is none."""
        return next((reign for reign in reversed(self.before) if to in (None, reign.model)), None)

    def rolled_back(self, reign: Reign, card: Card, reason: str) -> "Champion":
        """The model of `behind` in its place: all above that is left behind.

        One that it does not stand on is put on top, and only the champion is left behind.
        """
        below = [k for k, one in enumerate(self.before) if one == reign]
        above = [one.model for one in self.before[below[-1] + 1 :]] if below else []
        before = self.before[: below[-1]] if below else (*self.before, self.reign)[-REMEMBERED:]
        left = dict.fromkeys([*self.left, *above, self.model])
        left.pop(reign.model, None)
        return Champion(
            reign.model,
            card.fingerprint,
            card.window,
            reason,
            reign.crps,
            reign.until,
            before,
            tuple(left)[-REMEMBERED:],
            returned=True,
        )

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, payload: bytes) -> "Champion":
        """Read what `encode` wrote."""
        return msgspec.json.decode(payload, type=cls)

    def event(self, time: int) -> Activation:
        """The event that this payload is."""
        return Activation(time, self.model, self.fingerprint, self.window)


class Ordered(msgspec.Struct, frozen=True, omit_defaults=True):
    """The payload of an order that was taken: who gave it, what it is, why it was given.

    `who` is `uid N` of a process on this machine, as the kernel says; `mqtt NAME` of a message that claims to
    be from NAME, which the broker alone could prove; or `signal`. `answers` and `correlation` (hexadecimal)
    are those of the message: with them an order is known that comes again.
    """

    who: str
    verb: str
    wait: bool = False
    to: str | None = None
    reason: str | None = None
    answers: str = ""
    correlation: str = ""
    training: TrainingSettings | None = None

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, payload: bytes) -> "Ordered":
        """Read what `encode` wrote."""
        return msgspec.json.decode(payload, type=cls)


class Answered(msgspec.Struct, frozen=True, omit_defaults=True):
    """The payload of what came of an order, the number of whose record is `order`: one of both is set."""

    order: int
    done: str | None = None
    refused: str | None = None

    def encode(self) -> bytes:
        """As JSON."""
        return msgspec.json.encode(self)

    @classmethod
    def decode(cls, payload: bytes) -> "Answered":
        """Read what `encode` wrote."""
        return msgspec.json.decode(payload, type=cls)


def events(records: Iterable[Record], settings: Settings | None = None) -> Iterator[tuple[int, Event]]:
    """Decode records in order; yield each event with its number.

    Bars are decoded under the settings that were in force when they were received, as the live daemon
    decoded them; `settings` are those before the first record. Raise ConfigError for a decision that cannot
    be read.
    """
    root, calendars = "", Calendars("24x7", Timeframe.parse("1m"))
    if settings is not None:
        root, calendars = settings.root, settings.bar_calendars()
    for record in records:
        if record.kind in TOLD:
            continue
        try:
            event = _event(record, root, calendars)
            if isinstance(event, Revision):
                settings = Settings.decode(event.settings)
                root, calendars = settings.root, settings.bar_calendars()
        except (msgspec.DecodeError, ValueError) as error:
            raise _unreadable(record, error) from error
        yield record.seq, event


def _unreadable(record: Record, error: Exception) -> ConfigError:
    return ConfigError(
        f"journal.db, record {record.seq} ({record.kind}): {error}; restore a copy of the journal, or use "
        "the version of barcast that wrote it"
    )


def shed_groups(journal: Journal, after: int = 0) -> frozenset[str]:
    """The keys of groups that an overload has shed, in the records after a number."""
    return frozenset(key for _, key in decoded(journal.of_kind(Kind.OVERLOAD, after), bytes.decode))


def decoded(records: Iterable[Record], decode: Callable[[bytes], T]) -> Iterator[tuple[int, T]]:
    """The numbers of records and what their payloads are. Raise ConfigError for one that cannot be read."""
    for record in records:
        try:
            yield record.seq, decode(record.payload)
        except (msgspec.DecodeError, ValueError) as error:
            raise _unreadable(record, error) from error


def restore(journal: Journal, pipeline: Pipeline, upto: int) -> int:
    """Give a new path the state of the newest snapshot that is not after record `upto`.

    Return the number of the record after which it was taken, 0 without one. Raise ConfigError when it cannot
    be read.
    """
    found = journal.snapshot(upto)
    if found is None:
        if journal.base:
            raise ConfigError(
                f"{journal.place}: the snapshot after record {journal.base} is missing; restore a copy"
            )
        return 0
    try:
        pipeline.restore(PipelineState.decode(found.state))
    except (msgspec.DecodeError, ValueError) as error:
        raise ConfigError(
            f"{journal.place}: the snapshot after record {found.seq} cannot be read ({error}); restore a "
            "copy, or use the version of barcast that wrote it"
        ) from error
    return found.seq


def _event(record: Record, root: str, calendars: Calendars) -> Event:
    """The event of one record. Raise ValueError or DecodeError for a record that cannot be read."""
    match record.kind:
        case Kind.BARS:
            came, _ = wire.decode(record.topic, record.payload, record.time, root, calendars)
            return Arrival(record.time, tuple(came))
        case Kind.ADJUSTMENT:
            found = wire.declared(record.topic, record.payload, root)
            if isinstance(found, Adjustment):
                return Declaration(record.time, found)
            raise ValueError(found.reason)
        case Kind.REVISION:
            return Revision(record.time, record.payload)
        case Kind.WARMUP | Kind.NEWCOMER:
            return Warmth.decode(record.payload).event(record.time)
        case Kind.ACTIVATION:
            return Champion.decode(record.payload).event(record.time)
        case Kind.SHED:
            began = msgspec.json.decode(record.payload, type=Progress)
            return Shed(record.time, began.seq, began.clock)
        case Kind.PAUSE | Kind.RESUME:
            return Pause(record.time, record.kind == Kind.PAUSE)
    raise ValueError(f"kind {record.kind!r} is unknown")
