from datetime import UTC, datetime, timedelta
from math import sqrt

import numpy as np
import polars as pl
import pytest

from barcast.backtest.ledger import EQUITY, FILLS, Execution, Ledger
from barcast.backtest.result import level_column, levels_of
from barcast.backtest.scoring import DEFINITIONS, pit, portfolio, scores

LEVELS = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95)
START = datetime(2026, 1, 1, tzinfo=UTC)


def times(count: int) -> pl.Series:
    return pl.Series([START + timedelta(days=k) for k in range(count)], dtype=pl.Datetime("ns", "UTC"))


def forecasts(
    quantiles: np.ndarray,
    y: np.ndarray,
    symbol: str = "A",
    horizon: int = 1,
    levels: tuple[float, ...] = LEVELS,
) -> tuple[pl.DataFrame, pl.DataFrame]:
    keys = pl.DataFrame({"symbol": symbol, "close_time": times(len(y)), "horizon": horizon})
    named = [pl.Series(level_column(level), quantiles[:, k]) for k, level in enumerate(levels)]
    return keys.with_columns(*named), keys.with_columns(outcome=pl.Series(y))


def equity(values: list[float], strategy: str = "s") -> pl.DataFrame:
    rows = [
        (strategy, time, 0.0, value, 0.0, 0.0, 0.0)
        for time, value in zip(times(len(values)), values, strict=True)
    ]
    return pl.DataFrame(rows, schema=EQUITY, orient="row")


def test_level_columns() -> None:
    """Levels become columns that sort, and are found again among others."""
    names = [level_column(level) for level in (0.005, 0.01, 0.025, 0.07, 0.5, 0.975, 0.99)]
    assert names == ["q00.5", "q01", "q02.5", "q07", "q50", "q97.5", "q99"]
    assert list(levels_of([*names, "quality", "q"])) == [0.005, 0.01, 0.025, 0.07, 0.5, 0.975, 0.99]


def test_by_hand() -> None:
    """One forecast with two levels: pinball loss and CRPS as worked out on paper."""
    signals, outcomes = forecasts(np.array([[-1.0, 1.0]]), np.array([2.0]), levels=(0.25, 0.75))
    row = scores(signals, outcomes).row(0, named=True)
    assert row["pinball"] == pytest.approx((0.25 * 3 + 0.75 * 1) / 2)
    assert row["crps"] == pytest.approx(1.5)
    assert (row["n"], row["coverage_50"], row["coverage_80"]) == (1, 0.0, None)


def test_gaussian() -> None:
    """True Gaussian quantiles score the closed-form CRPS, cover what they claim and give a flat PIT."""
    stats = pytest.importorskip("scipy.stats")
    y = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    levels = tuple(np.round(np.arange(0.005, 1, 0.005), 4).tolist())
    quantiles = np.tile(stats.norm.ppf(levels), (len(y), 1))
    row = scores(*forecasts(quantiles, y, levels=levels)).row(0, named=True)
    assert row["crps"] == pytest.approx(1 / sqrt(np.pi), rel=0.01)
    assert [row[f"coverage_{p}"] for p in (50, 80, 90)] == pytest.approx([0.5, 0.8, 0.9], abs=1e-3)
    bins = pit(*forecasts(quantiles, y, levels=levels))
    assert bins["density"].to_list() == pytest.approx([1.0] * 200, abs=0.02)
    assert bins["share"].sum() == pytest.approx(1)


def test_pit_bins() -> None:
    """Each outcome falls in the bin between the levels whose quantiles enclose it, ends included."""
    quantiles = np.array([[-1.0, 0.0, 1.0]] * 4)
    bins = pit(*forecasts(quantiles, np.array([-2.0, -1.0, 0.5, 3.0]), levels=(0.1, 0.5, 0.9)))
    assert bins.columns == ["horizon", "lower", "upper", "n", "share", "density"]
    assert bins["n"].to_list() == [2, 0, 1, 1]
    assert bins["lower"].to_list() == [0.0, 0.1, 0.5, 0.9]
    assert bins["density"].to_list() == pytest.approx([5.0, 0.0, 0.625, 2.5])


def test_rows_for_each_symbol_and_horizon() -> None:
    """Every symbol and horizon has its row, `all` pools the symbols, and open horizons do not count."""
    quantiles = np.tile(np.linspace(-1, 1, 7), (3, 1))
    parts = [
        forecasts(quantiles, np.array([0.0, 0.1, 9.0]), "A", 1),
        forecasts(quantiles, np.array([0.0, 0.1, 0.2]), "A", 5),
        forecasts(quantiles, np.array([9.0, 9.0, 9.0]), "B", 1),
    ]
    signals = pl.concat([part[0] for part in parts])
    outcomes = pl.concat([part[1] for part in parts]).filter(pl.col("close_time") < times(3)[2])
    table = scores(signals, outcomes)
    keys = table.select("symbol", "horizon", "n", "coverage_90").rows()
    assert keys == [
        ("A", 1, 2, 1.0),
        ("A", 5, 2, 1.0),
        ("B", 1, 2, 0.0),
        ("all", 1, 4, 0.5),
        ("all", 5, 2, 1.0),
    ]


def test_portfolio() -> None:
    """Return, volatility, Sharpe ratio and drawdown follow their definitions, with P given."""
    values = [100.0, 110.0, 99.0, 104.0, 120.0]
    returns = np.diff(values) / values[:-1]
    trade = ("s", "A", START, START, 10.0, 1.0, 0.5, 0.0, 0.25, 1.0, 1.0)
    fills = pl.DataFrame([trade, trade, ("t", *trade[1:])], schema=FILLS, orient="row")
    row = portfolio(equity(values), fills, 252).row(0, named=True)
    assert row["periods"] == 4
    assert row["total_return"] == pytest.approx(0.2)
    assert row["max_drawdown"] == pytest.approx(99 / 110 - 1)
    assert row["volatility"] == pytest.approx(returns.std(ddof=1) * sqrt(252))
    assert row["sharpe"] == pytest.approx(returns.mean() / returns.std(ddof=1) * sqrt(252))
    assert (row["fills"], row["costs"]) == (2, pytest.approx(0.015))


def test_portfolio_without_variation() -> None:
    """A flat book has no Sharpe ratio; a book of one close has neither volatility nor returns."""
    both = pl.concat([equity([1.0, 1.0, 1.0], "flat"), equity([1.0], "short")])
    table = portfolio(both, pl.DataFrame(schema=FILLS), 365)
    assert table.select("strategy", "periods", "volatility", "sharpe", "max_drawdown").rows() == [
        ("flat", 2, 0.0, None, 0.0),
        ("short", 0, None, None, 0.0),
    ]


def test_ruined_book() -> None:
    """The returns of a book that lost everything end there, and its figures stay finite."""
    row = portfolio(equity([1.0, 0.5, 0.0, 0.0]), pl.DataFrame(schema=FILLS), 365).row(0, named=True)
    assert (row["periods"], row["total_return"], row["max_drawdown"]) == (2, -1.0, -1.0)
    assert row["sharpe"] == pytest.approx(-0.75 / np.std([-0.5, -1.0], ddof=1) * sqrt(365))


def test_nothing_recorded() -> None:
    """A run without forecasts gives empty tables."""
    ledger = Ledger(Execution())
    table = scores(ledger.signals(), ledger.outcomes())
    assert table.height == pit(ledger.signals(), ledger.outcomes()).height == 0
    books = portfolio(ledger.equity(), ledger.fills(), 365)
    assert books.height == 0
    assert {*table.columns[2:], *books.columns[1:]} == set(DEFINITIONS)
