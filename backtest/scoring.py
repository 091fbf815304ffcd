"""What a backtest's forecasts were worth. Every number's definition is in `DEFINITIONS`."""

from collections.abc import Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.result import levels_of
from barcast.models.scores import lag, mean, pinball

POOLED = "all"
"""The symbol of the rows that pool all symbols."""

INTERVALS = {50: (0.25, 0.75), 80: (0.1, 0.9), 90: (0.05, 0.95)}
"""Central intervals: the share that should lie inside, in percent, and their two levels."""

SCORED = (80, 90)
"""The intervals that have an interval score."""

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

_ERROR = "standard error of that share: Newey and West (1987) over origin times, lag max(2 h, T^(1/3))"

DEFINITIONS = {
    "n": "forecasts whose outcome is known",
    "pinball": "mean over levels of max(level (y - q), (level - 1) (y - q)), y the log return",
    "crps": "twice the pinball loss: the continuous ranked probability score on the grid of levels",
    "interval_80": "q90 - q10, and 2 / 0.2 = 10 times by how much the outcome misses it: Gneiting and "
    "Raftery (2007), eq. 43",
    "interval_90": "q95 - q05, and 2 / 0.1 = 20 times by how much the outcome misses it",
    "coverage_50": "share of outcomes from q25 to q75; 50 % when calibrated",
    "coverage_50_error": _ERROR,
    "coverage_80": "share of outcomes from q10 to q90; 80 % when calibrated",
    "coverage_80_error": _ERROR,
    "coverage_90": "share of outcomes from q05 to q95; 90 % when calibrated",
    "coverage_90_error": _ERROR,
}


def scores(signals: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    """Score the forecasts whose outcome is known.

    A row for each symbol and horizon, and rows of the symbol `all` that pool them; columns symbol, horizon
    and those of `DEFINITIONS`, null without the levels, errors also with fewer than two origin times.
    """
    known, quantiles, levels = _known(signals, outcomes)
    y = known["outcome"].to_numpy()
    loss = pinball(y, quantiles, levels) if len(y) else np.empty(0)
    means: dict[str, Array] = {"pinball": loss, "crps": 2 * loss}
    inside: dict[str, Array] = {}
    for percent in INTERVALS:
        if (pair := interval(levels, percent)) is None:
            continue
        lower, upper = quantiles[:, pair[0]], quantiles[:, pair[1]]
        if percent in SCORED:
            means[f"interval_{percent}"] = interval_score(y, lower, upper, percent / 100)
        inside[f"coverage_{percent}"] = ((lower <= y) & (y <= upper)).astype(float)
    times = known["close_time"].to_physical().to_numpy()
    rows = []
    for symbol, horizon, own in _groups(known):
        moments, at = np.unique(times[own], return_inverse=True)
        lags = lag(horizon, 1, len(moments))
        row = {"symbol": symbol, "horizon": horizon, "n": len(own)}
        row |= {name: values[own].mean() for name, values in means.items()}
        for name, values in inside.items():
            share = mean(values[own], at, len(moments), lags)
            row |= {name: share.value, f"{name}_error": share.error}
        rows.append(row)
    floats = {name: pl.Float64() for name in DEFINITIONS if name != "n"}
    schema = pl.Schema({"symbol": pl.String(), "horizon": pl.Int64(), "n": pl.Int64(), **floats})
    return pl.DataFrame(rows, schema=schema).with_columns(pl.col(*floats).fill_nan(None))


def interval(levels: Array, percent: int) -> tuple[int, int] | None:
    """The places of the two levels (Q,) that bound an interval of `INTERVALS`, if they are there."""
    lower, upper = (np.flatnonzero(np.isclose(levels, level)) for level in INTERVALS[percent])
    return (int(lower[0]), int(upper[0])) if len(lower) and len(upper) else None


def interval_score(outcome: Array, lower: Array, upper: Array, coverage: float) -> Array:
    """Width of a central interval of that nominal coverage, and 2 / (1 - coverage) times the miss, (n,).

    Gneiting and Raftery (2007), eq. 43.
    """
    miss = np.maximum(lower - outcome, 0) + np.maximum(outcome - upper, 0)
    return upper - lower + 2 / (1 - coverage) * miss


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


def _known(signals: pl.DataFrame, outcomes: pl.DataFrame) -> tuple[pl.DataFrame, Array, Array]:
    """Signals with their outcomes, their quantiles (N, Q) and levels (Q,)."""
    named = levels_of(signals.columns)
    known = signals.join(outcomes, on=["symbol", "close_time", "horizon"], how="inner", maintain_order="left")
    return known, known.select(named.values()).to_numpy(), np.array(list(named))


def _groups(known: pl.DataFrame) -> Iterator[tuple[str, int, Ints]]:
    """Symbol, horizon and the rows of each, in order; `all` among the symbols."""
    rows = known.select("symbol", "horizon", row=pl.int_range(pl.len()))
    both = [rows, rows.with_columns(symbol=pl.lit(POOLED))]
    grouped = pl.concat(both).group_by("symbol", "horizon").agg("row").sort("symbol", "horizon")
    for symbol, horizon, own in zip(*grouped, strict=True):
        yield symbol, horizon, own.to_numpy()
