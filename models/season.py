"""The hour of the week, in the time zone that a market keeps, and what is typical of each."""

from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from zoneinfo import ZoneInfo

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]
Ints = NDArray[np.int64]

HOUR = 3_600_000_000_000  # nanoseconds
SLOTS = 168  # hours of a week, from Monday 00:00
ZONES = ("UTC", "America/New_York")  # those that a market's week is looked for in
PRIOR = 30.0  # bars of evidence for "like any other hour" in every slot
OUTLIER = 20.0  # times their ninth decile, what values count at most: one bar must not make an hour

_SECOND = 1_000_000_000
_FIRST, _LAST = 0, 2**63 // _SECOND  # seconds since 1970 that int64 nanoseconds can say
_STEP = 7 * 86_400  # seconds; no zone changes its clock twice in a week
_MONDAY = 3 * 24  # hours from Monday 00:00 to 1970-01-01, a Thursday


def slots(close_times: Ints, zone: str) -> Ints:
    """The hour of the week (n,), 0 from Monday 00:00 to 167, in which each bar ends by the clock of `zone`.

    `close_times` is (n,) nanoseconds since 1970. A bar that closes on the hour belongs to the hour before.
    Exact at every change of the clock. Raise `ZoneInfoNotFoundError` for a zone that is unknown.
    """
    within = close_times - 1
    since, offset = _clock(zone)
    local = within + offset[np.searchsorted(since, within, side="right") - 1]
    hours: Ints = (local // HOUR + _MONDAY) % SLOTS
    return hours


def slot_means(slot: Ints, x: Array, count: int = SLOTS, prior: float = PRIOR) -> Array:
    """Mean of x (n,) in each of `count` slots, in units of its overall mean and shrunk to 1.

    `prior` is the number of bars that the 1 counts as. All are 1 when the overall mean is not above 0.
    """
    mean = float(x.mean()) if len(x) else 0.0
    if not mean > 0:
        return np.ones(count)
    total = np.bincount(slot, x / mean, minlength=count)
    n = np.bincount(slot, minlength=count)
    means: Array = (total + prior) / (n + prior)
    return means


def choose_zone(moves: Iterable[tuple[Ints, Array]], zones: Sequence[str] = ZONES) -> str:
    """The zone by whose hours of the week x (n,) is told best: least squares of x around its slot means.

    `moves` are the closes (n,) of the bars of each symbol and their x (n,), which is at least 0, such as
    absolute returns over their mean. The first zone is taken where none is better, as in bars without a
    change of the clock, unless whole hours of the week lack bars: such markets keep an exchange's hours, and
    the last zone is taken.
    """
    total, count = np.zeros((2, len(zones), SLOTS))
    for close_times, x in moves:
        size = clipped(x)
        for z, zone in enumerate(zones):
            slot = slots(close_times, zone)
            total[z] += np.bincount(slot, size, minlength=SLOTS)
            count[z] += np.bincount(slot, minlength=SLOTS)
    if not total.any():
        return zones[0]
    total /= total[0].sum() / count[0].sum()
    means = (total + PRIOR) / (count + PRIOR)
    told = ((means - 1) * (2 * total - (means + 1) * count)).sum(1)
    if told.max() - told.min() > 1e-9 * abs(told.max()):
        return zones[int(told.argmax())]
    return zones[0] if count[-1].all() else zones[-1]


def clipped(x: Array) -> Array:
    """x (n,), none of it more than 20 times the ninth decile; unchanged where that decile is 0."""
    most = OUTLIER * float(np.quantile(x, 0.9)) if len(x) else 0.0
    return np.minimum(x, most) if most > 0 else x


@lru_cache(maxsize=8)
def _clock(zone: str) -> tuple[Ints, Ints]:
    """When a zone's offset from UTC changes, ascending, and the offset from then on, in nanoseconds."""
    info = ZoneInfo(zone)

    def offset(second: int) -> int:
        delta = datetime.fromtimestamp(second, UTC).astimezone(info).utcoffset()
        assert delta is not None
        return delta.days * 86_400 + delta.seconds

    since, offsets = [np.iinfo(np.int64).min], [offset(_FIRST) * _SECOND]
    for start in range(_FIRST, _LAST, _STEP):
        before, after = start, min(start + _STEP, _LAST)
        if offset(before) == offset(after):
            continue
        while after - before > 1:
            middle = (before + after) // 2
            before, after = (middle, after) if offset(middle) == offset(start) else (before, middle)
        since.append(after * _SECOND)
        offsets.append(offset(after) * _SECOND)
    return np.array(since, np.int64), np.array(offsets, np.int64)
