"""The last bars of every symbol, and windows cut from them at a close time."""

from bisect import bisect_left
from collections.abc import Iterable
from dataclasses import dataclass
from enum import Enum

import numpy as np
from numpy.typing import NDArray

from barcast.models.bar import Bar

SLACK = 64
"""Bars kept beyond the window's length, so that a window can be cut while newer bars are already there."""


@dataclass(frozen=True, slots=True, eq=False)
class Window:
    """The last bars of one symbol up to and including `close_time`.

    `close_times` is (N,) int64 nanoseconds, ascending; `values` is (N, 5) float64: open, high, low,
    close, volume. N is at most the length asked for, fewer while the symbol is warming. Both arrays are
    read-only views, valid until the next bar of the symbol is put.
    """

    symbol: str
    close_times: NDArray[np.int64]
    values: NDArray[np.float64]

    @property
    def close_time(self) -> int:
        """The close of the newest bar, in nanoseconds."""
        return int(self.close_times[-1])

    @property
    def reference(self) -> float:
        """The newest closing price."""
        return float(self.values[-1, 3])

    def __len__(self) -> int:
        return len(self.close_times)


class Verdict(Enum):
    """What a bar was to the bars already known of its symbol."""

    NEWEST = "newest"
    OLDER = "older"
    CORRECTION = "correction"
    DUPLICATE = "duplicate"
    FORGOTTEN = "forgotten"


class Windows:
    """The newest bars of each symbol.

    The state is one `_Ring` for each symbol, allocated when its first bar comes.
    """

    def __init__(self, length: int) -> None:
        self.length = length
        self._rings: dict[str, _Ring] = {}

    def put(self, bar: Bar) -> Verdict:
        """Give a bar its place.

        A payload already seen for this symbol and close is a duplicate, also after a correction; other
        values for a known close replace the bar for later windows; an older bar is inserted where it
        belongs, or forgotten if every bar that is kept is newer.
        """
        ring = self._rings.get(bar.symbol)
        if ring is None:
            ring = self._rings[bar.symbol] = _Ring(self.length + SLACK)
        return ring.put(bar.close_time, bar.values)

    def warm(self, bars: Iterable[Bar]) -> int:
        """Put bars of the history whose closes are not known yet; return how many there were."""
        return sum(not self.knows(bar.symbol, bar.close_time) and bool(self.put(bar)) for bar in bars)

    def knows(self, symbol: str, close_time: int) -> bool:
        """Whether a bar of this symbol and close is kept."""
        ring = self._rings.get(symbol)
        return ring is not None and ring.find(close_time) is not None

    def cut(self, symbol: str, close_time: int, length: int) -> Window | None:
        """The symbol's last `length` bars up to `close_time`, or None when that very bar is not kept.

        A newer bar that is already there is never in the window.
        """
        ring = self._rings.get(symbol)
        at = None if ring is None else ring.find(close_time)
        if ring is None or at is None:
            return None
        first = max(ring.start, at + 1 - length)
        times, values = ring.times[first : at + 1], ring.values[first : at + 1]
        times.flags.writeable = values.flags.writeable = False
        return Window(symbol, times, values)

    def lengthen(self, length: int) -> None:
        """Keep at least `length` bars from now on: a newly activated model may need more."""
        if length > self.length:
            self.length = length
            for ring in self._rings.values():
                ring.grow(length + SLACK)


class _Ring:
    """Up to `capacity` bars, ascending by close, as one contiguous slice [start:stop) of twice the room."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self.times = np.empty(2 * capacity, np.int64)
        self.values = np.empty((2 * capacity, 5))
        self.start = self.stop = 0
        self.superseded: dict[int, set[tuple[float, ...]]] = {}

    def put(self, time: int, values: tuple[float, ...]) -> Verdict:
        if self.stop == self.start or time > self.times[self.stop - 1]:
            self._insert(self.stop, time, values)
            return Verdict.NEWEST
        at = self.start + bisect_left(self.times[self.start : self.stop], time)
        if self.times[at] == time:
            known = tuple(self.values[at].tolist())
            if known == values or values in self.superseded.get(time, ()):
                return Verdict.DUPLICATE
            self.superseded.setdefault(time, set()).add(known)
            self.values[at] = values
            return Verdict.CORRECTION
        if at == self.start and self.stop - self.start == self.capacity:
            return Verdict.FORGOTTEN
        self._insert(at, time, values)
        return Verdict.OLDER

    def find(self, time: int) -> int | None:
        if self.stop > self.start and self.times[self.stop - 1] == time:
            return self.stop - 1
        at = self.start + bisect_left(self.times[self.start : self.stop], time)
        return at if at < self.stop and self.times[at] == time else None

    def grow(self, capacity: int) -> None:
        kept = slice(self.start, self.stop)
        times, values = self.times[kept].copy(), self.values[kept].copy()
        self.capacity, self.start, self.stop = capacity, 0, len(times)
        self.times, self.values = np.empty(2 * capacity, np.int64), np.empty((2 * capacity, 5))
        self.times[: self.stop], self.values[: self.stop] = times, values

    def _insert(self, at: int, time: int, values: tuple[float, ...]) -> None:
        if self.stop == len(self.times):
            kept = self.stop - self.start
            self.times[:kept] = self.times[self.start : self.stop]
            self.values[:kept] = self.values[self.start : self.stop]
            at, self.start, self.stop = at - self.start, 0, kept
        if at < self.stop:
            self.times[at + 1 : self.stop + 1] = self.times[at : self.stop].copy()
            self.values[at + 1 : self.stop + 1] = self.values[at : self.stop].copy()
        self.times[at], self.values[at] = time, values
        self.stop += 1
        if self.stop - self.start > self.capacity:
            self.superseded.pop(int(self.times[self.start]), None)
            self.start += 1
