"""What a backtest's forecasts and books were worth. Every number's definition is in `DEFINITIONS`."""

from math import sqrt

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.result import levels_of
from barcast.models.scores import pinball

POOLED = "all"
"""The symbol of the rows that pool all symbols."""

INTERVALS = {50: (0.25, 0.75), 80: (0.1, 0.9), 90: (0.05, 0.95)}
"""Central intervals: the share that should lie inside, in percent, and their two levels."""

Array = NDArray[np.float64]

DEFINITIONS = {
    "n": "forecasts whose outcome is known",
    "pinball": "mean over levels of max(level (y - q), (level - 1) (y - q)), y the log return",
    "crps": "twice the pinball loss: the continuous ranked probability score on the grid of levels",
    "coverage_50": "share of outcomes from q25 to q75; 50 % when calibrated",
    "coverage_80": "share of outcomes from q10 to q90; 80 % when calibrated",
    "coverage_90": "share of outcomes from q05 to q95; 90 % when calibrated",
    "periods": "returns of the book, from one group's close to the next",
    "total_return": "last equity / first equity - 1, after costs",
    "volatility": "standard deviation (ddof 1) of the returns x sqrt(P)",
    "sharpe": "mean / standard deviation (ddof 1) of the returns x sqrt(P), risk-free rate 0",
    "max_drawdown": "lowest equity / highest equity before it - 1",
    "fills": "trades",
    "costs": "commission and slippage paid, as a share of the first equity",
}


def scores(signals: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    """Score the forecasts whose outcome is known.

    A row for each symbol and horizon, and rows of the symbol `all` that pool them; columns symbol, horizon,
    n, pinball, crps, coverage_50, coverage_80, coverage_90 (null without the levels), as in `DEFINITIONS`.
    """
    known, quantiles, levels = _known(signals, outcomes)
    y = known["outcome"].to_numpy()
    loss = pinball(y, quantiles, levels) if len(y) else np.empty(0)
    columns: dict[str, Array] = {"pinball": loss, "crps": 2 * loss}
    for percent, interval in INTERVALS.items():
        at = [int(np.argmin(np.abs(levels - level))) for level in interval] if len(levels) else []
        if len(y) and np.allclose(levels[at], interval):
            lower, upper = quantiles[:, at].T
            columns[f"coverage_{percent}"] = ((lower <= y) & (y <= upper)).astype(float)
        else:
            columns[f"coverage_{percent}"] = np.full(len(y), np.nan)
    rows = known.select("symbol", "horizon").with_columns(
        pl.Series(name, values, dtype=pl.Float64, strict=False) for name, values in columns.items()
    )
    both = pl.concat([rows, rows.with_columns(symbol=pl.lit(POOLED))])
    means = [pl.col(name).mean().fill_nan(None) for name in columns]
    return (
        both.group_by("symbol", "horizon")
        .agg(pl.len().cast(pl.Int64).alias("n"), *means)
        .sort("symbol", "horizon")
    )


def pit(signals: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    """Where outcomes fell between the levels (probability integral transform).

    A row for each horizon and bin: horizon, lower, upper (levels, 0 and 1 at the ends), n (outcomes above
    the lower and up to the upper quantile), share, and density: share / (upper - lower), 1 when calibrated.
    """
    known, quantiles, levels = _known(signals, outcomes)
    edges = np.concatenate([[0.0], levels, [1.0]])
    below = (known["outcome"].to_numpy()[:, None] > quantiles).sum(1)  # (N,) the bin of each outcome
    frames = []
    for horizon in sorted(known["horizon"].unique()):
        counts = np.bincount(below[(known["horizon"] == horizon).to_numpy()], minlength=len(edges) - 1)
        share = counts / counts.sum()
        frames.append(
            pl.DataFrame(
                {
                    "lower": edges[:-1],
                    "upper": edges[1:],
                    "n": counts,
                    "share": share,
                    "density": share / np.diff(edges),
                }
            ).select(pl.lit(horizon).alias("horizon"), pl.all())
        )
    if not frames:
        floats = {name: pl.Float64() for name in ("lower", "upper", "share", "density")}
        return pl.DataFrame(schema=pl.Schema({"horizon": pl.Int64(), "n": pl.Int64(), **floats}))
    return pl.concat(frames)


def portfolio(equity: pl.DataFrame, fills: pl.DataFrame, periods_per_year: int) -> pl.DataFrame:
    """Performance of each strategy's book; `periods_per_year` (P) is the calendar's.

    A row for each strategy: strategy, periods, total_return, volatility, sharpe, max_drawdown, fills, costs,
    as in `DEFINITIONS`. Volatility and Sharpe ratio are null with fewer than two returns, the ratio also
    without any variation. Returns end with the first equity that is not positive.
    """
    rows = []
    for (strategy,), own in equity.group_by("strategy", maintain_order=True):
        value = own.sort("close_time")["equity"].to_numpy()
        alive = value[: int(np.argmax(value <= 0)) + 1] if (value <= 0).any() else value
        returns = np.diff(alive) / alive[:-1]
        deviation = float(returns.std(ddof=1)) if len(returns) > 1 else None
        trades = fills.filter(pl.col("strategy") == strategy)
        rows.append(
            {
                "strategy": strategy,
                "periods": len(returns),
                "total_return": float(value[-1] / value[0] - 1),
                "volatility": None if deviation is None else deviation * sqrt(periods_per_year),
                "sharpe": float(returns.mean() / deviation * sqrt(periods_per_year)) if deviation else None,
                "max_drawdown": float((value / np.maximum.accumulate(value) - 1).min()),
                "fills": trades.height,
                "costs": float((trades["commission"] + trades["slippage"]).sum() / value[0]),
            }
        )
    whole = {"strategy": pl.String(), "periods": pl.Int64(), "fills": pl.Int64()}
    names = ("strategy", "periods", "total_return", "volatility", "sharpe", "max_drawdown", "fills", "costs")
    return pl.DataFrame(rows, schema=pl.Schema({name: whole.get(name, pl.Float64()) for name in names}))


def _known(signals: pl.DataFrame, outcomes: pl.DataFrame) -> tuple[pl.DataFrame, Array, Array]:
    """Signals with their outcomes, their quantiles (N, Q) and levels (Q,)."""
    named = levels_of(signals.columns)
    known = signals.join(outcomes, on=["symbol", "close_time", "horizon"], how="inner", maintain_order="left")
    return known, known.select(named.values()).to_numpy(), np.array(list(named))
