from datetime import UTC, datetime
from zoneinfo import ZoneInfo

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from barcast.daemon.calendar import Calendar, Calendars, iso
from barcast.daemon.timeframe import DAY, Timeframe
from barcast.models import ConfigError, DataError

HOUR = 3600 * 10**9
NEW_YORK = ZoneInfo("America/New_York")


def close_for_open(calendar, open_time):
    """The close of the bar that opens at one time; -1 if none does."""
    return int(calendar.closes_for_opens(np.array([open_time]))[0])


def calendar(name: str, timeframe: str) -> Calendar:
    return Calendar(name, Timeframe.parse(timeframe))


def utc(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=UTC).timestamp()) * 10**9  # type: ignore[arg-type, misc]


def new_york(*parts: int) -> int:
    return int(datetime(*parts, tzinfo=NEW_YORK).timestamp()) * 10**9  # type: ignore[arg-type, misc]


@pytest.mark.parametrize(
    ("text", "duration"),
    [("1m", 60 * 10**9), ("4h", 4 * HOUR), ("90s", 90 * 10**9), ("7d", 7 * DAY)],
)
def test_timeframes(text: str, duration: int) -> None:
    """A timeframe divides a day or is whole days."""
    assert Timeframe.parse(text).duration == duration
    assert str(Timeframe.parse(text)) == text


@pytest.mark.parametrize(
    ("text", "name"), [("60s", "1m"), ("120m", "2h"), ("24h", "1d"), ("48h", "2d"), ("86400s", "1d")]
)
def test_a_length_has_one_name(text: str, name: str) -> None:
    """A timeframe in a smaller unit than need be is refused with its name."""
    with pytest.raises(ConfigError, match=f"timeframe {text!r} is {name!r}: write that"):
        Timeframe.parse(text)
    assert Timeframe.of(Timeframe.parse(name).duration or 0).text == name


@pytest.mark.parametrize(
    "text", ["", "7m", "5h", "0m", "25h", "1w", "m", "1M", "-1m", "1.5h", "01m", "sessions"]
)
def test_timeframes_refused(text: str) -> None:
    """Any other timeframe is refused by name, with one that would do."""
    with pytest.raises(ConfigError, match=f"timeframe {text!r} .* such as 15m"):
        Timeframe.parse(text)


@pytest.mark.parametrize(
    ("name", "timeframe", "remedy"),
    [
        ("XNYS", "1d", "take session"),
        ("fx", "2d", "longer than a day"),
        ("XNYZ", "session", "did you mean .*XNYS"),
    ],
)
def test_combinations_refused(name: str, timeframe: str, remedy: str) -> None:
    """A calendar without such a timeframe, or an unknown one, is refused with the remedy."""
    with pytest.raises(ConfigError, match=remedy):
        calendar(name, timeframe)


def test_always_open() -> None:
    """With 24x7, bars step from the epoch, weekends and all."""
    hours = calendar("24x7", "4h")
    friday = utc(2026, 3, 6, 20)
    assert hours.closes_after(friday, 3) == tuple(friday + k * 4 * HOUR for k in (1, 2, 3))
    assert hours.close_at_or_after(friday) == friday
    assert hours.close_at_or_after(friday + 1) == friday + 4 * HOUR
    assert hours.missing_between(friday, friday + 12 * HOUR) == 2
    assert hours.missing_between(friday, friday) == hours.missing_between(friday, friday - DAY) == 0
    assert close_for_open(hours, friday) == hours.close_at_or_after(friday + 1)
    assert hours.valid_until(friday) == friday + 8 * HOUR
    assert hours.periods_per_year == 365 * 6
    assert close_for_open(hours, friday + HOUR) == -1


def test_fx_week() -> None:
    """FX trades from Sunday 17:00 to Friday 17:00 New York; the weekend is no hole."""
    hours = calendar("fx", "1h")
    friday, sunday = new_york(2026, 1, 9, 17), new_york(2026, 1, 11, 17)
    assert hours.closes_after(friday - HOUR, 3) == (friday, sunday + HOUR, sunday + 2 * HOUR)
    assert hours.missing_between(friday, sunday + HOUR) == 0
    assert hours.missing_between(friday - 2 * HOUR, sunday + 2 * HOUR) == 3
    assert close_for_open(hours, sunday) == sunday + HOUR
    assert hours.close_at_or_after(friday + 1) == sunday + HOUR
    assert hours.periods_per_year == 260 * 24
    assert close_for_open(hours, friday) == -1


@pytest.mark.parametrize(("before", "after"), [((2026, 3, 6), (2026, 3, 9)), ((2026, 10, 30), (2026, 11, 2))])
def test_fx_daily_over_clock_changes(before: tuple[int, int, int], after: tuple[int, int, int]) -> None:
    """FX days end at 17:00 New York on both sides of both clock changes, for 1d and session alike."""
    for timeframe in ("1d", "session"):
        days = calendar("fx", timeframe)
        assert days.closes_after(new_york(*before, 17), 1) == (new_york(*after, 17),)
        assert new_york(*after, 17) - new_york(*before, 17) != 3 * DAY
        assert close_for_open(days, utc(*after)) == new_york(*after, 17)
        assert days.missing_between(new_york(*before, 17), new_york(*after, 17)) == 0


def test_fx_steps_from_five_over_clock_changes() -> None:
    """Four-hour FX bars keep stepping from 17:00 New York when New York's clock has changed."""
    closes = calendar("fx", "4h").closes_after(new_york(2026, 3, 6, 13), 3)
    assert closes == (new_york(2026, 3, 6, 17), new_york(2026, 3, 8, 21), new_york(2026, 3, 9, 1))


def test_sessions() -> None:
    """Daily exchange bars close with their sessions, half days and clock changes included."""
    days = calendar("XNYS", "session")
    wednesday, half, monday = utc(2012, 11, 21, 21), utc(2012, 11, 23, 18), utc(2012, 11, 26, 21)
    assert days.closes_after(wednesday, 2) == (half, monday)
    assert days.missing_between(wednesday, half) == 0
    assert days.missing_between(wednesday, monday) == 1
    assert days.valid_until(wednesday) == monday
    assert close_for_open(days, utc(2012, 11, 23)) == half
    assert close_for_open(days, utc(2012, 11, 23, 14, 30)) == half
    assert days.closes_after(utc(2026, 3, 6, 21), 1) == (utc(2026, 3, 9, 20),)
    assert days.closes_after(utc(2026, 10, 30, 20), 1) == (utc(2026, 11, 2, 21),)
    assert days.periods_per_year == 252
    assert close_for_open(days, utc(2012, 11, 22)) == -1


def test_exchange_hours() -> None:
    """Intraday exchange bars step from the session's open and the last one ends at its close."""
    hours = calendar("XNYS", "1h")
    closes = hours.closes_after(utc(2012, 11, 21, 21), 5)
    half_day = [(14, 30), (15, 30), (16, 30), (17, 30)]
    assert closes == (
        *(utc(2012, 11, 23, h + 1, m) for h, m in half_day[:3]),
        utc(2012, 11, 23, 18),
        utc(2012, 11, 26, 15, 30),
    )
    assert close_for_open(hours, utc(2012, 11, 23, 17, 30)) == utc(2012, 11, 23, 18)
    assert hours.missing_between(utc(2012, 11, 23, 15, 30), utc(2012, 11, 26, 15, 30)) == 3
    assert hours.close_at_or_after(utc(2012, 11, 24)) == utc(2012, 11, 26, 15, 30)
    opens = np.array(
        [utc(2012, 11, 23, 14, 30), utc(2012, 11, 23, 14), utc(2012, 11, 23, 18), utc(2012, 11, 22, 15, 30)]
    )
    assert hours.closes_for_opens(opens).tolist() == [utc(2012, 11, 23, 15, 30), -1, -1, -1]
    assert 1700 < hours.periods_per_year < 1764


def test_lunch_break() -> None:
    """Around a lunch break, each half of the session steps from its own open."""
    closes = calendar("XHKG", "1h").closes_after(utc(2024, 6, 3), 6)
    assert [iso(close)[11:16] for close in closes] == ["02:30", "03:30", "04:00", "06:00", "07:00", "08:00"]


def test_young_calendar() -> None:
    """A calendar that begins after 2010 is annualised by its own first years."""
    days = calendar("AIXK", "session")
    assert 240 < days.periods_per_year < 262
    with pytest.raises(DataError, match="it reaches from 20"):
        days.closes_after(utc(2009, 1, 1), 1)


def test_years_beyond_reach() -> None:
    """A time outside the calendar's years is refused, and sessions are read as far as they are needed."""
    days = calendar("XHKG", "session")
    with pytest.raises(DataError, match="XHKG has no sessions around 2150-01-01"):
        days.closes_after(utc(2150, 1, 1), 1)
    with pytest.raises(DataError, match="it reaches from 1970 to 2049"):
        days.closes_after(utc(2049, 12, 1), 300)
    assert len(days.closes_after(utc(2001, 1, 1), 5000)) == 5000
    assert close_for_open(days, utc(1999, 3, 1)) == utc(1999, 3, 1, 8)


CALENDARS = [
    calendar("24x7", "15m"),
    calendar("fx", "1h"),
    calendar("fx", "1d"),
    calendar("XNYS", "30m"),
    calendar("XNYS", "session"),
]


@settings(max_examples=60, deadline=None)
@given(
    which=st.sampled_from(CALENDARS), time=st.integers(utc(2004, 1, 1), utc(2030, 1, 1)), n=st.integers(1, 60)
)
def test_closes_agree(which: Calendar, time: int, n: int) -> None:
    """Closes ascend, are their own `close_at_or_after`, and holes count exactly those in between."""
    closes = which.closes_after(time, n)
    assert len(closes) == n
    assert list(closes) == sorted({*closes})
    assert closes[0] > time
    assert all(which.close_at_or_after(close) == close for close in closes)
    assert closes[0] == which.close_at_or_after(time + 1)
    assert which.missing_between(closes[0], closes[-1]) == max(0, n - 2)


@settings(max_examples=60)
@given(st.sampled_from(CALENDARS), st.integers(utc(2026, 1, 5), utc(2026, 12, 20)), st.integers(-40, 40))
def test_what_is_stale_and_what_follows(hours: Calendar, time: int, step: int) -> None:
    """The oldest close still valid divides the closes by their `valid_until`; what follows leaves no hole."""
    near = [c for days in (60, 3, 0) for c in hours.closes_after(time - days * DAY, 3)]
    oldest = hours.oldest_valid(time)
    assert hours.is_close(oldest)
    assert hours.valid_until(oldest) >= time
    for close in near:
        assert (close >= oldest) == (hours.valid_until(close) >= time)
        after = hours.closes_after(close, 2)
        assert hours.follows(close, after[0])
        assert not hours.follows(close, after[1])
        assert hours.missing_between(close, after[0]) == 0
        assert hours.is_close(close)
        assert hours.is_close(close + step) == (hours.close_at_or_after(close + step) == close + step)


def test_each_symbol_has_its_calendar() -> None:
    """Symbols without a calendar of their own keep the default's hours; only the open ones are expected."""
    hours = Calendars("24x7", Timeframe.parse("1h"), {"EURUSD": "fx", "AAPL": "XNYS", "BTCUSD": "24x7"})
    saturday, monday = utc(2026, 3, 7, 12), utc(2026, 3, 9, 12)
    everybody = ["AAPL", "BTCUSD", "EURUSD", "XRPUSD"]
    assert hours.open(everybody, saturday) == {"BTCUSD", "XRPUSD"}
    assert hours.open(everybody, monday) == {"BTCUSD", "EURUSD", "XRPUSD"}
    assert hours.open(everybody, utc(2026, 3, 9, 14, 30)) == {"AAPL"}
    assert hours.of("BTCUSD") is hours.of("ANY") is hours.default
    assert hours.periods_per_year == 365 * 24
    with pytest.raises(ConfigError, match="'session' needs an exchange's calendar"):
        Calendars("24x7", Timeframe.parse("session"))
    days = Calendars("XNYS", Timeframe.parse("session"), {"BTCUSD": "24x7"})
    assert days.of("BTCUSD").is_close(utc(2026, 3, 7))
