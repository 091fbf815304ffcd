"""Splits and rolls from a file: what a feed declares live, for backtests, training and forecasts."""

from pathlib import Path

import msgspec
import polars as pl

from barcast.daemon.wire import ADJUSTMENT, AdjustmentMessage, adjustment
from barcast.models import Adjustment, DataError


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
    except pl.exceptions.PolarsError as error:
        raise DataError(f"{path} cannot be read ({str(error).splitlines()[0]}): write it anew.") from error
    found = []
    for number, row in enumerate(frame.iter_rows(named=True), 1):
        try:
            message = msgspec.convert(row, AdjustmentMessage, strict=False)
            found.append(adjustment(message, message.symbol or ""))
        except (msgspec.ValidationError, ValueError) as error:
            raise DataError(f"{path}, row {number}: {error}; {ADJUSTMENT}.") from error
    return found
