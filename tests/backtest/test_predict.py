"""`barcast predict`: quantiles at given origins, each from the bars up to its own."""

import numpy as np
import polars as pl
import pytest

from barcast.backtest.sample import sample_bars, sample_checkpoint
from barcast.models import Window, open_model
from tests.garch import simulate

HORIZONS = (1, 4, 16)
COLUMNS = ["symbol", "ts", "horizon", "q05", "q10", "q25", "q50", "q75", "q90", "q95"]
SAMPLE = [str(sample_bars()), "--stamp", "close", "--calendar", "XNYS"]


def opened(window: Window, **more: str) -> pl.DataFrame:
    """A window as rows stamped by the open of hourly bars."""
    times = pl.from_epoch(pl.Series(window.close_times - 3600 * 10**9), "ns").dt.replace_time_zone("UTC")
    names = ("open", "high", "low", "close", "volume")
    values = dict(zip(names, window.values.T, strict=True))
    return pl.DataFrame({"ts": times, **values}).select(
        pl.lit(window.symbol).alias("symbol"), *(pl.lit(v).alias(k) for k, v in more.items()), pl.all()
    )


@pytest.fixture
def bars(tmp_path):
    """Bars of two symbols, as frame and file; the file says the timeframe."""
    frame = pl.concat([opened(simulate(s, 700, seed=3).window, timeframe="1h") for s in ("AAA", "BBB")])
    frame.write_parquet(tmp_path / "bars.parquet")
    return frame, str(tmp_path / "bars.parquet")


def predicted(run, tmp_path, data, origins, model="hs", *more):
    origins.write_parquet(tmp_path / "o.parquet")
    arguments = ["--stamp", "open", "--model", model, "--origins", str(tmp_path / "o.parquet")]
    status, out, err = run("predict", data, *arguments, "--out", str(tmp_path / "p.parquet"), *more)
    found = pl.read_parquet(tmp_path / "p.parquet") if status == 0 else None
    return found, " ".join((out + err).split()), status


@pytest.mark.parametrize("unit", ["us", "ns"])
def test_every_origin_gets_every_horizon(run, bars, tmp_path, unit):
    """Rows keep the order of the origins and the type of their times; quantiles rise, each origin once."""
    frame, data = bars
    origins = frame.select("symbol", pl.col("ts").dt.cast_time_unit(unit)).filter(
        pl.int_range(pl.len()).over("symbol") >= 600
    )
    origins = pl.concat([origins.sample(fraction=1, shuffle=True, seed=1), origins.head(1)])
    found, said, _ = predicted(run, tmp_path, data, origins)
    assert found.columns == COLUMNS
    assert found.schema["ts"] == pl.Datetime(unit, "UTC")
    assert found.schema["horizon"] == pl.Int32
    once = origins.unique(maintain_order=True)
    assert found.select("symbol", "ts").gather_every(3).equals(once)
    assert found["horizon"].to_list() == list(HORIZONS) * once.height
    assert (np.diff(found.select(COLUMNS[3:]).to_numpy()) >= 0).all()
    assert "timeframe 1h: column 'timeframe'" in said


def test_quantiles_are_those_of_the_window_that_ends_there(run, bars, tmp_path):
    """The forecast at an origin is the one from the window cut at its bar; nothing after it matters."""
    frame, data = bars
    origins = frame.filter(symbol="BBB").slice(640, 20).select("symbol", "ts")
    found, _, _ = predicted(run, tmp_path, data, origins, "fhs")
    window = simulate("BBB", 700, seed=3).window
    forecaster = open_model("fhs", "1h", None, None)
    for k in (0, 7, 19):
        cut = Window("BBB", window.close_times[: 641 + k], window.values[: 641 + k])
        expected = forecaster.forecast([cut])[0].quantiles
        np.testing.assert_array_equal(found.slice(3 * k, 3).select(COLUMNS[3:]).to_numpy(), expected)
    later = pl.col("ts") > origins["ts"].max()
    poisoned = frame.with_columns(
        pl.when(later).then(3 * pl.col(c)).otherwise(c).alias(c) for c in ("open", "high", "low", "close")
    )
    poisoned.write_parquet(tmp_path / "poisoned.parquet")
    again, _, _ = predicted(run, tmp_path, str(tmp_path / "poisoned.parquet"), origins, "fhs")
    assert again.equals(found)


def test_declared_split_after_an_origin_is_not_seen(run, bars, tmp_path):
    """A split between two origins changes nothing before it, and is no return after it."""
    frame, data = bars
    rows = frame.filter(symbol="AAA")
    moment = rows["ts"][650]
    prices = ["open", "high", "low", "close"]
    before = pl.col("ts") < moment
    rows.with_columns(
        pl.when(before).then(2 * pl.col(c)).otherwise(c).alias(c) for c in prices
    ).write_parquet(tmp_path / "traded.parquet")
    (tmp_path / "splits.csv").write_text(
        f"symbol,time,factor,kind\nAAA,{moment:%Y-%m-%dT%H:%M:%SZ},0.5,split\n"
    )
    origins = rows.slice(630, 40).select("symbol", "ts")
    plain, _, _ = predicted(run, tmp_path, data, origins, "fhs")
    splits = ["--adjustments", str(tmp_path / "splits.csv")]
    declared, _, _ = predicted(run, tmp_path, str(tmp_path / "traded.parquet"), origins, "fhs", *splits)
    np.testing.assert_allclose(declared.select(COLUMNS[3:]), plain.select(COLUMNS[3:]), rtol=0, atol=1e-12)


def test_a_trained_model_predicts_sessions(run, tmp_path):
    """A checkpoint, bars stamped by the close and days of an exchange: the timeframe is found as session."""
    rows = pl.read_parquet(sample_bars()).filter(symbol="IBM").sort("close_time")
    origins = rows.tail(3).select("symbol", ts="close_time")
    origins.write_parquet(tmp_path / "o.parquet")
    out = tmp_path / "new" / "p.parquet"
    arguments = [
        "--model",
        str(sample_checkpoint()),
        "--origins",
        str(tmp_path / "o.parquet"),
        "--out",
        str(out),
    ]
    status, _, err = run("predict", *SAMPLE, *arguments)
    assert status == 0, err
    assert "timeframe session: the most frequent distance between bars" in err
    found = pl.read_parquet(out)
    assert (found.columns, found["horizon"].to_list()) == (COLUMNS, [1, 5, 20] * 3)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (
            lambda o: o.with_columns(symbol=pl.lit("CCC")),
            "2 of 2 origins in {o} cannot be forecast, the first CCC",
        ),
        (
            lambda o: o.with_columns(symbol=pl.lit("CCC")),
            "the files have no bar of CCC; give the bars, or leave",
        ),
        (lambda o: o.with_columns(pl.col("ts").dt.offset_by("-10y")), "the files have no bar of that time"),
        (
            lambda o: o.with_columns(pl.col("ts").dt.offset_by("7m")),
            "by the calendar no bar has that time; correct the time, or take the calendar",
        ),
        (
            lambda o: o.with_columns(pl.col("ts").dt.strftime("%Y-%m-%dT%H:%M:%S")),
            "2 of 2 origins in {o} cannot be forecast, the first AAA at 2024-01-30T02:00:00: it says no time "
            "zone; write it, such as 2026-01-31T16:00:00Z",
        ),
        (
            lambda o: o.with_columns(ts=pl.lit("soon")),
            "1 of 1 origins in {o} cannot be forecast, the first AAA at soon: that is no time; write a date",
        ),
        (lambda o: o.clear(), "{o} holds no origin"),
        (lambda o: o.rename({"ts": "time"}), "{o} has no column 'ts', only symbol, time"),
        (lambda o: o.with_columns(pl.col("ts").dt.replace_time_zone(None)), "times without a time zone"),
        (lambda o: o.with_columns(pl.col("ts").dt.epoch("ms")), "looks like ms since 1970"),
        (lambda o: o.with_columns(ts=pl.lit(None, pl.Datetime("ns", "UTC"))), "at None: that is no time"),
        (lambda o: o.with_columns(symbol=pl.lit(1.5)), "holds Float64, not texts"),
    ],
)
def test_origins_that_cannot_be_forecast_are_named(run, bars, tmp_path, change, said):
    """One sentence says how many, the first one, why and what to do; exit status 78, and no file."""
    frame, data = bars
    origins = change(frame.filter(symbol="AAA").tail(2).select("symbol", "ts"))
    _, text, status = predicted(run, tmp_path, data, origins)
    assert status == 78
    assert said.format(o=tmp_path / "o.parquet") in text
    assert not (tmp_path / "p.parquet").exists()


def test_a_fault_of_the_disk_amid_the_work_is_not_blamed_on_the_output(run, bars, tmp_path, monkeypatch):
    """Only what forbids writing the file is said of --out."""

    def broken(*_):
        raise OSError("a disk went away")

    frame, data = bars
    monkeypatch.setattr("barcast.backtest.predict.predict", broken)
    with pytest.raises(OSError, match=r"^a disk went away$"):
        predicted(run, tmp_path, data, frame.tail(1).select("symbol", "ts"))


def test_too_short_a_history_is_named(run, bars, tmp_path):
    """Origins before the model has its bars are counted; those after them do not hide them."""
    frame, data = bars
    origins = frame.filter(symbol="AAA").slice(110, 20).select("symbol", "ts")
    _, text, status = predicted(run, tmp_path, data, origins)
    assert status == 78
    assert "6 of 20 origins" in text
    assert "it has 111 bars up to then and hs-" in text
    assert "needs 117" in text


def test_bad_bars_and_models_end_in_a_sentence(run, bars, tmp_path):
    """A row without a price, and a model that there is not."""
    frame, data = bars
    origins = frame.tail(1).select("symbol", "ts")
    bad = frame.with_columns(
        pl.when(pl.int_range(pl.len()) == 5).then(np.nan).otherwise("close").alias("close")
    )
    bad.write_parquet(tmp_path / "bad.parquet")
    _, text, status = predicted(run, tmp_path, str(tmp_path / "bad.parquet"), origins)
    assert (status, "row 6, AAA at" in text, "column 'close' is 'NaN'" in text) == (78, True, True)
    _, text, status = predicted(run, tmp_path, data, origins, "nowhere")
    assert (status, "model 'nowhere': there is no such folder" in text) == (78, True)
