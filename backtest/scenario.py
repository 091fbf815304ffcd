"""Stress scenarios as files: bars that are marked as made up, so that no reader takes them for history."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import polars as pl

from barcast.daemon.history import SCENARIO, VALUES
from barcast.models.errors import ConfigError

if TYPE_CHECKING:
    from barcast.models.transfer.generator import Scenario


def frame(scenario: "Sequence[Scenario]") -> pl.DataFrame:
    """The made-up bars of a scenario's symbols, with what they are in the column `scenario`.

    The other columns are those of a file of bars, in order of symbol and close.
    """
    parts = []
    for each in scenario:
        made = each.times >= each.since
        close_time = pl.from_epoch("close_time", "ns").dt.replace_time_zone("UTC")
        columns = {"symbol": each.symbol, "close_time": each.times[made], SCENARIO: each.mark}
        values = {name: each.rows[made, k] for k, name in enumerate(VALUES)}
        parts.append(pl.DataFrame(columns | values).with_columns(close_time))
    return pl.concat(parts).sort("symbol", "close_time")


def write(scenario: "Sequence[Scenario]", path: Path) -> None:
    """Write a scenario as Parquet; raise `ConfigError` where it cannot be."""
    try:
        frame(scenario).write_parquet(path)
    except OSError as error:
        raise ConfigError(f"{path}: {error}; name a file that you may write") from error
