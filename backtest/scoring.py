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

KEY = ("symbol", "close_time", "horizon")

Array = NDArray[np.float64]
Ints = NDArray[np.int64]
Bools = NDArray[np.bool_]
Inside = tuple[Ints, dict[str, Bools]]

KEPT = 2**22
"""Forecasts of which it is kept which were inside; of more they are read again."""

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
    for symbol in (*known.symbols(), None):
        for horizon, found in _scored(lambda own=symbol: known.of(own)).items():  # type: ignore[misc]
            rows.append({"symbol": symbol or POOLED, "horizon": horizon} | found)
    floats = {name: pl.Float64() for name in DEFINITIONS if name != "n"}
    schema = pl.Schema({"symbol": pl.String(), "horizon": pl.Int64(), "n": pl.Int64(), **floats})
    table = pl.DataFrame(rows, schema=schema).sort("symbol", "horizon")
    return table.with_columns(pl.col(*floats).fill_nan(None))


def _scored(read: Callable[[], Iterable[pl.DataFrame]]) -> dict[int, dict[str, float]]:
    """The numbers of some forecasts by their horizons.

    They are read in spans; and again, if there are too many to keep which of them were inside.
    """
    sums: dict[int, dict[str, float]] = {}
    kept: list[tuple[int, Inside]] | None = []
    for horizon, means, inside in _each(read()):
        own = sums.setdefault(horizon, {"n": 0})
        own["n"] += len(means["crps"])
        for name, values in (means | inside[1]).items():
            own[name] = own.get(name, 0.0) + float(values.sum())
        if kept is not None:
            kept.append((horizon, inside))
            kept = kept if sum(own["n"] for own in sums.values()) <= KEPT else None
    found = {
        horizon: {name: total if name == "n" else total / own["n"] for name, total in own.items()}
        for horizon, own in sums.items()
    }
    again = kept if kept is not None else ((horizon, inside) for horizon, _, inside in _each(read()))
    series: dict[tuple[int, str], list[Array]] = {}
    for horizon, (at, shares) in again:
        for name, values in shares.items():
            deviations = np.bincount(at, values - found[horizon][name])
            series.setdefault((horizon, name), []).append(deviations.astype(np.float64, copy=False))
    for (horizon, name), parts in series.items():
        whole, own = np.concatenate(parts), found[horizon]
        T = len(whole)
        own[f"{name}_error"] = newey_west(whole, lag(horizon, 1, T)) * T / own["n"]
    return found


def _each(spans: Iterable[pl.DataFrame]) -> Iterator[tuple[int, dict[str, Array], Inside]]:
    """Horizon, losses (n,), and the number of the close and what was inside (n,), of whole closes."""
    for span in spans:
        for (horizon,), own in span.group_by("horizon", maintain_order=True):
            _, at = np.unique(own["close_time"].to_physical().to_numpy(), return_inverse=True)
            means, inside = _values(own)
            yield int(str(horizon)), means, (at, inside)


def _values(span: pl.DataFrame) -> tuple[dict[str, Array], dict[str, Bools]]:
    """The losses of forecasts with their outcomes, (n,), and whether these lie in the intervals."""
    y, quantiles, levels = _arrays(span)
    loss = pinball(y, quantiles, levels) if len(y) else np.empty(0)
    means: dict[str, Array] = {"pinball": loss, "crps": 2 * loss}
    inside: dict[str, Bools] = {}
    for percent in INTERVALS:
        if (pair := interval(levels, percent)) is None:
            continue
        lower, upper = quantiles[:, pair[0]], quantiles[:, pair[1]]
        if percent in SCORED:
            means[f"interval_{percent}"] = interval_score(y, lower, upper, percent / 100)
        inside[f"coverage_{percent}"] = (lower <= y) & (y <= upper)
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
        levels = levels_of(signals.lazy().collect_schema().names()).values()
        self._signals: Rows = signals.select(*KEY, *levels)
        self._outcomes: Rows | None = outcomes.select(*KEY, "outcome")
        if isinstance(self._signals, pl.DataFrame) and isinstance(self._outcomes, pl.DataFrame):
            self._signals, self._outcomes = _met(self._signals, self._outcomes), None

    def symbols(self) -> list[str]:
        """Whose forecasts there are."""
        return sorted(collected(self._signals.select(pl.col("symbol").unique()))["symbol"])

    def of(self, symbol: str | None = None) -> Iterator[pl.DataFrame]:
        """Those of one symbol, or of all: `KEY`, levels and outcome."""
        own = [] if symbol is None else [pl.col("symbol") == symbol]
        for span in spans(self._signals.filter(*own)):
            if self._outcomes is None:
                yield span
            elif span.height:
                yield _met(span, between(self._outcomes.filter(*own), span))


def _met(signals: pl.DataFrame, outcomes: pl.DataFrame) -> pl.DataFrame:
    return signals.join(outcomes, on=KEY, how="inner", maintain_order="left")


def _arrays(known: pl.DataFrame) -> tuple[Array, Array, Array]:
    """Outcomes (N,), quantiles (N, Q) and levels (Q,)."""
    named = levels_of(known.columns)
    return known["outcome"].to_numpy(), known.select(named.values()).to_numpy(), np.array(list(named))
