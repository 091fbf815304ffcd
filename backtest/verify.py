"""A recorded live run, computed again from its journal and held against what was published."""

from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import ArrayLike, NDArray

from barcast.backtest.replay import Recording, replay
from barcast.backtest.result import level_column
from barcast.daemon import wire
from barcast.daemon.events import events, restore, shed_groups
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.pipeline import Pipeline, Settings, pass_over
from barcast.daemon.ports import Outcome, Shed
from barcast.daemon.store import ModelStore
from barcast.daemon.wire import Outgoing
from barcast.models import ConfigError, DataError

_ALL = 1 << 62
"""Rows of an outbox, more than there are."""

_Body = wire.Signal | wire.Target


@dataclass(frozen=True, slots=True)
class Replayed:
    """What a journal says when it is computed again.

    The first `settled` messages were in its outbox by then; `outbox` holds (topic, payload) of those that
    still are, and of older ones, newest first. Groups up to the close `left` (nanoseconds, -1 for none) have
    left the journal. `fingerprints` are those (recorded, own) that differ, and `elsewhere` the ids of the
    messages that were recorded under such a one: bytes are promised for all others.
    """

    messages: list[Outgoing]
    settled: int = 0
    outbox: tuple[tuple[str, bytes], ...] = ()
    left: int = -1
    elsewhere: frozenset[str] = frozenset()
    fingerprints: tuple[tuple[str, str], ...] = ()

    def sentence(self) -> str:
        """What a person wants to know."""
        signals = sum("/signals/" in message.topic for message in self.messages)
        return f"{len(self.messages)} messages replayed, {signals} of them signals"


class _Replaying(Recording):
    """A recording that also keeps what was recorded under another fingerprint than it is replayed under."""

    def __init__(self, pipeline: Pipeline) -> None:
        super().__init__()
        self.elsewhere: set[str] = set()
        self.fingerprints: dict[tuple[str, str], None] = {}
        self._pipeline = pipeline

    async def emit(self, outcome: Outcome) -> None:
        """Encode the outcome's messages."""
        first = len(self.messages)
        await super().emit(outcome)
        recorded, own = self._pipeline.fingerprint or "", outcome.card.fingerprint
        if recorded != own:
            self.fingerprints[recorded, own] = None
            self.elsewhere.update(message.id for message in self.messages[first:])


def replay_journal(journal: Path) -> Replayed:
    """Compute again every signal, target and group message from a journal, as far as it reaches back.

    Models are those of the journal's state directory; one that forecasts nothing in it is not opened. What
    was passed over live is passed over. Raise ConfigError when the journal has no settings in it,
    CheckpointError when a model is missing, changed or cannot be opened here.
    """
    reader = Journal(journal, readonly=True)
    try:
        with reader.one_moment():
            revision = reader.last(Kind.REVISION)
            if revision is None:
                raise ConfigError(f"{journal}: nothing was recorded yet; run the daemon first")
            list(events([revision]))  # names the record if it is damaged
            store = ModelStore(journal.parent / "models", Settings.decode(revision.payload).timeframe)
            pipeline = Pipeline(store.open, journal.parent / "strategies")
            recording = _Replaying(pipeline)
            base = restore(reader, pipeline, reader.base)
            left = pipeline.batcher.state.closed
            active = reader.last(Kind.ACTIVATION, base)
            for _, event in events([active] if active else []):  # a snapshot knows no fingerprint
                list(pipeline.take(event))
            overload = shed_groups(reader, base)
            for seq, shed in events(reader.of_kind(Kind.SHED)):
                if seq > base and isinstance(shed, Shed):
                    until = events(reader.records(base, shed.after), pipeline.revision)
                    replay((event for _, event in until), pipeline, recording, shed.clock, shed=overload)
                    passed = events(reader.records(max(base, shed.after), seq), pipeline.revision)
                    for _, event in passed:
                        pass_over(pipeline, event)
                    base = seq
            progress = reader.progress()
            done = events(reader.records(base, progress.seq), pipeline.revision)
            replay((event for _, event in done), pipeline, recording, progress.clock, shed=overload)
            settled = len(recording.messages)
            rest = events(reader.records(max(base, progress.seq)), pipeline.revision)
            replay((event for _, event in rest), pipeline, recording, shed=overload)
            return Replayed(
                recording.messages,
                settled,
                tuple(pair for pair in reader.sent("", _ALL) if _replays(pair[0])),
                left,
                frozenset(recording.elsewhere),
                tuple(recording.fingerprints),
            )
    finally:
        reader.close()


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
    """Replayed messages beside published ones, as (topic, payload), each counted once.

    Published is what a subscriber captured, or the journal's `outbox`. `older` is how many are of closes that
    have left the journal: nothing is said of them. `apart` is of what was recorded under another fingerprint:
    there only what is no figure differs, or agrees.
    """

    signals: int
    differing: tuple[tuple[str, bytes], ...]
    missing: tuple[Outgoing, ...]
    older: int = 0
    outbox: bool = False
    fingerprints: tuple[tuple[str, str], ...] = ()
    apart: Apart | None = None

    @property
    def agrees(self) -> bool:
        """Whether all that was published is what the replay says, as far as that is promised.

        An outbox holds every message; a subscriber may have come late, but a capture without a signal shows
        nothing.
        """
        return not self.differing and (not self.missing if self.outbox else self.signals > 0)

    def sentence(self) -> str:
        """What a person wants to know; of another fingerprint on lines of its own."""
        where, lacking = "captured", "were not captured"
        if self.outbox:
            where, lacking = "in the journal's own outbox", "are not in it"
        aside = ", figures from elsewhere aside" if self.apart else ""
        said = (
            f"{self.signals} signals {where}, {len(self.differing)} messages differ from the replay{aside}, "
            f"{len(self.missing)} of the replay {lacking}"
        )
        if self.older:
            said += f"; {self.older} are older than what the journal still holds"
        for recorded, own in self.fingerprints:
            said += f"\nrecorded under {recorded!r}, replayed under {own!r}"
        return f"{said}: bytes are not promised; {self.apart.sentence()}" if self.apart else said


def compare(replayed: Replayed, captured: Iterable[tuple[str, bytes]] | None = None) -> Difference:
    """Compare signals, targets, groups and requests for bars with a capture, or with the journal's outbox.

    It is byte by byte, but for the figures of signals and targets that were recorded under another
    fingerprint: of them it is said how far they are apart. At-least-once delivery may have brought a message
    twice: it counts once. What a replay does not say, such as a status, is left out, and so is what is of
    closes that have left the journal.
    """
    said = replayed.messages if captured is not None else replayed.messages[: replayed.settled]
    told = captured if captured is not None else replayed.outbox
    published = [pair for pair in dict.fromkeys(told) if _replays(pair[0])]
    again = {(m.topic, m.payload): m for m in said}
    same = [again[pair] for pair in published if pair in again]
    figures = {(m.topic, _close(m.payload)): m for m in said if m.id in replayed.elsewhere}
    near: list[Outgoing] = []
    bodies: list[tuple[_Body, _Body]] = []
    differing, older = [], []
    for topic, payload in (pair for pair in published if pair not in again):
        close = _close(payload)
        message = figures.get((topic, close))
        if message is None and 0 <= close <= replayed.left:
            older.append(topic)
        elif message is not None and (both := _alike(payload, message.payload)):
            near.append(message)
            bodies.append(both)
        else:
            differing.append((topic, payload))
    found = {(m.topic, m.payload) for m in (*same, *near)}
    begin = 0
    if captured is None and replayed.left >= 0:  # messages may leave the outbox before what a replay needs
        begin = next((k for k, pair in enumerate(again) if pair in found), 0 if published else len(again))
    elsewhere = sum(_signal(m.topic) for m in (*same, *near) if m.id in replayed.elsewhere)
    return Difference(
        sum(_signal(topic) for topic, _ in published) - sum(map(_signal, older)),
        tuple(differing),
        tuple(m for k, (pair, m) in enumerate(again.items()) if k >= begin and pair not in found),
        len(older),
        captured is None,
        replayed.fingerprints,
        _apart(bodies, elsewhere) if replayed.fingerprints else None,
    )


def _replays(topic: str) -> bool:
    """Whether a replay says what is published there."""
    return any(kind in topic for kind in ("/signals/", "/targets/", "/groups/", "/backfill/"))


def _signal(topic: str) -> bool:
    return "/signals/" in topic


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


def _apart(bodies: Sequence[tuple[_Body, _Body]], compared: int) -> Apart:
    """The largest differences of pairs (published, replayed) of one frame each, of so many signals."""
    signals = [(w, n) for w, n in bodies if isinstance(w, wire.Signal) and isinstance(n, wire.Signal)]
    targets = [(w, n) for w, n in bodies if isinstance(w, wire.Target) and isinstance(n, wire.Target)]

    def most(gaps: Callable[[wire.Signal, wire.Signal], NDArray[np.float64]]) -> float:
        return max((float(gaps(was, now).max(initial=0.0)) for was, now in signals), default=0.0)

    def column(was: wire.Signal) -> NDArray[np.float64]:
        return np.array(was.std)[:, None]  # (H, 1)

    quantile = most(_in_price)
    return Apart(
        compared,
        len(signals),
        len(targets),
        quantile=1e4 * quantile,
        place=next((_place(w, n) for w, n in signals if quantile and _in_price(w, n).max() == quantile), ""),
        deviations=most(lambda was, now: _gaps(_in_price(was, now), 0.0, column(was))),
        mean=1e4 * most(lambda was, now: _gaps(was.mean, now.mean)),
        std=most(lambda was, now: _gaps(was.std, now.std, was.std)),
        rise=most(lambda was, now: _gaps(was.rise, now.rise)),
        coverage=most(lambda was, now: _gaps(_shares(was), _shares(now))),
        touch=most(lambda was, now: _gaps(_firsts(was), _firsts(now))),
        drawdown=1e4 * most(lambda was, now: _gaps(was.drawdown or 0.0, now.drawdown or 0.0)),
        target=max((abs(was.target - now.target) for was, now in targets), default=0.0),
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
