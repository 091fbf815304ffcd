"""What Python hands over to backtests, sweeps and audits, in its form; else it is one clear sentence."""

from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from barcast.backtest.ledger import Execution
from barcast.daemon import wire
from barcast.daemon.pipeline import StrategySettings
from barcast.models import Adjustment, ConfigError

Moment = int | str | datetime
"""A time: nanoseconds since 1970 UTC, an ISO 8601 text or a datetime."""

SHOWN = 60
"""Characters of a wrong value that a sentence shows."""


def nanoseconds(moment: Moment | None, name: str) -> int | None:
    """Nanoseconds since 1970; a time without a zone is UTC. Raise ConfigError for what is no time."""
    if moment is None or isinstance(moment, int):
        return moment
    try:
        time = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    except ValueError as error:
        raise ConfigError(f"{name}: {moment!r} is no time: write one such as 2025-01-31T16:00:00Z") from error
    if not isinstance(time, datetime):
        raise _wrong(
            name, moment, "a datetime, a text such as 2025-01-31T16:00:00Z or nanoseconds since 1970"
        )
    return wire.to_ns(time if time.tzinfo else time.replace(tzinfo=UTC))


def paths_of(files: Sequence[Path | str] | Path | str) -> list[Path]:
    """The paths of files. Raise ConfigError for anything else, such as a frame."""
    remedy = "the path of a Parquet or CSV file, or several: write bars into one"
    return [Path(each) for each in listed(files, "files", (Path, str), remedy)]


def settings_of(strategies: Sequence[str | StrategySettings] | str) -> tuple[StrategySettings, ...]:
    """The settings of strategies. Raise ConfigError for anything else, such as an instance of one."""
    remedy = "a text such as 'rank:share=0.4' or 'mine.py:Mine', or StrategySettings.of(kind, name, params)"
    given = listed(strategies, "strategies", (str, StrategySettings), remedy)
    return tuple(StrategySettings.parse(each) if isinstance(each, str) else each for each in given)


def check_execution(execution: Execution | None) -> Execution:
    """The execution, or that by default. Raise ConfigError for anything else, such as a table."""
    if not isinstance(execution, Execution | None):
        raise _wrong("execution", execution, "Execution(...) of barcast.backtest.ledger")
    return execution or Execution()


def check_adjustments(adjustments: Sequence[Adjustment]) -> Sequence[Adjustment]:
    """The adjustments. Raise ConfigError for anything else, such as the path of their file."""
    remedy = "Adjustment(symbol, time, factor, kind) of each, or read_adjustments(file)"
    return listed(adjustments, "adjustments", (Adjustment,), remedy)


def listed(given: Any, name: str, types: tuple[type, ...], remedy: str) -> list[Any]:
    """What is given, one or several of these types. Raise ConfigError for anything else, also a frame."""
    if isinstance(given, types):
        return [given]
    if not isinstance(given, Iterable) or isinstance(given, str | Mapping) or hasattr(given, "columns"):
        raise _wrong(name, given, remedy)
    several = list(given)
    for k, each in enumerate(several):
        if not isinstance(each, types):
            raise _wrong(f"{name}[{k}]", each, remedy)
    return several


def _wrong(name: str, value: object, remedy: str) -> ConfigError:
    shown = " ".join(repr(value).split())
    return ConfigError(f"{name} is {shown:.{SHOWN}}, of type {type(value).__name__}: give {remedy}")
