"""From forecasts to targets: pure functions of all forecasts of a due group."""

import difflib
import re
from collections.abc import Mapping
from dataclasses import fields
from math import inf, isfinite
from typing import Protocol

from barcast.models import ConfigError, Forecast
from barcast.strategies.median_drift import MedianDrift
from barcast.strategies.quantile_band import QuantileBand

__all__ = ["KINDS", "MedianDrift", "QuantileBand", "Strategy", "build"]


class Strategy(Protocol):
    """Turns the forecasts of one group into wanted exposures."""

    @property
    def name(self) -> str:
        """The segment that names this strategy in topics and reports."""
        ...

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> dict[str, float]:
        """The target of each symbol, from -1 (fully short) to 1 (fully long), from this group alone."""
        ...


KINDS: Mapping[str, type[QuantileBand] | type[MedianDrift]] = {
    "quantile-band": QuantileBand,
    "median-drift": MedianDrift,
}
"""The strategies that a config can name."""


def build(kind: str, name: str, params: Mapping[str, object]) -> Strategy:
    """The strategy of this kind, called `name`.

    Raise `ConfigError` for an unknown kind or parameter, saying which exist, for a value that does not
    fit, and for a name that cannot be a segment of a topic.
    """
    if kind not in KINDS:
        raise ConfigError(f"strategy kind {kind!r} is unknown: {_one_of(kind, list(KINDS))}.")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", name):
        raise ConfigError(
            f"strategy name {name!r} cannot be part of a topic: "
            "take up to 32 letters, digits, dots, underscores and dashes."
        )
    known = [field.name for field in fields(KINDS[kind]) if field.name != "name"]
    for param, value in params.items():
        if param not in known:
            raise ConfigError(f"strategy {name!r} has no parameter {param!r}: {_one_of(param, known)}.")
        whole, highest = param == "horizon", 1 if param == "band" else inf
        number = isinstance(value, int if whole else int | float) and not isinstance(value, bool)
        if not (number and isfinite(value) and (1 if whole else 0) <= value <= highest):  # type: ignore[arg-type, operator]
            wanted = (
                "a whole number of bars from 1"
                if whole
                else "a number from 0" + (" to 1" if highest == 1 else "")
            )
            raise ConfigError(f"strategy {name!r}: parameter {param} is {value!r}, not {wanted}.")
    return KINDS[kind](name, **params)  # type: ignore[arg-type]


def _one_of(given: str, known: list[str]) -> str:
    near = difflib.get_close_matches(given, known, n=1)
    return (
        f"did you mean {near[0]}? There are {', '.join(known)}" if near else f"take one of {', '.join(known)}"
    )
