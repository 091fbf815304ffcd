"""The bars an instance knows: its journal before its archive before its history, where several have a bar.

The archive holds what left the journal, in the files that an export writes: `bars-YYYY-MM-DD.parquet`, a UTC
day of closes each, with the prices as they were received.
"""

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path

import polars as pl

from barcast.daemon.adjustments import adjusted
from barcast.daemon.calendar import Calendars
from barcast.daemon.events import events, restore
from barcast.daemon.history import UNREADABLE, VALUES, history_files, read_windows, scan
from barcast.daemon.history import bars as bars_of_frame
from barcast.daemon.journal import Journal, Place, exists
from barcast.daemon.pipeline import Pipeline
from barcast.daemon.ports import Arrival, Declaration, Event, Warmup
from barcast.daemon.room import flush, hand_over, make
from barcast.models import Adjustment, Bar, DataError, Forecaster, Window

SCHEMA = {
    "symbol": pl.String(),
    "close_time": pl.Datetime("ns", "UTC"),
    **dict.fromkeys(VALUES, pl.Float64()),
    "trades": pl.Int64(),
    "vwap": pl.Float64(),
}
"""The columns of bars; those of a file also name the timeframe."""
KEY = ("symbol", "close_time")
AT_ONCE = 200_000
"""Bars taken into a frame at once: some 100 MB."""

Seen = Iterable[tuple[str, int, Iterable[tuple[float, ...]]]]
"""Symbol, close, and payloads that were seen and corrected before."""


def known_bars(
    state_dir: Path,
    calendars: Calendars,
    now: int,
    progress: Callable[[int], None] = lambda _bars: None,
    journal: Place | None = None,
    length: int | None = None,
) -> dict[str, Window]:
    """Every bar of each symbol that closed by `now`, one window for each: what a model may learn from.

    The journal, that of the state directory where none is named, may be in use by a running daemon. All
    prices of a symbol are on the basis of its newest bar. `progress` is told how many bars of the journal
    were read. With a `length`, at least the newest so many bars of each symbol, and not many more.
    """
    bars, adjustments = every_bar(state_dir, calendars, now, progress, journal, length)
    return dict(adjusted(read_windows(bars.lazy()), adjustments))


def every_bar(
    state_dir: Path,
    calendars: Calendars,
    now: int,
    progress: Callable[[int], None] = lambda _bars: None,
    journal: Place | None = None,
    length: int | None = None,
) -> tuple[pl.DataFrame, list[Adjustment]]:
    """Every bar that closed by `now`, in the columns of `SCHEMA` and as received, and what was declared.

    A corrected bar has its last values, and a payload that comes again after its correction changes nothing:
    the rule of the windows. A `length` is that of `known_bars`. Raise DataError where nothing is known.
    """
    journal = journal or state_dir / "journal.db"
    bars, adjustments = _every_bar(state_dir, journal, calendars, now, progress, length)
    if bars.is_empty():
        name = journal.name if isinstance(journal, Path) else journal
        raise DataError(
            f"{state_dir}: neither history/, archive/ nor {name} holds a bar; let the daemon collect "
            "some first"
        )
    return bars.sort("close_time", "symbol"), adjustments


def last_bars(
    state_dir: Path, journal: Place, calendars: Calendars, now: int, length: int
) -> Iterator[tuple[Bar, ...]]:
    """The last `length` bars of each symbol that closed by `now`, as they were received."""
    bars, _ = _every_bar(state_dir, journal, calendars, now, lambda _count: None, length)
    for _, own in bars.group_by("symbol", maintain_order=True):
        yield tuple(bars_of_frame(own.sort("close_time").tail(length).lazy()))


def bars_of(
    state_dir: Path, symbols: Sequence[str], calendars: Calendars, now: int, length: int
) -> dict[str, tuple[Bar, ...]]:
    """The last `length` bars of each symbol in history and archive that closed by `now`; none is no fault."""
    archived = read_archive(state_dir / "archive", symbols)
    both = latest([_history(state_dir, calendars, now, symbols), archived])
    found: dict[str, list[Bar]] = {symbol: [] for symbol in symbols}
    for bar in bars_of_frame(both.sort("close_time").group_by("symbol").tail(length).lazy()):
        found[bar.symbol].append(bar)
    return {symbol: tuple(own) for symbol, own in found.items()}


def received(bars: Iterable[Bar], seen: Seen) -> pl.DataFrame:
    """Bars in the order in which they came, each once, with the values that it has at the end.

    A payload that was there before, or is among those `seen`, counts for nothing.
    """
    return _corrected(_frame(map(_row, bars)), seen)


def latest(frames: Iterable[pl.DataFrame]) -> pl.DataFrame:
    """Each bar once: of several, that of the last frame that has it."""
    return pl.concat(frames).unique(KEY, keep="last", maintain_order=True)


def read_archive(
    folder: Path, symbols: Sequence[str] | None = None, length: int | None = None
) -> pl.DataFrame:
    """The bars in the files of an archive or an export, of these symbols; of each the last `length`."""
    days = (_read(path, symbols) for path in sorted(folder.glob("bars-*.parquet")))
    known = pl.DataFrame(schema=SCHEMA)
    if length is None:
        return pl.concat([known, *days])
    for day in days:  # one after another: an archive may be larger than the memory
        known = _newest(pl.concat([known, day]), length)
    return known


def write_days(bars: pl.DataFrame, folder: Path, timeframe: str) -> int:
    """Write bars into the files of their UTC days, over those that are there; return how many files changed.

    A file is written beside and renamed, so that there is never half a file. Raise DataError for a folder
    with bars of another timeframe.
    """
    make(folder)
    changed = 0
    for (day,), own in bars.group_by(pl.col("close_time").dt.date().alias("day"), maintain_order=True):
        path = folder / f"bars-{day}.parquet"
        known = _read(path, None, timeframe) if path.is_file() else pl.DataFrame(schema=SCHEMA)
        whole = latest([known, own.select(*SCHEMA)]).sort(*KEY)
        if whole.equals(known):
            continue
        partial = folder / f".{path.name}.partial"
        try:
            with partial.open("wb") as file:
                whole.with_columns(timeframe=pl.lit(timeframe)).write_parquet(file)
                file.flush()
                os.fsync(file.fileno())
            hand_over(partial)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)
        changed += 1
    if changed:
        flush(folder)
    return changed


def _every_bar(
    state_dir: Path,
    journal: Place,
    calendars: Calendars,
    now: int,
    progress: Callable[[int], None],
    length: int | None = None,
) -> tuple[pl.DataFrame, list[Adjustment]]:
    """See `every_bar`; with a `length`, each source is cut to so many bars of a symbol before they meet."""
    # The journal first: what leaves it meanwhile is in the archive before.
    warm, own, adjustments = _journalled(journal, progress, length)
    history = _history(state_dir, calendars, now, length=length)
    archive = read_archive(state_dir / "archive", length=length)
    return latest([warm, history, archive, own]), adjustments


def _newest(bars: pl.DataFrame, length: int) -> pl.DataFrame:
    """The rows of the last `length` closes of each symbol, in their order."""
    closes = bars.select(KEY).unique().sort("close_time").group_by("symbol").tail(length)
    first = closes.group_by("symbol").agg(first=pl.col("close_time").min())
    kept = bars.join(first, on="symbol", maintain_order="left")
    return kept.filter(pl.col("close_time") >= pl.col("first")).drop("first")


def _read(path: Path, symbols: Sequence[str] | None, timeframe: str | None = None) -> pl.DataFrame:
    try:
        rows = pl.scan_parquet(path)
        if symbols is not None:
            rows = rows.filter(pl.col("symbol").is_in(list(symbols)))
        found = rows.select(*SCHEMA, "timeframe").collect()
        bars = found.select(*SCHEMA).match_to_schema(SCHEMA)
    except UNREADABLE as error:
        raise DataError(
            f"{path} cannot be read as bars ({str(error).splitlines()[0]}): restore a copy, or move it away."
        ) from error
    if timeframe is not None and found.height and (said := found["timeframe"][0]) != timeframe:
        raise DataError(f"{path} holds bars of {said}, not {timeframe}: name another folder.")
    return bars


def _history(
    state_dir: Path,
    calendars: Calendars,
    now: int,
    symbols: Sequence[str] | None = None,
    length: int | None = None,
) -> pl.DataFrame:
    files = history_files(state_dir / "history")
    if not files:
        return pl.DataFrame(schema=SCHEMA)
    frame = scan(files, "close", calendars, symbols, until=now + 1, may_lack=symbols is not None)
    missing = [
        pl.lit(None, dtype).alias(name) for name, dtype in SCHEMA.items() if name in ("trades", "vwap")
    ]
    if length is not None:
        frame = frame.group_by("symbol", maintain_order=True).tail(length)
    return frame.with_columns(*missing).select(*SCHEMA).collect()


def _journalled(
    place: Place, progress: Callable[[int], None], length: int | None
) -> tuple[pl.DataFrame, pl.DataFrame, list[Adjustment]]:
    """The bars of warm-ups, the bars that were received since the base, and every declaration."""
    if not exists(place):
        return _frame([]), _frame([]), []
    adjustments: list[Adjustment] = []
    warm, came, count = [_frame([])], [_frame([])], 0
    journal = Journal(place, readonly=True)
    try:
        with journal.one_moment():
            pipeline = Pipeline(serves_nothing)
            base = restore(journal, pipeline, journal.base)
            for _, event in events(journal.decisions(base)):
                if isinstance(event, Declaration):
                    adjustments.append(event.adjustment)
            for batch in batches(event for _, event in events(journal.records(base), pipeline.revision)):
                adjustments += [e.adjustment for e in batch if isinstance(e, Declaration)]
                warm += [_frame(map(_row, e.bars)) for e in batch if isinstance(e, Warmup)]
                rows = (_row(bar) for e in batch if isinstance(e, Arrival) for bar in e.bars)
                came.append(_frame(rows).unique([*KEY, *VALUES], keep="first", maintain_order=True))
                count += len(came[-1])
                progress(count)
                if length is not None:
                    came, warm = [_newest(pl.concat(came), length)], [_newest(pl.concat(warm), length)]
    finally:
        journal.close()
    first_wins = pl.concat(warm).unique(KEY, keep="first", maintain_order=True)
    return first_wins, _corrected(pl.concat(came), pipeline.windows.superseded()), adjustments


def batches(recorded: Iterable[Event]) -> Iterator[list[Event]]:
    """Events in lists of about `AT_ONCE` bars."""
    batch, count = list[Event](), 0
    for event in recorded:
        batch.append(event)
        count += len(event.bars) if isinstance(event, Arrival) else 1
        if count >= AT_ONCE:
            yield batch
            batch, count = [], 0
    yield batch


def _corrected(came: pl.DataFrame, seen: Seen) -> pl.DataFrame:
    """Each bar once, of all payloads that came in this order and those seen before."""
    before = _frame((s, time, *values, None, None) for s, time, own in seen for values in own)
    both = pl.concat([before.with_columns(old=True), came.with_columns(old=False)])
    first = both.unique([*KEY, *VALUES], keep="first", maintain_order=True)
    return first.filter(~pl.col("old")).drop("old").unique(KEY, keep="last", maintain_order=True)


def _row(bar: Bar) -> tuple[object, ...]:
    vwap = None if bar.vwap is None else float(bar.vwap)
    return (bar.symbol, bar.close_time, *map(float, bar.values), bar.trades, vwap)


def _frame(rows: Iterable[tuple[object, ...]]) -> pl.DataFrame:
    whole = SCHEMA | {"close_time": pl.Int64()}
    frame = pl.DataFrame(list(rows), whole, orient="row")
    return frame.with_columns(pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC")).select(
        pl.col(name).cast(dtype) for name, dtype in SCHEMA.items()
    )


def serves_nothing(*_: object) -> Forecaster:
    """Stands for the models of a path that forecasts nothing."""
    raise RuntimeError("nothing is forecast here")
