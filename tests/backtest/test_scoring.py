from datetime import UTC, datetime, timedelta
from math import sqrt
from statistics import NormalDist

import numpy as np
import polars as pl
import pytest
import scoringrules as rules
from scipy import stats

from barcast.backtest.ledger import Execution, Ledger
from barcast.backtest.result import level_column, levels_of
from barcast.backtest.scoring import DEFINITIONS, interval_score, pit, scores
from barcast.models.scores import newey_west

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
    y = stats.norm.ppf((np.arange(20_000) + 0.5) / 20_000)
    levels = tuple(np.round(np.arange(0.005, 1, 0.005), 4).tolist())
    quantiles = np.tile(stats.norm.ppf(levels), (len(y), 1))
    row = scores(*forecasts(quantiles, y, levels=levels)).row(0, named=True)
    assert row["crps"] == pytest.approx(1 / sqrt(np.pi), rel=0.01)
    assert [row[f"coverage_{p}"] for p in (50, 80, 90)] == pytest.approx([0.5, 0.8, 0.9], abs=1e-3)
    bins = pit(*forecasts(quantiles, y, levels=levels))
    assert bins["density"].to_list() == pytest.approx([1.0] * 200, abs=0.02)
    assert bins["share"].sum() == pytest.approx(1)


def test_as_scoringrules_has_it() -> None:
    """Pinball loss, CRPS and interval scores are those of scoringrules, outcomes on a quantile included.

    Its `crps_quantile` is ours: twice the mean pinball loss over the levels given, whatever their spacing.
    """
    rng = np.random.default_rng(5)
    quantiles = np.sort(rng.standard_t(3, (500, 7)), 1)
    y = np.where(np.arange(500) % 10 == 0, quantiles[:, 5], rng.standard_normal(500))
    row = scores(*forecasts(quantiles, y)).row(0, named=True)
    loss = rules.quantile_score(y[:, None], quantiles, np.array(LEVELS))
    assert row["pinball"] == pytest.approx(loss.mean(), rel=1e-9)
    assert row["crps"] == pytest.approx(rules.crps_quantile(y, quantiles, np.array(LEVELS)).mean(), rel=1e-9)
    for percent, lower, upper in ((80, 1, 5), (90, 0, 6)):
        sides = quantiles[:, lower], quantiles[:, upper]
        its = rules.interval_score(y, *sides, 1 - percent / 100)
        np.testing.assert_allclose(interval_score(y, *sides, percent / 100), its, rtol=1e-9)
        assert row[f"interval_{percent}"] == pytest.approx(its.mean(), rel=1e-9)


def test_coverage_is_as_sure_as_its_origin_times_are_many() -> None:
    """Errors are those of Newey and West over times: symbols that move as one count once."""
    rng = np.random.default_rng(6)
    quantiles = np.tile(NormalDist().inv_cdf(0.9) * np.array([[-1.0, 1.0]]), (400, 1))
    y = np.repeat(rng.standard_normal(100), 4)  # outcomes come in fours
    parts = [forecasts(quantiles, y, symbol, 4, levels=(0.1, 0.9)) for symbol in ("A", "B")]
    table = scores(pl.concat([p[0] for p in parts]), pl.concat([p[1] for p in parts]))
    inside = (np.abs(y) <= quantiles[0, 1]).astype(float)
    expected = newey_west(inside, 2 * 4)
    assert table["symbol"].to_list() == ["A", "B", "all"]
    assert table["coverage_80"].to_list() == pytest.approx([inside.mean()] * 3)
    assert table["coverage_80_error"].to_list() == pytest.approx([expected] * 3)
    assert expected > 1.5 * sqrt(0.8 * 0.2 / 400)
    assert table["coverage_90_error"].to_list() == table["interval_90"].to_list() == [None] * 3
    single = scores(*forecasts(quantiles[:1], y[:1], levels=(0.1, 0.9))).row(0, named=True)
    assert (single["coverage_80"], single["coverage_80_error"]) == (1.0, None)


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


def test_nothing_recorded() -> None:
    """A run without forecasts gives empty tables."""
    ledger = Ledger(Execution(commission_bp=0, slippage_bp=0))
    table = scores(ledger.signals(), ledger.outcomes())
    assert table.height == pit(ledger.signals(), ledger.outcomes()).height == 0
    assert table.columns == ["symbol", "horizon", *DEFINITIONS]
