"""Build `us_daily.parquet` from the public-domain stock prices in bokeh-sampledata.

Run `python -m barcast.backtest.sample.build`; it needs the `dev` extra. The prices come unadjusted, with
an adjusted close, and dated. Each bar's four prices are multiplied by adjusted close / close and its volume
divided by it, and it is stamped by the close of its session in New York.

Prices are rounded to six decimals, as the source gives its adjusted closes, and volumes to whole shares.
Rounding keeps order: a bar whose low, open, close and high were in order stays so, although the products of
floats before it may differ in the last bit. A bar that is still out of order, a date that is not a session,
a session without a bar or a second bar of one date stops the build. Nothing is dropped, filled or mended.
"""

import gzip
from dataclasses import dataclass
from pathlib import Path

import polars as pl

from barcast.backtest.sample import sample_bars
from barcast.daemon.calendar import Calendar
from barcast.daemon.timeframe import Timeframe
from barcast.models import DataError

PRICES = ("open", "high", "low", "close")
COLUMNS = ("symbol", "close_time", *PRICES, "volume")
SYMBOLS = {"AAPL", "FB", "GOOG", "IBM", "MSFT"}


@dataclass(frozen=True, slots=True)
class Adjusted:
    """The bars in canonical columns, and how many rows rounding had to bring back in order."""

    bars: pl.DataFrame
    reordered: int


def read_source() -> pl.DataFrame:
    """The prices as bokeh-sampledata ships them: ticker, date, unadjusted OHLCV and the adjusted close."""
    from bokeh_sampledata import package_path

    raw = pl.read_csv(gzip.decompress(package_path("stocks.csv.gz").read_bytes()))
    names = {name: name.lower().replace(" ", "_") for name in raw.columns}
    return raw.rename(names).with_columns(pl.col("date").str.to_date("%Y-%m-%d"))


def adjust(source: pl.DataFrame, closes: pl.DataFrame) -> Adjusted:
    """Adjust prices and volumes for splits and dividends and stamp each bar by its session's close.

    `closes` has the columns `date` and `close_time`. Raise `DataError` for a date that is no session, a
    missing session, two bars of a date, or prices out of order.
    """
    ratio = pl.col("adj_close") / pl.col("close")
    exact = source.join(closes, on="date", how="left").with_columns(
        pl.col("ticker").alias("symbol"),
        *(pl.col(name) * ratio for name in PRICES[:3]),
        pl.col("adj_close").alias("close"),
        pl.col("volume") / ratio,
    )
    _refuse(exact.filter(pl.col("close_time").is_null()), "is no session of the exchange")
    _refuse(exact.filter(pl.struct("symbol", "date").is_duplicated()), "has more than one bar")
    for (symbol,), own in exact.group_by("symbol"):
        between = closes.filter(pl.col("date").is_between(own["date"].min(), own["date"].max()))
        missing = between.join(own, on="date", how="anti").with_columns(symbol=pl.lit(symbol))
        _refuse(missing, "is a session without a bar")
    bars = exact.with_columns(*(pl.col(name).round(6) for name in PRICES), pl.col("volume").round(0))
    _refuse(bars.filter(_out_of_order()), "has prices out of order: low <= open, close <= high does not hold")
    bars = bars.select(COLUMNS).sort("symbol", "close_time")
    return Adjusted(bars, exact.filter(_out_of_order()).height)


def session_closes(source: pl.DataFrame) -> pl.DataFrame:
    """The sessions of the New York Stock Exchange over the source's dates: `date` and `close_time` (UTC)."""
    first, last = source.select(first=pl.col("date").min(), last=pl.col("date").max()).row(0)
    dates = pl.date_range(first, last, eager=True)
    midnights = dates.cast(pl.Datetime("ns")).to_physical().to_numpy()
    closes = Calendar("XNYS", Timeframe.parse("session")).closes_for_opens(midnights)
    every = pl.DataFrame({"date": dates, "close_time": closes}).filter(pl.col("close_time") >= 0)
    return every.with_columns(pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC"))


def build(path: Path) -> Adjusted:
    """Write the sample bars to `path` and return them."""
    source = read_source()
    if found := set(source["ticker"].unique()) ^ SYMBOLS:
        raise DataError(f"The stocks of bokeh-sampledata changed: {sorted(found)} came or went.")
    adjusted = adjust(source, session_closes(source))
    adjusted.bars.write_parquet(path, compression="zstd", compression_level=19)
    return adjusted


def _out_of_order() -> pl.Expr:
    lowest, highest = pl.min_horizontal("open", "close"), pl.max_horizontal("open", "close")
    return (pl.col("low") > lowest) | (pl.col("high") < highest) | (pl.col("low") <= 0)


def _refuse(rows: pl.DataFrame, fault: str) -> None:
    if rows.height:
        first = rows.row(0, named=True)
        raise DataError(f"{rows.height} row(s) of the source: {first['symbol']} {first['date']} {fault}.")


if __name__ == "__main__":
    result = build(sample_bars())
    print(result.bars.group_by("symbol", maintain_order=True).agg(pl.len(), pl.col("close_time").min()))
    print(f"{result.reordered} rows were in order only after rounding to six decimals; none was dropped.")
    print(f"{sample_bars()}: {result.bars.height} bars, {sample_bars().stat().st_size} bytes")
