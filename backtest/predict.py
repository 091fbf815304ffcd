"""Forecasts from given bars of a history, each seen without what came after it."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

import numpy as np
import polars as pl

from barcast.backtest.result import level_column, outlook_columns
from barcast.daemon.adjustments import by_symbol
from barcast.daemon.calendar import iso
from barcast.models import Adjustment, DataError, Forecast, Forecaster, Window, usable
from barcast.models.evaluation import CHUNK
from barcast.models.joint import Outlook, outlook
from barcast.models.window import window_at

_FAULTS = {
    None: (
        "that is no time",
        "write a date and time from 1970 on, before 2262, such as 2026-01-31T16:00:00Z",
    ),
    -1: (
        "by the calendar no bar has that time",
        "correct the time, or take the calendar, timeframe and stamp that the bars follow",
    ),
    -2: ("it says no time zone", "write it, such as 2026-01-31T16:00:00Z"),
}
"""What a close that `history.read_origins` could not tell means, and what to do."""

_MORE = "give the bars, or leave such origins out"


def predict(
    forecaster: Forecaster,
    histories: Mapping[str, Window],
    origins: pl.DataFrame,
    source: str,
    adjustments: Iterable[Adjustment] = (),
    touch: Sequence[tuple[float, float]] = (),
    progress: Callable[[int, str], None] = lambda _count, _at: None,
) -> pl.DataFrame:
    """The quantiles at each of the `origins`, which `history.read_origins` read from the file `source`.

    A row for each origin, in their order, and horizon: symbol, ts, horizon (Int32, bars), and a column for
    each level (`q05` ...), log returns from the origin's close. A window holds bars up to and including the
    origin's own, at most as many as the model's window, on the price basis of then. Windows come symbol by
    symbol in order of time, so that a forecaster profits from the work on the one before. With pairs of
    barriers to `touch`, and a forecaster of paths, the columns of `outlook_columns` follow, the same in all
    rows of an origin. Raise `DataError` when an origin cannot be forecast.
    """
    card = forecaster.card
    places = _places(origins, histories, source, card.model, card.min_window)
    own = by_symbol(adjustments)
    quantiles = np.empty((len(places), len(card.horizons), len(card.levels)))
    withheld: list[int] = []
    outlooks: dict[int, Outlook] = {}
    for chunk in _chunks(origins["symbol"], places):
        windows = [
            window_at(histories[symbol], places[i], card.window, own.get(symbol, ()))
            for i, symbol in zip(chunk, origins["symbol"][chunk], strict=True)
        ]
        made: list[Forecast] = forecaster.forecast(windows)
        for i, forecast, good in zip(chunk, made, usable(made, card), strict=True):
            if not good:
                withheld.append(i)
            elif touch:
                outlooks[i] = outlook(forecast, touch)
        quantiles[chunk] = [f.quantiles for f in made]
        progress(len(chunk), f"{windows[-1].symbol} {iso(windows[-1].close_time)[:10]}")
    if withheld:
        said = f"{card.model} makes nothing usable of its bars"
        raise _fault(origins, sorted(withheld), source, said, _MORE)
    H, Q = len(card.horizons), len(card.levels)
    columns = dict(zip(map(level_column, card.levels), quantiles.reshape(-1, Q).T, strict=True))
    if touch:
        told = outlook_columns([outlooks[i] for i in range(len(places))])
        columns |= {name: np.repeat(values, H) for name, values in told.items()}
    return origins.select(
        pl.col("symbol", "ts").repeat_by(H).explode(),
        pl.Series("horizon", np.tile(card.horizons, len(places)), pl.Int32),
    ).with_columns(pl.Series(name, values) for name, values in columns.items())


def _places(
    origins: pl.DataFrame, histories: Mapping[str, Window], source: str, model: str, least: int
) -> list[int]:
    """Which bar of its symbol each origin is; what cannot be forecast ends in one sentence."""
    places, faults = [], []
    for i, (symbol, close_time) in enumerate(origins.select("symbol", "close_time").iter_rows()):
        history = histories.get(symbol)
        at = -1
        if close_time in _FAULTS:
            faults.append((i, *_FAULTS[close_time]))
        elif history is None:
            faults.append((i, f"the files have no bar of {symbol}", _MORE))
        elif (at := _find(history, close_time)) < 0:
            faults.append((i, "the files have no bar of that time", _MORE))
        elif at + 1 < least:
            faults.append((i, f"it has {at + 1} bars up to then and {model} needs {least}", _MORE))
        places.append(at)
    if faults:
        raise _fault(origins, [i for i, *_ in faults], source, *faults[0][1:])
    return places


def _find(history: Window, close_time: int) -> int:
    at = int(np.searchsorted(history.close_times, close_time))
    return at if at < len(history) and history.close_times[at] == close_time else -1


def _chunks(symbols: pl.Series, places: Sequence[int]) -> Iterator[list[int]]:
    """The numbers of the origins, symbol by symbol in order of time, some at once."""
    order = np.lexsort((np.array(places), symbols.rank("dense").to_numpy()))
    for i in range(0, len(order), CHUNK):
        yield order[i : i + CHUNK].tolist()


def _fault(origins: pl.DataFrame, wrong: Sequence[int], source: str, reason: str, remedy: str) -> DataError:
    symbol, ts, _ = origins.row(wrong[0])
    return DataError(
        f"{len(wrong)} of {origins.height} origins in {source} cannot be forecast, the first {symbol} at "
        f"{ts}: {reason}; {remedy}."
    )
