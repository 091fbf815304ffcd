"""Hours of the week beside the standard library's clock, and the zone that a market keeps."""

from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from barcast.models.season import SLOTS, choose_zone, slot_means, slots

HOUR = 3_600_000_000_000
NEW_YORK = "America/New_York"


def ns(text: str) -> int:
    return int(datetime.fromisoformat(text).replace(tzinfo=UTC).timestamp()) * 1_000_000_000


def expected(close_time: int, zone: str) -> int:
    """The hour of the week of the last second that began before a close."""
    moment = datetime.fromtimestamp((close_time - 1) // 1_000_000_000, UTC).astimezone(ZoneInfo(zone))
    return 24 * moment.weekday() + moment.hour


@given(st.lists(st.integers(1, 2**63 - 1 - 24 * HOUR), min_size=1, max_size=50))
@pytest.mark.parametrize("zone", ["UTC", NEW_YORK, "Asia/Kolkata", "Australia/Lord_Howe"])
def test_slots_are_those_of_the_standard_library(zone: str, close_times: list[int]) -> None:
    """At any time from 1970 to 2262 the hour of the week is the one that zoneinfo tells."""
    found = slots(np.array(close_times, np.int64), zone).tolist()
    assert found == [expected(t, zone) for t in close_times]


@pytest.mark.parametrize(
    "change", ["2024-03-10T07:00", "2024-11-03T06:00", "1987-04-05T07:00", "2006-10-29T06:00"]
)
def test_slots_are_exact_where_the_clock_changes(change: str) -> None:
    """Every minute's close within a day of a change, and the nanoseconds around it, has its own hour."""
    at = ns(change)
    minutes = at + 60_000_000_000 * np.arange(-1440, 1441)
    times = np.concatenate([minutes, at + np.arange(-2, 3)]).astype(np.int64)
    assert slots(times, NEW_YORK).tolist() == [expected(int(t), NEW_YORK) for t in times]


def test_a_bar_belongs_to_the_hour_in_which_it_ends() -> None:
    """A bar that closes at 10:00 in New York is of the hour from nine, summer and winter."""
    closes = np.array([ns("2024-07-01T14:00"), ns("2024-01-01T15:00")])  # Mondays
    assert slots(closes, NEW_YORK).tolist() == [9, 9]
    assert slots(closes + 1, NEW_YORK).tolist() == [10, 10]
    assert slots(np.array([ns("2024-07-01T00:00")]), "UTC").tolist() == [SLOTS - 1]


def test_an_unknown_zone_is_refused() -> None:
    """A zone that is none is named."""
    with pytest.raises(ZoneInfoNotFoundError, match="Atlantis"):
        slots(np.array([HOUR]), "Atlantis")


def test_slot_means_are_shrunk_to_one() -> None:
    """Slots are means over the overall mean, and the prior counts as that many bars of 1."""
    found = slot_means(np.array([0, 0, 1, 1]), np.array([1.0, 3.0, 6.0, 6.0]), count=3, prior=2.0)
    np.testing.assert_allclose(found, [(4 / 4 + 2) / 4, (12 / 4 + 2) / 4, 1.0])
    assert slot_means(np.zeros(5, np.int64), np.zeros(5)).tolist() == [1.0] * SLOTS
    assert slot_means(np.zeros(0, np.int64), np.zeros(0)).tolist() == [1.0] * SLOTS


def busy_hours(zone: str, start: str, days: int, hours: range) -> tuple[np.ndarray, np.ndarray]:
    """Hourly closes, of those hours of weekdays in a zone, or of all, and twice the movement from 9 to 12."""
    first, rng = datetime.fromisoformat(start).replace(tzinfo=UTC), np.random.default_rng(1)
    closes = [ns(f"{(first + timedelta(hours=k)).replace(tzinfo=None)}") for k in range(1, 24 * days)]
    slot = slots(np.array(closes), zone)
    open_ = np.isin(slot % 24, list(hours)) & ((slot < 120) | (len(hours) == 24))
    x = np.abs(rng.standard_normal(len(closes))) * np.where((slot % 24 >= 9) & (slot % 24 < 12), 2.0, 1.0)
    return np.array(closes)[open_], x[open_]


@pytest.mark.parametrize("zone", ["UTC", NEW_YORK])
def test_the_zone_is_the_one_that_the_bars_keep(zone: str) -> None:
    """Bars from winter into summer show by which clock they are busy, whatever one wild bar says."""
    closes, x = busy_hours(zone, "2024-01-01", 180, range(24))
    assert choose_zone([(closes, x)]) == zone
    x[1000] = 1e6
    assert choose_zone([(closes, x)]) == zone


def test_without_a_change_of_the_clock_the_hours_without_bars_decide() -> None:
    """In one winter both clocks tell the same: New York where the market shuts, UTC around the clock."""
    assert choose_zone([busy_hours(NEW_YORK, "2024-01-01", 60, range(9, 16))]) == NEW_YORK
    assert choose_zone([busy_hours(NEW_YORK, "2024-01-01", 60, range(24))]) == "UTC"


def test_bars_that_stand_still_keep_no_hours() -> None:
    """Without any movement, or any bar, the zone is UTC."""
    closes = HOUR * np.arange(1, 500)
    assert choose_zone([(closes, np.zeros(len(closes)))]) == "UTC"
    assert choose_zone([(closes[:0], np.zeros(0))]) == "UTC"
