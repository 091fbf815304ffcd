"""Journal records back to the events they were: used by recovery and by every replay of a journal."""

from collections.abc import Iterable, Iterator

import msgspec

from barcast.daemon import wire
from barcast.daemon.calendar import Calendar
from barcast.daemon.journal import Kind, Record
from barcast.daemon.pipeline import Settings
from barcast.daemon.ports import Activation, Arrival, Event, Revision, Warmup
from barcast.daemon.timeframe import Timeframe
from barcast.models import Bar


class Warmth(msgspec.Struct, frozen=True):
    """The payload of a warm-up: the content hash of the history, and the bars that the windows took of it.

    The bars are part of the journal, so that a replay needs no file that an operator may have changed since.
    """

    digest: str
    bars: tuple[Bar, ...]

    def encode(self) -> bytes:
        """As msgpack."""
        return msgspec.msgpack.encode(self)

    @classmethod
    def decode(cls, payload: bytes) -> "Warmth":
        """Read what `encode` wrote."""
        return msgspec.msgpack.decode(payload, type=cls)

    def event(self, time: int) -> Warmup:
        """The event that this payload is."""
        return Warmup(time, self.digest, self.bars)


class Champion(msgspec.Struct, frozen=True):
    """The payload of an activation: the model, the fingerprint it serves under, and why it was chosen."""

    model: str
    fingerprint: str
    reason: str


def events(records: Iterable[Record]) -> Iterator[tuple[int, Event]]:
    """Decode records in order; yield each event with its number.

    Bars are decoded under the settings that were in force when they were received, as the live daemon
    decoded them.
    """
    root, calendar = "", Calendar("24x7", Timeframe.parse("1m"))
    for record in records:
        match record.kind:
            case Kind.BARS:
                came, _ = wire.decode(record.topic, record.payload, record.time, root, calendar)
                yield record.seq, Arrival(record.time, tuple(came))
            case Kind.REVISION:
                settings = Settings.decode(record.payload)
                root, calendar = settings.root, settings.bar_calendar()
                yield record.seq, Revision(record.time, record.payload)
            case Kind.WARMUP:
                yield record.seq, Warmth.decode(record.payload).event(record.time)
            case Kind.ACTIVATION:
                champion = msgspec.json.decode(record.payload, type=Champion)
                yield record.seq, Activation(record.time, champion.model, champion.fingerprint)
            case kind:
                raise ValueError(f"record {record.seq} of the journal is of unknown kind {kind!r}")
