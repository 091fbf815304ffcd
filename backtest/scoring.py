"""What a backtest's forecasts were worth. Every number's definition is in `DEFINITIONS`."""

from collections.abc import Callable, Iterable, Iterator

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.result import levels_of
from barcast.backtest.tables import Rows, between, collected, spans
from barcast.models.scores import lag, newey_west, pinball

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


def scores(signals: Rows, outcomes: Rows) -> pl.DataFrame:
    """Score the forecasts whose outcome is known.

    A row for each symbol and horizon, and rows of the symbol `all` that pool them; columns symbol, horizon
    and those of `DEFINITIONS`, null without the levels, errors also with fewer than two origin times.
    """
    known = _Known(signals, outcomes)
    rows: list[dict[str, object]] = []
    for symbol, horizon in known.groups():
        found = _scored(lambda own=(symbol, horizon): known.of(*own), horizon)  # type: ignore[misc]
        rows.append({"symbol": symbol or POOLED, "horizon": horizon} | found)
    floats = {name: pl.Float64() for name in DEFINITIONS if name != "n"}
    schema = pl.Schema({"symbol": pl.String(), "horizon": pl.Int64(), "n": pl.Int64(), **floats})
    table = pl.DataFrame(rows, schema=schema).sort("symbol", "horizon")
    return table.with_columns(pl.col(*floats).fill_nan(None))


def _scored(read: Callable[[], Iterable[pl.DataFrame]], horizon: int) -> dict[str, float]:
    """The numbers of the forecasts of one group, which are read span by span, and twice."""
    n, totals, inside = 0, dict[str, float](), list[str]()
    for span in read():
        n += span.height
        means, shares = _values(span)
        inside = list(shares)
        for name, values in (means | shares).items():
            totals[name] = totals.get(name, 0.0) + float(values.sum())
    row = {"n": n} | {name: total / n for name, total in totals.items()}
    if not inside:
        return row
    sums: dict[str, list[Array]] = {name: [] for name in inside}
    for span in read():
        _, at = np.unique(span["close_time"].to_physical().to_numpy(), return_inverse=True)
        for name, values in _values(span)[1].items():
            sums[name].append(np.bincount(at, values - row[name]).astype(np.float64))
    for name, parts in sums.items():
        series = np.concatenate(parts)
        T = len(series)
        row[f"{name}_error"] = newey_west(series, lag(horizon, 1, T)) * T / n
    return row


def _values(span: pl.DataFrame) -> tuple[dict[str, Array], dict[str, Array]]:
    """The losses of forecasts with their outcomes, (n,), and whether these lie in the intervals."""
    y, quantiles, levels = _arrays(span)
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
    return means, inside


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


def pit(signals: Rows, outcomes: Rows) -> pl.DataFrame:
    """Where outcomes fell between the levels (probability integral transform).

    A row for each horizon and bin: horizon, lower, upper (levels, 0 and 1 at the ends), n (outcomes above
    the lower and up to the upper quantile), share, and density: share / (upper - lower), 1 when calibrated.
    """
    counted: dict[int, Ints] = {}
    edges = np.empty(0)
    for span in _Known(signals, outcomes).of():
        y, quantiles, levels = _arrays(span)
        edges = np.concatenate([[0.0], levels, [1.0]])
        below = (y[:, None] > quantiles).sum(1)  # (n,) the bin of each outcome
        for horizon in span["horizon"].unique():
            own = np.bincount(below[(span["horizon"] == horizon).to_numpy()], minlength=len(edges) - 1)
            counted[horizon] = counted.get(horizon, 0) + own
    frames = []
    for horizon, counts in sorted(counted.items()):
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


class _Known:
    """Forecasts whose outcome is known, read span by span where they lie in files."""

    def __init__(self, signals: Rows, outcomes: Rows) -> None:
        self._signals: Rows = signals
        self._outcomes: Rows | None = outcomes
        if isinstance(signals, pl.DataFrame) and isinstance(outcomes, pl.DataFrame):
            self._signals, self._outcomes = _met(signals, outcomes), None

    def groups(self) -> list[tuple[str | None, int]]:
        """Symbols and horizons; None stands for all symbols."""
        of = self._signals if self._outcomes is None else self._outcomes
        found: list[tuple[str | None, int]] = collected(of.select("symbol", "horizon").unique()).rows()
        return [*found, *((None, horizon) for horizon in {horizon for _, horizon in found})]

    def of(self, symbol: str | None = None, horizon: int | None = None) -> Iterator[pl.DataFrame]:
        """Those of a symbol and a horizon, if they are given: signals with end_time and outcome."""
        wanted = {"symbol": symbol, "horizon": horizon}
        wanted = {name: value for name, value in wanted.items() if value is not None}
        for span in spans(self._signals.filter(**wanted)):
            yield (
                span if self._outcomes is None else _met(span, between(self._outcomes.filter(**wanted), span))
            )


def _met(signals: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    return signals.join(outcomes, on=["symbol", "close_time", "horizon"], how="inner", maintain_order="left")


def _arrays(known: pl.DataFrame) -> tuple[Array, Array, Array]:
    """Outcomes (N,), quantiles (N, Q) and levels (Q,)."""
    named = levels_of(known.columns)
    return known["outcome"].to_numpy(), known.select(named.values()).to_numpy(), np.array(list(named))
