"""From forecasts to targets: pure functions of all forecasts of a due group."""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol, cast

from barcast.models import ConfigError, Forecast
from barcast.strategies.median_drift import MedianDrift
from barcast.strategies.params import checked, one_of
from barcast.strategies.quantile_band import QuantileBand
from barcast.strategies.rank import Rank
from barcast.strategies.skew_tilt import SkewTilt
from barcast.strategies.user import PATH, from_file, from_package, made, packaged
from barcast.strategies.vol_target import VolatilityTarget

__all__ = [
    "KINDS",
    "PATH",
    "MedianDrift",
    "QuantileBand",
    "Rank",
    "SkewTilt",
    "Strategy",
    "VolatilityTarget",
    "build",
    "identify",
    "kinds",
]


class Strategy(Protocol):
    """Turns the forecasts of one group into wanted exposures."""

    @property
    def name(self) -> str:
        """The segment that names this strategy in topics and reports."""
        ...

    def on_forecasts(self, close_time: int, forecasts: Mapping[str, Forecast]) -> Mapping[str, float]:
        """The target of each symbol, from -1 (fully short) to 1 (fully long), from this group alone.

        A symbol that is left out keeps the target that it had.
        """
        ...


KINDS: Mapping[str, type] = {
    "quantile-band": QuantileBand,
    "median-drift": MedianDrift,
    "vol-target": VolatilityTarget,
    "skew-tilt": SkewTilt,
    "rank": Rank,
}
"""The strategies that are built in."""


def kinds() -> list[str]:
    """What a config can name: the built-in strategies, and those of installed packages."""
    return list(dict.fromkeys([*KINDS, *packaged()]))


def identify(kind: str) -> tuple[str, str]:
    """The name that a strategy has unless it is given another, and the digest of the file that it is in.

    The digest is the first 16 hexadecimal digits of the SHA-256; a built-in strategy has none. Raise
    `ConfigError` for a kind that cannot be loaded.
    """
    cls, digest = _found(kind, "")
    name = cls.__name__ if PATH.fullmatch(kind) else kind
    return re.sub(r"[^A-Za-z0-9._-]", "", name).lstrip("._-")[:32], digest


def build(
    kind: str, name: str, params: Mapping[str, object], digest: str = "", kept: Path | None = None
) -> Strategy:
    """The strategy of this kind, called `name`.

    A kind is built in, the name of an entry point in the group `barcast.strategies`, or `FILE.py:CLASS`. A
    file is executed anew for each, so that no strategy shares a variable of the module with another. With a
    `digest` the file must be the one that had it, or the folder `kept` hold that one as DIGEST.py. Raise
    `ConfigError` for an unknown kind or parameter, saying which exist, for a value that does not fit, for a
    file that is no strategy or has changed, for a class that raises when it is made, and for a name that
    cannot be a segment of a topic.
    """
    cls, _ = _found(kind, digest, kept)
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,31}", name):
        raise ConfigError(
            f"strategy name {name!r} cannot be part of a topic: "
            "take up to 32 letters, digits, dots, underscores and dashes."
        )
    values = checked(cls, name, params)
    return cast(Strategy, made(cls, name, values))


def _found(kind: str, digest: str, kept: Path | None = None) -> tuple[type, str]:
    if path := PATH.fullmatch(kind):
        return from_file(Path(path["file"]), path["name"], digest, kept)
    if kind in KINDS:
        return KINDS[kind], ""
    if found := from_package(kind):
        if digest not in ("", found[1]):
            raise ConfigError(
                f"strategy {kind!r}: its package changed since it was recorded (the digest is {found[1]}, "
                f"not {digest}); install that version to go on from there, or name a changed one otherwise"
            )
        return found
    raise ConfigError(
        f"strategy kind {kind!r} is unknown: {one_of(kind, kinds())}, or name a file and its class as "
        "path/to/file.py:Class."
    )
