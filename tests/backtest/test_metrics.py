"""What books were worth, held against empyrical-reloaded, the papers and numbers worked out by hand."""

import warnings
from datetime import UTC, datetime, timedelta
from math import isfinite, isnan, sqrt
from statistics import NormalDist

import empyrical
import numpy as np
import polars as pl
import pytest
from scipy import stats

from barcast.backtest.metrics import (
    DEFINITIONS,
    deflated_sharpe,
    expected_best,
    portfolio,
    probabilistic_sharpe,
)
from barcast.models import ConfigError

START = datetime(2026, 1, 1, tzinfo=UTC)
TIME = pl.Datetime("ns", "UTC")
BENCHMARK = "buy-and-hold"
COSTS = ("commission", "spread", "slippage")
NORMAL = NormalDist()


def times(count: int, first: int = 0) -> pl.Series:
    return pl.Series([START + timedelta(days=first + k) for k in range(count)], dtype=TIME)


def equity(
    values, strategy: str = "s", first: int = 0, gross: float = 0.5, carry: float = 0.0
) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "strategy": strategy,
            "close_time": times(len(values), first),
            "equity": pl.Series(values, dtype=pl.Float64),
        }
    ).with_columns(gross=pl.lit(gross), net=pl.lit(0.0), carry=pl.lit(carry))


def fills(*trades, strategy: str = "s", cost: float = 0.0) -> pl.DataFrame:
    """Trades (symbol, price, units), or with the basis of the price; positions follow."""
    rows, held = [], {}
    for k, (symbol, price, units, *basis) in enumerate(trades):
        b = basis[0] if basis else 1.0
        held[symbol] = held.get(symbol, 0.0) + units * b
        rows.append(
            (strategy, symbol, START + timedelta(days=k), price, units, cost, cost, cost, held[symbol] / b, b)
        )
    floats = dict.fromkeys(("price", "units", *COSTS, "position", "basis"), pl.Float64)
    schema = {"strategy": pl.String, "symbol": pl.String, "close_time": TIME, **floats}
    return pl.DataFrame(rows, schema=schema, orient="row")


def row(frame: pl.DataFrame, trades: pl.DataFrame | None = None, P: int = 252, trials: int = 1) -> dict:
    table = portfolio(frame, fills() if trades is None else trades, P, trials)
    assert table.columns == ["strategy", *DEFINITIONS]
    return table.row(by_predicate=pl.col("strategy") == "s", named=True)


def series(kind: str, seed: int) -> np.ndarray:
    """Equity of 400 closes: returns that are random, skewed, rising throughout, or end in ruin."""
    rng = np.random.default_rng(seed)
    returns = {
        "random": 0.01 * rng.standard_normal(399),
        "fat": 0.002 + 0.01 * rng.standard_t(3, 399),
        "skewed": 0.02 - 0.02 * rng.exponential(1, 399),
        "trending": 0.001 + 0.0005 * rng.random(399),
        "falling": -0.001 - 0.0005 * rng.random(399),
    }["random" if kind == "wiped" else kind]
    value = 100 * np.cumprod(np.concatenate([[1.0], 1 + np.maximum(returns, -0.5)]))
    if kind == "wiped":
        value[300:] = 0.0
    return value


@pytest.mark.parametrize("P", [252, 365, 8760])
@pytest.mark.parametrize("kind", ["random", "fat", "skewed", "trending", "falling", "wiped"])
def test_as_empyrical_has_it(kind: str, P: int) -> None:
    """Numbers that empyrical-reloaded has too are its numbers, and null where it has none."""
    for seed in (0, 1):
        value, other = series(kind, seed), series("random", seed + 10)
        if kind == "wiped":
            value, ended = value, 301
        else:
            ended = len(value)
        found = row(pl.concat([equity(value), equity(other, BENCHMARK)]), P=P, trials=5)
        r, b = (np.diff(v[:ended]) / v[: ended - 1] for v in (value, other))
        with np.errstate(all="ignore"):
            expected = {
                "total_return": empyrical.cum_returns_final(r),
                "cagr": empyrical.cagr(r, annualization=P),
                "volatility": empyrical.annual_volatility(r, annualization=P),
                "sharpe": empyrical.sharpe_ratio(r, annualization=P),
                "sortino": empyrical.sortino_ratio(r, annualization=P),
                "calmar": empyrical.calmar_ratio(r, annualization=P),
                "max_drawdown": empyrical.max_drawdown(r),
                "skew": stats.skew(r),
                "kurtosis": stats.kurtosis(r),
                "var_95": empyrical.value_at_risk(r),
                "cvar_95": empyrical.conditional_value_at_risk(r),
                "omega": empyrical.omega_ratio(r),
                "tail_ratio": empyrical.tail_ratio(r),
                "alpha": empyrical.alpha_aligned(r, b, annualization=P),
                "beta": empyrical.beta_aligned(r, b),
                "information_ratio": empyrical.excess_sharpe(r, b) * sqrt(P),
            }
        assert found["periods"] == ended - 1
        for name, its in expected.items():
            if isfinite(its):
                assert found[name] == pytest.approx(float(its), rel=1e-9, abs=1e-12), name
            else:
                assert found[name] is None, name


def test_books_that_stand_still_have_no_ratios() -> None:
    """Where empyrical divides by nothing there is null; a book that grows evenly has no Sharpe ratio."""
    flat = row(equity([1.0] * 10))
    assert (flat["periods"], flat["total_return"], flat["volatility"], flat["max_drawdown"]) == (
        9,
        0.0,
        0.0,
        0.0,
    )
    even = row(equity(1.01 ** np.arange(200)))
    assert even["cagr"] == pytest.approx(1.01**252 - 1)
    assert even["drawdown_periods"] == 0
    jitter = row(equity(1.0 + 2e-16 * (np.arange(200) % 3)))
    assert (jitter["drawdown_periods"], jitter["trades"]) == (0, 0)
    for book in (flat, even, jitter):
        for name in (
            "sharpe",
            "skew",
            "kurtosis",
            "sortino",
            "calmar",
            "omega",
            "psr",
            "dsr",
            "alpha",
            "beta",
        ):
            assert book[name] is None, name


@pytest.mark.parametrize("values", [[1.0], [1.0, 1.1]])
def test_too_short(values: list[float]) -> None:
    """A book of one or two closes has a return and a drawdown at most."""
    found = row(equity(values))
    assert found["periods"] == len(values) - 1
    assert found["total_return"] == pytest.approx(values[-1] - 1)
    assert all(found[name] is None for name in ("cagr", "volatility", "sharpe", "var_95", "psr", "dsr"))


@pytest.mark.parametrize("end", [0.0, -0.2])
def test_ruined_book(end: float) -> None:
    """Returns end with the first equity that is not positive, whatever the book holds afterwards."""
    book = pl.concat([equity([1.0, 0.5, end, 0.3, 0.9]), equity([1.0, 1.1, 1.0, 1.2, 1.3], BENCHMARK)])
    found = row(book)
    r = np.array([-0.5, end / 0.5 - 1])
    assert (found["periods"], found["total_return"], found["max_drawdown"]) == (2, end - 1, end - 1)
    assert found["sharpe"] == pytest.approx(r.mean() / r.std(ddof=1) * sqrt(252))
    assert found["cagr"] == (-1.0 if end == 0 else None)
    assert found["drawdown_periods"] == 2
    assert found["beta"] is not None


def test_time_under_water() -> None:
    """The longest time below an equity reached before counts, also one that is not over."""
    assert row(equity([3, 2, 4, 3, 3.5, 4, 5]))["drawdown_periods"] == 2
    assert row(equity([3, 2, 4, 3, 3.5, 4, 5, 4, 3, 4]))["drawdown_periods"] == 3


def test_beside_the_benchmark_at_common_closes() -> None:
    """A book that began later is compared over the closes of both; the benchmark has nothing beside it."""
    theirs, mine = series("random", 1)[:50], series("random", 2)[:40]
    found = row(pl.concat([equity(theirs, BENCHMARK), equity(mine, first=10)]), P=365)
    r, b = np.diff(mine) / mine[:-1], np.diff(theirs[10:]) / theirs[10:-1]
    beta = np.cov(r, b)[0, 1] / np.var(b, ddof=1)
    assert found["beta"] == pytest.approx(beta)
    assert found["alpha"] == pytest.approx((1 + (r - beta * b).mean()) ** 365 - 1)
    table = portfolio(pl.concat([equity(theirs, BENCHMARK), equity(mine)]), fills(), 365, 4)
    own = table.row(by_predicate=pl.col("strategy") == BENCHMARK, named=True)
    assert own["psr"] is not None
    assert all(own[name] is None for name in ("alpha", "beta", "information_ratio", "dsr"))
    assert all(row(equity(mine))[name] is None for name in ("alpha", "beta", "information_ratio"))


def test_round_trips() -> None:
    """A trip ends flat or on the other side, costs are its own, and what is still held is none yet."""
    trades = fills(
        ("A", 10.0, 4.0),
        ("A", 12.0, 4.0),  # 8 held at 11 on average
        ("B", 5.0, 10.0),
        ("A", 13.0, -4.0),
        ("A", 10.0, -4.0),  # 8 (11.5 - 11) = 4, less 4 fills' costs
        ("A", 10.0, -2.0),
        ("A", 12.0, 6.0),  # ends 2 short with -4, less the fill's costs and a third of this one's; 4 held
        ("B", 4.0, -10.0),  # -10 less two fills' costs
        ("A", 15.0, -4.0),  # 12 less the fill's costs and two thirds of those of the one through zero
        ("A", 15.0, 1.0),
        cost=0.1,
    )
    other = fills(("A", 10.0, 1.0), ("A", 20.0, -1.0), strategy="t")
    found = row(equity([100, 110, 120, 110, 115]), pl.concat([trades, other]))
    assert (found["trades"], found["fills"]) == (4, 10)
    assert found["win_rate"] == pytest.approx(2 / 4)
    profits = [4 - 4 * 0.3, 12 - 0.3 - 0.2, -4 - 0.3 - 0.1, -10 - 2 * 0.3]
    assert found["profit_factor"] == pytest.approx(sum(profits[:2]) / -sum(profits[2:]))
    assert found["costs"] == pytest.approx(10 * 0.3 / 100)
    traded = 40 + 48 + 50 + 52 + 40 + 20 + 72 + 40 + 60 + 15
    assert found["turnover"] == pytest.approx(traded / 111 * 252 / 4)


def test_split_is_no_trade() -> None:
    """Units before and after a split are counted on one basis: ten at 100 are twenty at 50."""
    trades = fills(
        ("A", 100.0, 10.0), ("A", 50.0, -20.0, 0.5), ("A", 50.0, 20.0, 0.5), ("A", 60.0, -20.0, 0.5)
    )
    found = row(equity([1e4, 1e4, 1e4, 1.02e4]), trades)
    assert (found["trades"], found["win_rate"], found["profit_factor"]) == (2, 0.5, None)


def test_residue_of_rounding_is_flat() -> None:
    """A position that only rounding leaves is none, so that the trip is over."""
    trades = fills(("A", 10.0, 0.1), ("A", 10.0, 0.2), ("A", 11.0, -0.3), ("A", 10.0, 0.5))
    assert trades["position"][2] not in (0.0, 0.3)
    assert row(equity([1, 2, 3]), trades)["trades"] == 1


def test_exposure_and_carry() -> None:
    """Exposure is the mean gross share, carry what borrow and funding took of the first equity."""
    found = row(equity([100.0, 101.0, 99.0], gross=0.7, carry=0.5))
    assert (found["exposure"], found["carry"]) == (pytest.approx(0.7), pytest.approx(0.015))
    assert (found["trades"], found["win_rate"], found["profit_factor"], found["turnover"]) == (
        0,
        None,
        None,
        0.0,
    )


def test_papers_example() -> None:
    """Bailey and López de Prado (2014): an annual ratio of 2.5 over 1250 days, the best of 100 trials."""
    told = {"sharpe": 2.5 / sqrt(250), "n": 1250, "skew": -3.0, "kurtosis": 10.0 - 3}
    best = sqrt(0.5 / 250) * expected_best(100)
    assert best == pytest.approx(0.1132, abs=1e-4)
    assert deflated_sharpe(**told, trials=100, variance=0.5 / 250) == pytest.approx(0.9004, abs=1e-4)
    assert deflated_sharpe(**told, trials=46, variance=0.5 / 250) == pytest.approx(0.9505, abs=1e-3)
    normal = {**told, "skew": 0.0, "kurtosis": 0.0}
    assert deflated_sharpe(**normal, trials=88, variance=0.5 / 250) == pytest.approx(0.9505, abs=1e-3)


def test_probabilistic_sharpe_is_a_probability() -> None:
    """It is a half at the benchmark, rises with the ratio and the time, and falls with a fat left tail."""
    assert probabilistic_sharpe(0.1, 100, -1.0, 4.0, 0.1) == 0.5
    plain = probabilistic_sharpe(0.1, 100, 0.0, 0.0)
    assert plain == pytest.approx(NORMAL.cdf(0.1 * sqrt(99 / (1 + 0.1**2 / 2))))
    assert probabilistic_sharpe(0.1, 400, 0.0, 0.0) > plain > probabilistic_sharpe(0.1, 100, -2.0, 6.0)
    assert deflated_sharpe(0.1, 100, 0.0, 0.0, trials=1) == plain
    assert probabilistic_sharpe(0.1, 1, 0.0, 0.0) is None


def test_luck_of_the_best_is_deflated() -> None:
    """Without skill, the best of many looks sure of itself, and hardly ever after it is deflated.

    One book alone is above 0.95 in 5 % of the cases, the best of N in 1 - N(1.645 + expected best)^N of them.
    """
    rng = np.random.default_rng(7)
    n, N, runs = 250, 10, 2000
    returns = rng.standard_normal((runs * N, n))
    d = returns - returns.mean(1, keepdims=True)
    ratios = returns.mean(1) / d.std(1, ddof=1)
    m2 = (d**2).mean(1)
    skews, tails = (d**3).mean(1) / m2**1.5, (d**4).mean(1) / m2**2 - 3
    moments = np.stack([ratios, skews, tails], 1).reshape(runs, N, 3)
    best = moments[np.arange(runs), moments[:, :, 0].argmax(1)].tolist()
    assert np.mean([b[0] for b in best]) * sqrt(n - 1) == pytest.approx(expected_best(N), abs=0.06)
    sure = np.mean([probabilistic_sharpe(s, n, a, k) > 0.95 for s, a, k in best])
    assert sure == pytest.approx(1 - 0.95**N, abs=0.04)
    deflated = np.mean([deflated_sharpe(s, n, a, k, N) > 0.95 for s, a, k in best])
    assert deflated == pytest.approx(1 - NORMAL.cdf(NORMAL.inv_cdf(0.95) + expected_best(N)) ** N, abs=0.006)
    single = np.mean([deflated_sharpe(s, n, a, k, 1) > 0.95 for s, a, k in moments[:, 0].tolist()])
    assert single == pytest.approx(0.05, abs=0.015)


def test_trials_are_counted() -> None:
    """More trials make the same book less sure; none at all is said to be wrong."""
    value = series("fat", 3)
    one, many = (row(equity(value), trials=trials) for trials in (1, 50))
    assert one["psr"] == one["dsr"] == many["psr"] > many["dsr"] > 0
    with pytest.raises(ConfigError, match="trials = 0: count every"):
        row(equity(value), trials=0)


def test_nothing_recorded() -> None:
    """A run without books gives an empty table with all columns."""
    table = portfolio(equity([]).clear(), fills(), 365, 1)
    assert (table.height, table.columns) == (0, ["strategy", *DEFINITIONS])


def test_no_warning_and_no_infinity() -> None:
    """Growth that cannot be annualised is null, not infinite, and nothing is warned of."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = row(
            pl.concat([equity([1.0, 3.0, 5.0, 20.0]), equity([1.0, 1.1, 1.0, 1.2], BENCHMARK)]), P=525_600
        )
    assert found["cagr"] is None
    assert found["calmar"] is None
    assert not any(isinstance(v, float) and (isnan(v) or not isfinite(v)) for v in found.values())
