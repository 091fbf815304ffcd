import datetime as dt
import errno
import re
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from barcast.backtest.sample import sample_bars
from barcast.daemon import history as module
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import (
    History,
    Stamp,
    bars,
    digest,
    files,
    find_timeframe,
    history_files,
    read_windows,
    scan,
)
from barcast.daemon.timeframe import Timeframe
from barcast.models import DataError

HOURS = Calendars("24x7", Timeframe.parse("1h"))
DAYS = Calendars("XNYS", Timeframe.parse("session"))
NINE = dt.datetime(2026, 3, 2, 9, tzinfo=dt.UTC)
HOUR = dt.timedelta(hours=1)


def table(**changes: Any) -> pl.DataFrame:
    columns: dict[str, Any] = {
        "symbol": ["BTC", "ETH", "BTC"],
        "close_time": [NINE + HOUR, NINE, NINE],
        "open": [10.0, 20.0, 11.0],
        "high": [12.0, 22.0, 13.0],
        "low": [9.0, 19.0, 10.0],
        "close": [11.0, 21.0, 12.0],
        "volume": [1.0, 0.0, 3.0],
    }
    return pl.DataFrame({name: values for name, values in (columns | changes).items() if values is not None})


def written(tmp_path: Path, frame: pl.DataFrame, suffix: str = "parquet") -> Path:
    path = tmp_path / f"bars.{suffix}"
    if suffix == "parquet":
        frame.write_parquet(path)
    else:
        frame.write_csv(path)
    return path


def closes(frame: pl.LazyFrame) -> list[str]:
    return [f"{time:%m-%d %H:%M}" for time in frame.collect()["close_time"]]


def test_sorted_and_canonical(tmp_path: Path) -> None:
    """Unsorted rows come out sorted by close and symbol, as frame, bars and windows alike."""
    frame = scan([written(tmp_path, table())], "close", HOURS)
    assert frame.collect_schema()["close_time"] == pl.Datetime("ns", "UTC")
    read = list(bars(frame))
    nine = int(NINE.timestamp()) * 10**9
    assert [(bar.symbol, bar.close_time - nine) for bar in read] == [
        ("BTC", 0),
        ("ETH", 0),
        ("BTC", 3600 * 10**9),
    ]
    assert read[0].values == (11.0, 13.0, 10.0, 12.0, 3.0)
    windows = read_windows(frame)
    assert list(windows) == ["BTC", "ETH"]
    assert windows["BTC"].close_time == nine + 3600 * 10**9
    assert windows["BTC"].values.tolist() == [[11.0, 13.0, 10.0, 12.0, 3.0], [10.0, 12.0, 9.0, 11.0, 1.0]]
    assert not windows["BTC"].values.flags.writeable


def test_csv_equals_parquet(tmp_path: Path) -> None:
    """CSV with ISO strings gives the same bars as Parquet, whatever the offset and the header's case."""
    strings = table(
        close_time=["2026-03-02T10:00:00Z", "2026-03-02 04:00:00-05:00", "2026-03-02T09:00:00.000+0000"]
    )
    path = written(tmp_path, strings.rename({"open": "Open", "close_time": "Close_Time"}), "csv")
    expected = scan([written(tmp_path, table())], "close", HOURS).collect()
    assert scan([path], "close", HOURS).collect().equals(expected)


@pytest.mark.parametrize("name", ["ts", "time", "open_time", "timestamp"])
def test_stamped_by_open(tmp_path: Path, name: str) -> None:
    """Bars stamped by their open are moved to their close."""
    path = written(tmp_path, table().rename({"close_time": name}))
    assert closes(scan([path], "open", HOURS)) == ["03-02 10:00", "03-02 10:00", "03-02 11:00"]


@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_dates_of_sessions(tmp_path: Path, suffix: str) -> None:
    """A daily bar stamped by its date closes with that date's session, half days included."""
    days = [dt.date(2012, 11, 26), dt.date(2012, 11, 23), dt.date(2012, 11, 23)]
    path = written(tmp_path, table(close_time=None, date=days), suffix)
    assert closes(scan([path], "open", DAYS)) == ["11-23 18:00", "11-23 18:00", "11-26 21:00"]
    path = written(tmp_path, table(close_time=days), suffix)
    assert closes(scan([path], "close", DAYS)) == ["11-23 18:00", "11-23 18:00", "11-26 21:00"]


def test_dates_always_open(tmp_path: Path) -> None:
    """With 24x7 a date is the day that begins then; as a close it is refused."""
    daily = Calendars("24x7", Timeframe.parse("1d"))
    path = written(tmp_path, table(close_time=None, date=[dt.date(2026, 3, day) for day in (1, 1, 2)]))
    assert closes(scan([path], "open", daily)) == ["03-02 00:00", "03-02 00:00", "03-03 00:00"]
    path = written(tmp_path, table(close_time=[dt.date(2026, 3, 1)] * 3))
    with pytest.raises(DataError, match="do not say when a 24x7 day closed: write date and time"):
        scan([path], "close", daily)
    with pytest.raises(DataError, match="holds dates, but the timeframe is 1h: write date and time"):
        scan([path], "close", HOURS)


def test_selection(tmp_path: Path) -> None:
    """Symbols and since <= close < until select rows; only those are checked."""
    path = written(tmp_path, table(high=[12.0, -1.0, 13.0]))
    nine = int(NINE.timestamp()) * 10**9
    only = scan([path], "close", HOURS, symbols=["BTC"])
    assert [bar.symbol for bar in bars(only)] == ["BTC", "BTC"]
    assert closes(scan([path], "close", HOURS, symbols=["BTC"], until=nine + 1)) == ["03-02 09:00"]
    assert closes(scan([path], "close", HOURS, since=nine + 1)) == ["03-02 10:00"]
    with pytest.raises(DataError, match=r"No bar of DOGE, SOL was found .* correct the symbols"):
        scan([path], "close", HOURS, symbols=["BTC", "SOL", "DOGE"])


def test_equal_rows_are_one(tmp_path: Path) -> None:
    """Rows that are equal in everything, also across files, count once."""
    path, other = written(tmp_path, table()), tmp_path / "more.parquet"
    pl.concat([table(), table()]).write_parquet(other)
    assert scan([path, other], "close", HOURS).collect().height == 3
    assert scan([tmp_path], "close", HOURS).collect().height == 3


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"volume": None}, "has no column 'volume', only symbol.*add or rename it"),
        ({"symbol": ["BTC", "btc", "BTC"]}, "row 2, btc at .*: column 'symbol' is 'btc'; spell it in A-Z"),
        ({"symbol": ["BTC", "", "BTC"]}, "column 'symbol' is ''"),
        ({"symbol": ["BTC", None, "BTC"]}, "row 2, no symbol at .*: column 'symbol' is empty"),
        ({"symbol": ["BTC", "A" * 33, "BTC"]}, "at most 32 characters"),
        (
            {"open": [10.0, 20.0, float("nan")]},
            "row 3, BTC at .*: column 'open' is '?NaN'?; prices are positive",
        ),
        ({"close": [10.0, None, 12.0]}, "row 2, ETH at .*: column 'close' is empty"),
        ({"low": [-9.0, 19.0, 10.0]}, "row 1, BTC at .*: column 'low' is '-9.0'; prices are positive"),
        ({"high": [float("inf"), 22.0, 13.0]}, "column 'high' is 'inf'"),
        (
            {"volume": [1.0, -2.0, 3.0]},
            "row 2.*column 'volume' is '-2.0'; volume is a number and not negative",
        ),
        (
            {"high": [12.0, 18.0, 13.0]},
            "row 2, ETH at .*: column 'low' is '19.0' beside open 20.0, high 18.0",
        ),
        ({"high": [12.0, 20.5, 13.0]}, "row 2, ETH at .*: column 'high' is '20.5' beside open 20.0"),
        (
            {"close_time": [NINE, NINE, NINE]},
            r"Two rows of BTC closing at 2026-03-02T09:00:00Z in .*bars.* differ: column 'open'",
        ),
        (
            {"close_time": [NINE, None, NINE]},
            "row 2, ETH at None: the time is empty; write a date and time",
        ),
        (
            {"close_time": None},
            "has no time column.* for bars stamped by their close; have one, named close_time",
        ),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_faults(tmp_path: Path, suffix: str, changes: dict[str, Any], message: str) -> None:
    """Every fault is one sentence that names the file, the row, the column, the value and the remedy."""
    frame = table(**changes)
    if suffix == "csv":
        frame = frame.with_columns(pl.col(pl.Datetime).dt.to_string("iso:strict"))
    with pytest.raises(DataError, match=message) as caught:
        scan([written(tmp_path, frame, suffix)], "close", HOURS)
    assert "\n" not in str(caught.value)
    assert f"bars.{suffix}" in str(caught.value)


@pytest.mark.parametrize(
    ("times", "message"),
    [
        ([NINE.replace(tzinfo=None)] * 3, "times without a time zone: say which it is"),
        ([1, 2, 3], "holds Int64, not times"),
        (["2026-03-02T09:00:00"] * 3, "row 1, BTC at 2026.*'2026-03-02T09:00:00'; write the time zone"),
        (["2026-03-02T09:00:00Z", "soon", "2026-03-02T09:00:00Z"], "row 2.*is 'soon'; write a date and time"),
        (["2026-03-02", "2026-13-02", "2026-03-02"], "holds dates, but the timeframe is 1h"),
    ],
)
def test_time_faults(tmp_path: Path, times: list[object], message: str) -> None:
    """Times that are naive, not times or not understood are refused with what to write instead."""
    with pytest.raises(DataError, match=message):
        scan([written(tmp_path, table(close_time=times))], "close", HOURS)


def test_off_grid_open(tmp_path: Path) -> None:
    """An open at which no bar of the calendar opens is refused by row."""
    path = written(tmp_path, table().with_columns(ts=pl.col("close_time") + dt.timedelta(minutes=1)))
    with pytest.raises(
        DataError,
        match=r"row 1, BTC at .*when no 1h bar of the calendar 24x7 opens: around it its bars close at ",
    ):
        scan([path], "open", HOURS)
    dates = table(close_time=None, date=[dt.date(2012, 11, day) for day in (21, 22, 23)])
    with pytest.raises(
        DataError, match=r"row 2, ETH at 2012-11-22: .*when no session bar of the calendar XNYS opens"
    ):
        scan([written(tmp_path, dates)], "open", DAYS)
    dates = table(close_time=None, date=[dt.date(2012, 11, 21), dt.date(2250, 11, 22), dt.date(2012, 11, 23)])
    with pytest.raises(DataError, match="XNYS has no sessions around 2250-11-22"):
        scan([written(tmp_path, dates)], "open", DAYS)


def test_file_faults(tmp_path: Path) -> None:
    """Files that are missing, foreign, damaged, empty or ambiguous are refused by name."""
    damaged, foreign, empty = tmp_path / "damaged.parquet", tmp_path / "bars.txt", tmp_path / "empty.csv"
    damaged.write_bytes(b"no parquet")
    foreign.write_text("")
    empty.write_text("symbol,close_time,open,high,low,close,volume\n")
    two = tmp_path / "two.parquet"
    table().with_columns(ts="close_time", time="close_time").write_parquet(two)
    ragged = tmp_path / "ragged.csv"
    ragged.write_text(
        "symbol,close_time,open,high,low,close,volume\nBTC,2026-03-02T09:00:00Z,1,1,1,1,1,9,9\n"
    )
    (tmp_path / "nothing").mkdir()
    cases: list[tuple[list[Path], Stamp, str]] = [
        ([tmp_path / "none.csv"], "close", "none.csv does not exist: correct the path"),
        ([foreign], "close", "neither .parquet nor .csv"),
        ([damaged], "close", "damaged.parquet cannot be read as parquet"),
        ([ragged], "close", "ragged.csv cannot be read as csv"),
        ([empty], "close", "no bar; name files with bars"),
        ([two], "open", "has 2 time column.*: ts, time; have one"),
        ([tmp_path / "nothing"], "close", "holds no .parquet or .csv file"),
        ([], "close", "No file with bars was named"),
    ]
    for paths, stamp, message in cases:
        with pytest.raises(DataError, match=message):
            scan(paths, stamp, HOURS)


@pytest.mark.parametrize("what", [files, digest])
def test_what_may_not_be_read_is_a_fault_of_the_data(tmp_path, monkeypatch, what):
    """A folder or file of another user is named with its remedy."""
    written(tmp_path, table())

    def may_not(path, *_):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(Path, "iterdir" if what is files else "open", may_not)
    with pytest.raises(DataError, match=r"Permission denied: let the user of this program read it\.$"):
        what([tmp_path])
    if what is files:
        with pytest.raises(DataError, match="Permission denied"):
            history_files(tmp_path)


def test_digest(tmp_path: Path) -> None:
    """The digest depends on the contents alone: not on names, order or folders."""
    one, other = tmp_path / "a.csv", tmp_path / "b.csv"
    one.write_text("one")
    other.write_text("other")
    before = digest([one, other])
    assert digest([other, one]) == before == digest([tmp_path])
    one.rename(tmp_path / "z.csv")
    assert digest([tmp_path]) == before
    other.write_text("another")
    assert digest([tmp_path]) != before


def test_sample_bars() -> None:
    """The shipped sample passes every check."""
    frame = scan([sample_bars()], "close", DAYS, symbols=["IBM"])
    assert len(read_windows(frame)["IBM"]) == 3270


def test_other_bad_rows_are_counted(tmp_path: Path) -> None:
    """The first fault is said in full, and how many rows have which faults."""
    frame = table(low=[-1.0, 19.0, -1.0], volume=[1.0, -1.0, 3.0])
    with pytest.raises(
        DataError, match=r"row 1, .*'low' is '-1.0'.* In all 3 rows .*: column 'low' in 2, column "
    ):
        scan([written(tmp_path, frame)], "close", HOURS)
    with pytest.raises(DataError) as caught:
        scan([written(tmp_path, table(low=[9.0, 19.0, -1.0]))], "close", HOURS)
    assert "In all" not in str(caught.value)


@pytest.mark.parametrize(
    ("count", "unit"), [(1772442000, "s"), (1772442000123, "ms"), (1772442000123456, "us"), (10**18, "ns")]
)
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_numbers_for_times_can_be_converted_as_said(
    tmp_path: Path, suffix: str, count: int, unit: str
) -> None:
    """A count since 1970 is refused with its unit, and the conversion that is named gives the moment."""
    times = [str(count)] * 3 if suffix == "csv" else [count] * 3
    with pytest.raises(DataError, match=rf"{count} looks like {unit} since 1970") as caught:
        scan([written(tmp_path, table(close_time=times), suffix)], "close", HOURS)
    expression = str(caught.value).split("in polars ")[1].removesuffix(" converts it.")
    [moment] = pl.DataFrame({"close_time": [str(count)]}).select(eval(expression)).to_series()
    assert moment.tzinfo is not None
    assert abs(moment.timestamp() - count / {"s": 1, "ms": 1e3, "us": 1e6, "ns": 1e9}[unit]) < 1e-3


def test_times_that_cannot_be_written(tmp_path: Path) -> None:
    """Times that are no nanoseconds since 1970, or have no text, are refused by row."""
    for count, unit in ((-1, "us"), (10**19 // 1000, "us"), (6 * 10**18, "us"), (9 * 10**15, "ms")):
        times = pl.Series([count] * 3).cast(pl.Datetime(unit, "UTC"))  # type: ignore[arg-type]
        with pytest.raises(DataError, match=r"row 1, BTC at .*from 1970 on, before 2262"):
            scan([written(tmp_path, table(close_time=None).with_columns(close_time=times))], "close", HOURS)


def test_each_symbol_keeps_its_own_hours(tmp_path):
    """Bars are checked against the calendar of their symbol, which a fault names."""
    rows = [
        ("EURUSD", "2026-03-06T22:00:00Z"),  # the week ends
        ("EURUSD", "2026-03-08T22:00:00Z"),  # and begins, an hour earlier in UTC
        ("BTC", "2026-03-07T12:00:00Z"),
        ("AAPL", "2026-03-06T20:30:00Z"),
        ("AAPL", "2026-03-06T21:00:00Z"),
    ]
    frame = pl.DataFrame(
        [(symbol, time, 1.0, 2.0, 0.5, 1.5, 3.0) for symbol, time in rows],
        ["symbol", "close_time", "open", "high", "low", "close", "volume"],
        orient="row",
    )
    hours = Calendars("24x7", Timeframe.parse("1h"), {"EURUSD": "fx", "AAPL": "XNYS"})
    assert scan([written(tmp_path, frame)], "close", hours).collect().height == 5
    opens = frame.with_columns(
        pl.col("close_time").replace_strict(
            {
                "2026-03-06T22:00:00Z": "2026-03-06T21:00:00Z",
                "2026-03-08T22:00:00Z": "2026-03-08T21:00:00Z",
                "2026-03-07T12:00:00Z": "2026-03-07T11:00:00Z",
                "2026-03-06T20:30:00Z": "2026-03-06T19:30:00Z",
                "2026-03-06T21:00:00Z": "2026-03-06T20:30:00Z",
            }
        )
    ).rename({"close_time": "open_time"})
    closes_of = scan([written(tmp_path, opens)], "open", hours).collect()
    assert sorted(closes_of["close_time"].dt.strftime("%Y-%m-%dT%H:%M:%SZ")) == sorted(
        time for _, time in rows
    )
    wrong = frame.with_columns(symbol=pl.col("symbol").replace("BTC", "EURUSD"))
    with pytest.raises(DataError, match=r"row 3, EURUSD .*no 1h bar of the calendar fx closes"):
        scan([written(tmp_path, wrong)], "close", hours)
    with pytest.raises(DataError, match=r"row 4, AAPL .*no 1h bar of the calendar 24x7 closes"):
        scan([written(tmp_path, frame)], "close", Calendars("24x7", Timeframe.parse("1h")))


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({"timeframe": ["15m"] * 3}, ("15m", "column 'timeframe' of {path}")),
        ({"Timeframe": ["session"] * 3}, ("session", "column 'timeframe' of {path}")),
        ({}, ("1h", "the most frequent distance between bars")),
        ({"close_time": [NINE + 24 * HOUR, NINE, NINE]}, ("1d", "the most frequent distance between bars")),
        ({"close_time": [NINE + HOUR / 4, NINE, NINE]}, ("15m", "the most frequent distance between bars")),
        ({"close_time": [NINE + 168 * HOUR, NINE, NINE]}, ("7d", "the most frequent distance between bars")),
    ],
)
@pytest.mark.parametrize("suffix", ["parquet", "csv"])
def test_timeframe_is_found(
    tmp_path: Path, changes: dict[str, Any], found: tuple[str, str], suffix: str
) -> None:
    """The column `timeframe` tells it, or else how far apart the bars of a symbol mostly are."""
    path = written(tmp_path, table(**changes), suffix)
    timeframe, how = find_timeframe([path], "close")
    assert (timeframe.text, how) == (found[0], found[1].format(path=path))


def test_timeframe_is_the_most_frequent_distance(tmp_path: Path) -> None:
    """Holes, other symbols, rows that are there twice and files that split a symbol do not mislead it."""
    hours = [0, 1, 2, 9, 10, 50, 51]
    rows = table(**{name: [v] * 7 for name, v in table().row(0, named=True).items()}).with_columns(
        close_time=pl.Series([NINE + h * HOUR for h in hours], dtype=pl.Datetime("us", "UTC"))
    )
    for k in range(7):
        rows[k : k + 1].write_parquet(tmp_path / f"{k}.parquet")
    rows[:2].write_parquet(tmp_path / "again.parquet")
    assert find_timeframe([tmp_path], "close")[0].text == "1h"
    dates = table(symbol=["BTC"] * 3, close_time=None, date=[dt.date(2026, 3, d) for d in (2, 3, 6)])
    assert find_timeframe([written(tmp_path, dates)], "open")[0].text == "1d"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"timeframe": ["15m", "1h", "1h"]},
            "Column 'timeframe' of {path} holds '15m', '1h': keep bars of one",
        ),
        ({"timeframe": ["1h", None, "1h"]}, "holds '', '1h': keep bars of one"),
        ({"timeframe": ["1w"] * 3}, "Column 'timeframe' of {path}: timeframe '1w' is not understood"),
        ({"symbol": ["A", "B", "C"]}, "{path}: there are no two bars that tell how long one is"),
        ({"close_time": [NINE + 7 * HOUR, NINE, NINE]}, "timeframe '7h' neither divides a day"),
        ({"close_time": [NINE + HOUR / 7200, NINE, NINE]}, "0.5 s is no timeframe"),
        ({"close_time": None}, "no time column"),
        ({"symbol": None}, "no column 'symbol'"),
    ],
)
def test_a_timeframe_that_cannot_be_found_is_a_fault(
    tmp_path: Path, changes: dict[str, Any], said: str
) -> None:
    """Several, none, or one that bars cannot have: a sentence says what to do."""
    path = written(tmp_path, table(**changes))
    with pytest.raises(DataError, match=re.escape(said.format(path=path))):
        find_timeframe([path], "close")


def test_timeframe_of_the_symbols_that_are_taken(tmp_path: Path) -> None:
    """Bars of other symbols do not count."""
    path = written(tmp_path, table(timeframe=["1h", "15m", "1h"]))
    assert find_timeframe([path], "close", ["BTC"])[0].text == "1h"
    with pytest.raises(DataError, match="no two bars of SOL"):
        find_timeframe([path], "close", ["SOL"])


def random_files(folder: Path) -> list[Path]:
    """Bars of three symbols in two files, shuffled, some of them in both."""
    rng = np.random.default_rng(5)
    hours = pl.datetime_range(NINE, NINE + 200 * HOUR, "1h", eager=True)
    frames = []
    for symbol, count in (("BTC", 120), ("ETH", 40), ("SOL", 90)):
        when = hours.gather(np.sort(rng.choice(len(hours), count, replace=False)))
        close = rng.uniform(9, 11, count)
        frames.append(
            pl.DataFrame(
                {"symbol": symbol, "close_time": when, "open": close, "high": close + 1}
            ).with_columns(low=close - 1, close=close, volume=rng.integers(0, 9, count).astype(float))
        )
    whole = pl.concat(frames)
    one, other = (
        whole.sample(fraction=0.7, seed=1, shuffle=True),
        whole.sample(fraction=0.7, seed=2, shuffle=True),
    )
    rest = whole.join(pl.concat([one, other]), on=["symbol", "close_time"], how="anti")
    return [written(folder, one, "parquet"), written(folder, pl.concat([other, rest]), "csv")]


@pytest.mark.parametrize("at_once", [7, 200_000])
def test_history_in_files_is_that_of_a_scan(tmp_path: Path, monkeypatch, at_once: int) -> None:
    """Bars that lie in plain files are those of the frame: in order, in windows, and the newest of each."""
    monkeypatch.setattr(module, "AT_ONCE", at_once)
    paths = random_files(tmp_path)
    (tmp_path / "kept").mkdir()
    history = History(paths, "close", HOURS, None, None, tmp_path / "kept")
    frame = scan(paths, "close", HOURS)
    every = list(bars(frame))
    assert len(every) == 250
    assert list(history.bars(0)) == every
    assert (history.first, history.last) == (every[0].close_time, every[-1].close_time)
    cut = every[100].close_time
    assert list(history.bars(cut)) == [bar for bar in every if bar.close_time >= cut]
    before = {s: [b for b in every if b.symbol == s and b.close_time < cut][-5:] for s in history}
    assert history.newest(cut - 1, 5) == [b for b in every if b in before[b.symbol]]
    windows, upto = read_windows(frame), history.closed(cut)
    assert list(history) == list(windows)
    for symbol, window in windows.items():
        for one, other in (
            (history[symbol].close_times, window.close_times),
            (history[symbol].values, window.values),
        ):
            np.testing.assert_array_equal(one, other)
        assert (upto[symbol].close_times == window.close_times[window.close_times <= cut]).all()


def test_history_in_files_says_what_a_scan_says(tmp_path: Path) -> None:
    """What cannot be used is said in the same words."""
    again = table().with_columns(close=pl.col("close") + 0.5)
    both = [written(tmp_path, table(), "parquet"), written(tmp_path, again, "csv")]
    for number, (paths, symbols) in enumerate(((both, None), (both[:1], ["BTC", "DOGE"]), ([], None))):
        folder = tmp_path / str(number)
        folder.mkdir()
        with pytest.raises(DataError) as scanned:
            scan(paths, "close", HOURS, symbols)
        with pytest.raises(DataError) as kept:
            History(paths, "close", HOURS, symbols, None, folder)
        assert str(kept.value) == str(scanned.value)


def test_folder_that_cannot_be_written_is_no_fault_of_the_bars(tmp_path: Path, monkeypatch) -> None:
    """Whoever names the folder hears of it, as it is: the files are not called unreadable."""
    paths = [written(tmp_path, table(), "parquet")]
    with pytest.raises(FileNotFoundError, match=r"nowhere/BTC\.closes"):
        History(paths, "close", HOURS, None, None, tmp_path / "nowhere")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(History, "_add", full)
    with pytest.raises(OSError, match="No space left"):
        History(paths, "close", HOURS, None, None, tmp_path)


def test_history_is_told_where_nothing_is(tmp_path: Path) -> None:
    """What another history left in a folder is not taken for bars of this one."""
    paths = [written(tmp_path, table(), "parquet")]
    (tmp_path / "kept").mkdir()
    History(paths, "close", HOURS, None, None, tmp_path / "kept")
    with pytest.raises(FileExistsError):
        History(paths, "close", HOURS, None, None, tmp_path / "kept")


def test_steps_are_counted_a_few_symbols_at_a_time(tmp_path: Path, monkeypatch) -> None:
    """The timeframe is the same when the times of all symbols are not compared at once."""
    paths = random_files(tmp_path)
    expected = find_timeframe(paths, "close")
    monkeypatch.setattr(module, "FEW", 1)
    assert find_timeframe(paths, "close") == expected
