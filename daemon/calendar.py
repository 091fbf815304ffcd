"""When bars close: used for holes, the end times of horizons and periods per year; never for filling.

Three kinds of calendar. `24x7`: bars step from 1970-01-01 UTC, a session is a day. `fx`: a day runs from
17:00 to 17:00 New York, Sunday evening to Friday, holidays included; bars step from 17:00. Any other name is
a calendar of exchange_calendars: bars step from the session's open and the last one ends at its close; where
there is a lunch break, each half steps from its own open. All times are int64 nanoseconds since 1970, UTC.
"""

import difflib
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Protocol
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

from barcast.daemon.timeframe import DAY, Timeframe
from barcast.models import ConfigError, DataError
from barcast.models.bar import TIME_UNIT

YEARS = range(1970, 2200)
"""The years in which sessions are looked up."""

REACH = 2
"""Closes after a bar that must be known for it to be taken: its signal is valid until then."""

_MARGIN = 5
"""Years read before and after a time that is not covered yet."""

_WHOLE_SESSION = 7 * DAY
"""A step longer than any session: its only bar ends with it."""

_KEPT = 64
"""Stretches of exchanges' sessions that are kept: reading one takes 0.1 s, and every replay needs three."""


class Calendar:
    """The bar closes of one timeframe.

    The state is what `_closes` has read of the sessions so far; it grows by years when a time needs it.
    Reading an exchange's sessions takes about 0.1 s, once in a process. A time for which the calendar has
    no sessions raises `DataError`.
    """

    def __init__(self, name: str, timeframe: Timeframe) -> None:
        """Raise `ConfigError` when there is no such calendar, or it has no such timeframe."""
        self.name = name
        self.timeframe = timeframe
        self._closes = _closes(name, timeframe)
        self._periods_per_year: int | None = None
        # The symbols of a close ask the same one after the other.
        self._is_close, self._next, self._oldest_valid = (-1, False), (-1, -1), (-1, -1)
        self._covered: dict[int, tuple[int, int]] = {}

    def close_at_or_after(self, time: int) -> int:
        """The first bar close that is not before `time`."""
        return self._closes.after(time - 1, 1)[0]

    def closes_after(self, close_time: int, count: int) -> tuple[int, ...]:
        """The next `count` bar closes after `close_time`, over closures: where horizons end."""
        return self._closes.after(close_time, count)

    def is_close(self, time: int) -> bool:
        """Whether a bar closes at `time`, and the calendar also knows the bars after it."""
        if time != self._is_close[0]:
            self._is_close = (time, self._closes.is_close(time) and self.covers(time))
        return self._is_close[1]

    def covers(self, time: int, count: int = REACH) -> bool:
        """Whether sessions are known around `time`, and `count` closes after it."""
        if isinstance(self._closes, _Steps):
            return True
        first, last = self._covered.get(count, (time + 1, time - 1))
        if not first <= time <= last:
            try:
                self._closes.after(time, count)
            except DataError:
                return False
            self._covered[count] = (min(first, time), max(last, time))
        return True

    def closes_before(self, close_time: int, count: int) -> int:
        """The `count`-th bar close before another. Raise `DataError` where no sessions are known."""
        return self._closes.preceding(close_time, count)

    def missing_between(self, previous_close: int, close_time: int) -> int:
        """How many bars close strictly between: a hole inside sessions. A closure counts nothing."""
        if close_time <= previous_close:
            return 0
        return self._closes.between(previous_close, close_time)

    def follows(self, previous_close: int, close_time: int) -> bool:
        """Whether `close_time` is the first close after another: no bar is missing between the two."""
        if previous_close != self._next[0]:
            self._next = (previous_close, self._closes.after(previous_close, 1)[0])
        return close_time == self._next[1]

    def closes_for_opens(self, open_times: NDArray[np.int64]) -> NDArray[np.int64]:
        """The closes of the bars that open at many times (N,); -1 where no bar opens.

        A daily bar of a session may also be stamped by its date (midnight UTC); its close is then the close
        of that date's session.
        """
        if not len(open_times):
            return np.empty(0, np.int64)
        return self._closes.for_opens(np.asarray(open_times, np.int64))

    def are_closes(self, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which of many times (N,) are closes of a bar, (N,)."""
        if not len(times):
            return np.empty(0, np.bool_)
        return self._closes.are(np.asarray(times, np.int64))

    def valid_until(self, close_time: int) -> int:
        """Until when a signal of this close may be used: the close of the second next bar."""
        return self._closes.after(close_time, 2)[1]

    def oldest_valid(self, time: int) -> int:
        """The oldest close whose signal may still be used at `time`; those before it are stale."""
        if time != self._oldest_valid[0]:
            self._oldest_valid = (time, self._closes.preceding(time, 2))
        return self._oldest_valid[1]

    @property
    def periods_per_year(self) -> int:
        """Bars in a year, by which returns are annualised.

        `24x7`: 365 days. `fx`: 260 days (52 weeks of five). An exchange: the mean number of closes in a year
        from 2010 to 2019, or in the first years of a calendar that begins later, rounded: 252 for daily bars
        of the New York Stock Exchange.
        """
        if self._periods_per_year is None:
            duration = self.timeframe.duration or DAY
            if self.name == "24x7":
                self._periods_per_year = round(365 * DAY / duration)
            elif self.name == "fx":
                self._periods_per_year = round(260 * DAY / duration)
            else:
                first = max(2010, self._closes.years.start)
                last = max(2020, first + 5)
                closes = self._closes.between(_new_year(first), _new_year(last))
                self._periods_per_year = round(closes / (last - first))
        return self._periods_per_year


class Calendars:
    """The calendar of each symbol: `default`, unless `others` (symbol -> name) says another.

    There is no state but that of the calendars.
    """

    def __init__(
        self, default: str, timeframe: Timeframe, others: Mapping[str, str] = MappingProxyType({})
    ) -> None:
        """Raise `ConfigError` when there is no such calendar, or it has no such timeframe."""
        if default == "24x7" and timeframe.duration is None:
            raise ConfigError("timeframe 'session' needs an exchange's calendar: with 24x7 take 1d.")
        self.timeframe = timeframe
        self.default = Calendar(default, timeframe)
        known = {default: self.default}
        for name in others.values():
            if name not in known:
                known[name] = Calendar(name, timeframe)
        self.others = {symbol: name for symbol, name in others.items() if name != default}
        self._others = {symbol: known[name] for symbol, name in self.others.items()}

    def of(self, symbol: str) -> Calendar:
        """The calendar of one symbol."""
        return self._others.get(symbol, self.default)

    def split(self, symbols: Collection[str]) -> Iterable[tuple[Calendar, Collection[str]]]:
        """The symbols of each calendar."""
        if not self._others:
            return [(self.default, symbols)]
        found: dict[str, tuple[Calendar, list[str]]] = {}
        for symbol in symbols:
            calendar = self.of(symbol)
            found.setdefault(calendar.name, (calendar, []))[1].append(symbol)
        return found.values()

    def open(self, symbols: Collection[str], close_time: int) -> set[str]:
        """The symbols of which a bar closes at `close_time`."""
        if not self._others:
            return set(symbols) if self.default.is_close(close_time) else set()
        parts = [own for calendar, own in self.split(symbols) if calendar.is_close(close_time)]
        return set().union(*parts)

    @property
    def periods_per_year(self) -> int:
        """Bars in a year of the busiest calendar: groups come about as often when symbols share a grid."""
        return max(c.periods_per_year for c in (self.default, *self._others.values()))


def iso(time: int) -> str:
    """A time in nanoseconds as RFC 3339 in UTC, for messages."""
    seconds, rest = divmod(time, TIME_UNIT)
    whole = datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%dT%H:%M:%S")
    return f"{whole}.{rest:09d}Z" if rest else f"{whole}Z"


class _Closes(Protocol):
    @property
    def years(self) -> range: ...

    def after(self, time: int, count: int) -> tuple[int, ...]: ...

    def preceding(self, time: int, count: int) -> int: ...

    def is_close(self, time: int) -> bool: ...

    def between(self, start: int, stop: int) -> int: ...

    def for_opens(self, open_times: NDArray[np.int64]) -> NDArray[np.int64]: ...

    def are(self, times: NDArray[np.int64]) -> NDArray[np.bool_]: ...


def _closes(name: str, timeframe: Timeframe) -> _Closes:
    duration = timeframe.duration
    if name == "24x7":
        return _Steps(duration or DAY)
    if duration is not None and duration > DAY:
        raise ConfigError(
            f"timeframe {timeframe.text!r} is longer than a day: the calendar {name} has none such."
        )
    if name == "fx":
        daily = duration in (None, DAY)
        return _Sessions(name, _WHOLE_SESSION if daily else duration or DAY, YEARS, _fx_days)
    if duration == DAY:
        raise ConfigError(f"timeframe '1d' is no exchange day: with the calendar {name} take session.")
    return _exchange(name, duration)


@dataclass(frozen=True, slots=True)
class _Steps:
    step: int
    years: range = YEARS

    def after(self, time: int, count: int) -> tuple[int, ...]:
        first = (time // self.step + 1) * self.step
        return tuple(range(first, first + count * self.step, self.step))

    def preceding(self, time: int, count: int) -> int:
        return (-(-time // self.step) - count) * self.step

    def is_close(self, time: int) -> bool:
        return time % self.step == 0

    def between(self, start: int, stop: int) -> int:
        return (stop - 1) // self.step - start // self.step

    def for_opens(self, open_times: NDArray[np.int64]) -> NDArray[np.int64]:
        return np.where(open_times % self.step == 0, open_times + self.step, -1)

    def are(self, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        return np.asarray(times % self.step == 0)


@dataclass(frozen=True, slots=True)
class _Spans:
    """Sessions, or the halves of sessions: int64 nanoseconds, and the day (since 1970) of each."""

    opens: NDArray[np.int64]
    ends: NDArray[np.int64]
    days: NDArray[np.int64]


class _Sessions:
    """Closes every `step` from each span's open, the last at its end.

    The state is the spans of the years `read`, and for each span the number of closes before it.
    """

    def __init__(self, name: str, step: int, years: range, load: Callable[[int, int], _Spans]) -> None:
        self.name, self.step, self.years, self.load = name, step, years, load
        self.read = range(0)
        self.since = self.until = 0

    def after(self, time: int, count: int) -> tuple[int, ...]:
        self._cover(time, time)
        rank = self._rank(time)
        while rank + count > self.total:
            if self.read.stop == self.years.stop:
                raise self._outside(time)
            self._read(self.read.start, self.read.stop + _MARGIN)
            rank = self._rank(time)
        return tuple(self._at(rank + k) for k in range(count))

    def preceding(self, time: int, count: int) -> int:
        """The close that is `count` closes before the first one at or after `time`."""
        if time >= _new_year(self.years.stop):
            return time
        self._cover(time - 1, time)
        return self._at(max(0, self._rank(time - 1) - count))

    def is_close(self, time: int) -> bool:
        try:
            self._cover(time, time)
        except DataError:
            return False
        at = bisect_left(self.opens, time) - 1
        if at < 0 or time > self.ends[at]:
            return False
        return time == self.ends[at] or (time - self.opens[at]) % self.step == 0

    def between(self, start: int, stop: int) -> int:
        self._cover(start, stop)
        return self._rank(stop - 1) - self._rank(start)

    def for_opens(self, open_times: NDArray[np.int64]) -> NDArray[np.int64]:
        self._cover(int(open_times.min()), int(open_times.max()))
        opens, ends = self.spans.opens, self.spans.ends
        at = np.searchsorted(opens, open_times, side="right") - 1
        inside = (at >= 0) & (open_times < ends[at])
        if self.step == _WHOLE_SESSION:
            day, rest = np.divmod(open_times, DAY)
            dated = np.minimum(np.searchsorted(self.spans.days, day), len(ends) - 1)
            by_open = np.where(inside & (open_times == opens[at]), ends[at], -1)
            return np.where((rest == 0) & (self.spans.days[dated] == day), ends[dated], by_open)
        past = open_times - opens[at]
        closes = np.minimum(open_times + self.step, ends[at])
        return np.where(inside & (past % self.step == 0), closes, -1)

    def are(self, times: NDArray[np.int64]) -> NDArray[np.bool_]:
        self._cover(int(times.min()), int(times.max()))
        opens, ends = self.spans.opens, self.spans.ends
        at = np.searchsorted(opens, times, side="left") - 1
        stepped = ((times - opens[at]) % self.step == 0) | (times == ends[at])
        return np.asarray((at >= 0) & (times <= ends[at]) & stepped)

    def _rank(self, time: int) -> int:
        """How many closes are at or before `time`."""
        at = bisect_right(self.opens, time) - 1
        if at < 0:
            return 0
        if time >= self.ends[at]:
            return self.before[at + 1]
        return self.before[at] + (time - self.opens[at]) // self.step

    def _at(self, rank: int) -> int:
        at = bisect_right(self.before, rank) - 1
        return min(self.opens[at] + (rank - self.before[at] + 1) * self.step, self.ends[at])

    def _cover(self, first: int, last: int) -> None:
        if first >= self.since and last < self.until:
            return
        low, high = _year(first), _year(last)
        if low < self.years.start:
            raise self._outside(first)
        if high >= self.years.stop:
            raise self._outside(last)
        known = (self.read.start, self.read.stop) if self.read else (low, high)
        self._read(min(low - _MARGIN, known[0]), max(high + _MARGIN, known[1]))

    def _read(self, start: int, stop: int) -> None:
        self.read = range(max(start, self.years.start), min(stop, self.years.stop))
        self.spans = self.load(self.read.start, self.read.stop)
        self.opens: list[int] = self.spans.opens.tolist()
        self.ends: list[int] = self.spans.ends.tolist()
        counts = -(-(self.spans.ends - self.spans.opens) // self.step)
        self.before: list[int] = [0, *np.cumsum(counts).tolist()]
        self.total = self.before[-1]
        self.since, self.until = _new_year(self.read.start), _new_year(self.read.stop)
        if self.read.start > self.years.start:
            self.since += 31 * DAY
        if self.read.stop < self.years.stop:
            self.until -= 31 * DAY

    def _outside(self, time: int) -> DataError:
        return DataError(
            f"The calendar {self.name} has no sessions around {iso(time)}: "
            f"it reaches from {self.years.start} to {self.years.stop - 1}."
        )


def _fx_days(start: int, stop: int) -> _Spans:
    """The days of the years [start, stop): 17:00 New York to 17:00, Sunday evening to Friday."""
    new_york = ZoneInfo("America/New_York")
    first = date(start, 1, 1)
    days = [first + timedelta(n) for n in range((date(stop, 1, 1) - first).days)]
    days = [day for day in days if day.weekday() < 5]

    def five(day: date) -> int:
        return int(datetime(day.year, day.month, day.day, 17, tzinfo=new_york).timestamp()) * TIME_UNIT

    return _Spans(
        np.array([five(day - timedelta(1)) for day in days], np.int64),
        np.array([five(day) for day in days], np.int64),
        np.array([(day - date(1970, 1, 1)).days for day in days], np.int64),
    )


def _exchange(name: str, duration: int | None) -> _Sessions:
    years = _years_of(name)

    def load(start: int, stop: int) -> _Spans:
        return _spans_of(name, duration is None, start, stop)

    return _Sessions(name, duration or _WHOLE_SESSION, years, load)


@lru_cache(_KEPT)
def _years_of(name: str) -> range:
    """The years in which an exchange's sessions are known. Raise `ConfigError` where there is none such."""
    from exchange_calendars import errors, get_calendar, get_calendar_names

    try:
        known = get_calendar(name, start="2024-01-01", end="2024-12-31")
    except errors.InvalidCalendarName:
        near = difflib.get_close_matches(name, ["24x7", "fx", *get_calendar_names()], n=3)
        hint = f"did you mean {' or '.join(near)}?" if near else "such as XNYS."
        raise ConfigError(
            f"calendar {name!r} is unknown: take 24x7, fx or a name of exchange_calendars, {hint}"
        ) from None
    except (NotImplementedError, ValueError) as error:
        reason = str(error)[:80]
        raise ConfigError(
            f"calendar {name!r} cannot be read by the installed exchange_calendars ({reason}): take another."
        ) from error
    low, high = known.bound_min(), known.bound_max()
    start = YEARS.start if low is None else low.year + (low.day_of_year > 1)
    stop = YEARS.stop if high is None else high.year + (high.month == 12 and high.day == 31)
    return range(max(YEARS.start, start), min(YEARS.stop, stop))


@lru_cache(_KEPT)
def _spans_of(name: str, whole: bool, start: int, stop: int) -> _Spans:
    """The sessions of an exchange in the years [start, stop), `whole` or parted by their breaks."""
    from exchange_calendars import get_calendar

    calendar = get_calendar(name, start=f"{start}-01-01", end=f"{stop - 1}-12-31")
    ends = calendar.closes.to_numpy(dtype="datetime64[ns]").astype(np.int64)
    opens = calendar.opens.to_numpy(dtype="datetime64[ns]").astype(np.int64)
    days = calendar.closes.index.to_numpy().astype("datetime64[D]").astype(np.int64)
    if whole:
        return _Spans(opens, ends, days)
    breaks = calendar.break_starts.notna().to_numpy()
    pause = calendar.break_starts.to_numpy(dtype="datetime64[ns]").astype(np.int64)[breaks]
    resume = calendar.break_ends.to_numpy(dtype="datetime64[ns]").astype(np.int64)[breaks]
    return _Spans(
        np.sort(np.concatenate([opens, resume])),
        np.sort(np.concatenate([ends, pause])),
        np.sort(np.concatenate([days, days[breaks]])),
    )


def _new_year(year: int) -> int:
    return (date(year, 1, 1) - date(1970, 1, 1)).days * DAY


def _year(time: int) -> int:
    return int(np.datetime64(time, "ns").astype("datetime64[Y]").astype(int)) + 1970
