"""The replay composition root: the very path that runs live, fed from history or from a journal."""

import hashlib
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from itertools import groupby
from operator import attrgetter
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import polars as pl

from barcast.backtest.ledger import Execution, Ledger
from barcast.backtest.result import BacktestResult
from barcast.backtest.scoring import portfolio, scores
from barcast.daemon import wire
from barcast.daemon.bars import serves_nothing
from barcast.daemon.calendar import Calendars
from barcast.daemon.events import events, restore
from barcast.daemon.history import Stamp, bars, digest, scan
from barcast.daemon.journal import Journal, Kind
from barcast.daemon.pipeline import Pipeline, Settings, StrategySettings, pass_over, run
from barcast.daemon.ports import (
    Activation,
    Arrival,
    Declaration,
    EndOfSource,
    Event,
    Outcome,
    Revision,
    Shed,
    Sink,
    Warmup,
)
from barcast.daemon.store import ModelStore
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import Outgoing
from barcast.models import (
    BASELINES,
    Adjustment,
    Bar,
    ConfigError,
    DataError,
    Forecaster,
    check_sampled,
    open_model,
)

Moment = int | str | datetime
"""A time: nanoseconds since 1970 UTC, an ISO 8601 text or a datetime."""


class ReplaySource:
    """Events in order of their time, and a clock that jumps from one to the next.

    After the last event the clock jumps from deadline to deadline, so that no group stays behind; with `end`
    (nanoseconds), not beyond that.
    """

    def __init__(self, events: Iterable[Event], end: int | None = None) -> None:
        self._events, self._end = iter(events), end
        self._ahead: Event | None = next(self._events, None)
        self._now = 0

    def now(self) -> int:
        """The simulated time in nanoseconds."""
        return self._now

    async def next(self, deadline: int | None) -> Event | None:
        """See `Source.next`."""
        event = self._ahead
        if event is None:
            if deadline is None or (self._end is not None and deadline > self._end):
                raise EndOfSource
            self._now = deadline
            return None
        if deadline is not None and deadline < event.time:
            self._now = deadline
            return None
        self._now, self._ahead = event.time, next(self._events, None)
        return event


class Recording:
    """A sink that keeps every outgoing message, as the live daemon would have sent it."""

    def __init__(self) -> None:
        self.messages: list[Outgoing] = []

    def accepted(self, bar: Bar) -> None:
        """Nothing is sent of a bar alone."""

    def adjusted(self, adjustment: Adjustment) -> None:
        """Nothing is sent of an adjustment alone."""

    async def emit(self, outcome: Outcome) -> None:
        """Encode the outcome's messages."""
        self.messages.extend(wire.messages(outcome))

    async def settle(self, now: int) -> None:
        """There is nothing to make durable."""


def arrivals(bars: Iterable[Bar]) -> Iterator[Arrival]:
    """Bars sorted by close time, as if those of one close came together at that moment."""
    for close_time, together in groupby(bars, attrgetter("close_time")):
        yield Arrival(close_time, tuple(together))


def drive(coroutine: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine that never waits for the outside: it needs no event loop, also in a notebook."""
    try:
        coroutine.send(None)
    except StopIteration:
        return
    coroutine.close()
    raise RuntimeError("a replay waited for something outside of it")


def replay(source: Iterable[Event], pipeline: Pipeline, sink: Sink, end: int | None = None) -> None:
    """Drive the path with events until their end, and on to the last group that waits, or is due by `end`."""
    drive(run(ReplaySource(source, end), pipeline, sink))


class _Digest:
    """A sink in front of the ledger: hashes every outgoing message, so that two runs can be compared.

    It also keeps why each symbol was withheld the last time.
    """

    def __init__(self, ledger: Ledger) -> None:
        self.sha256 = hashlib.sha256()
        self.withheld: dict[str, str] = {}
        self._ledger = ledger

    def accepted(self, bar: Bar) -> None:
        """Hand it on."""
        self._ledger.accepted(bar)

    def adjusted(self, adjustment: Adjustment) -> None:
        """Hand it on."""
        self._ledger.adjusted(adjustment)

    async def settle(self, now: int) -> None:
        """Hand it on."""
        await self._ledger.settle(now)

    async def emit(self, outcome: Outcome) -> None:
        """Hash the outcome's messages and hand it on."""
        self.withheld |= outcome.withheld
        for message in wire.messages(outcome):
            self.sha256.update(message.topic.encode() + b"\0" + message.payload + b"\n")
        await self._ledger.emit(outcome)


def run_backtest(
    files: Sequence[Path | str],
    *,
    stamp: Stamp,
    model: str = "fhs",
    timeframe: str = "1d",
    calendar: str = "24x7",
    calendars: Mapping[str, str] = MappingProxyType({}),
    adjustments: Sequence[Adjustment] = (),
    strategies: Sequence[str | StrategySettings] = ("quantile-band", "median-drift"),
    symbols: Sequence[str] | None = None,
    since: Moment | None = None,
    until: Moment | None = None,
    sampler: str | None = None,
    steps: int | None = None,
    commission_bp: float = 1.0,
    slippage_bp: float = 2.0,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> BacktestResult:
    """Replay bars from Parquet or CSV files through the live path, and keep the books.

    `stamp` says which end of a bar the files' times name. `since` and `until` are datetimes, ISO 8601 texts
    or nanoseconds since 1970, UTC where they name no zone: bars before `since` only warm the windows up.
    `model` is a checkpoint directory or the name of a baseline. Bars of one close count as received together
    at that moment; a target is filled at the next bar's open. `calendars` (symbol -> name) are those of
    symbols that keep other hours than `calendar`; an adjustment takes effect with the first bar after its
    time.
    Raise DataError for bars that cannot be used, ConfigError for settings, CheckpointError for the model.
    """
    if stamp not in ("open", "close"):
        raise ConfigError(f"stamp = {stamp!r}: say 'open' or 'close', the end of a bar that its time names")
    paths = [Path(file) for file in files]
    since, until = _ns(since), _ns(until)
    closes = Calendars(calendar, Timeframe.parse(timeframe), calendars)
    forecaster = open_model(model, timeframe, sampler, steps)
    card = forecaster.card
    check_sampled(model, card, sampler, steps)
    frame = scan(paths, stamp, closes, symbols, None, until)
    settings = Settings(
        root="backtest",
        timeframe=timeframe,
        calendar=calendar,
        calendars=dict(calendars),
        symbols=tuple(symbols or ()),
        max_wait=1,
        sampler=sampler,
        steps=steps,
        strategies=tuple(StrategySettings(s, s, {}) if isinstance(s, str) else s for s in strategies),
    )
    first = wire.to_ns(frame.select(pl.col("close_time").min()).collect().item())
    start = first if since is None else since
    begins = pl.lit(start).cast(pl.Datetime("ns", "UTC"))
    before = frame.filter(pl.col("close_time") < begins).group_by("symbol").tail(card.window)
    tested = frame.filter(pl.col("close_time") >= begins)
    if tested.limit(1).collect().is_empty():
        raise DataError(
            f"No bar of {', '.join(map(str, paths))} closes from {wire.to_text(start)} on and before the "
            "end: widen the time."
        )

    def story() -> Iterator[Event]:
        yield Revision(start - 1, settings.encode())
        yield Activation(start - 1, model, card.fingerprint, card.window)
        yield Warmup(start - 1, "", tuple(bars(before)))
        for adjustment in adjustments:
            yield Declaration(start - 1, adjustment)
        for arrival in arrivals(bars(tested)):
            progress(len(arrival.bars), wire.to_text(arrival.time))
            yield arrival

    ledger = Ledger(Execution(commission_bp=commission_bp, slippage_bp=slippage_bp))
    digested = _Digest(ledger)
    pipeline = Pipeline(lambda *_: forecaster)
    replay(story(), pipeline, digested)
    if not ledger.signals().height:
        why = "; ".join(f"{symbol}: {reason}" for symbol, reason in list(digested.withheld.items())[:3])
        raise DataError(f"nothing was forecast ({why or 'no bar is tested'}): give more history, or mend it")
    signals, outcomes, fills, equity = ledger.signals(), ledger.outcomes(), ledger.fills(), ledger.equity()
    return BacktestResult(
        signals=signals,
        outcomes=outcomes,
        fills=fills,
        equity=equity,
        scores=scores(signals, outcomes),
        portfolio=portfolio(equity, fills, closes.periods_per_year),
        meta={
            "warning": learnt_warning(model, start),
            "model": card.model,
            "kind": card.kind,
            "sampler": card.sampler,
            "steps": card.steps,
            "samples": card.samples,
            "fingerprint": card.fingerprint,
            "timeframe": timeframe,
            "calendar": calendar,
            "periods_per_year": closes.periods_per_year,
            "strategies": ", ".join(s.name for s in settings.strategies),
            "commission_bp": commission_bp,
            "slippage_bp": slippage_bp,
            "files": ", ".join(path.name for path in paths),
            "files_sha256": digest(paths),
            "messages_sha256": digested.sha256.hexdigest(),
            **{f"bars_{name}": count for name, count in asdict(pipeline.counts).items()},
        },
    )


def _ns(moment: Moment | None) -> int | None:
    """Nanoseconds since 1970; a time without a zone is UTC."""
    if moment is None or isinstance(moment, int):
        return moment
    try:
        time = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    except ValueError as error:
        raise ConfigError(f"{moment!r} is no time: write one such as 2025-01-31T16:00:00Z") from error
    return wire.to_ns(time if time.tzinfo else time.replace(tzinfo=UTC))


def learnt_until(model: str) -> int:
    """The close up to which a checkpoint directory has learnt and chosen, in nanoseconds; baselines: 0."""
    if model in BASELINES:
        return 0
    from barcast.models.checkpoint import load

    return load(Path(model)).trained.record.validation_end


def learnt_warning(model: str, first: int) -> str:
    """A warning when a model has seen some of the bars that it is tested on, else nothing."""
    seen = learnt_until(model)
    if seen <= first:
        return ""
    return (
        f"The model has learnt from bars up to {wire.to_text(seen)[:10]}: what it forecasts before that day "
        "is in sample and says nothing about the future. Train with --until, or test from that day on."
    )


def replay_journal(journal: Path) -> list[Outgoing]:
    """Compute again every signal, target and group message from a journal, as far as it reaches back.

    Models are those of the journal's state directory; one that forecasts nothing in it is not opened. What
    was passed over live is passed over. Raise ConfigError when the journal has no settings in it, or a model
    another fingerprint here than it was activated under, CheckpointError when a model is missing or changed.
    """
    reader = Journal(journal, readonly=True)
    try:
        with reader.one_moment():
            revision = reader.last(Kind.REVISION)
            if revision is None:
                raise ConfigError(f"{journal}: nothing was recorded yet; run the daemon first")
            list(events([revision]))  # names the record if it is damaged
            store = ModelStore(journal.parent / "models", Settings.decode(revision.payload).timeframe)

            def open_same(model: str, sampler: str | None, steps: int | None) -> Forecaster:
                forecaster = store.open(model, sampler, steps)
                if (mine := forecaster.card.fingerprint) != pipeline.fingerprint:
                    raise ConfigError(
                        f"{journal}: recorded under {pipeline.fingerprint!r}, here it is {mine!r}; bytes are "
                        "promised within one fingerprint: replay where it was recorded"
                    )
                return forecaster

            recording, pipeline = Recording(), Pipeline(open_same)
            base = restore(reader, pipeline, reader.base)
            active = reader.last(Kind.ACTIVATION, base)
            for _, event in events([active] if active else []):  # a snapshot knows no fingerprint
                list(pipeline.take(event))
            for seq, shed in events(reader.of_kind(Kind.SHED)):
                if seq > base and isinstance(shed, Shed):
                    until = events(reader.records(base, shed.after), pipeline.revision)
                    replay((event for _, event in until), pipeline, recording, shed.clock)
                    passed = events(reader.records(max(base, shed.after), seq), pipeline.revision)
                    for _, event in passed:
                        pass_over(pipeline, event)
                    base = seq
            rest = events(reader.records(base), pipeline.revision)
            replay((event for _, event in rest), pipeline, recording)
            return recording.messages
    finally:
        reader.close()


@dataclass(frozen=True, slots=True)
class Difference:
    """Replayed messages beside captured ones, as (topic, payload), each counted once.

    `older` is how many captured ones are of closes that have left the journal: nothing is said of them.
    """

    signals: int
    differing: tuple[tuple[str, bytes], ...]
    missing: tuple[Outgoing, ...]
    older: int = 0

    def sentence(self) -> str:
        """What a person wants to know."""
        return (
            f"{self.signals} signals captured, {len(self.differing)} messages differ from the replay, "
            f"{len(self.missing)} of the replay were not captured"
            + (f"; {self.older} are older than what the journal still holds" if self.older else "")
        )


def compare(
    replayed: Iterable[Outgoing], captured: Iterable[tuple[str, bytes]], left: int = -1
) -> Difference:
    """Compare signals, targets, groups and requests for bars byte by byte.

    At-least-once delivery may have brought a message twice: it counts once. What a replay does not say, such
    as a status, is left out, and so is what is of closes up to `left` (nanoseconds), which has left the
    journal.
    """
    kinds = ("/signals/", "/targets/", "/groups/", "/backfill/")
    seen = dict.fromkeys(pair for pair in captured if any(kind in pair[0] for kind in kinds))
    again = {(m.topic, m.payload): m for m in replayed}
    older = [key for key in seen if key not in again and 0 <= _close(key[1]) <= left]
    for key in older:
        del seen[key]
    return Difference(
        sum("/signals/" in topic for topic, _ in seen),
        tuple(key for key in seen if key not in again),
        tuple(m for key, m in again.items() if key not in seen),
        len(older),
    )


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


def left_until(journal: Path) -> int:
    """The close (nanoseconds) up to which groups have left a journal, -1 where none has."""
    reader = Journal(journal, readonly=True)
    try:
        with reader.one_moment():
            pipeline = Pipeline(serves_nothing)
            restore(reader, pipeline, reader.base)
            return pipeline.batcher.state.closed
    finally:
        reader.close()


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
