"""A recorded live run, computed again from its journal and held against what was published."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, suppress
from dataclasses import dataclass, replace
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from barcast.backtest.replay import Recording, replay
from barcast.backtest.result import level_column
from barcast.daemon import journal as journals
from barcast.daemon import wire
from barcast.daemon.events import events, restore, shed_groups
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.pipeline import Pipeline, Settings, pass_over
from barcast.daemon.ports import Event, Outcome, Shed
from barcast.daemon.store import ModelStore
from barcast.daemon.verification import Place
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError, DataError

WAITING = 20_000
"""Messages that are kept to find their counterparts in, at most: several closes of many symbols."""
SHOWN = 10
"""Differences that are named."""

_Body = wire.Signal | wire.Target
_Spot = tuple[str, int]
"""Topic and close (nanoseconds, -1 where a message names none)."""


@dataclass(frozen=True, slots=True)
class Apart:
    """How far signals and targets of two machines are apart at most, of the same bars and the same model.

    `differing` of `signals` signals differ. `quantile` is the largest difference of a quantile in basis
    points of the reference price, `place` where it is; `deviations` the largest as a multiple of that
    forecast's standard deviation. `mean` is in basis points, `std` a share of it; `rise`, `coverage`, `touch`
    (of probabilities) and `target` are differences of what is published, `drawdown` is in basis points.
    `targets` is how many of those differ.
    """

    signals: int
    differing: int
    targets: int
    quantile: float = 0.0
    place: str = ""
    deviations: float = 0.0
    mean: float = 0.0
    std: float = 0.0
    rise: float = 0.0
    coverage: float = 0.0
    touch: float = 0.0
    drawdown: float = 0.0
    target: float = 0.0

    def sentence(self) -> str:
        """What a person wants to know."""
        said = f"{self.differing} of {self.signals} signals differ"
        if self.differing:
            at = f" ({self.place})" if self.place else ""
            said += (
                f", by at most {self.quantile:.2g} bp of the price{at} and {self.deviations:.2g} of the "
                f"forecast's deviation, mean {self.mean:.2g} bp, std {100 * self.std:.2g} %, rise "
                f"{self.rise:.2g}, coverage {self.coverage:.2g}"
            )
        if self.touch or self.drawdown:
            said += f", touch {self.touch:.2g}, drawdown {self.drawdown:.2g} bp"
        if self.targets:
            said += f"; {self.targets} targets differ, by at most {self.target:.2g}"
        return said


@dataclass(frozen=True, slots=True)
class Difference:
    """Replayed messages beside published ones: how many signals were compared, and how many messages differ.

    Published is what a subscriber captured, or the journal's `outbox`. `differing` are of those, `missing`
    are of the replay and not among those, so that a message with a byte changed is one of either; `places`
    names the first of them: topic, symbol, close, and what of it. `older` is how many are of closes that
    have left the journal: nothing is said of them. `apart` is of what was recorded under another of the
    `fingerprints` (recorded, own): there only what is no figure differs, or agrees.
    """

    signals: int
    differing: int
    missing: int
    older: int = 0
    outbox: bool = False
    fingerprints: tuple[tuple[str, str], ...] = ()
    apart: Apart | None = None
    places: tuple[Place, ...] = ()

    @property
    def agrees(self) -> bool:
        """Whether all that was published is what the replay says, as far as that is promised.

        An outbox holds every message; a subscriber may have come late, but a capture without a signal shows
        nothing.
        """
        return not self.differing and (not self.missing if self.outbox else self.signals > 0)

    def sentence(self) -> str:
        """What a person wants to know; of places, and of another fingerprint, on lines of their own."""
        where, lacking = "captured", "were not captured"
        if self.outbox:
            where, lacking = "in the journal's own outbox", "are not in it"
        aside = ", figures from elsewhere aside" if self.apart else ""
        said = (
            f"{self.signals} signals {where}, {self.differing} messages differ from the replay{aside}, "
            f"{self.missing} of the replay {lacking}"
        )
        if self.older:
            said += f"; {self.older} are older than what the journal still holds"
        if not self.agrees:
            said = "\n".join([said, *(place.sentence() for place in self.places)])
            said += "\nand others" * (len(self.places) == SHOWN)
        for recorded, own in self.fingerprints:
            said += f"\nrecorded under {recorded!r}, replayed under {own!r}"
        return f"{said}: bytes are not promised; {self.apart.sentence()}" if self.apart else said


@dataclass(frozen=True, slots=True)
class _One:
    """A message that is alone: its payload, and whether it stands for what another fingerprint gave."""

    payload: bytes
    elsewhere: bool = False


class _Side:
    """The messages of one side that wait for their counterparts, by topic and close, and how many."""

    def __init__(self) -> None:
        self.waiting: dict[_Spot, list[_One]] = {}
        self.count = 0

    def put(self, spot: _Spot, one: _One) -> None:
        self.waiting.setdefault(spot, []).append(one)
        self.count += 1

    def take(self, spot: _Spot, fits: Callable[[_One], object]) -> _One | None:
        """Take out the oldest one of a topic and close that fits."""
        ones = self.waiting.get(spot, [])
        found = next((k for k, one in enumerate(ones) if fits(one)), None)
        if found is None:
            return None
        self.count -= 1
        one = ones.pop(found)
        if not ones:
            del self.waiting[spot]
        return one

    def oldest(self) -> tuple[_Spot, _One]:
        """Take out one of the topic and close that have waited longest."""
        spot, [one, *_] = next(iter(self.waiting.items()))
        self.take(spot, lambda other: other is one)
        return spot, one


class Comparison:
    """Holds messages, one after the other as they are computed, against those that were published.

    Of the latter `published` gives (topic, payload) in the order in which they were, `captured` in any. As
    long as both sides say the same nothing is kept. What is alone waits until the other side has come to its
    close, or until `WAITING` others wait. Groups up to the close `left` went before the replay begins, so
    that messages of them may be published and not computed; unless what was published is the `whole` of it,
    its beginning may be missing, too, or all of it. Messages of closes before `since` do not count.

    The state is the next message published, what waits on either side, whether anything was the same yet,
    and what is counted.
    """

    def __init__(
        self,
        published: Iterable[tuple[str, bytes]] = (),
        left: int = -1,
        since: int = 0,
        *,
        whole: bool = True,
        captured: Iterable[tuple[str, bytes]] | None = None,
    ) -> None:
        self._published = (pair for pair in published if _replays(pair[0]))
        self._head = next(self._published, None)
        self._outbox = captured is None
        self._left, self._since = left, since
        self._begun = whole or not self._outbox
        self._gone = not self._begun and self._head is None
        self._told, self._said = _Side(), _Side()
        self._signals = self._elsewhere = self._differing = self._missing = self._older = 0
        self._apart = Apart(0, 0, 0)
        self._places: dict[_Spot, Place] = {}
        for topic, payload in dict.fromkeys(captured or ()):
            if _replays(topic) and self._counts(spot := (topic, _close(payload))):
                self._told.put(spot, _One(payload))

    def hear(self, messages: Iterable[Outgoing], elsewhere: bool = False) -> None:
        """Take what was computed next; `elsewhere`: for what was recorded under another fingerprint."""
        for message in messages:
            topic, payload = message.topic, message.payload
            if self._head == (topic, payload):
                self._head = next(self._published, None)
                self._same(topic, elsewhere)
            else:
                self._astray((topic, _close(payload)), _One(payload, elsewhere))

    def end(self, fingerprints: Iterable[tuple[str, str]] = ()) -> Difference:
        """Take the rest of what was published; say what came of it all."""
        while self._head is not None:
            self._take(self._head)
        while self._told.count:
            self._unsaid()
        while self._said.count and not self._gone:
            self._untold()
        pairs = tuple(fingerprints)
        return Difference(
            self._signals,
            self._differing,
            self._missing,
            self._older,
            self._outbox,
            pairs,
            replace(self._apart, signals=self._elsewhere) if pairs else None,
            tuple(self._places.values()),
        )

    def _counts(self, spot: _Spot) -> bool:
        return not 0 <= spot[1] < self._since

    def _astray(self, spot: _Spot, one: _One) -> None:
        """Find the counterpart of a message that is not the next one published; else let it wait."""
        while not self._meets(self._told, spot, one):
            if self._head is None or _close(self._head[1]) > spot[1]:
                if self._counts(spot) and not self._gone:
                    self._said.put(spot, one)
                    if self._said.count > WAITING:
                        self._untold()
                return
            self._take(self._head)

    def _take(self, head: tuple[str, bytes]) -> None:
        """Take the next message published, which waits if it was not said yet."""
        self._head = next(self._published, None)
        spot, one = (head[0], _close(head[1])), _One(head[1])
        if self._counts(spot) and not self._meets(self._said, spot, one):
            self._told.put(spot, one)
            if self._told.count > WAITING:
                self._unsaid()

    def _meets(self, side: _Side, spot: _Spot, one: _One) -> bool:
        """Whether its counterpart waits: the same bytes or, elsewhere, all the same but the figures."""
        if same := side.take(spot, lambda other: other.payload == one.payload):
            self._same(spot[0], one.elsewhere or same.elsewhere)
            return True

        def near(other: _One) -> object:
            return (one.elsewhere or other.elsewhere) and _alike(one.payload, other.payload)

        if (found := side.take(spot, near)) is None:
            return False
        told, said = (found, one) if side is self._told else (one, found)
        if both := _alike(told.payload, said.payload):
            self._apart = _further(self._apart, *both)
        self._same(spot[0], True)
        return True

    def _same(self, topic: str, elsewhere: bool) -> None:
        """Count a message that both sides have."""
        if "/signals/" in topic:
            self._signals += 1
            self._elsewhere += elsewhere
        if not self._begun:  # what is before the first one that is still there is not missed
            self._begun, self._missing, self._said = True, 0, _Side()

    def _unsaid(self) -> None:
        """Give up the message published that has waited longest."""
        spot, one = self._told.oldest()
        others = self._said.waiting.get(spot)
        if others is None and 0 <= spot[1] <= self._left:
            self._older += 1
            return
        self._signals += "/signals/" in spot[0]
        self._differing += 1
        self._name(spot, _what(one.payload, others[0].payload) if others else "not said by the replay")

    def _untold(self) -> None:
        """Give up the message computed that has waited longest."""
        spot, _ = self._said.oldest()
        self._missing += 1
        if self._begun and self._outbox:
            self._name(spot, "said by the replay alone")

    def _name(self, spot: _Spot, what: str) -> None:
        if len(self._places) < SHOWN:
            symbol = "" if "/groups/" in spot[0] else spot[0].rpartition("/")[2]
            close = wire.to_text(spot[1]) if spot[1] >= 0 else ""
            self._places.setdefault(spot, Place(spot[0], symbol, close, what))


_fields = msgspec.json.Decoder(dict[str, msgspec.Raw])


def _what(published: bytes, replayed: bytes) -> str:
    """The fields in which two bodies differ."""
    try:
        was, now = _fields.decode(published), _fields.decode(replayed)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return "no message"
    fields = [name for name in {**was, **now} if was.get(name) != now.get(name)]
    return f"another {', '.join(fields)}" if fields else "other bytes of the same values"


class _Sink(Recording):
    """Hands the messages of each outcome on, and whether it was recorded under another fingerprint.

    The state is the pairs (recorded, own) of fingerprints that differ. Outcomes of closes before `since` are
    passed over.
    """

    def __init__(self, pipeline: Pipeline, since: int, hear: Callable[[Iterable[Outgoing], bool], None]):
        super().__init__()
        self.fingerprints: dict[tuple[str, str], None] = {}
        self._pipeline, self._since, self._hear = pipeline, since, hear

    async def emit(self, outcome: Outcome) -> None:
        """Encode the outcome's messages."""
        if outcome.group.close_time < self._since:
            return
        recorded, own = self._pipeline.fingerprint or "", outcome.card.fingerprint
        if recorded != own:
            self.fingerprints[recorded, own] = None
        self._hear(wire.messages(outcome), recorded != own)


class _Run:
    """The path of a journal, from the newest snapshot on that is older than all that closes `since` need.

    The state is that of the path. What came before `begin` is of no such close. Groups up to the close `left`
    (nanoseconds, -1 for none) went before the snapshot. Models are those of the state directory, the one that
    a journal file is in; one that forecasts nothing is not opened. What was passed over live is passed over.
    Raise ConfigError when the journal has no settings in it, CheckpointError when a model is missing, changed
    or cannot be opened here.
    """

    def __init__(self, reader: Journal, since: int, state_dir: Path | None) -> None:
        revision = reader.last(Kind.REVISION)
        if revision is None:
            raise ConfigError(f"{reader.place}: nothing was recorded yet; run the daemon first")
        list(events([revision]))  # names the record if it is damaged
        settings, folder = Settings.decode(revision.payload), state_dir or Path(str(reader.place)).parent
        store = ModelStore(folder / "models", settings.timeframe)
        self.pipeline = Pipeline(store.open, folder / "strategies")
        self._reader, self.begin = reader, since - wire.ahead(settings.bar_calendars())
        near = [seq for seq, time in reader.snapshots() if time < self.begin and seq >= reader.base]
        self._base = restore(reader, self.pipeline, max(near, default=reader.base))
        self._shed = shed_groups(reader, self._base)
        self.left = self.pipeline.batcher.state.closed
        active = reader.last(Kind.ACTIVATION, self._base)
        for _, event in events([active] if active else []):  # a snapshot knows no fingerprint
            list(self.pipeline.take(event))

    def settled(self, sink: _Sink) -> None:
        """Say again what is in the outbox by now."""
        for seq, shed in events(self._reader.of_kind(Kind.SHED)):
            if seq > self._base and isinstance(shed, Shed):
                replay(self._events(self._base, shed.after), self.pipeline, sink, shed.clock, shed=self._shed)
                for _, event in self._decoded(max(self._base, shed.after), seq):
                    pass_over(self.pipeline, event)
                self._base = seq
        progress = self._reader.progress()
        replay(self._events(self._base, progress.seq), self.pipeline, sink, progress.clock, shed=self._shed)
        self._base = max(self._base, progress.seq)

    def rest(self, sink: _Sink) -> None:
        """Say what was not settled yet."""
        replay(self._events(self._base, None), self.pipeline, sink, shed=self._shed)

    def read_rest(self) -> None:
        """Read what was not settled yet, and say nothing of it. Raise ConfigError where it cannot be read."""
        for _ in self._decoded(self._base, None):
            pass

    def _events(self, after: int, upto: int | None) -> Iterator[Event]:
        """Events in order; what came too early for any close that counts is passed over."""
        for _, event in self._decoded(after, upto):
            if event.time < self.begin:
                pass_over(self.pipeline, event)
            else:
                yield event

    def _decoded(self, after: int, upto: int | None) -> Iterator[tuple[int, Event]]:
        return events(self._reader.records(after, upto), self.pipeline.revision)


def verify(
    journal: journals.Place,
    since: int = 0,
    captured: Iterable[tuple[str, bytes]] | None = None,
    state_dir: Path | None = None,
) -> "Difference":
    """Compute a journal again and compare what it says with its own outbox, or with what was captured.

    Signals, targets, groups and requests for bars are compared, byte by byte, but for the figures of signals
    and targets that were recorded under another fingerprint: of them it is said how far they are apart. With
    `since`, in nanoseconds, only those of closes from then on are computed and compared. What a replay does
    not say, such as a status, is left out, and closes that have left the journal are counted apart.

    Messages are compared one by one as they are computed, so memory does not grow with the journal; it holds
    a capture, though, of which a message may have come twice: it counts once. A daemon may be writing the
    journal meanwhile.

    Raise ConfigError when the journal has no settings in it, CheckpointError when a model is missing, changed
    or cannot be opened here.
    """
    with closing(Journal(journal, readonly=True)) as reader, reader.one_moment():
        run = _Run(reader, since, state_dir)
        if captured is None:
            first = reader.valid_after(run.begin)
            whole = first > 0 or not reader.snapshots()  # messages leave by a compaction alone
            comparison = Comparison(reader.told(first), run.left, since, whole=whole)
        else:
            comparison = Comparison((), run.left, since, captured=captured)
        sink = _Sink(run.pipeline, since, comparison.hear)
        run.settled(sink)
        if captured is None:
            run.read_rest()
        else:
            run.rest(sink)
        return comparison.end(sink.fingerprints)


def _replays(topic: str) -> bool:
    """Whether a replay says what is published there."""
    return any(kind in topic for kind in ("/signals/", "/targets/", "/groups/", "/backfill/"))


def _alike(published: bytes, replayed: bytes) -> tuple[_Body, _Body] | None:
    """Both bodies, if they are signals or targets that differ in figures only."""
    was, now = _body(published), _body(replayed)
    if was is None or now is None or _frame(was) != _frame(now):
        return None
    return was, now


def _body(payload: bytes) -> _Body | None:
    """A signal or a target, None for anything else."""
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(payload, type=wire.Signal)
    with suppress(msgspec.DecodeError, UnicodeDecodeError):
        return msgspec.json.decode(payload, type=wire.Target)
    return None


def _frame(body: _Body) -> _Body:
    """A body without its id, and with zeros in the places of what a forecaster computes."""
    if isinstance(body, wire.Target):
        return msgspec.structs.replace(body, id="", target=0.0)
    coverage = body.coverage
    if coverage is not None:
        shares = {interval: [0.0] * len(share) for interval, share in coverage.share.items()}
        coverage = msgspec.structs.replace(coverage, share=shares)
    nothing = {"up_price": 0.0, "down_price": 0.0, "up_first": 0.0, "down_first": 0.0}
    return msgspec.structs.replace(
        body,
        id="",
        touch=body.touch and [msgspec.structs.replace(pair, **nothing) for pair in body.touch],
        drawdown=body.drawdown and 0.0,
        quantiles=[[0.0] * len(row) for row in body.quantiles],
        mean=[0.0] * len(body.mean),
        std=[0.0] * len(body.std),
        rise=[0.0] * len(body.rise),
        coverage=coverage,
    )


def _further(apart: Apart, was: _Body, now: _Body) -> Apart:
    """The largest differences, with those of one more pair (published, replayed) of one frame."""
    if isinstance(was, wire.Target) and isinstance(now, wire.Target):
        gap = abs(was.target - now.target)
        return replace(apart, targets=apart.targets + 1, target=max(apart.target, gap))
    assert isinstance(was, wire.Signal)
    assert isinstance(now, wire.Signal)

    def most(so_far: float, gaps: NDArray[np.float64], unit: float = 1.0) -> float:
        return max(so_far, unit * float(gaps.max(initial=0.0)))

    prices = _in_price(was, now)
    quantile = most(apart.quantile, prices, 1e4)
    return replace(
        apart,
        differing=apart.differing + 1,
        quantile=quantile,
        place=_place(was, now) if quantile > apart.quantile else apart.place,
        deviations=most(apart.deviations, _gaps(prices, 0.0, np.array(was.std)[:, None])),
        mean=most(apart.mean, _gaps(was.mean, now.mean), 1e4),
        std=most(apart.std, _gaps(was.std, now.std, was.std)),
        rise=most(apart.rise, _gaps(was.rise, now.rise)),
        coverage=most(apart.coverage, _gaps(_shares(was), _shares(now))),
        touch=most(apart.touch, _gaps(_firsts(was), _firsts(now))),
        drawdown=most(apart.drawdown, _gaps(was.drawdown or 0.0, now.drawdown or 0.0), 1e4),
    )


def _gaps(one: ArrayLike, other: ArrayLike, scale: ArrayLike = 1.0) -> NDArray[np.float64]:
    """Differences as shares of a scale; 0 where there is none, whatever the scale is."""
    gaps = np.abs(np.subtract(one, other))
    with np.errstate(divide="ignore"):
        return np.divide(gaps, scale, out=np.zeros_like(gaps), where=gaps > 0)


def _in_price(was: wire.Signal, now: wire.Signal) -> NDArray[np.float64]:
    """Differences of the quantiles, (H, Q), as shares of the reference price."""
    return _gaps(was.quantiles, now.quantiles, was.reference)


def _place(was: wire.Signal, now: wire.Signal) -> str:
    """Whose quantile differs most, of which close, how many bars ahead, and its level."""
    gaps = _in_price(was, now)
    row, column = np.unravel_index(gaps.argmax(), gaps.shape)
    return f"{was.symbol} at {was.close_time}, +{was.horizons[row].bars}, {level_column(was.levels[column])}"


def _shares(signal: wire.Signal) -> list[list[float]]:
    """The shares of a signal's coverage in the order of the intervals' names."""
    return [share for _, share in sorted(signal.coverage.share.items())] if signal.coverage else []


def _firsts(signal: wire.Signal) -> list[tuple[float, float]]:
    """The probabilities of a signal's pairs of barriers."""
    return [(pair.up_first, pair.down_first) for pair in signal.touch or ()]


class _Closed(msgspec.Struct):
    """Of a message, the close that it is of: a request for bars names it as their end."""

    close_time: datetime | None = None
    before: datetime | None = None


def _close(payload: bytes) -> int:
    """The close that a message is of in nanoseconds, -1 where it names none."""
    try:
        found = msgspec.json.decode(payload, type=_Closed)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return -1
    close = found.close_time or found.before
    return -1 if close is None or close.tzinfo is None else wire.to_ns(close)


def read_capture(path: Path) -> list[tuple[str, bytes]]:
    """Topics and payloads that a subscriber wrote down, one message a line.

    A line is a topic, a blank and the payload, as `mosquitto_sub -v` prints it, or a JSON array of the two.
    Raise DataError for a file or line that is neither.
    """
    pairs = msgspec.json.Decoder(tuple[str, str])
    if not path.is_file():
        raise DataError(f"{path}: no such file; name the lines that a subscriber wrote down")
    found = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        name, blank, plain = line.partition(b" ")
        if blank and not line.startswith(b"["):
            found.append((name.decode("utf-8", "replace"), plain))
            continue
        try:
            topic, payload = pairs.decode(line)
        except (msgspec.DecodeError, UnicodeDecodeError) as error:
            raise DataError(
                f"{path}, line {number}: {line[:40].decode('utf-8', 'replace')!r} is no message ({error}); "
                "write topic, blank and payload, as mosquitto_sub -v does"
            ) from error
        found.append((topic, payload.encode()))
    return found
