"""How long a bar is: `{n}{s|m|h|d}`, or `session` for exchange days."""

import re
from dataclasses import dataclass

from barcast.models import ConfigError
from barcast.models.bar import TIME_UNIT

DAY = 86_400 * TIME_UNIT
_UNITS = {"s": TIME_UNIT, "m": 60 * TIME_UNIT, "h": 3600 * TIME_UNIT, "d": DAY}


@dataclass(frozen=True, slots=True)
class Timeframe:
    """The length of a bar. `duration` is in nanoseconds, None for `session`."""

    text: str
    duration: int | None

    @classmethod
    def parse(cls, text: str) -> "Timeframe":
        """Read `1m`, `4h`, `1d` or `session`. Raise `ConfigError` for anything else.

        A duration below a day must divide a day; from a day on it must be whole days. It has one name, in the
        largest unit, since topics, models and baselines go by it.
        """
        if text == "session":
            return cls(text, None)
        match = re.fullmatch(r"([1-9][0-9]{0,6})([smhd])", text)
        if match is None:
            raise ConfigError(
                f"timeframe {text!r} is not understood: "
                "write a number and s, m, h or d, such as 15m, or session."
            )
        duration = int(match[1]) * _UNITS[match[2]]
        if DAY % duration if duration < DAY else duration % DAY:
            raise ConfigError(
                f"timeframe {text!r} neither divides a day nor is whole days: "
                "take one such as 15m, 4h, 1d or 7d."
            )
        if text != (name := _name(duration)):
            raise ConfigError(f"timeframe {text!r} is {name!r}: write that.")
        return cls(text, duration)

    @classmethod
    def of(cls, duration: int) -> "Timeframe":
        """The timeframe of this many nanoseconds. Raise `ConfigError` when there is none."""
        if duration % TIME_UNIT:
            raise ConfigError(f"{duration / TIME_UNIT} s is no timeframe: take whole seconds.")
        return cls.parse(_name(duration))

    def __str__(self) -> str:
        return self.text


def _name(duration: int) -> str:
    """Whole seconds, in nanoseconds, by the largest unit that divides them."""
    unit = next(unit for unit in reversed(_UNITS) if duration % _UNITS[unit] == 0)
    return f"{duration // _UNITS[unit]}{unit}"
