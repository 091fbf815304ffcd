"""What was published, beside the classical baselines on the same origins. `DEFINITIONS` says what is what."""

from collections.abc import Callable, Iterable, Iterator, Mapping

import numpy as np
import polars as pl
from numpy.typing import NDArray

from barcast.backtest.result import levels_of
from barcast.backtest.scoring import POOLED, interval
from barcast.backtest.tables import Rows, between, collected, spans
from barcast.daemon.adjustments import by_symbol
from barcast.daemon.calendar import iso
from barcast.daemon.gate import MAX_ORIGINS, rivals
from barcast.models import Adjustment, Window, even_stride, usable
from barcast.models.evaluation import Forecasts, every, windows_at
from barcast.models.forecast import FAR
from barcast.models.scores import THIRDS, crps, gain, lag, thirds

VOLATILITY = "fhs"
"""The model whose 80 % interval says how volatile a time was expected to be, if it is there."""

ALL = "all"
"""The regime of the rows that pool the thirds."""

DEFINITIONS = {
    "regime": "a third of each symbol's origins, by the width of the 80 % interval of fhs then",
    "n": f"forecasts, at about {MAX_ORIGINS} origins at most, evenly spread over the times at which all "
    "baselines can forecast",
    "times": "origin times: the symbols of a time count as one observation in the error",
    "crps": "twice the pinball loss averaged over the levels and forecasts, of log returns",
    "other_crps": "that of the baseline, which saw the bars up to the origin's close",
    "skill": "100 (1 - CRPS / CRPS of the baseline)",
    "error": "standard error of the skill: Newey and West (1987) over origin times, "
    "lag max(2 ceil(h / bars from one origin to the next), T^(1/3))",
}

SCHEMA = pl.Schema(
    {
        "symbol": pl.String(),
        "horizon": pl.Int64(),
        "regime": pl.String(),
        "other": pl.String(),
        "n": pl.Int64(),
        "times": pl.Int64(),
        "crps": pl.Float64(),
        "other_crps": pl.Float64(),
        "skill": pl.Float64(),
        "error": pl.Float64(),
    }
)

AT = ("symbol", "close_time")
SINCE = pl.Schema({"symbol": pl.String(), "since": pl.Int64()})

Array = NDArray[np.float64]


def skill(
    signals: Rows,
    outcomes: Rows,
    histories: Mapping[str, Window],
    adjustments: Iterable[Adjustment],
    timeframe: str,
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> pl.DataFrame:
    """Compare the signals, whoever made them, with the baselines of the gate.

    `signals` and `outcomes` are those of `BacktestResult`. `histories` hold the bars as they were received,
    also those before the signals: a baseline looks back as far as it does live, on the price basis of then.
    Origins are the signals all of whose outcomes are known, and that every baseline can forecast; of many,
    about `MAX_ORIGINS`, at times that are evenly spread and the same for all symbols. A row for each symbol,
    and for `all` of them, horizon, regime and baseline, with the columns of `SCHEMA`; no row without an
    origin, and no regimes without the levels of an 80 % interval. `progress` is told how many forecasts were
    made, and by which baseline of which symbol.
    Raise ValueError for a signal at whose close the symbol's history has no bar.
    """
    levels = levels_of(signals.lazy().collect_schema().names())
    horizons = sorted(collected(signals.select(pl.col("horizon").unique()))["horizon"])
    if not horizons:
        return pl.DataFrame(schema=SCHEMA)
    others = rivals(timeframe, horizons, list(levels))
    least = max(other.card.min_window for other in others.values())
    y, published, origins, stride = _taken(signals, outcomes, list(levels.values()), histories, least)
    if not len(y):
        return pl.DataFrame(schema=SCHEMA)
    symbols, times = (origins[name].to_numpy() for name in ("symbol", "close_time"))
    declared = by_symbol(adjustments)
    quantiles: list[list[Array]] = [[] for _ in others]
    for symbol in np.unique(symbols).tolist():
        history = histories[symbol]
        ends = _places(history, times[symbols == symbol]).tolist()
        for (name, other), made in zip(others.items(), quantiles, strict=True):
            length = other.card.window
            for windows in windows_at(history, ends, length, declared.get(symbol, ())):
                forecasts = other.forecast(windows)
                usable(forecasts, other.card)
                made += [forecast.quantiles for forecast in forecasts]
                progress(len(windows), f"{name}, {symbol}")
    said = [published, *map(np.array, quantiles)]
    good = np.logical_and.reduce([(np.abs(q) < FAR).all((1, 2)) for q in said])  # not of nan
    found = Forecasts(y[good], [q[good] for q in said], tuple(symbols[good]), times[good])
    rows = _rows(found, list(others), horizons, np.array(list(levels)), max(1, int(stride)))
    table = pl.DataFrame(list(rows) if good.any() else [], schema=SCHEMA)
    return table.sort("symbol", "horizon", maintain_order=True).with_columns(
        pl.col(pl.Float64).fill_nan(None)
    )


def _taken(
    signals: Rows, outcomes: Rows, levels: list[str], histories: Mapping[str, Window], least: int
) -> tuple[Array, Array, pl.DataFrame, float]:
    """The origins to compare at: those with `least` bars and all outcomes, thinned to even times.

    Outcomes (n, H), quantiles (n, H, Q), symbol and close_time (ns) of each, in that order, and from one time
    to the next that is taken, how many there are. In files the origins are counted before some are read.
    """
    H = collected(signals.select(pl.col("horizon").n_unique())).item()
    first = {}
    for symbol in collected(signals.select(pl.col("symbol").unique()))["symbol"]:
        closes = histories[symbol].close_times
        first[symbol] = int(closes[least - 1]) if len(closes) >= least else None
    since = pl.DataFrame({"symbol": list(first), "since": list(first.values())}, schema=SINCE)
    ended = outcomes.select(*AT, "horizon", "outcome")

    def whole(some: pl.DataFrame, ended: pl.DataFrame) -> pl.DataFrame:
        known = some.join(ended, on=[*AT, "horizon"]).filter(pl.len().over(AT) == H)
        return known.join(since, on="symbol").filter(pl.col("close_time").to_physical() >= pl.col("since"))

    count, moments = 0, [np.empty(0, np.int64)]
    for span in spans(signals.select(*AT, "horizon")):
        known = whole(span, between(ended, span))
        count += known.height // H
        moments.append(known["close_time"].unique().to_physical().to_numpy())
    stride, times = even_stride(count, MAX_ORIGINS), np.unique(np.concatenate(moments))
    taken = pl.Series(times[every(len(times), stride)], dtype=pl.Int64)
    among = pl.col("close_time").to_physical().is_in(taken.implode())
    found = whole(collected(signals.filter(among)), collected(ended.filter(among))).sort(*AT, "horizon")
    origins = found.gather_every(H).select("symbol", pl.col("close_time").to_physical())
    quantiles = found.select(levels).to_numpy().reshape(-1, H, len(levels))
    return found["outcome"].to_numpy().reshape(-1, H), quantiles, origins, stride


def _places(history: Window, times: NDArray[np.int64]) -> NDArray[np.intp]:
    """Which bar of a history closes at each of these times (n,)."""
    places = np.searchsorted(history.close_times, times)
    known = history.close_times[np.minimum(places, len(history) - 1)] == times
    if not known.all():
        raise ValueError(f"{history.symbol} has a signal at {iso(int(times[~known][0]))}, but no bar of then")
    return places


def _rows(
    found: Forecasts, others: list[str], horizons: list[int], levels: Array, stride: int
) -> Iterator[dict[str, object]]:
    """The rows of `skill`; the first quantiles are those that were published, then each baseline's."""
    names, pair = np.array(found.symbols), interval(levels, 80)
    for j, h in enumerate(horizons):
        mine, *theirs = (crps(found.outcomes[:, j], q[:, j], levels) for q in found.quantiles)
        regimes = {ALL: np.ones(len(names), bool)}
        if pair is not None:
            q = found.quantiles[1 + others.index(VOLATILITY)][:, j]
            third = thirds(q[:, pair[1]] - q[:, pair[0]], names)
            regimes |= {name: third == k for k, name in enumerate(THIRDS)}
        for symbol in [*np.unique(names).tolist(), POOLED]:
            own = (names == symbol) | (symbol == POOLED)
            moments, at = np.unique(found.close_times[own], return_inverse=True)
            T = len(moments)
            for regime, part in regimes.items():
                if not (inside := part[own]).any():
                    continue
                for other, loss in zip(others, theirs, strict=True):
                    own_losses = mine[own][inside], loss[own][inside]
                    saved = gain(*own_losses, at[inside], T, lag(h, stride, T))
                    yield {
                        "symbol": symbol,
                        "horizon": h,
                        "regime": regime,
                        "other": other,
                        "n": int(inside.sum()),
                        "times": len(np.unique(at[inside])),
                        "crps": own_losses[0].mean(),
                        "other_crps": own_losses[1].mean(),
                        "skill": 100 * saved.value,
                        "error": 100 * saved.error,
                    }
