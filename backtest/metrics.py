"""What a backtest's books were worth. Every number's definition is in `DEFINITIONS`; P is periods a year."""

from math import e, isfinite, sqrt
from statistics import NormalDist

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.ledger import BENCHMARK
from barcast.backtest.tables import Rows, collected, spans
from barcast.models import ConfigError

Array = NDArray[np.float64]

DEFINITIONS = {
    "periods": "returns of the book, from one group's close to the next; none after an equity that is not "
    "positive",
    "total_return": "last equity / first equity - 1, after costs and carry",
    "cagr": "(1 + total return)^(P / periods) - 1",
    "volatility": "standard deviation (ddof 1) of the returns x sqrt(P)",
    "sharpe": "mean / standard deviation (ddof 1) of the returns x sqrt(P), risk-free rate 0",
    "sortino": "mean of the returns / sqrt(mean of min(return, 0)^2) x sqrt(P)",
    "calmar": "CAGR / -max drawdown",
    "max_drawdown": "lowest equity / highest equity before it - 1",
    "drawdown_periods": "most closes in a row below an equity reached before",
    "skew": "m3 / m2^1.5, m_k the mean of (return - mean)^k",
    "kurtosis": "excess: m4 / m2^2 - 3, m_k the mean of (return - mean)^k; 0 for normal returns",
    "var_95": "5 % quantile of the returns, linear between neighbours; a loss is negative",
    "cvar_95": "mean of the lowest 1 + floor(0.05 (periods - 1)) returns; a loss is negative",
    "omega": "sum of the returns above 0 / -(sum of those below 0)",
    "tail_ratio": "|95 % quantile| / |5 % quantile| of the returns",
    "alpha": "(1 + mean(return - beta x benchmark's return))^P - 1; the benchmark is buy-and-hold",
    "beta": "covariance of the returns with the benchmark's / variance of the benchmark's",
    "information_ratio": "mean / standard deviation (ddof 1) of (return - benchmark's return) x sqrt(P)",
    "exposure": "mean over the closes of the gross value held / equity",
    "turnover": "value bought and sold / mean equity x P / periods",
    "trades": "round trips: a symbol's position from none to none again, or through it to the other side",
    "win_rate": "share of the round trips with a profit after commission, spread and slippage",
    "profit_factor": "sum of the round trips' profits / sum of their losses, after the same costs",
    "fills": "orders filled, in whole or in part",
    "costs": "commission, spread and slippage paid, as a share of the first equity",
    "carry": "borrow and funding paid, as a share of the first equity",
    "psr": "probabilistic Sharpe ratio, Bailey and López de Prado (2012): the probability that the true one "
    "is above 0, N(s sqrt(periods - 1) / sqrt(1 - skew s + (kurtosis + 2) / 4 s^2)), s = Sharpe / sqrt(P)",
    "dsr": "deflated Sharpe ratio, Bailey and López de Prado (2014): as the probabilistic one, but above the "
    "best ratio to expect of so many independent trials without skill, whose ratios vary by chance alone, "
    "by 1 / (periods - 1); null for the benchmark, which is no trial",
}
"""Null where a number is not defined: rates and moments of fewer than two returns, ratios over nothing, and
rates of growth to below 0 or beyond what a float holds."""

WHOLE = ("periods", "drawdown_periods", "trades", "fills")
SCHEMA = pl.Schema(
    {"strategy": pl.String(), **{n: pl.Int64() if n in WHOLE else pl.Float64() for n in DEFINITIONS}}
)

EULER = 0.5772156649015329
STILL = 1e-14
"""What rounding alone makes of returns and drawdowns: an equity is known to 2e-16 of itself."""
COSTS = ("commission", "spread", "slippage")
FLAT = 1e-9
"""What is left of a position, as a share of the fill, that is only rounding."""
_NORMAL = NormalDist()


def portfolio(equity: Rows, fills: Rows, periods_per_year: int, trials: int) -> pl.DataFrame:
    """Performance of each strategy's book; `periods_per_year` (P) is the calendar's.

    `equity` and `fills` are those of `BacktestResult`; `trials` is how many strategies and settings were
    tried in all until these were found. A row for each strategy with the columns of `DEFINITIONS`, null where
    a number is not defined. A book counts up to its first equity that is not positive, its fills to the end.
    Raise ConfigError for fewer than one trial.
    """
    if trials < 1:
        raise ConfigError(f"trials = {trials}: count every strategy and setting that was tried, at least 1")

    def book(name: str) -> pl.DataFrame:
        own = equity.filter(strategy=name).select("close_time", "equity", "gross", "carry")
        return _alive(collected(own).sort("close_time"))

    names = collected(equity.select(pl.col("strategy").unique(maintain_order=True)))["strategy"].to_list()
    benchmark = book(BENCHMARK) if BENCHMARK in names else None
    rows = []
    for name in names:
        own, filled = book(name), fills.filter(strategy=name)
        other = None if name == BENCHMARK else benchmark
        row = {
            **_performance(own, periods_per_year, None if name == BENCHMARK else trials),
            **_beside(own, other, periods_per_year),
            **_trading(own, filled, _round_trips(filled), periods_per_year),
        }
        rows.append({"strategy": name, **{k: _defined(v) for k, v in row.items()}})
    return pl.DataFrame(rows, schema=SCHEMA)


def probabilistic_sharpe(
    sharpe: float, n: int, skew: float, kurtosis: float, benchmark: float = 0.0
) -> float | None:
    """The probability that the true Sharpe ratio is above `benchmark`, by Bailey and López de Prado (2012).

    Both ratios are of one period, `sharpe` was measured over `n` of them; `kurtosis` is the excess, the
    paper's less 3. None with fewer than two periods, or where the returns leave no doubt of it.
    """
    doubt = 1 - skew * sharpe + (kurtosis + 2) / 4 * sharpe**2
    if n < 2 or not doubt > 0:
        return None
    return _NORMAL.cdf((sharpe - benchmark) * sqrt((n - 1) / doubt))


def deflated_sharpe(
    sharpe: float, n: int, skew: float, kurtosis: float, trials: int, variance: float | None = None
) -> float | None:
    """The probability that the best of `trials` is better than luck: Bailey and López de Prado (2014).

    That is `probabilistic_sharpe` against the highest ratio to expect of so many without skill. `variance` is
    that of the trials' ratios of one period; unless it is known, that of a ratio measured over `n` periods
    where the true one is 0, 1 / (n - 1): the few books of a run are too few to estimate it. It supposes
    independent trials. As a test it is cautious: without skill, a single one is above 0.95 in 5 % of the
    cases, the best of a hundred in less than 0.2 %.
    """
    if n < 2:
        return None
    spread = sqrt(1 / (n - 1) if variance is None else variance)
    return probabilistic_sharpe(sharpe, n, skew, kurtosis, spread * expected_best(trials))


def expected_best(trials: int) -> float:
    """About the expected maximum of so many independent standard normal values: Bailey et al. (2014), eq. 1.

    0 for a single one.
    """
    if trials == 1:
        return 0.0
    first, second = _NORMAL.inv_cdf(1 - 1 / trials), _NORMAL.inv_cdf(1 - 1 / (trials * e))
    return (1 - EULER) * first + EULER * second


def _performance(book: pl.DataFrame, P: int, trials: int | None) -> dict[str, float | None]:
    """What follows from the equity alone."""
    value = book["equity"].to_numpy()
    drawdown = value / np.maximum.accumulate(value) - 1
    found: dict[str, float | None] = {
        "periods": len(value) - 1,
        "total_return": value[-1] / value[0] - 1,
        "max_drawdown": drawdown.min(),
        "drawdown_periods": _longest(drawdown < -STILL),
    }
    r = _returns(value)
    if len(r) < 2:
        return found
    mean, deviation = r.mean(), r.std(ddof=1)
    low, high = np.percentile(r, [5, 95])
    downside = sqrt(np.square(np.minimum(r, 0)).mean())
    gains, losses = np.maximum(r, 0).mean(), -np.minimum(r, 0).mean()
    with np.errstate(over="ignore"):
        growth = value[-1] / value[0]
        cagr = growth ** (P / len(r)) - 1 if growth >= 0 else np.nan
    found |= {
        "cagr": cagr,
        "volatility": deviation * sqrt(P),
        "sortino": mean / downside * sqrt(P) if downside > STILL else None,
        "calmar": cagr / -drawdown.min() if drawdown.min() < -STILL else None,
        "var_95": low,
        "cvar_95": np.sort(r)[: 1 + int(0.05 * (len(r) - 1))].mean(),
        "omega": gains / losses if losses > STILL else None,
        "tail_ratio": abs(high) / abs(low) if abs(low) > STILL else None,
    }
    if deviation > STILL:
        d = r - mean
        m2 = np.square(d).mean()
        sharpe = mean / deviation
        skew, kurtosis = (d**3).mean() / m2**1.5, (d**4).mean() / m2**2 - 3
        found |= {
            "sharpe": sharpe * sqrt(P),
            "skew": skew,
            "kurtosis": kurtosis,
            "psr": probabilistic_sharpe(sharpe, len(r), skew, kurtosis),
            "dsr": None if trials is None else deflated_sharpe(sharpe, len(r), skew, kurtosis, trials),
        }
    return found


def _beside(book: pl.DataFrame, benchmark: pl.DataFrame | None, P: int) -> dict[str, float | None]:
    """What follows from the returns beside those of the benchmark, over the closes of both."""
    if benchmark is None:
        return {}
    both = book.join(benchmark, on="close_time", suffix="_beside", maintain_order="left")
    r, b = (_returns(both[name].to_numpy()) for name in ("equity", "equity_beside"))
    if len(r) < 2:
        return {}
    active = r - b
    found: dict[str, float | None] = {}
    if (deviation := active.std(ddof=1)) > STILL:
        found["information_ratio"] = active.mean() / deviation * sqrt(P)
    if b.std(ddof=1) > STILL:
        beta = ((b - b.mean()) * r).mean() / b.var()
        with np.errstate(over="ignore", invalid="ignore"):
            found |= {"beta": beta, "alpha": (1 + (r - beta * b).mean()) ** P - 1}
    return found


def _trading(book: pl.DataFrame, fills: Rows, profits: Array, P: int) -> dict[str, float | None]:
    """What follows from the fills, and from the `profits` (n,) of the round trips."""
    value = book["equity"].to_numpy()
    lost = -profits[profits < 0].sum()
    traded, costs, count = 0.0, 0.0, 0
    for span in spans(fills.select("close_time", "units", "price", *COSTS)):
        traded += float((span["units"] * span["price"]).abs().sum())
        costs += float((span["commission"] + span["spread"] + span["slippage"]).sum())
        count += span.height
    return {
        "exposure": book["gross"].to_numpy().mean(),
        "turnover": traded / value.mean() * P / (len(value) - 1) if len(value) > 1 else None,
        "trades": len(profits),
        "win_rate": (profits > 0).mean() if len(profits) else None,
        "profit_factor": profits[profits > 0].sum() / lost if lost else None,
        "fills": count,
        "costs": costs / value[0],
        "carry": book["carry"].sum() / value[0],
    }


def _round_trips(fills: Rows) -> Array:
    """The profits (n,) of a strategy's round trips that are over: what came in less what was paid.

    Units are those of the symbol's first bar, so that no split is a trade. A fill through zero ends one trip
    and begins the next; its cash is shared by the units. Fills are looked at symbol by symbol; those trips
    come first that were turned into another, and then in order of the fill that says so.
    """
    numbered = fills.sort("close_time", maintain_order=True) if isinstance(fills, pl.DataFrame) else fills
    numbered = numbered.with_row_index("fill")
    symbols = collected(fills.select(pl.col("symbol").unique(maintain_order=True)))["symbol"]
    found = [_trips_of(collected(numbered.filter(symbol=symbol))) for symbol in symbols]
    if not found:
        return np.empty(0)
    return pl.concat(found).sort("rest", "fill")["profit"].to_numpy()


def _trips_of(fills: pl.DataFrame) -> pl.DataFrame:
    """Profit, first fill and whether nothing was turned of each round trip of one symbol."""
    after = pl.col("position") * pl.col("basis")
    moved = pl.col("units") * pl.col("basis")
    costs = pl.col("commission") + pl.col("spread") + pl.col("slippage")
    steps = (
        fills.select(
            "fill",
            after=pl.when(after.abs() > FLAT * moved.abs()).then(after).otherwise(0.0),
            cash=-(pl.col("units") * pl.col("price")) - costs,
        )
        .with_columns(before=pl.col("after").shift(1, fill_value=0.0))
        .with_columns(through=pl.col("before") * pl.col("after") < 0)
        .with_columns(
            trip=(pl.col("through") | ((pl.col("before") == 0) & (pl.col("after") != 0))).cum_sum(),
            old=pl.when("through")
            .then(pl.col("before") / (pl.col("before") - pl.col("after")))
            .otherwise(0.0),
        )
    )
    ends = steps.filter("through").select(
        "fill", pl.col("trip") - 1, pl.col("cash") * pl.col("old"), over=True, rest=False
    )
    rest = steps.select(
        "fill", "trip", pl.col("cash") * (1 - pl.col("old")), over=pl.col("after") == 0, rest=True
    )
    trips = pl.concat([ends, rest]).group_by("trip", maintain_order=True)
    found = trips.agg(
        pl.col("cash").sum().alias("profit"), pl.col("over").any(), pl.col("rest", "fill").first()
    )
    return found.filter("over").select("profit", "rest", "fill")


def _alive(book: pl.DataFrame) -> pl.DataFrame:
    """The book up to the first equity that is not positive, that one included."""
    ruined = book["equity"] <= 0
    return book.head((ruined.arg_max() or 0) + 1) if ruined.any() else book


def _returns(value: Array) -> Array:
    return np.diff(value) / value[:-1]


def _longest(under: NDArray[np.bool_]) -> int:
    """The length of the longest run of true values."""
    edges = np.flatnonzero(np.diff(np.concatenate([[False], under, [False]])))
    return int((edges[1::2] - edges[::2]).max(initial=0))


def _defined(value: float | None) -> float | None:
    return value if value is not None and isfinite(value) else None
