"""Splits and rolls from a file: what a feed declares live, for backtests, training and forecasts."""

from collections.abc import Iterable, Iterator, Mapping
from operator import attrgetter
from pathlib import Path

import msgspec
import polars as pl

from barcast.daemon.history import UNREADABLE
from barcast.daemon.wire import ADJUSTMENT, AdjustmentMessage, adjustment
from barcast.models import Adjustment, DataError, Window
from barcast.models.window import on_one_basis


def read_adjustments(path: Path) -> list[Adjustment]:
    """The adjustments in a Parquet or CSV file with the columns symbol, time, factor and kind.

    Times are RFC 3339 texts or datetimes with a zone. Raise `DataError` that names file, row and value.
    """
    if not path.is_file() or path.suffix not in (".csv", ".parquet"):
        raise DataError(
            f"{path} is no .csv or .parquet file: name one with the columns symbol, time, factor, kind."
        )
    try:
        frame = pl.read_parquet(path) if path.suffix == ".parquet" else pl.read_csv(path, infer_schema=False)
    except UNREADABLE as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}): write it anew.") from error
    found = []
    for number, row in enumerate(frame.iter_rows(named=True), 1):
        try:
            message = msgspec.convert(row, AdjustmentMessage, strict=False)
            found.append(adjustment(message, message.symbol or ""))
        except msgspec.ValidationError as error:
            raise DataError(f"{path}, row {number}: {error}; {ADJUSTMENT}.") from error
        except ValueError as error:
            raise DataError(f"{path}, row {number}: {error}.") from error
    return found


def adjusted(windows: Mapping[str, Window], adjustments: Iterable[Adjustment]) -> Mapping[str, Window]:
    """Each window on the price basis of its newest bar; it is put there when it is asked for."""
    return _Adjusted(windows, by_symbol(adjustments))


class _Adjusted(Mapping[str, Window]):
    def __init__(self, windows: Mapping[str, Window], own: Mapping[str, list[Adjustment]]) -> None:
        self._windows, self._own = windows, own

    def __getitem__(self, symbol: str) -> Window:
        w = self._windows[symbol]
        if symbol not in self._own:
            return w
        return Window(symbol, w.close_times, on_one_basis(w.close_times, w.values, self._own[symbol]))

    def __iter__(self) -> Iterator[str]:
        return iter(self._windows)

    def __len__(self) -> int:
        return len(self._windows)


def by_symbol(adjustments: Iterable[Adjustment]) -> dict[str, list[Adjustment]]:
    """The adjustments of each symbol in order of time; of two declarations for a time the last counts."""
    own: dict[str, list[Adjustment]] = {}
    latest = {(each.symbol, each.time): each for each in adjustments}
    for each in sorted(latest.values(), key=attrgetter("time")):
        own.setdefault(each.symbol, []).append(each)
    return own
