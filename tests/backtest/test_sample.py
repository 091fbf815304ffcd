import datetime as dt
import importlib.util
from pathlib import Path

import polars as pl
import pytest
from polars.testing import assert_frame_equal

from barcast.backtest.sample import sample_bars
from barcast.backtest.sample.build import adjust, build
from barcast.models import DataError

DAYS = [dt.date(2012, 11, 21), dt.date(2012, 11, 23)]
CLOSES = pl.DataFrame(
    {
        "date": DAYS,
        "close_time": [
            dt.datetime(2012, 11, 21, 21, tzinfo=dt.UTC),
            dt.datetime(2012, 11, 23, 18, tzinfo=dt.UTC),
        ],
    }
)


def source(**changes: object) -> pl.DataFrame:
    columns: dict[str, object] = {
        "ticker": ["AAPL", "AAPL"],
        "date": DAYS,
        "open": [10.0, 11.0],
        "high": [12.0, 12.0],
        "low": [9.0, 10.0],
        "close": [11.0, 12.0],
        "volume": [100, 300],
        "adj_close": [5.5, 6.0],
    }
    return pl.DataFrame(columns | changes)


@pytest.mark.skipif(
    importlib.util.find_spec("bokeh_sampledata") is None,
    reason="bokeh-sampledata is not installed: dev extra",
)
def test_rebuild(tmp_path: Path) -> None:
    """A rebuild from bokeh-sampledata gives the committed bars."""
    adjusted = build(tmp_path / "bars.parquet")
    committed = pl.read_parquet(sample_bars())
    assert_frame_equal(adjusted.bars, committed, check_exact=True)
    assert_frame_equal(pl.read_parquet(tmp_path / "bars.parquet"), committed, check_exact=True)
    assert adjusted.reordered == 13


def test_committed_bars_are_whole() -> None:
    """The committed file is small, its prices are in order and its stamps are the real session closes."""
    bars = pl.read_parquet(sample_bars())
    assert sample_bars().stat().st_size <= 600_000
    assert bars.schema["close_time"] == pl.Datetime("ns", "UTC")
    assert bars.null_count().sum_horizontal().item() == 0
    assert (bars["low"] > 0).all()
    assert (bars["low"] <= bars.select(pl.min_horizontal("open", "close")).to_series()).all()
    assert (bars["high"] >= bars.select(pl.max_horizontal("open", "close")).to_series()).all()
    local = bars["close_time"].dt.convert_time_zone("America/New_York")
    assert set(local.dt.hour().unique()) == {13, 16}
    half_day = local.filter(local.dt.date() == dt.date(2012, 11, 23))
    assert half_day.dt.hour().to_list() == [13] * 5


def test_adjustment() -> None:
    """Prices are scaled by adjusted close / close, volumes by its inverse."""
    bars = adjust(source(), CLOSES).bars
    assert bars.select("open", "high", "low", "close", "volume").rows() == [
        (5.0, 6.0, 4.5, 5.5, 200.0),
        (5.5, 6.0, 5.0, 6.0, 600.0),
    ]


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"date": [DAYS[0], dt.date(2012, 11, 22)]}, "AAPL 2012-11-22 is no session"),
        ({"date": [DAYS[0], DAYS[0]]}, "AAPL 2012-11-21 has more than one bar"),
        ({"low": [9.0, 11.5]}, "AAPL 2012-11-23 has prices out of order"),
    ],
)
def test_refusals(changes: dict[str, object], fault: str) -> None:
    """A date that is no session, a second bar of a date and prices out of order stop the build."""
    with pytest.raises(DataError, match=fault):
        adjust(source(**changes), CLOSES)


def test_missing_session() -> None:
    """A session without a bar between a symbol's first and last stops the build."""
    monday = pl.DataFrame(
        {"date": [dt.date(2012, 11, 26)], "close_time": [dt.datetime(2012, 11, 26, 21, tzinfo=dt.UTC)]}
    )
    with pytest.raises(DataError, match="AAPL 2012-11-23 is a session without a bar"):
        adjust(source(date=[DAYS[0], dt.date(2012, 11, 26)]), pl.concat([CLOSES, monday]))
