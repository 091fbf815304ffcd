"""The schedule of trainings and verifications: cron expressions in UTC."""

import re
from collections.abc import Awaitable, Callable, Iterator, Mapping
from datetime import UTC, datetime
from zoneinfo import ZoneInfo

from apscheduler.schedulers.asyncio import AsyncIOScheduler
from apscheduler.triggers.cron import CronTrigger

from barcast.models import ConfigError

_FIELDS = ("second", "minute", "hour", "day", "month", "day_of_week")


def cron(expression: str) -> CronTrigger:
    """A trigger in UTC from five fields (minute first) or six (second first).

    Raise ConfigError for any other, without the name of the key that it is of.
    """
    fields = expression.split()
    if len(fields) not in (5, 6):
        raise ConfigError(f"{expression!r} has {len(fields)} fields; write five, or six with seconds")
    if len(fields) == 5:
        fields.insert(0, "0")
    if re.search(r"(?<![/0-9])[0-9]", fields[5]):
        raise ConfigError(
            f"{expression!r} numbers a weekday, and programs differ in which one is 0; write mon to sun"
        )
    try:
        return CronTrigger(**dict(zip(_FIELDS, fields, strict=True)), timezone=ZoneInfo("UTC"))
    except ValueError as error:
        raise ConfigError(f"{expression!r}: {error}; write one such as 17 3 * * sun") from error


def scheduler(jobs: Mapping[str, tuple[str, Callable[[], Awaitable[None]]]]) -> AsyncIOScheduler:
    """A scheduler that runs jobs, of each table its cron expression and what to do.

    Of a job there is one at a time, and a missed one is run once and late rather than never.
    """
    planner = AsyncIOScheduler(timezone=ZoneInfo("UTC"))
    for table, (expression, job) in jobs.items():
        planner.add_job(
            job, cron(expression), id=table, misfire_grace_time=None, coalesce=True, max_instances=1
        )
    return planner


def occasions(expression: str, after: int) -> Iterator[int]:
    """When the cron expression fires after a moment, one time after the other, in nanoseconds."""
    trigger, last = cron(expression), datetime.fromtimestamp(after // 10**9, UTC)
    while (found := trigger.get_next_fire_time(last, last)) is not None:
        last = found
        yield int(found.timestamp()) * 10**9
