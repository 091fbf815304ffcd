"""The schedule: cron expressions in UTC, and runs that are never lost and never doubled."""

import asyncio
import time
from datetime import UTC, datetime

import pytest

from barcast.daemon.schedule import cron, scheduler
from barcast.models import ConfigError


def fires(expression, after):
    """The next moment at which a cron expression fires."""
    return cron(expression).get_next_fire_time(None, after)


def test_five_fields_begin_with_the_minute():
    """Five fields mean minute, hour, day, month, weekday, at second 0 and in UTC."""
    noon = datetime(2026, 3, 28, 12, 0, 1, tzinfo=UTC)
    assert fires("30 3 * * *", noon) == datetime(2026, 3, 29, 3, 30, tzinfo=UTC)
    assert fires("0 3 * * sun", noon) == datetime(2026, 3, 29, 3, 0, tzinfo=UTC)


def test_six_fields_begin_with_the_second():
    """A sixth field in front is the second."""
    noon = datetime(2026, 3, 28, 12, 0, 1, tzinfo=UTC)
    assert fires("15 30 3 * * *", noon) == datetime(2026, 3, 29, 3, 30, 15, tzinfo=UTC)
    assert fires("*/20 * * * * *", noon) == datetime(2026, 3, 28, 12, 0, 20, tzinfo=UTC)


def test_the_machine_s_zone_does_not_matter(monkeypatch):
    """Where the host's zone skips an hour, the job still runs at that hour of UTC."""
    monkeypatch.setenv("TZ", "America/New_York")
    time.tzset()
    try:
        skipped = fires("30 2 8 3 *", datetime(2026, 3, 8, 0, 0, tzinfo=UTC))
    finally:
        monkeypatch.undo()
        time.tzset()
    assert skipped == datetime(2026, 3, 8, 2, 30, tzinfo=UTC)


def test_weekdays_are_named():
    """Weekdays are names, alone, in ranges and lists."""
    friday = datetime(2026, 3, 27, 12, 0, tzinfo=UTC)
    assert fires("0 3 * * mon-fri", friday).strftime("%a") == "Mon"
    assert fires("0 3 * * sun,sat", friday).strftime("%a") == "Sat"


@pytest.mark.parametrize("weekday", ["0", "7", "1-5", "mon,6"])
def test_numbered_weekday_is_refused(weekday):
    """A number would be another day to cron than to the scheduler, so it is not guessed."""
    with pytest.raises(ConfigError, match=r"numbers a weekday.*write mon to sun"):
        cron(f"0 3 * * {weekday}")


@pytest.mark.parametrize(
    ("expression", "said"),
    [
        ("", "0 fields; write five, or six with seconds"),
        ("0 3 * *", "4 fields"),
        ("0 0 3 * * * *", "7 fields"),
        ("0 24 * * *", "0 24"),
        ("0 3 * * someday", "someday"),
        ("x 3 * * *", "x 3"),
    ],
)
def test_expression_that_means_nothing_is_refused(expression, said):
    """A wrong expression is a fault of the configuration, said with the expression."""
    with pytest.raises(ConfigError, match=r"fields|; write one such as") as caught:
        cron(expression)
    assert said in str(caught.value)


def test_scheduler_calls_the_job():
    """A planner that was started calls the job when its time comes."""

    async def main():
        called = asyncio.Event()

        async def job():
            called.set()

        planner = scheduler({"any": ("* * * * * *", job)})
        planner.start()
        async with asyncio.timeout(5):
            await called.wait()
        planner.shutdown(wait=False)
        return called.is_set()

    assert asyncio.run(main())


def test_missed_run_is_made_up_once():
    """A run that the machine slept through is run once when it wakes, never twice and never beside itself."""

    async def job():
        raise AssertionError

    jobs = scheduler({"one": ("0 3 * * *", job), "other": ("0 4 * * *", job)}).get_jobs()
    assert [(j.misfire_grace_time, j.coalesce, j.max_instances) for j in jobs] == [(None, True, 1)] * 2
