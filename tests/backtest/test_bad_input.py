"""What a backtest makes of input that is not as it should be: one clear error, or a rule that can be seen."""

from datetime import UTC, datetime

import numpy as np
import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest.caveats import SHOWN
from barcast.backtest.ledger import BENCHMARK, Execution
from barcast.backtest.replay import run_backtest
from barcast.daemon.calendar import Calendar
from barcast.daemon.config import Retrain
from barcast.daemon.timeframe import Timeframe
from barcast.daemon.wire import to_ns
from barcast.models import Adjustment, ConfigError, DataError, open_model

HOUR = 3600 * 10**9
START = 1_704_067_200 * 10**9  # 2024-01-01T00:00Z
N, LENGTH = 300, open_model("hs", "1h", None, None).card.min_window
DRIFT = ["median-drift:costs=0"]
PRICES = ("open", "high", "low", "close")
HOURS = tuple(START + HOUR * (k + 1) for k in range(N))
FRAMES = ("signals", "fills", "equity")
HOLD = """from dataclasses import dataclass

@dataclass(frozen=True)
class Hold:
    name: str

    def on_forecasts(self, close_time, forecasts):
        if close_time < {first}:
            return dict.fromkeys(forecasts, 0.5)
        {then}
"""


def at(time):
    """A moment in UTC, in nanoseconds."""
    return to_ns(datetime.fromisoformat(time).replace(tzinfo=UTC))


def written(ns):
    """A moment as sentences show it."""
    return f"{datetime.fromtimestamp(ns / 1e9, UTC):%Y-%m-%dT%H:%M:%SZ}"


def bars_of(symbol, times=HOURS, seed=1, start=100.0):
    """Bars with ten basis points of noise."""
    rng = np.random.default_rng(seed)
    close = start * np.exp(np.cumsum(0.001 * rng.standard_normal(len(times))))
    opens = np.concatenate([[start], close[:-1]])
    frame = pl.DataFrame({"symbol": [symbol] * len(times), "ns": list(times)})
    return frame.select(
        "symbol",
        pl.from_epoch("ns", "ns").dt.replace_time_zone("UTC").alias("close_time"),
        pl.Series("open", opens),
        pl.Series("high", np.maximum(opens, close)),
        pl.Series("low", np.minimum(opens, close)),
        pl.Series("close", close),
        pl.Series("volume", np.full(len(times), 1e6)),
    )


AAA, BBB = bars_of("AAA"), bars_of("BBB", seed=2)


def without(frame, first, last):
    """A frame with a hole: rows first to last are gone."""
    return frame.filter(~pl.int_range(pl.len()).is_between(first, last))


def scaled(frame, first, factor):
    """Prices from a row on times a factor, as after a split."""
    part = pl.when(pl.int_range(pl.len()) >= first).then(factor).otherwise(1.0)
    return frame.with_columns(pl.col(name) * part for name in PRICES)


@pytest.fixture
def backtest(tmp_path):
    """Runs a backtest over frames, each in a file of its own: bars0.parquet, bars1.parquet and so on."""

    def run(*frames, **given):
        files = [tmp_path / f"bars{k}.parquet" for k in range(len(frames))]
        for file, frame in zip(files, frames, strict=True):
            frame.write_parquet(file)
        settings = {
            "stamp": "close",
            "model": "hs",
            "timeframe": "1h",
            "strategies": DRIFT,
        }
        return run_backtest(files, **(settings | given))

    return run


def warning(result):
    """What is said of a result."""
    return result.meta["warning"]


def refused(run, *frames, error=DataError, **given):
    """The sentence that a backtest ends with."""
    with pytest.raises(error) as caught:
        run(*frames, **given)
    return str(caught.value)


def assert_same(one, other):
    """Two results say and do the same, to the bit."""
    for name in FRAMES:
        assert getattr(one, name).height > 0
        assert_frame_equal(getattr(one, name), getattr(other, name), check_exact=True)


# --- gaps, hours, days


def test_sound_bars_are_not_warned_of(backtest):
    """The control: nothing is said of bars that are as they should be."""
    result = backtest(AAA, BBB)
    assert (warning(result), result.meta["degraded"], result.meta["jumps"]) == ("", {}, [])


def test_small_hole_degrades_and_is_told(backtest):
    """Forecasts from a window with a hole are made, counted as degraded, and the hole is named."""
    result = backtest(without(AAA, 200, 202), BBB)
    assert result.meta["degraded"] == {"AAA": N - 203}
    said = (
        f"AAA lacks bars that the calendar 24x7 has (the most, 3, after {written(HOURS[199])}): 0 forecasts"
    )
    assert said in warning(result)
    assert f"{N - 203} degraded; add them" in warning(result)
    assert "BBB" not in warning(result)


def test_large_hole_withholds_and_keeps_the_position(backtest):
    """No forecast from a window that lacks over a tenth; what is held stays, at its last close."""
    result = backtest(without(AAA, 200, 219), BBB)
    assert f"{N - 220} forecasts were withheld for it, 0 degraded" in warning(result)
    own = result.signals.filter(symbol="AAA")["close_time"].to_physical()
    assert own.max() == HOURS[199]
    fills = result.fills.filter(strategy="median-drift", symbol="AAA").sort("close_time")
    # The order of the last close before the hole waits for the first bar after it; then there are no more.
    assert fills["close_time"].to_physical()[-1] == HOURS[220]
    assert fills["decided"].to_physical()[-1] == HOURS[199]
    marked = result.equity.filter(strategy="median-drift")["close_time"]
    assert marked.n_unique() == marked.len() == N - LENGTH + 1


def test_sessions_that_are_missing_are_told(backtest):
    """A missing session is a hole of an exchange's calendar, without a word on markets that shut at night."""
    days = _sessions("XNYS", "2023-01-03", 260)
    given = {"timeframe": "session", "calendar": "XNYS"}
    assert warning(backtest(bars_of("IBM", days), **given)) == ""
    said = warning(backtest(without(bars_of("IBM", days), 200, 201), **given))
    assert f"IBM lacks bars that the calendar XNYS has (the most, 2, after {written(days[199])})" in said
    assert said.endswith("degraded; add them.")


def _sessions(calendar, first, count, timeframe="session"):
    return Calendar(calendar, Timeframe.parse(timeframe)).closes_after(at(first), count)


@pytest.mark.parametrize(
    ("calendar", "timeframe", "first"),
    [
        ("XNYS", "1h", "2023-10-20"),  # the clock changes in November; half a day after Thanksgiving
        ("XNYS", "15m", "2024-03-05"),  # the clock changes on March 10
        ("XLON", "1h", "2024-03-20"),  # Easter, and the clock changes on March 31
        ("fx", "1h", "2024-03-04"),
        ("fx", "1h", "2023-10-25"),
    ],
)
def test_closures_half_days_and_clocks_are_no_holes(backtest, calendar, timeframe, first):
    """Nights, weekends, holidays, half days and the change of the clock withhold and degrade nothing."""
    times = _sessions(calendar, first, 260, timeframe)
    bars = bars_of("IBM", times)
    result = backtest(bars, calendar=calendar, timeframe=timeframe)
    assert (warning(result), result.meta["degraded"]) == ("", {})
    assert result.signals["close_time"].n_unique() == 260 - LENGTH + 1


NEW_YORK = {"calendar": "XNYS", "timeframe": "1h"}
STEP = "which step from the session's open,"


@pytest.mark.parametrize(
    ("time", "around"),
    [
        # stamped at full hours, not from half past nine on
        ("2023-11-22T16:00:00", f"bars, {STEP} close at 2023-11-22T15:30:00Z and 2023-11-22T16:30:00Z"),
        # as if November 24 were a whole day
        ("2023-11-24T18:30:00", f"bars, {STEP} close at 2023-11-24T18:00:00Z and 2023-11-27T15:30:00Z"),
        # an hour late, as the clock changed on March 10
        ("2024-03-11T20:30:00", f"bars, {STEP} close at 2024-03-11T20:00:00Z and 2024-03-12T14:30:00Z"),
        # a holiday
        ("2024-07-04T15:30:00", f"bars, {STEP} close at 2024-07-03T17:00:00Z and 2024-07-05T14:30:00Z"),
    ],
)
def test_bar_off_the_sessions_is_an_error_with_the_closes_around_it(backtest, time, around):
    """The sentence shows when the calendar's bars close, so that one sees what is wrong."""
    good = _sessions("XNYS", "2023-11-20", 3, "1h")
    said = refused(backtest, bars_of("IBM", [*good, at(time)]), **NEW_YORK)
    assert f"bars0.parquet, row 4, IBM at {time.replace('T', ' ')}" in said
    assert "no 1h bar of the calendar XNYS closes" in said
    assert around in said
    assert "correct the time, or take the calendar (24x7, fx, or an exchange's such as XNYS)" in said


def test_opens_and_dates_off_the_calendar_show_closes_too(backtest):
    """By whichever end bars are stamped, and where a date names a day without a session."""
    bars = bars_of("IBM", [at("2024-07-03T14:00:00"), at("2024-07-03T14:30:00")])
    said = refused(backtest, bars.rename({"close_time": "open_time"}), stamp="open", **NEW_YORK)
    assert "no 1h bar of the calendar XNYS opens: around it" in said
    assert "close at 2024-07-02T20:00:00Z and 2024-07-03T14:30:00Z" in said
    dated = bars_of("IBM", [at("2024-07-04")]).with_columns(date=pl.col("close_time").dt.date())
    said = refused(backtest, dated.drop("close_time"), calendar="XNYS", timeframe="session")
    assert "around it its bars close at 2024-07-03T17:00:00Z and 2024-07-05T20:00:00Z" in said


def test_session_bars_around_the_clock_name_the_remedy(backtest):
    """Bars of an exchange under 24x7 are all withheld: the error says which calendar to name."""
    clock = [START + (24 * day + hour) * HOUR for day in range(80) if day % 7 < 5 for hour in range(15, 22)]
    said = refused(backtest, bars_of("IBM", clock))
    assert "nothing was forecast (IBM: " in said
    assert "name its calendar: fx, or an exchange's such as XNYS" in said


# --- splits


def test_undeclared_split_is_told_and_counted_as_a_return(backtest):
    """What happened, what became of it, and what to do; the jump stays in the result."""
    result = backtest(scaled(AAA, 200, 0.5), BBB)
    moment = written(HOURS[200])
    assert "AAA jumped once, to 0.5 times " in warning(result)
    assert f"the last close at {moment}, undeclared: forecasts near one are degraded" in warning(result)
    assert "took it for a return; declare a split or a roll as an adjustment, unless" in warning(result)
    [jump] = result.meta["jumps"]
    assert (jump["symbol"], jump["close_time"]) == ("AAA", moment)
    assert jump["ratio"] == pytest.approx(0.5, rel=0.01)
    held = result.equity.filter(strategy=BENCHMARK)
    fall = held["equity"].pct_change().min()
    assert fall == pytest.approx(-0.25, abs=0.01)


def test_declared_split_changes_nothing(backtest):
    """With the split declared, every book and forecast is that of the bars without one."""
    split = Adjustment("AAA", HOURS[199], 0.5, "split")
    result, plain = backtest(scaled(AAA, 200, 0.5), BBB, adjustments=[split]), backtest(AAA, BBB)
    assert (warning(result), result.meta["jumps"]) == ("", [])
    both = [r.equity.select("strategy", "close_time", "equity") for r in (result, plain)]
    assert_frame_equal(*both, check_exact=False, rel_tol=1e-9)
    assert result.meta["adjustments"][0]["symbol"] == "AAA"


def test_jump_that_was_left_in_by_max_jump_is_seen_in_the_result(backtest):
    """A wider max_jump says that the market moved so; it stands in the result."""
    result = backtest(scaled(AAA, 200, 0.5), max_jump=2.0)
    assert (warning(result), result.meta["jumps"], result.meta["max_jump"]) == ("", [], 2.0)


def test_split_behind_a_hole_is_told(backtest):
    """A jump that no forecast met, as the hole before it withheld them all, is found."""
    result = backtest(without(scaled(AAA, 230, 0.5), 200, 229), BBB)
    assert [jump["close_time"] for jump in result.meta["jumps"]] == [written(HOURS[230])]


def test_many_jumps_are_cut_short(backtest):
    """A feed of bad prices does not fill the screen; the result has each."""
    bars = AAA
    for k in range(150, 164):
        bars = scaled(bars, k, 0.5 if k % 2 else 2.0)
    result = backtest(bars)
    assert len(result.meta["jumps"]) == 14
    first, *also = (jump["close_time"] for jump in result.meta["jumps"][:3])
    said = f"AAA jumped 14 times, to 2 times the last close at {first}, at {also[0]}, at {also[1]}, 11 times"
    assert f"{said} more, undeclared" in warning(result)
    assert warning(result).count("declare a split") == 1


def test_what_is_said_of_symbols_is_said_once(backtest):
    """A line for each kind: the symbols by name, what became of it and what to do once."""
    early = [
        without(scaled(bars_of(name, seed=k), 150, 0.5), 180, 181).head(200)
        for k, name in enumerate("CDEFGHI")
    ]
    lines = warning(backtest(AAA, *early)).splitlines()
    assert [sum(text in line for line in lines) for text in ("jumped once", "lacks bars", "ends at")] == [
        1,
        1,
        1,
    ]
    assert len(lines) == 3
    for line, advice in zip(lines, ("declare a split", "add them", "end the test there"), strict=True):
        assert line.count(advice) == 1
        assert f"and {7 - SHOWN} more" in line


@pytest.mark.parametrize(
    ("symbol", "time", "said"),
    [
        ("AAB", HOURS[200], "AAB has no bars (did you mean AAA?)"),
        ("AAA", HOURS[-1], f"AAA has no bar after {written(HOURS[-1])}"),
        ("AAA", START, f"AAA has no bar up to {written(START)}"),
    ],
)
def test_adjustment_without_effect_is_told(backtest, symbol, time, said):
    """A symbol misspelt or a time outside of the bars: nothing is adjusted, and it is said."""
    given = [Adjustment(symbol, time, 1.0001, "roll"), Adjustment("AAA", HOURS[150], 1.0001, "roll")]
    result = backtest(AAA, adjustments=given)
    assert f"1 of 2 adjustments change nothing: {said}." in warning(result)
    other = backtest(AAA, adjustments=given[1:])
    assert_frame_equal(result.signals, other.signals)
    assert_frame_equal(result.equity, other.equity)


def test_adjustments_beyond_what_was_asked_for_are_no_fault(backtest):
    """A file of all splits may be used for some of the symbols and some of the time."""
    given = [Adjustment("BBB", HOURS[50], 1.0001, "roll"), Adjustment("AAA", HOURS[280], 1.0001, "roll")]
    assert warning(backtest(AAA, BBB, adjustments=given, symbols=["AAA"], until=HOURS[250])) == ""


def test_calendar_of_a_symbol_without_bars_is_told(backtest, run, tmp_path):
    """A symbol misspelt: a backtest says it, as an instance may know more symbols; other commands refuse."""
    said = "A calendar is given of AAB without a bar: there are AAA."
    assert warning(backtest(AAA, calendars={"AAB": "fx"})) == said
    assert warning(backtest(AAA, calendars={"AAB": "fx"}, symbols="AAA")) == ""
    command = ["forecast", str(tmp_path / "bars0.parquet"), "--stamp", "close", "--model", "hs"]
    status, _, err = run(*command, "--symbol-calendar", "AAB=fx")
    assert status == 2
    assert "given of AAB without a bar" in " ".join(err.replace("│", " ").split())


@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("parquet", "bars.csv begins as a Parquet file: name it so, ending in .parquet"),
        (";", "bars.csv begins 'symbol;close_time;open;high;low;close;volume': part columns by commas"),
    ],
)
def test_csv_that_is_none_is_told(tmp_path, kind, said):
    """What a file is instead of what its name says, without its bytes on the screen."""
    path = tmp_path / "bars.csv"
    AAA.write_parquet(path) if kind == "parquet" else AAA.write_csv(path, separator=kind)
    with pytest.raises(DataError) as caught:
        run_backtest(path, stamp="close", model="hs", timeframe="1h")
    assert said in str(caught.value)
    assert str(caught.value).isprintable()


# --- histories


def test_symbol_that_starts_later_joins_when_it_has_a_window(backtest):
    """Its bars count from the first on; its forecasts begin with a whole window, and nothing is warned of."""
    result = backtest(AAA, BBB.slice(100))
    firsts = result.signals.group_by("symbol").agg(pl.col("close_time").min().to_physical())
    assert dict(firsts.iter_rows()) == {"AAA": HOURS[LENGTH - 1], "BBB": HOURS[100 + LENGTH - 1]}
    assert warning(result) == ""
    said = f"{LENGTH - 1} times, the last: {LENGTH - 1} of at least {LENGTH} bars"
    assert result.meta["withheld"]["BBB"] == said


def test_symbol_that_ends_keeps_its_last_close(backtest):
    """What is held at the end of a symbol's bars counts at its last close, is not sold, and is told."""
    end = 220
    result = backtest(AAA, BBB.slice(0, end))
    said = f"BBB ends at {written(HOURS[end - 1])}, {N - end} bars before the end: what a book holds of it"
    assert said in warning(result)
    assert "AAA ends" not in warning(result)
    fills = result.fills.filter(strategy="median-drift", symbol="BBB").sort("close_time")
    assert fills["close_time"].to_physical()[-1] == HOURS[end - 1]
    position = fills["position"][-1]
    assert position != 0
    last = result.equity.filter(strategy="median-drift").sort("close_time").row(-1, named=True)
    own = result.fills.filter(strategy="median-drift", symbol="AAA").sort("close_time")["position"][-1]
    worth = own * AAA["close"][-1] + position * BBB["close"][end - 1]
    assert last["equity"] == pytest.approx(last["cash"] + worth)


def test_symbol_that_ends_before_the_test_is_told(backtest):
    """It is neither forecast nor held, and not one of the symbols among which the benchmark is parted."""
    result = backtest(AAA, BBB.slice(0, 150), since=HOURS[200])
    assert warning(result) == f"BBB ends at {written(HOURS[149])}, before the test, and has no part in it."
    assert result.equity.equals(backtest(AAA, since=HOURS[200]).equity)


# --- files


def test_equal_bars_in_two_files_are_kept_once(backtest):
    """Files that overlap, and rows in any order, change nothing."""
    plain = backtest(AAA)
    for frames in ((AAA.slice(0, 200), AAA.slice(100)), (AAA.sample(fraction=1, shuffle=True, seed=1),)):
        result = backtest(*frames)
        assert_same(result, plain)
        assert result.meta["bars"] == plain.meta["bars"]


def test_bars_that_differ_between_or_inside_files_are_an_error(backtest):
    """Both files, the bar, the column, both values, and how many there are."""
    other = AAA.slice(100).with_columns(volume=pl.col("volume") + 1)
    said = refused(backtest, AAA.slice(0, 200), other)
    assert f"Two rows of AAA closing at {written(HOURS[100])} in " in said
    assert "bars0.parquet and " in said
    assert "bars1.parquet differ: column 'volume' is " in said
    assert "keep the right one. In all 100 bars are there twice." in said
    said = refused(backtest, pl.concat([AAA, other.slice(50, 1)]))
    assert f"closing at {written(HOURS[150])}" in said


@pytest.mark.parametrize("price", [0.0, -1.0, float("nan")])
def test_price_that_is_none_is_an_error(backtest, price):
    """File, row, symbol, time, column and value."""
    bad = AAA.with_columns(close=pl.when(pl.int_range(pl.len()) == 99).then(price).otherwise("close"))
    said = refused(backtest, bad)
    assert "bars0.parquet, row 100, AAA at " in said
    assert "column 'close' is" in said
    assert "correct or remove the row" in said


def test_bars_without_volume_fill_nothing_and_are_told(backtest):
    """With a volume share, an order waits for a bar with a volume."""
    bars = AAA.with_columns(volume=pl.when(pl.int_range(pl.len()) % 3 == 0).then(0.0).otherwise("volume"))
    share = Execution(volume_share=0.5)
    result = backtest(bars, execution=share, since=HOURS[150])
    assert "50 of 150 bars have volume 0, and with volume_share = 0.5 fill nothing" in warning(result)
    filled = set(result.fills["close_time"].to_physical())
    assert filled
    assert filled.isdisjoint(HOURS[::3])
    assert warning(backtest(bars)) == ""
    assert warning(backtest(AAA, execution=share)) == ""


# --- what was asked for


def test_unknown_symbol_names_those_there_are(backtest):
    """The symbol, the files, and what they hold."""
    said = refused(backtest, AAA, BBB, symbols=["AAA", "ZZZ"])
    assert "No bar of ZZZ was found in " in said
    assert "where there are AAA, BBB: correct the symbols or the files" in said


@pytest.mark.parametrize(
    ("given", "error", "said"),
    [
        (
            {"since": "2025-01-01"},
            DataError,
            f"closes at {written(HOURS[-1])}, and since is 2025-01-01",
        ),
        ({"until": "2020-01-01"}, DataError, "no bar before 2020-01-01T00:00:00Z; widen the time"),
        (
            {"since": "2024-01-05", "until": "2024-01-05"},
            ConfigError,
            "since is 2024-01-05T00:00:00Z, and until 2024-01-05T00:00:00Z: give a since before until",
        ),
    ],
)
def test_time_without_bars_is_an_error(backtest, given, error, said):
    """The sentence has the time that was asked for."""
    assert said in refused(backtest, AAA, error=error, **given)


def test_too_short_a_history_says_how_much_is_needed(backtest):
    """Bars found and bars needed."""
    said = refused(backtest, AAA.slice(0, 50))
    assert f"nothing was forecast (AAA: 50 of at least {LENGTH} bars): give more history" in said


# --- strategies


@pytest.mark.parametrize(
    ("then", "said"),
    [
        (
            "return dict.fromkeys(forecasts, float('nan'))",
            "its target of AAA is nan, not a number from -1 to 1",
        ),
        ("return dict.fromkeys(forecasts, float('-inf'))", "its target of AAA is -inf, not a number"),
        ("return dict.fromkeys(forecasts, 1.5)", "its target of AAA is 1.5, not a number from -1 to 1"),
        ("return {'ZZZ': 1.0}", "it gave a target of 'ZZZ', which was not forecast"),
        ("return None", "it gave a value of type NoneType, not a target for each symbol"),
        ("return [0.5]", "it gave a value of type list, not a target for each symbol"),
        ("return {'AAA': 1 / 0}", "ZeroDivisionError: division by zero"),
        ("return {'AAA': forecasts['GONE'].mean[0]}", "KeyError: 'GONE'"),
        ("raise SystemExit(3)", "SystemExit: 3"),
        (
            "forecasts['AAA'].mean[0] = 1",
            "ValueError: assignment destination is read-only",
        ),
    ],
)
def test_strategy_that_fails_ends_the_backtest(backtest, tmp_path, then, said):
    """The sentence names strategy and close; of what it raised there are the lines of its own file alone."""
    mine = tmp_path / "mine.py"
    mine.write_text(HOLD.format(first=HOURS[200], then=then))
    told = refused(backtest, AAA, strategies=[f"{mine}:Hold:name=held"], error=ConfigError)
    assert told.startswith(f"strategy held, close {written(HOURS[200])}: ")
    assert said in told
    if "Error: " in said or "SystemExit" in said:
        assert told.endswith(f"{said}, in {mine}, line 10; correct it there")


@pytest.mark.parametrize(
    ("names", "said"),
    [
        (["rank", "rank"], "strategy names rank, rank repeat; give each a name of its own"),
        ([f"rank:name={BENCHMARK}"], f"strategy name '{BENCHMARK}' is that of the book which others are"),
    ],
)
def test_name_of_another_book_is_an_error(backtest, names, said):
    """Each book has a name of its own, and the benchmark's is taken."""
    assert said in refused(backtest, AAA, strategies=names, error=ConfigError)


# --- retraining


def test_schedule_that_never_fires_is_told(backtest):
    """Without one training in the bars, the warning says when the next would have been."""
    result = backtest(AAA, retrain=Retrain(cron="0 3 1 7 *", steps=1))
    said = f"a training by the last bar, {written(HOURS[-1])}, and '0 3 1 7 *' next does at 2024-07-01T03"
    assert said in warning(result)
    assert result.trainings.is_empty()


def test_training_that_outlasts_the_bars_is_told(backtest):
    """A training time that is longer than what is left of the bars."""
    given = {"retrain": Retrain(cron="0 3 * * *", steps=1), "training_time": "300d"}
    result = backtest(AAA, since=HOURS[240], **given)
    assert "No training was over by the last bar" in warning(result)
    assert "shorten the training time, or give more bars" in warning(result)
    assert result.trainings.is_empty()


def test_training_on_too_few_bars_has_a_row_with_the_reason(backtest):
    """It is no end of the backtest, and each row says what was lacking."""
    result = backtest(AAA, since=HOURS[240], retrain=Retrain(cron="0 3 * * *", steps=1))
    assert result.trainings.height >= 2
    assert not result.trainings["accepted"].any()
    for reason in result.trainings["reason"]:
        assert "AAA has " in reason
        assert "bars to learn from: give at least" in reason
    assert warning(result) == ""


# --- what the command line shows


def test_command_line_shows_what_may_mislead(run, tmp_path):
    """The warning stands under the tables, and why no training took over; a single origin breaks nothing."""
    bars = bars_of("IBM", _sessions("XNYS", "2023-01-03", 271))
    without(bars, 200, 201).write_parquet(tmp_path / "bars.parquet")
    options = ["--stamp", "close", "--calendar", "XNYS", "--model", "hs", "--out", str(tmp_path / "out")]
    options += ["--retrain", "0 3 1 1 *", "--retrain-steps", "1"]
    status, out, err = run("backtest", str(tmp_path / "bars.parquet"), *options)
    assert status == 0, err
    assert "1 training, 0 took over: " in out
    assert "IBM lacks bars that the calendar XNYS has" in " ".join(err.split())


def test_command_line_shows_where_a_strategy_raised(run, tmp_path):
    """One sentence with the line of its own file, and nothing is left behind."""
    AAA.write_parquet(tmp_path / "bars.parquet")
    (tmp_path / "mine.py").write_text(HOLD.format(first=HOURS[200], then="return dict(gone)"))
    options = ["--stamp", "close", "--model", "hs", "--strategy", str(tmp_path / "mine.py")]
    options += ["--out", str(tmp_path / "out")]
    status, _, err = run("backtest", str(tmp_path / "bars.parquet"), *options)
    assert status == 78
    told = err[err.index("error: ") :]
    said = f"error: strategy Hold, close {written(HOURS[200])}: NameError: name 'gone' is not defined, in "
    assert told == f"{said}{tmp_path / 'mine.py'}, line 10; correct it there\n"
    assert not (tmp_path / "out").exists()
