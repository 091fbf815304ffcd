"""Bars from Parquet and CSV files, checked once, in canonical columns.

A file holds the columns `symbol`, `open`, `high`, `low`, `close`, `volume` and one time column: `close_time`
or `open_time`, by the end of the bar that they are stamped by, or one of `ts`, `time`, `timestamp` and
`date`. Case does not matter, other columns are ignored. Times are datetimes with a time zone or ISO 8601
strings with an offset. A date without a time is accepted for daily bars: of sessions it means the close of
that day's session, with `24x7` the day that begins then.
"""

import hashlib
import re
from bisect import bisect
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from operator import attrgetter
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.daemon.calendar import Calendars, iso
from barcast.daemon.timeframe import DAY, Timeframe
from barcast.models import Bar, ConfigError, DataError, Window
from barcast.models.bar import LEAST, MOST, TIME_UNIT

Stamp = Literal["open", "close"]

PRICES = ("open", "high", "low", "close")
VALUES = (*PRICES, "volume")
COLUMNS = ("symbol", "close_time", *VALUES)
TIMES = ("ts", "time", "timestamp", "date")
SYMBOL = r"^[A-Z0-9][A-Z0-9._-]{0,31}$"
TEXTS = (pl.String, pl.Categorical, pl.Enum, pl.Null)

SCENARIO = "scenario"
"""The column that marks a file of bars that were made up: none of the readers here takes one."""

KNOWN = "\0known"
"""The column of `stamped` that no file has."""

AT_ONCE = 200_000
"""Rows of files, and bars of all symbols, that are in memory at once."""
FEW = 2_000_000
"""Times that are compared with one another at once, or those of one symbol."""
ROWS = 4096
"""Bars that are made into objects at once."""

SHOWN = 5
"""Symbols that a sentence names."""

_2262, _10000 = 9_214_646_400, 253_402_300_800
"""Years in seconds: nanoseconds overflow in the first, and polars writes no text long after the second."""
UNREADABLE = (pl.exceptions.PolarsError, pl.exceptions.PanicException, OSError)
_UNITS = {"s": TIME_UNIT, "ms": 10**6, "us": 10**3, "ns": 1}

_REMEDIES = {
    "symbol": "spell it in A-Z, 0-9, dot, underscore and dash, at most 32 characters",
    "naive": "write the time zone, such as 2026-01-31T16:00:00Z",
    "time": "write a date and time from 1970 on, before 2262, such as 2026-01-31T16:00:00Z",
    "grid": "correct the time, or take the calendar (24x7, fx, or an exchange's such as XNYS) and timeframe "
    "that the bars follow",
    "price": "prices are positive numbers that a market can have: correct or remove the row",
    "volume": "volume is a number and not negative: correct it, or write 0 where it is unknown",
    "order": "low must not be above, high not below open and close: correct or remove the row",
}


def scan(
    paths: Sequence[Path],
    stamp: Stamp,
    calendars: Calendars,
    symbols: Sequence[str] | None = None,
    since: int | None = None,
    until: int | None = None,
    *,
    may_lack: bool = False,
) -> pl.LazyFrame:
    """The bars in `paths` (files, or folders of them), sorted by close time and symbol.

    The columns are `symbol`, `close_time` (datetime[ns, UTC]) and open, high, low, close, volume (float64).
    Only `symbols` are kept, and closes with since <= close < until (nanoseconds). The selected rows are
    checked here, so that reading the frame finds no fault; equal rows are kept once. Raise `DataError` for
    anything that cannot be used, naming the file, column, row, value and remedy; also where there is no bar
    of a symbol, unless it `may_lack`.
    """
    found = files(paths)
    known = _together([_checked(path, stamp, calendars, symbols, since, until) for path in found])
    _check_together(known)
    if not may_lack:
        there = set(known.select(pl.col("symbol").unique()).collect().to_series())
        _check_there(there, symbols, found, _time(since, until))
    return known.select(COLUMNS)


def _checked(
    path: Path,
    stamp: Stamp,
    calendars: Calendars,
    symbols: Sequence[str] | None,
    since: int | None,
    until: int | None,
) -> pl.LazyFrame:
    """The rows of a file that are wanted, as `_canonical` has them, and `file`; they can be used."""
    rows = _canonical(path, stamp, calendars)
    if symbols is not None:
        rows = rows.filter(pl.col("symbol").is_in(list(symbols)) | pl.col("symbol").is_null())
    if since is not None:
        rows = rows.filter((pl.col("ns") >= since) | (pl.col("ns") < 0) | pl.col("ns").is_null())
    if until is not None:
        rows = rows.filter((pl.col("ns") < until) | pl.col("ns").is_null())
    _check(path, rows, stamp, calendars)
    return rows.with_columns(file=pl.lit(str(path)))


def _together(checked: Sequence[pl.LazyFrame]) -> pl.LazyFrame:
    """The bars of several files in order, equal ones once."""
    close_time = pl.from_epoch("ns", "ns").dt.replace_time_zone("UTC").alias("close_time")
    known = pl.concat([rows.select("symbol", close_time, *VALUES, "file") for rows in checked])
    return known.unique(COLUMNS, keep="any").sort("close_time", "symbol")


class History(Mapping[str, Window]):
    """The bars of files, checked once and then kept in a folder, so that they may be more than memory holds.

    Each symbol has two files of plain numbers in order of its closes: int64 nanoseconds, and float64 rows of
    open, high, low, close and volume. As a mapping it has the whole history of each symbol as one window, the
    symbols in order; a window is read anew each time it is asked for, and mapped from the files. The folder
    is the caller's, and must outlive it.
    """

    def __init__(
        self,
        paths: Sequence[Path],
        stamp: Stamp,
        calendars: Calendars,
        symbols: Sequence[str] | None,
        until: int | None,
        folder: Path,
    ) -> None:
        """Arguments and errors are those of `scan`; OSError where the folder cannot be filled."""
        self._folder = folder
        found, checked = files(paths), []
        counts: Counter[str] = Counter()
        for path in found:
            checked.append(_checked(path, stamp, calendars, symbols, None, until))
            rows = checked[-1].select("symbol", "ns", *VALUES)
            for some in _batches(path, rows):
                self._add(some, counts)
        _check_there(counts, symbols, found, _time(None, until))
        self._counts = {symbol: self._sorted(symbol) for symbol in sorted(counts)}
        if twice := [symbol for symbol, count in self._counts.items() if not count]:
            among = pl.col("symbol").is_in(twice)
            _check_together(_together([rows.filter(among) for rows in checked]))
        self._note_ends()

    @classmethod
    def of_windows(cls, windows: Iterable[Window], folder: Path) -> Self:
        """Whole histories, which were checked before; OSError where the folder cannot be filled."""
        made = cls.__new__(cls)
        made._folder, made._counts = folder, {}
        for w in sorted(windows, key=attrgetter("symbol")):
            w.close_times.tofile(made._times(w.symbol))
            w.values.tofile(made._values(w.symbol))
            made._counts[w.symbol] = len(w)
        made._note_ends()
        return made

    def _note_ends(self) -> None:
        ends = [self._closes(symbol, k) for symbol, n in self._counts.items() for k in (0, n - 1)]
        self.first, self.last = min(ends), max(ends)

    def __getitem__(self, symbol: str) -> Window:
        n = self._counts[symbol]
        times = np.memmap(self._times(symbol), np.int64, "r", shape=(n,))
        values = np.memmap(self._values(symbol), np.float64, "r", shape=(n, len(VALUES)))
        return Window(symbol, np.asarray(times), np.asarray(values))

    def __iter__(self) -> Iterator[str]:
        return iter(self._counts)

    def __len__(self) -> int:
        return len(self._counts)

    def closed(self, until: int) -> dict[str, Window]:
        """The history of each symbol up to a close in nanoseconds, of those that have one."""
        ends = {symbol: self._place(symbol, until) for symbol in self}
        return {symbol: self[symbol].part(0, end) for symbol, end in ends.items() if end}

    def newest(self, until: int, count: int) -> list[Bar]:
        """The last bars of each symbol up to a close in nanoseconds, in order of close and symbol."""
        found = []
        for symbol, window in self.closed(until).items():
            own = window.part(max(0, len(window) - count), len(window))
            found.append((symbol, own.close_times, own.values))
        return list(_merged(found))

    def bars(self, since: int) -> Iterator[Bar]:
        """The bars from a close in nanoseconds on, in order of close and symbol.

        Some of each symbol are read at once, and handed out up to the close to which all are there.
        """
        at = {symbol: self._place(symbol, since - 1) for symbol in self}
        some = max(1, AT_ONCE // len(at))
        while at := {symbol: place for symbol, place in at.items() if place < self._counts[symbol]}:
            ahead = {
                symbol: np.fromfile(self._times(symbol), np.int64, some, offset=8 * place)
                for symbol, place in at.items()
            }
            until = min(int(times[-1]) for times in ahead.values())
            found = []
            for symbol, times in ahead.items():
                n, row = int(np.searchsorted(times, until, "right")), 8 * len(VALUES)
                if n:
                    values = np.fromfile(
                        self._values(symbol), np.float64, n * len(VALUES), offset=row * at[symbol]
                    )
                    found.append((symbol, times[:n], values.reshape(n, -1)))
                    at[symbol] += n
            yield from _merged(found)

    def _times(self, symbol: str) -> Path:
        return self._folder / f"{symbol}.closes"

    def _values(self, symbol: str) -> Path:
        return self._folder / f"{symbol}.values"

    def _closes(self, symbol: str, place: int) -> int:
        return int(np.fromfile(self._times(symbol), np.int64, 1, offset=8 * place)[0])

    def _place(self, symbol: str, until: int) -> int:
        """How many bars of a symbol close up to a time."""
        return int(np.searchsorted(self[symbol].close_times, until, "right"))

    def _add(self, rows: pl.DataFrame, counts: Counter[str]) -> None:
        """Append rows to the files of their symbols, as they come."""
        for (symbol,), own in rows.group_by("symbol", maintain_order=True):
            mode = "ab" if counts[str(symbol)] else "xb"  # what another has left there is none of its bars
            counts[str(symbol)] += own.height
            with self._times(str(symbol)).open(mode) as stream:
                stream.write(own["ns"].to_numpy().tobytes())
            with self._values(str(symbol)).open(mode) as stream:
                stream.write(np.ascontiguousarray(own.select(VALUES).to_numpy(), np.float64).tobytes())

    def _sorted(self, symbol: str) -> int:
        """Put a symbol's bars in order, equal ones once; how many, or 0 where two of a close differ."""
        times = np.fromfile(self._times(symbol), np.int64)
        if (times[1:] > times[:-1]).all():
            return len(times)
        values = np.fromfile(self._values(symbol), np.float64).reshape(-1, len(VALUES))
        order = np.argsort(times, kind="stable")
        times, values = times[order], values[order]
        again = np.concatenate([[False], times[1:] == times[:-1]])
        at = np.flatnonzero(again)
        if (values[at] != values[at - 1]).any():
            return 0
        times[~again].tofile(self._times(symbol))
        values[~again].tofile(self._values(symbol))
        return int((~again).sum())


def _merged(found: Sequence[tuple[str, NDArray[np.int64], NDArray[np.float64]]]) -> Iterator[Bar]:
    """Bars of several symbols, which are in order, in order of close and symbol."""
    if not found:
        return
    names = [symbol for symbol, _, _ in found]
    owner = np.repeat(np.arange(len(found)), [len(times) for _, times, _ in found])
    times = np.concatenate([times for _, times, _ in found])
    values = np.concatenate([values for _, _, values in found])
    order = np.lexsort((owner, times))
    for k in range(0, len(order), ROWS):
        some = order[k : k + ROWS]
        whose = [names[k] for k in owner[some].tolist()]
        yield from map(Bar, whose, times[some].tolist(), *values[some].T.tolist())


def read_windows(frame: pl.LazyFrame) -> dict[str, Window]:
    """The whole history of each symbol of a scanned frame as one window; symbols in order."""
    bars = frame.sort("symbol", "close_time").collect()
    windows = {}
    for (symbol,), own in bars.group_by("symbol", maintain_order=True):
        times = own["close_time"].to_physical().to_numpy().copy()
        values = np.ascontiguousarray(own.select(VALUES).to_numpy())
        times.flags.writeable = values.flags.writeable = False
        windows[str(symbol)] = Window(str(symbol), times, values)
    return windows


def bars(frame: pl.LazyFrame) -> Iterator[Bar]:
    """The bars of a scanned frame, sorted by close time and symbol."""
    rows = frame.sort("close_time", "symbol").with_columns(pl.col("close_time").to_physical()).select(COLUMNS)
    for row in rows.collect().iter_rows():
        yield Bar(*row)


def find_timeframe(
    paths: Sequence[Path], stamp: Stamp, symbols: Sequence[str] | None = None
) -> tuple[Timeframe, str]:
    """The timeframe of the bars in `paths` (files, or folders of them), and what it was found by.

    It is what the column `timeframe` says. Without that column it is the most frequent distance between
    neighbouring bars of a symbol, of several the shortest. Only the bars of `symbols` are looked at. Raise
    `DataError` when there is none, more than one, or one that bars cannot have.
    """
    said: dict[str, Path] = {}
    stamps = []
    for path in files(paths):
        raw, schema, names = _opened(path)
        if "symbol" not in names:
            raise DataError(f"{path} has no column 'symbol', only {', '.join(schema)}: add or rename it.")
        symbol = pl.col(names["symbol"]).cast(pl.String)
        own = raw if symbols is None else raw.filter(symbol.is_in(list(symbols)))
        if "timeframe" in names:
            column = pl.col(names["timeframe"]).cast(pl.String).fill_null("").unique().sort()
            for text in _collect(path, own.select(column)).to_series():
                said.setdefault(text, path)
        else:
            time = _time_column(path, schema, names, stamp)
            moments, _ = _moments(path, own, time, schema[time])
            stamps.append((path, own.select(symbol=symbol, time=moments)))
    if len(said) > 1:
        raise DataError(
            f"Column 'timeframe' of {' and '.join(sorted({str(path) for path in said.values()}))} holds "
            f"{', '.join(map(repr, said))}: keep bars of one length in the files."
        )
    for text, path in said.items():
        try:
            return Timeframe.parse(text), f"column 'timeframe' of {path}"
        except ConfigError as error:
            raise DataError(f"Column 'timeframe' of {path}: {error}") from error
    named = ", ".join(map(str, paths))
    steps = _steps(stamps)
    naive = pl.col("time").eq(-2).any()
    if not steps and any(_collect(path, rows.select(naive)).item() for path, rows in stamps):
        raise DataError(f"{named}: the times name no zone: {_REMEDIES['naive']}.")
    if not steps:
        whose = f" of {', '.join(symbols)}" if symbols else ""
        raise DataError(
            f"{named}: there are no two bars{whose} that tell how long one is{_symbols_in(files(paths))}: "
            "correct the files or the symbols, or say the timeframe."
        )
    duration = min(steps, key=lambda step: (-steps[step], step))
    try:
        return Timeframe.of(duration), "the most frequent distance between bars"
    except ConfigError as error:
        raise DataError(f"{named}: the most frequent distance between bars: {error}") from error


def _steps(stamps: Sequence[tuple[Path, pl.LazyFrame]]) -> Counter[int]:
    """How often which distance is between neighbouring bars of a symbol, a few symbols at a time.

    `stamps` are the symbol and time (nanoseconds, faults below 0) of the rows of each file.
    """
    sizes: Counter[str | None] = Counter()
    for path, rows in stamps:
        sizes.update(dict(_collect(path, rows.group_by("symbol").len()).rows()))
    steps: Counter[int] = Counter()
    some: list[str | None] = []
    held = 0
    for number, symbol in enumerate(sorted(sizes, key=str), 1):
        some.append(symbol)
        held += sizes[symbol]
        if held < FEW and number < len(sizes):
            continue
        wanted = pl.col("symbol").is_in(some, nulls_equal=True) & (pl.col("time") >= 0)
        times = pl.concat([_collect(path, rows.filter(wanted)) for path, rows in stamps])
        apart = times.unique().sort("time").select(pl.col("time").diff().over("symbol").drop_nulls())
        steps.update(dict(apart.group_by("time").len().rows()))
        some, held = [], 0
    return steps


def read_origins(path: Path, stamp: Stamp, calendars: Calendars) -> pl.DataFrame:
    """The forecast origins in a file with the columns `symbol` and `ts`, each once and as they come.

    The columns are `symbol`, `ts` as it is in the file, where it names the open or the close of the origin's
    bar as `stamp` says, and `close_time` (int64 nanoseconds): null where the time is not understood, -1 where
    no bar of the calendar has it, -2 where it has no zone. Raise `DataError` for a file without origins.
    """
    if path.is_dir():
        raise DataError(f"{path} is a folder: name the file with the origins.")
    raw, schema, _ = _opened(*files([path]))
    if missing := [repr(column) for column in ("symbol", "ts") if column not in schema]:
        raise DataError(
            f"{path} has no column {' and no '.join(missing)}, only {', '.join(schema)}: origins are rows of "
            "symbol and ts, the time of a bar."
        )
    if schema["symbol"] not in TEXTS:
        raise DataError(f"Column 'symbol' of {path} holds {schema['symbol']}, not texts: write texts.")
    symbol = pl.col("symbol").cast(pl.String)
    given = raw.select(symbol.alias("symbol"), "ts").unique(maintain_order=True)
    close_time = _nanoseconds(path, given, "ts", schema["ts"], pl.col("symbol"), stamp, calendars)
    origins = _collect(path, given.with_columns(close_time=close_time))
    if not origins.height:
        raise DataError(f"{path} holds no origin: write rows of symbol and ts, the time of a bar.")
    return origins


def stamped(path: Path, stamp: Stamp, calendars: Calendars) -> pl.DataFrame:
    """The rows of one file as they stand there, of a CSV as texts, and when each was known.

    The column `KNOWN` is added (int64 nanoseconds): the close of the bar that the row's time names, or where
    no bar has it that time. The file needs a time column alone; without a column `symbol` its rows follow the
    default calendar. Raise `DataError` for a time that is not understood.
    """
    raw, schema, names = _opened(path)
    time = _time_column(path, schema, names, stamp)
    symbols = pl.col(names["symbol"]).cast(pl.String) if "symbol" in names else pl.lit("")
    close = _nanoseconds(path, raw, time, schema[time], symbols, stamp, calendars)
    moment, _ = _moments(path, raw, time, schema[time])
    rows = _collect(path, raw.with_columns(pl.when(close == -1).then(moment).otherwise(close).alias(KNOWN)))
    bad = rows.select(time, KNOWN).with_row_index("\0row", offset=1)
    bad = bad.filter(pl.col(KNOWN).is_null() | (pl.col(KNOWN) < 0))
    if bad.height:
        number, given, mark = bad.row(0)
        remedy = _REMEDIES["naive" if mark == -2 else "time"]
        raise DataError(f"{path}, row {number}: column {time!r} is {given}; {remedy}.")
    return rows


@contextmanager
def _readable() -> Iterator[None]:
    """Say in a sentence which file or folder this user may not read."""
    try:
        yield
    except OSError as error:
        fault = f"{error.filename}: {error.strerror}"
        raise DataError(f"{fault}: let the user of this program read it.") from error


@_readable()
def digest(paths: Sequence[Path]) -> str:
    """The SHA-256 of the files' contents, in hex. Names and order do not matter."""
    hashes = []
    for path in files(paths):
        with path.open("rb") as stream:
            hashes.append(hashlib.file_digest(stream, "sha256").hexdigest())
    return hashlib.sha256("\n".join(sorted(hashes)).encode()).hexdigest()


@_readable()
def history_files(folder: Path) -> list[Path]:
    """The Parquet and CSV files of a state directory's history; none if there is no such folder."""
    return files([folder]) if folder.is_dir() and any(folder.iterdir()) else []


@_readable()
def files(paths: Sequence[Path]) -> list[Path]:
    """The Parquet and CSV files meant by `paths`: each file, and those in each folder, in order of name."""
    found = []
    for path in paths:
        inside = (
            sorted(p for p in path.iterdir() if p.suffix in (".parquet", ".csv")) if path.is_dir() else [path]
        )
        if not inside:
            raise DataError(
                f"{path} holds no .parquet or .csv file: name a file with bars, or put one there."
            )
        for file in inside:
            if not file.is_file():
                raise DataError(f"{file} does not exist: correct the path.")
            if file.suffix not in (".parquet", ".csv"):
                raise DataError(
                    f"{file} is neither .parquet nor .csv: convert it, or rename it to what it is."
                )
        found += inside
    if not found:
        raise DataError("No file with bars was named: name a .parquet or .csv file.")
    return found


def _canonical(path: Path, stamp: Stamp, calendars: Calendars) -> pl.LazyFrame:
    """The rows with `row` (from 1), `given` (the time as it was written) and `ns`; nulls are faults.

    `ns` is the close; null where the time is not understood, -1 where no bar opens, -2 without a zone.
    """
    raw, schema, names = _opened(path)
    if missing := [repr(column) for column in ("symbol", *VALUES) if column not in names]:
        raise DataError(
            f"{path} has no column {' and no '.join(missing)}, only {', '.join(schema)}: add or rename it."
        )
    for column in ("symbol", *VALUES):
        dtype = schema[names[column]]
        if dtype not in TEXTS and not (dtype.is_integer() if column == "symbol" else dtype.is_numeric()):
            wanted = "texts" if column == "symbol" else "numbers"
            raise DataError(
                f"Column {names[column]!r} of {path} holds {dtype}, not {wanted}: write {wanted}."
            )
    time = _time_column(path, schema, names, stamp)
    dtype, symbols = schema[time], pl.col(names["symbol"]).cast(pl.String)
    given, ns = (
        _as_written(time, dtype),
        _nanoseconds(path, raw, time, dtype, symbols, stamp, calendars),
    )
    return raw.with_row_index("\0row", offset=1).select(
        pl.col("\0row").alias("row"),
        given.alias("given"),
        symbols.alias("symbol"),
        *(pl.col(names[name]).cast(pl.Float64, strict=False).alias(name) for name in VALUES),
        *(pl.col(names[name]).cast(pl.String).alias(f"given {name}") for name in VALUES),
        ns=ns,
    )


def _opened(path: Path) -> tuple[pl.LazyFrame, pl.Schema, dict[str, str]]:
    """The rows of a file, the types of its columns, and their names by what they are in small letters."""
    try:
        raw = pl.scan_parquet(path) if path.suffix == ".parquet" else pl.scan_csv(path, infer_schema=False)
        schema = raw.collect_schema()
    except UNREADABLE as error:
        raise _unreadable(path, error) from error
    if path.suffix == ".csv" and (head := ",".join(schema)).startswith("PAR1"):
        raise DataError(f"{path} begins as a Parquet file: name it so, ending in .parquet.")
    if path.suffix == ".csv" and head.count(";") >= len(VALUES):
        raise DataError(f"{path} begins {head!r}: part columns by commas, not semicolons.")
    names: dict[str, str] = {}
    for name in schema:
        # polars tells columns of one name in a CSV apart by this ending
        plain = re.sub(r"_duplicated_\d+$", "", name).lower() if path.suffix == ".csv" else name.lower()
        if plain in names and plain in (*COLUMNS, "open_time", "timeframe", *TIMES):
            raise DataError(f"{path} has two columns {names[plain]!r} and {name!r}: keep one of them.")
        names[plain] = name
    if SCENARIO in names:
        raise DataError(
            f"{path} has a column {names[SCENARIO]!r}: its bars are a stress scenario's, which nothing "
            "learns from, forecasts from or journals; name a file of real bars."
        )
    return raw, schema, names


def _time_column(path: Path, schema: pl.Schema, names: dict[str, str], stamp: Stamp) -> str:
    candidates = (f"{stamp}_time", *TIMES)
    times = [names[name] for name in candidates if name in names]
    if len(times) != 1:
        raise DataError(
            f"{path} has {len(times) or 'no'} time column(s) for bars stamped by their {stamp}"
            f"{': ' + ', '.join(times) if times else ''}; have one, named {' or '.join(candidates)}."
        )
    return times[0]


def _as_written(name: str, dtype: pl.DataType) -> pl.Expr:
    """A time as text; what has none, such as the year 50000, as the number that it is stored as."""
    if dtype == pl.String:
        return pl.col(name)
    count = pl.col(name).to_physical().cast(pl.Int64)
    most = _10000 * TIME_UNIT // (_UNITS[dtype.time_unit] if isinstance(dtype, pl.Datetime) else DAY)
    known = pl.when(count.is_between(-most, most, closed="none")).then(pl.col(name))
    return pl.coalesce(known.cast(pl.String), count.cast(pl.String))


def _nanoseconds(
    path: Path,
    raw: pl.LazyFrame,
    name: str,
    dtype: pl.DataType,
    symbols: pl.Expr,
    stamp: Stamp,
    calendars: Calendars,
) -> pl.Expr:
    """The close of each row in nanoseconds, or the mark of its fault."""
    moments, dates = _moments(path, raw, name, dtype)
    if dates:
        _check_dates(path, name, stamp, calendars)
        stamp = "open"
    rows = raw.select(symbol=symbols, given=moments).filter(pl.col("given") >= 0)
    reach = rows.group_by("symbol").agg(first=pl.col("given").min(), last=pl.col("given").max())
    for symbol, first, last in _collect(path, reach).rows():
        try:
            calendars.of(symbol or "").closes_for_opens(np.array([first, last]))
        except DataError as error:
            raise DataError(f"Column {name!r} of {path}: {error}") from error

    def close_of(symbol: str, known: NDArray[np.int64]) -> NDArray[np.int64]:
        calendar = calendars.of(symbol)
        if stamp == "open":
            return calendar.closes_for_opens(known)
        return np.where(calendar.are_closes(known), known, -1)

    def closes(series: pl.Series) -> pl.Series:
        # Symbols that keep the same hours share a table: they are named by the calendar.
        stamps = series.struct.unnest().with_columns(
            fault=pl.when(pl.col("given") < 0).then("given"),
            hours=pl.col("symbol").replace_strict(calendars.others, default=""),
        )
        known = stamps.filter(pl.col("given") >= 0).select("hours", "symbol", "given")
        tables = [stamps.select("hours", "given", close=pl.lit(None, pl.Int64)).clear()]
        for (hours,), own in known.group_by("hours"):
            given = own["given"].unique()
            close = close_of(own["symbol"][0] or "", given.to_numpy())
            tables.append(
                pl.DataFrame({"hours": [hours], "given": [given], "close": [close]}).explode("given", "close")
            )
        joined = stamps.join(pl.concat(tables), on=["hours", "given"], how="left", maintain_order="left")
        return joined.select(pl.coalesce("fault", "close")).to_series()

    return pl.struct(given=moments, symbol=symbols).map_batches(
        closes, return_dtype=pl.Int64, is_elementwise=True
    )


def _moments(path: Path, raw: pl.LazyFrame, name: str, dtype: pl.DataType) -> tuple[pl.Expr, bool]:
    """A column's times in nanoseconds, and whether they are dates.

    Null where the time is not understood, -2 where it has no zone.
    """
    column = pl.col(name)
    first = _collect(path, raw.select(column.to_physical().drop_nulls().first().cast(pl.String))).item()
    if dtype == pl.String and first is not None:
        if re.fullmatch(r"\d{9,19}(\.\d*)?", first):
            dtype = pl.Int64()
        elif len(first) == 10:
            column, dtype = column.str.to_date("%Y-%m-%d", strict=False), pl.Date()
    if dtype == pl.Date:
        return _scaled(column, DAY), True
    if dtype == pl.String:
        zoned = column.str.contains(r"(Z|z|[+-]\d\d:?\d\d)$")
        iso8601 = column.str.replace(r"[Zz]$", "+00:00").str.replace(" ", "T", literal=True)
        parsed = iso8601.str.to_datetime("%Y-%m-%dT%H:%M:%S%.f%z", time_unit="ns", strict=False)
        bare = column.str.contains(r"^\d{4}-\d\d-\d\d[T ]\d\d:\d\d(:\d\d(\.\d+)?)?$")
        moments: pl.Expr = pl.when(zoned).then(_scaled(parsed, 1)).when(bare).then(pl.lit(-2, pl.Int64))
    elif isinstance(dtype, pl.Datetime) and dtype.time_zone is not None:
        moments = _scaled(column, _UNITS[dtype.time_unit])
    elif isinstance(dtype, pl.Datetime):
        raise DataError(
            f"Column {name!r} of {path} has times without a time zone: say which it is, "
            "in polars with dt.replace_time_zone('UTC')."
        )
    elif dtype.is_numeric() and first is not None and (unit := _unit(float(first))):
        raise DataError(
            f"Column {name!r} of {path} holds {dtype}, not times: {first} looks like {unit} since 1970; in "
            f"polars pl.from_epoch(pl.col({name!r}).cast(pl.Int64), {unit!r}).dt.replace_time_zone('UTC') "
            "converts it."
        )
    else:
        raise DataError(
            f"Column {name!r} of {path} holds {dtype}, not times: write datetimes with a time zone, "
            "or strings such as 2026-01-31T16:00:00Z."
        )
    return moments, False


def _scaled(column: pl.Expr, unit: int) -> pl.Expr:
    """Nanoseconds from a count of units since 1970; null for what is not from then and before 2262."""
    count = column.to_physical().cast(pl.Int64)
    return pl.when(count.is_between(0, _2262 * TIME_UNIT // unit, closed="left")).then(count * unit)


def _unit(count: float) -> str:
    """The unit of a number that counts from 1970 to about now, by its size; nothing if it does not."""
    return ("", "s", "ms", "us", "ns")[bisect((1e8, 1e11, 1e14, 1e17), count)]


def _check_dates(path: Path, name: str, stamp: Stamp, calendars: Calendars) -> None:
    duration = calendars.timeframe.duration
    if duration is not None and duration < DAY:
        raise DataError(
            f"Column {name!r} of {path} holds dates, but the timeframe is "
            f"{calendars.timeframe}: write date and time."
        )
    if stamp == "close" and "24x7" in (calendars.default.name, *calendars.others.values()):
        raise DataError(
            f"Column {name!r} of {path} holds dates, which do not say when a 24x7 day closed: "
            "write date and time, or stamp by the open."
        )


def _check(path: Path, rows: pl.LazyFrame, stamp: Stamp, calendars: Calendars) -> None:
    """Raise `DataError` for the first row that cannot be used, with how many others there are."""
    nan = [pl.col(name).is_null() | ~pl.col(name).is_finite() for name in VALUES]
    faults: list[tuple[str, str, pl.Expr]] = [
        ("symbol", "symbol", ~pl.col("symbol").str.contains(SYMBOL).fill_null(False)),
        ("time", "given", pl.col("ns").is_null() | (pl.col("ns") < -2)),
        ("naive", "given", pl.col("ns") == -2),
        ("grid", "given", pl.col("ns") == -1),
        *(
            ("price", name, bad | (pl.col(name) <= LEAST) | (pl.col(name) >= MOST))
            for name, bad in zip(PRICES, nan, strict=False)
        ),
        ("volume", "volume", nan[4] | (pl.col("volume") < 0) | (pl.col("volume") >= MOST)),
        ("order", "low", pl.col("low") > pl.min_horizontal("open", "close", "high")),
        ("order", "high", pl.col("high") < pl.max_horizontal("open", "close")),
    ]
    number = pl.coalesce(pl.when(bad).then(pl.lit(k)) for k, (_, _, bad) in enumerate(faults))
    bad = rows.with_columns(fault=number).filter(pl.col("fault").is_not_null())
    found = _collect(path, bad.group_by("fault").agg(pl.all().first(), rows=pl.len()).sort("row"))
    if not found.height:
        return
    row = found.row(0, named=True)
    kind, column, _ = faults[row["fault"]]
    counts = Counter[str]()
    for fault, count in found.select("fault", "rows").iter_rows():
        counts[_column(faults[fault][1])] += count
    others = ", ".join(f"{name} in {count}" for name, count in counts.most_common())
    raise DataError(
        f"{path}, row {row['row']}, {_where(row)}: {_column(column)} is {_value(row, column)}"
        f"{_beside(path, kind, row, stamp, calendars)}; {_REMEDIES[kind]}."
        + (f" In all {counts.total()} rows cannot be used: {others}." if counts.total() > 1 else "")
    )


def _check_together(bars: pl.LazyFrame) -> None:
    """Raise `DataError` where two rows of a symbol and close differ."""
    twice = bars.filter(pl.struct("symbol", "close_time").is_duplicated()).collect()
    if twice.height:
        one, other = twice.head(2).rows(named=True)
        column = next(name for name in VALUES if one[name] != other[name])
        where = " and ".join(sorted({one["file"], other["file"]}))
        count = twice.select("symbol", "close_time").n_unique()
        raise DataError(
            f"Two rows of {one['symbol']} closing at {iso(_ns(twice))} in {where} differ: "
            f"column {column!r} is {one[column]} and {other[column]}; keep the right one."
            + (f" In all {count} bars are there twice." if count > 1 else "")
        )


def _check_there(
    known: Collection[str], symbols: Sequence[str] | None, paths: Sequence[Path], time: str
) -> None:
    """Raise `DataError` where there is no bar, or none of one of the symbols."""
    named = ", ".join(map(str, paths[:3])) + (f" and {len(paths) - 3} more" if len(paths) > 3 else "")
    if missing := sorted(set(symbols or ()) - set(known)):
        raise DataError(
            f"No bar of {', '.join(missing)} was found{time} in {named}{_symbols_in(paths)}: "
            "correct the symbols or the files."
        )
    if not known:
        remedy = "widen the time, or name files with bars" if time else "name files with bars"
        raise DataError(f"{named}: no bar{time}; {remedy}.")


def _symbols_in(paths: Sequence[Path]) -> str:
    """Which symbols files hold, for messages."""
    found: set[str] = set()
    for path in paths:
        raw, _, names = _opened(path)
        symbol = pl.col(names["symbol"]).cast(pl.String).drop_nulls()
        found |= set(_collect(path, raw.select(symbol.unique())).to_series())
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return f", where there are {', '.join(sorted(found)[:SHOWN])}{more}" if found else ""


def _time(since: int | None, until: int | None) -> str:
    first = "" if since is None else f" from {iso(since)} on"
    return first if until is None else f"{first}{' and' if first else ''} before {iso(until)}"


def _collect(path: Path, frame: pl.LazyFrame) -> pl.DataFrame:
    try:
        return frame.collect()
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _batches(path: Path, frame: pl.LazyFrame) -> Iterator[pl.DataFrame]:
    """The rows of a file, some at once. What goes wrong where they are handed to is not the file's fault."""
    try:
        yield from frame.collect_batches(chunk_size=AT_ONCE)
    except UNREADABLE as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, error: BaseException) -> DataError:
    reason = str(error).splitlines()[0]
    return DataError(f"{path} cannot be read as {path.suffix[1:]} ({reason}): write it anew.")


def _ns(frame: pl.DataFrame) -> int:
    return int(frame["close_time"].to_physical()[0])


def _where(row: dict[str, Any]) -> str:
    symbol = "no symbol" if row["symbol"] is None else row["symbol"]
    return f"{symbol} at {row['given']}"


def _column(column: str) -> str:
    return "the time" if column == "given" else f"column {column!r}"


def _value(row: dict[str, Any], column: str) -> str:
    value = row[f"given {column}"] if f"given {column}" in row else row[column]
    return "empty" if value is None else str(value) if not isinstance(value, str) else repr(value)


def _beside(path: Path, kind: str, row: dict[str, Any], stamp: Stamp, calendars: Calendars) -> str:
    if kind == "grid":
        calendar = calendars.of(row["symbol"])
        raw, schema, names = _opened(path)
        time = _time_column(path, schema, names, stamp)
        moments, _ = _moments(path, raw, time, schema[time])
        given = _collect(path, raw.slice(row["row"] - 1, 1).select(moments)).item()
        following = calendar.close_at_or_after(given + 1)
        before = calendar.closes_before(following, 1)
        steps = ""
        if calendar.name not in ("24x7", "fx") and (calendar.timeframe.duration or DAY) < DAY:
            steps = ", which step from the session's open,"
        return (
            f", when no {calendar.timeframe} bar of the calendar {calendar.name} {stamp}s: around it its bars"
            f"{steps} close at {iso(before)} and {iso(following)}"
        )
    if kind == "order":
        return f" beside open {row['open']}, high {row['high']}, low {row['low']}, close {row['close']}"
    return ""
