"""One OHLCV interval, stamped by its close."""

from typing import Literal

import msgspec

TIME_UNIT = 1_000_000_000
"""Nanoseconds in a second: every time inside the program is int64 nanoseconds since 1970, UTC."""

LEAST, MOST = 1e-15, 1e15
"""Prices beyond, and volumes above, are no market's, and would overflow a forecast: the edge refuses them."""


class Bar(msgspec.Struct, frozen=True, gc=False):
    """One OHLCV interval of one symbol.

    `close_time` is nanoseconds since 1970 UTC; prices and volume are finite, prices positive and
    `low <= open, close <= high`. The edge that decodes bars checks this; the interior relies on it.
    """

    symbol: str
    close_time: int
    open: float
    high: float
    low: float
    close: float
    volume: float
    trades: int | None = None
    vwap: float | None = None

    @property
    def values(self) -> tuple[float, float, float, float, float]:
        """Open, high, low, close and volume: what a window keeps."""
        return (self.open, self.high, self.low, self.close, self.volume)


class Adjustment(msgspec.Struct, frozen=True, gc=False):
    """A declared change of the price basis of one symbol: a split, or the roll of a future.

    Prices of bars that close after `time` (nanoseconds since 1970 UTC) are `factor` times what they would
    have been: 0.5 for two shares in the place of one. A split also divides what was traded by the factor.
    """

    symbol: str
    time: int
    factor: float
    kind: Literal["split", "roll"]
