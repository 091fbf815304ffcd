"""The last bars of every symbol, and windows cut from them at a close time."""

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator, Sequence
from copy import copy
from enum import Enum
from hashlib import blake2b
from itertools import pairwise
from operator import attrgetter
from struct import Struct
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from barcast.models.bar import Adjustment, Bar

SLACK = 64
"""Bars kept beyond the window's length, so that a window can be cut while newer bars are already there."""

_ROW, _BAR = Struct("=5d"), Struct("=q5d")
_LANES = Struct("<2Q")
_lanes_of, _lanes_to, _bar_of = _LANES.unpack, _LANES.pack, _BAR.pack
_LANE = 2**64 - 1
_time = attrgetter("time")


class Window(msgspec.Struct, frozen=True, eq=False, gc=False):
    """The last bars of one symbol up to and including `close_time`.

    `close_times` is (N,) int64 nanoseconds, ascending; `values` is (N, 5) float64: open, high, low,
    close, volume, all on the price basis of the newest bar. N is at most the length asked for, fewer while
    the symbol is warming. Both arrays are read-only, valid until the next bar of the symbol is put.

    `sums`, where they are kept, are those of the hashes of all bars before each of these and after the last,
    (N + 1, 2) uint64, as they were received; `basis` is what put the values on another basis.
    """

    symbol: str
    close_times: NDArray[np.int64]
    values: NDArray[np.float64]
    sums: NDArray[np.uint64] | None = None
    basis: tuple[Adjustment, ...] = ()

    @property
    def close_time(self) -> int:
        """The close of the newest bar, in nanoseconds."""
        return self.close_times.item(-1)

    @property
    def reference(self) -> float:
        """The newest closing price."""
        return self.values.item(-1, 3)

    @property
    def digest(self) -> bytes | None:
        """What stands for symbol, closes and values: equal for equal ones, 16 bytes; None without `sums`.

        A bar's hash has its symbol and close in it, so the sum over a run of bars says which they are
        (AdHash: Bellare and Micciancio 1997). It does not withstand who makes up bars to deceive it.
        """
        if self.sums is None:
            return None
        lane = self.sums.item  # by a flat index
        told = _lanes_to((lane(-2) - lane(0)) & _LANE, (lane(-1) - lane(1)) & _LANE)
        for adjustment in self.basis:
            if adjustment.time >= self.close_times[0]:
                changed = repr((adjustment.time, adjustment.factor, adjustment.kind)).encode()
                told = blake2b(told + changed, digest_size=16).digest()
        return told

    def part(self, start: int, stop: int) -> "Window":
        """The bars from one place up to before another, on the basis of all."""
        sums = None if self.sums is None else self.sums[start : stop + 1]
        return Window(self.symbol, self.close_times[start:stop], self.values[start:stop], sums, self.basis)

    def __len__(self) -> int:
        return len(self.close_times)


def check_long_enough(window: Window, least: int) -> None:
    """Raise ValueError for a window of fewer bars than a forecast needs."""
    if len(window) < least:
        raise ValueError(f"{window.symbol} has {len(window)} bars; a forecast needs {least}")


def runs(windows: Sequence[Window], length: int, apart: int) -> list[list[Window]]:
    """Windows in order, those together that were cut from one array, each at most `apart` bars on.

    The first of a run has at least `length` bars, so that none is warming.
    """
    found: list[list[Window]] = []
    for window in windows:
        before = found[-1][-1] if found else None
        if before is not None and len(found[-1][0]) >= length and 0 < _ahead(before, window) <= apart:
            found[-1].append(window)
        else:
            found.append([window])
    return found


def joined(run: Sequence[Window]) -> Window:
    """The bars from the first one of the first window of a run to the last of the last, with their sums."""
    first = run[0]
    if len(run) == 1:
        return first
    times, values, sums = [first.close_times], [first.values], [first.sums]
    for before, window in pairwise(run):
        new = _ahead(before, window)
        times.append(window.close_times[-new:])
        values.append(window.values[-new:])
        sums.append(None if window.sums is None else window.sums[-new:])
    known = [each for each in sums if each is not None]
    together = np.concatenate(known) if len(known) == len(sums) else None
    return Window(first.symbol, np.concatenate(times), np.concatenate(values), together, first.basis)


def _ahead(before: Window, window: Window) -> int:
    """How many rows a window ends behind another one in the same memory; 0 if it is not so."""
    a, b = before.values, window.values
    same = a.base is b.base and a.base is not None and a.strides == b.strides == (40, 8)
    other = before.symbol != window.symbol or before.basis != window.basis
    if not same or other or len(window) < len(before):
        return 0
    start = (b.__array_interface__["data"][0] - a.__array_interface__["data"][0]) // 40
    behind: int = start + len(b) - len(a)
    return behind


class Verdict(Enum):
    """What a bar was to the bars already known of its symbol."""

    NEWEST = "newest"
    OLDER = "older"
    CORRECTION = "correction"
    DUPLICATE = "duplicate"
    FORGOTTEN = "forgotten"


NEWEST = Verdict.NEWEST
"""By a name that takes no look into the class: it is needed for every bar."""


class RingState(msgspec.Struct, frozen=True):
    """The bars of one symbol: closes as `<i8`, values as `<f8` (N, 5), and payloads that were corrected."""

    times: bytes
    values: bytes
    superseded: dict[int, set[tuple[float, float, float, float, float]]]


class WindowsState(msgspec.Struct, frozen=True):
    """All that windows know, to be stored."""

    length: int
    rings: dict[str, RingState]
    adjustments: dict[str, list[Adjustment]]


class Windows:
    """The newest bars of each symbol, as they were received, and what is declared about their basis.

    The state is one `_Ring` for each symbol, allocated when its first bar comes, and the adjustments of each
    symbol in order of their time. With `hashed` the windows that are cut know what stands for their bars.
    """

    def __init__(self, length: int, hashed: bool = False) -> None:
        self.length, self._hashed = length, hashed
        self._rings: dict[str, _Ring] = {}
        self._adjustments: dict[str, list[Adjustment]] = {}

    @property
    def state(self) -> WindowsState:
        """Everything known, by value."""
        rings = {symbol: ring.state for symbol, ring in self._rings.items()}
        return WindowsState(self.length, rings, {s: list(known) for s, known in self._adjustments.items()})

    @classmethod
    def of(cls, state: WindowsState) -> "Windows":
        """The windows that had this state."""
        windows = cls(state.length)
        windows._rings = {s: _Ring.of(ring, state.length + SLACK) for s, ring in state.rings.items()}
        windows._adjustments = {symbol: list(known) for symbol, known in state.adjustments.items()}
        return windows

    def put(self, bar: Bar) -> Verdict:
        """Give a bar its place.

        A payload already seen for this symbol and close is a duplicate, also after a correction; other
        values for a known close replace the bar for later windows; an older bar is inserted where it
        belongs, or forgotten if every bar that is kept is newer.
        """
        ring = self._rings.get(bar.symbol)
        if ring is None:
            hashed = bar.symbol.encode() if self._hashed else None
            ring = self._rings[bar.symbol] = _Ring(self.length + SLACK, hashed)
        if bar.close_time > ring.newest:
            ring.append(bar)
            return NEWEST
        return ring.place(bar.close_time, bar.values)

    def warm(self, bars: Iterable[Bar]) -> int:
        """Put bars of the history whose closes are not known yet; return how many there were."""
        return sum(not self.knows(bar.symbol, bar.close_time) and bool(self.put(bar)) for bar in bars)

    def knows(self, symbol: str, close_time: int) -> bool:
        """Whether a bar of this symbol and close is kept."""
        ring = self._rings.get(symbol)
        return ring is not None and ring.find(close_time) is not None

    def newest(self, symbol: str) -> int:
        """The close of a symbol's newest bar in nanoseconds, -1 without one."""
        ring = self._rings.get(symbol)
        return -1 if ring is None else ring.newest

    def count(self, symbol: str) -> int:
        """How many bars of a symbol are kept."""
        ring = self._rings.get(symbol)
        return 0 if ring is None else ring.stop - ring.start

    def adjust(self, adjustment: Adjustment) -> bool:
        """Take note of another price basis; False when it was declared before.

        Windows that end after its time show the bars up to it on the new basis. It replaces what was declared
        for the same time; a factor of 1 withdraws it.
        """
        known = self._adjustments.setdefault(adjustment.symbol, [])
        if adjustment in known:
            return False
        known[:] = [other for other in known if other.time != adjustment.time]
        insort(known, adjustment, key=_time)
        return True

    @property
    def adjusted(self) -> bool:
        """Whether any adjustment is known."""
        return bool(self._adjustments)

    def rebased(self, symbol: str) -> bool:
        """Whether an adjustment takes effect between the newest two bars of a symbol."""
        if symbol not in self._adjustments:
            return False
        after, before = self._rings[symbol].newest_two()
        return any(after <= adjustment.time < before for adjustment in self._adjustments[symbol])

    def cut(self, symbol: str, close_time: int, length: int) -> Window | None:
        """The symbol's last `length` bars up to `close_time`, or None when that very bar is not kept.

        A newer bar that is already there is never in the window.
        """
        ring = self._rings.get(symbol)
        at = None if ring is None else ring.stop - 1 if close_time == ring.newest else ring.find(close_time)
        if ring is None or at is None:
            return None
        first = at + 1 - length
        if first < ring.start:
            first = ring.start
        times, values = ring.times[first : at + 1], ring.values[first : at + 1]
        sums = None if ring.sums is None else ring.sums[first : at + 2]
        if symbol not in self._adjustments:
            return Window(symbol, times, values, sums)
        basis = tuple(a for a in self._adjustments[symbol] if a.time < times[-1])
        return Window(symbol, times, on_one_basis(times, values, basis), sums, basis)

    @property
    def symbols(self) -> list[str]:
        """The symbols of which there are bars."""
        return list(self._rings)

    def superseded(self) -> Iterator[tuple[str, int, frozenset[tuple[float, ...]]]]:
        """Of the bars that are kept and were corrected: symbol, close, and what they were before."""
        for symbol, ring in self._rings.items():
            for time, payloads in ring.superseded.items():
                yield symbol, time, frozenset(payloads)

    def foreseen(self, symbol: str, length: int, history: Iterable[Bar]) -> Window | None:
        """A copy of the symbol's newest window, as it would be with `length` bars and warmed by a history.

        None without any bar. Later bars leave it alone.
        """
        ahead, ring = Windows(length), self._rings.get(symbol)
        if ring is not None:
            ahead._rings[symbol] = ring.copy(length + SLACK)
        if symbol in self._adjustments:
            ahead._adjustments[symbol] = list(self._adjustments[symbol])
        ahead.warm(history)
        own = ahead._rings.get(symbol)
        return None if own is None else ahead.cut(symbol, own.newest, length)

    def lengthen(self, length: int) -> None:
        """Keep at least `length` bars from now on: a newly activated model may need more."""
        if length > self.length:
            self.length = length
            for ring in self._rings.values():
                ring.allocate(length + SLACK)


def window_at(history: Window, place: int, length: int, adjustments: Sequence[Adjustment] = ()) -> Window:
    """A history's bars up to the one at `place`, at most `length` of them, on the price basis of that one.

    `adjustments` are the symbol's, in order of their time.
    """
    window = history.part(max(0, place + 1 - length), place + 1)
    if not adjustments:
        return window
    basis = tuple(a for a in adjustments if a.time < window.close_time)
    values = on_one_basis(window.close_times, window.values, basis)
    return Window(window.symbol, window.close_times, values, window.sums, basis)


def hashed(history: Window) -> Window:
    """The same bars, which know what stands for them; see `Window.digest`."""
    symbol = history.symbol.encode()
    bars = zip(history.close_times.tolist(), *history.values.T.tolist(), strict=True)
    hashes = [_lanes_of(blake2b(_bar_of(*bar) + symbol, digest_size=16).digest()) for bar in bars]
    sums = np.zeros((len(history) + 1, 2), np.uint64)
    np.cumsum(np.array(hashes, np.uint64).reshape(-1, 2), 0, out=sums[1:])
    return Window(history.symbol, history.close_times, history.values, sums, history.basis)


def on_one_basis(
    times: NDArray[np.int64], values: NDArray[np.float64], adjustments: Iterable[Adjustment]
) -> NDArray[np.float64]:
    """Values (N, 5) on the basis of the last row: each adjustment before it scales the rows up to its time.

    `times` is (N,) int64 nanoseconds; the adjustments are in order of their time.
    """
    scaled = values.copy()
    for adjustment in adjustments:
        if adjustment.time < times[-1]:
            older = scaled[: int(np.searchsorted(times, adjustment.time, side="right"))]
            older[:, :4] *= adjustment.factor
            if adjustment.kind == "split":
                older[:, 4] /= adjustment.factor
    scaled.flags.writeable = False
    return scaled


class _Ring:
    """Up to `capacity` bars, ascending by close, as one contiguous slice [start:stop) of a longer room.

    `times`, `values` and `sums` are what windows are cut from. `_stamps`, `_rows` and `_lanes` write the same
    memory, a bar at a time: item assignment of numpy takes several times as long.
    """

    __slots__ = (
        "_hashed",
        "_lanes",
        "_rows",
        "_stamps",
        "capacity",
        "newest",
        "room",
        "start",
        "stop",
        "sums",
        "superseded",
        "times",
        "values",
    )

    def __init__(self, capacity: int, hashed: bytes | None = None) -> None:
        self.newest = -1
        self._hashed = hashed
        self.sums = None if hashed is None else np.zeros((1, 2), np.uint64)
        self.start = self.stop = self.room = 0
        self.superseded: dict[int, set[tuple[float, ...]]] = {}
        self.times, self.values = np.empty(0, np.int64), np.empty((0, 5))
        self.allocate(capacity)

    def allocate(self, capacity: int) -> None:
        """Take room for `capacity` bars, and keep those that are there."""
        room = capacity + capacity // 4
        times, values = np.empty(room, np.int64), np.empty((room, 5))
        count = self.stop - self.start
        times[:count] = self.times[self.start : self.stop]
        values[:count] = self.values[self.start : self.stop]
        if self.sums is not None:
            sums = np.zeros((room + 1, 2), np.uint64)
            sums[: count + 1] = self.sums[self.start : self.stop + 1]
            self.sums, self._lanes = sums, sums.data.cast("B").cast("Q")
        self.capacity, self.room, self.start, self.stop = capacity, room, 0, count
        self._stamps, self._rows = times.data, values.data.cast("B")
        self.times, self.values = times, values
        self.times.flags.writeable = self.values.flags.writeable = False

    @property
    def state(self) -> RingState:
        """The bars and what they were corrected from."""
        kept = slice(self.start, self.stop)
        times, values = self.times[kept].astype("<i8"), self.values[kept].astype("<f8")
        known: Any = {time: set(payloads) for time, payloads in self.superseded.items()}
        return RingState(times.tobytes(), values.tobytes(), known)

    @classmethod
    def of(cls, state: RingState, capacity: int) -> "_Ring":
        """The ring that had this state."""
        ring = cls(capacity)
        times = np.frombuffer(state.times, "<i8").astype(np.int64)
        ring.times, ring.values = times, np.frombuffer(state.values, "<f8").astype(float).reshape(-1, 5)
        ring.start, ring.stop = 0, len(times)
        ring.newest = int(times[-1])
        ring.superseded = {time: set(payloads) for time, payloads in state.superseded.items()}
        ring.allocate(capacity)
        return ring

    def copy(self, capacity: int) -> "_Ring":
        """The same bars in a room of their own, for at least `capacity`."""
        other = copy(self)
        other.superseded = {}
        other.allocate(max(capacity, self.capacity))
        return other

    def append(self, bar: Bar) -> None:
        """Put a bar that is newer than all others."""
        if self.stop == self.room:
            self.allocate(self.capacity)
        at, time = self.stop, bar.close_time
        self.newest = self._stamps[at] = time
        told = _bar_of(time, bar.open, bar.high, bar.low, bar.close, bar.volume)
        self._rows[40 * at : 40 * at + 40] = told[8:]
        if self._hashed is not None:
            self._add(at, told + self._hashed)
        self.stop = at + 1
        if at + 1 - self.start > self.capacity:
            if self.superseded:
                self.superseded.pop(self._stamps[self.start], None)
            self.start += 1

    def place(self, time: int, values: tuple[float, ...]) -> Verdict:
        """Put a bar that is not newer than all others."""
        at = self.start + bisect_left(self.times[self.start : self.stop], time)
        if self._stamps[at] == time:
            known = tuple(self.values[at].tolist())
            if known == values or values in self.superseded.get(time, ()):
                return Verdict.DUPLICATE
            self.superseded.setdefault(time, set()).add(known)
            _ROW.pack_into(self._rows, 40 * at, *values)
            self._sum(at, self.stop)
            return Verdict.CORRECTION
        if at == self.start and self.stop - self.start == self.capacity:
            return Verdict.FORGOTTEN
        if self.stop == self.room:
            at -= self.start
            self.allocate(self.capacity)
        self._stamps[at + 1 : self.stop + 1] = self._stamps[at : self.stop]
        self._rows[40 * (at + 1) : 40 * (self.stop + 1)] = self._rows[40 * at : 40 * self.stop]
        self._stamps[at] = time
        _ROW.pack_into(self._rows, 40 * at, *values)
        self.stop += 1
        self._sum(at, self.stop)
        if self.stop - self.start > self.capacity:
            self.superseded.pop(self._stamps[self.start], None)
            self.start += 1
        return Verdict.OLDER

    def _sum(self, start: int, stop: int) -> None:
        """Let the sums hold the bars from one place up to before another, where sums are kept."""
        if self._hashed is not None:
            for at in range(start, stop):
                told = _bar_of(self._stamps[at], *_ROW.unpack_from(self._rows, 40 * at))
                self._add(at, told + self._hashed)

    def _add(self, at: int, told: bytes) -> None:
        one, other = _lanes_of(blake2b(told, digest_size=16).digest())
        lanes, at = self._lanes, 2 * at
        lanes[at + 2] = (lanes[at] + one) & _LANE
        lanes[at + 3] = (lanes[at + 1] + other) & _LANE

    def newest_two(self) -> tuple[int, int]:
        """The closes of the newest bar and the one before it, or twice its own."""
        return self._stamps[max(self.start, self.stop - 2)], self.newest

    def find(self, time: int) -> int | None:
        """Where the bar of this close is."""
        if time == self.newest:
            return self.stop - 1
        at = self.start + bisect_left(self.times[self.start : self.stop], time)
        return at if at < self.stop and self._stamps[at] == time else None
