import asyncio
import re
from dataclasses import replace
from html import escape
from itertools import groupby, pairwise
from operator import attrgetter
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from barcast.backtest import plot
from barcast.backtest.ledger import BENCHMARK, Execution, Ledger
from barcast.backtest.metrics import portfolio
from barcast.backtest.report import html, write_report
from barcast.backtest.result import BacktestResult
from barcast.backtest.sample import sample_bars
from barcast.backtest.scoring import DEFINITIONS, scores
from barcast.daemon.calendar import Calendars
from barcast.daemon.history import bars, scan
from barcast.daemon.ports import Group, Outcome
from barcast.daemon.timeframe import Timeframe
from barcast.models import Card, Forecast
from barcast.strategies import build

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
HORIZONS = (1, 5)
SPREAD = np.array([-1.64, -1.28, -0.67, 0.0, 0.67, 1.28, 1.64])
CARD = Card("even<model>", "numpy", "session", HORIZONS, LEVELS, 1, 1, "none", 0, 0, "here")
SINCE = 1_340_000_000 * 10**9


@pytest.fixture(scope="module")
def result() -> BacktestResult:
    """Half a year of the sample bars under a forecast of constant width."""
    calendar = Calendars("XNYS", Timeframe.parse("session"))
    history = list(bars(scan([sample_bars()], "close", calendar, symbols=["FB", "IBM"], since=SINCE)))
    ledger, strategy = Ledger(Execution()), build("median-drift", "drift", {"costs": 0})
    root = np.sqrt(HORIZONS)

    async def play() -> None:
        for close_time, group in groupby(history, attrgetter("close_time")):
            forecasts = {}
            for bar in group:
                ledger.accepted(bar)
                drift = 0.01 * np.log(bar.close / bar.open)
                quantiles = drift + 0.015 * root[:, None] * SPREAD
                std, rise = 0.015 * root, np.array([0.5, 0.5])
                forecasts[bar.symbol] = Forecast(
                    bar.symbol,
                    close_time,
                    bar.close,
                    HORIZONS,
                    LEVELS,
                    quantiles,
                    quantiles[:, 3],
                    std,
                    rise,
                    False,
                )
            targets = {"drift": strategy.on_forecasts(close_time, forecasts)}
            due = Group(close_time, close_time, tuple(forecasts))
            await ledger.emit(Outcome("root", "session", due, CARD, forecasts, {}, {}, {}, targets, {}))

    asyncio.run(play())
    signals, outcomes, fills, equity = ledger.signals(), ledger.outcomes(), ledger.fills(), ledger.equity()
    return BacktestResult(
        signals=signals,
        outcomes=outcomes,
        fills=fills,
        equity=equity,
        scores=scores(signals, outcomes),
        portfolio=portfolio(equity, fills, calendar.periods_per_year),
        meta={"periods_per_year": 252, "config": {"symbols": ["FB", "<b>"]}, "digest": "4a8f77"},
    )


def without_library(page: str) -> str:
    """The page less the script of plotly.js."""
    scripts = re.findall(r"<script[^>]*>.*?</script>", page, re.DOTALL)
    library = [script for script in scripts if len(script) > 1_000_000]
    assert len(library) == 1
    return page.replace(library[0], "")


def test_self_contained(result: BacktestResult, tmp_path: Path) -> None:
    """The page carries plotly.js once and fetches nothing."""
    write_report(result, tmp_path / "report.html", title="Two <stocks>")
    page = without_library((tmp_path / "report.html").read_text("utf-8"))
    assert "<title>Two &lt;stocks&gt;</title>" in page
    assert not re.search(r"(src|href)=\"(?!data:)|@import|url\(", page)
    assert "http" not in page.replace("http://www.w3.org", "")


def test_sections(result: BacktestResult) -> None:
    """The page holds every figure, the tables with each number's definition, and what was run."""
    page = without_library(html(result))
    for name in ("equity", "drawdown", "coverage", "pit", "fan0", "fan1"):
        assert page.count(f'id="{name}"') == 1
    for definition in DEFINITIONS.values():
        assert escape(definition) in page
    assert "periods in a year: 252" in page
    assert "4a8f77" in page
    assert "even&lt;model&gt;" in page
    assert "&lt;b&gt;" in page


def test_numbers(result: BacktestResult) -> None:
    """The tables show the result's numbers, and mark coverage that is off."""
    page = html(result)
    pooled = result.scores.row(
        by_predicate=(pl.col("symbol") == "all") & (pl.col("horizon") == 1), named=True
    )
    assert f"<td>{1e4 * pooled['crps']:.1f}</td>" in page
    assert f">{pooled['coverage_90']:.1%}</td>" in page
    off = result.scores.with_columns(coverage_90=pl.lit(0.871), coverage_80=pl.lit(0.819))
    marked = html(replace(result, scores=off))
    assert '<td class="off">87.1%</td>' in marked
    assert "<td>81.9%</td>" in marked


def test_same_result_same_page(result: BacktestResult) -> None:
    """The same result gives the same bytes."""
    assert html(result) == html(result)


def test_nothing_recorded() -> None:
    """A run without a forecast still gives a page that says so."""
    ledger = Ledger(Execution())
    signals, outcomes, fills, equity = ledger.signals(), ledger.outcomes(), ledger.fills(), ledger.equity()
    tables = scores(signals, outcomes), portfolio(equity, fills, 365)
    page = without_library(html(BacktestResult(signals, outcomes, fills, equity, *tables, {})))
    assert "No forecast was made." in page
    assert "What was run" in page


def test_fan_is_what_was_forecast(result: BacktestResult) -> None:
    """Each band starts at the close it was made at and ends at the quantiles' prices; fans do not overlap."""
    figure = plot.fan(result, "IBM", origins=3, bars=60)
    bands = [trace for trace in figure.data if trace.name == "q05 to q95"]
    assert 1 <= len(bands) <= 3
    band = bands[0]
    made = result.signals.filter((pl.col("symbol") == "IBM") & (pl.col("close_time") == band.x[0]))
    last = made.row(by_predicate=pl.col("horizon") == 5, named=True)
    assert band.y[0] == band.y[-1] == last["reference"]
    assert band.y[2] == pytest.approx(last["reference"] * np.exp(last["q05"]))
    assert band.y[3] == pytest.approx(last["reference"] * np.exp(last["q95"]))
    starts = sorted((trace.x[0], max(trace.x)) for trace in bands)
    assert all(end <= start for (_, end), (start, _) in pairwise(starts))
    closes = figure.data[-1]
    assert closes.name == "close"
    assert len(closes.y) == 60
    assert closes.y[-1] == pl.read_parquet(sample_bars()).filter(symbol="IBM")["close"][-1]


def test_equity_and_drawdown(result: BacktestResult) -> None:
    """Equity begins at 1 and drawdown never rises above 0; both end with the last close."""
    growth, below = plot.equity(result).data[1], plot.drawdown(result).data[1]
    assert [trace.name for trace in plot.equity(result).data] == [BENCHMARK, "drift"]
    assert growth.y[0] == 1.0
    assert growth.y[-1] == pytest.approx(1 + result.portfolio["total_return"][0])
    assert max(below.y) <= 0
    assert min(below.y) == pytest.approx(result.portfolio["max_drawdown"][0])
