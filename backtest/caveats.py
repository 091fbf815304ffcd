"""What is to be known of the bars and settings of a backtest before its numbers are believed."""

import difflib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby

import numpy as np

from barcast.backtest.ledger import Execution
from barcast.daemon.calendar import Calendar, Calendars, iso
from barcast.daemon.ports import Hole, Outcome
from barcast.models import Adjustment, Window

SHOWN = 5
"""Things that one sentence names."""
DATES = 3
"""Jumps of one symbol that it names."""


@dataclass(slots=True)
class Gaps:
    """What holes in a symbol's bars did to its forecasts, and the largest hole that was met."""

    withheld: int = 0
    degraded: int = 0
    hole: Hole | None = None


class Holes:
    """Counts, symbol by symbol, the forecasts that holes withheld or degraded."""

    def __init__(self) -> None:
        self.gaps: dict[str, Gaps] = {}

    def seen(self, outcome: Outcome) -> None:
        """Take note of a group."""
        for symbol, why in outcome.withheld.items():
            if "missing" in why:
                self._of(symbol).withheld += 1
        for symbol, reasons in outcome.degraded.items():
            if any("missing" in reason for reason in reasons):
                self._of(symbol).degraded += 1
        for symbol, holes in outcome.holes.items():
            gaps = self._of(symbol)
            gaps.hole = max(filter(None, (gaps.hole, *holes)), key=lambda hole: hole.bars)

    def sentences(self, calendars: Calendars) -> list[str]:
        """What they did to each symbol that lost something, and what to do, in one sentence, if any did."""
        found, names = [], set()
        for symbol, gaps in sorted(self.gaps.items()):
            name = calendars.of(symbol).name
            largest = gaps.hole and f" (the most, {gaps.hole.bars}, after {iso(gaps.hole.after)})"
            names.add(name)
            found.append(
                f"{symbol} lacks bars that the calendar {name} has{largest or ''}: {gaps.withheld} forecasts "
                f"were withheld for it, {gaps.degraded} degraded"
            )
        return [f"{few(found, '; ')}; {_add(names)}."] if found else []

    def _of(self, symbol: str) -> Gaps:
        return self.gaps.setdefault(symbol, Gaps())


@dataclass(frozen=True, slots=True)
class Jump:
    """A price that opened or closed too far from the close before (nanoseconds), and how many times it."""

    symbol: str
    close_time: int
    ratio: float


def jumps(windows: Mapping[str, Window], start: int, length: int, max_jump: float) -> list[Jump]:
    """The jumps of each symbol from `length` bars before the close `start` on, which no adjustment explains.

    `windows` are on one price basis.
    """
    found = []
    for symbol, window in windows.items():
        first = max(0, int(np.searchsorted(window.close_times, start)) - length)
        values = window.values[first:]
        ratios = values[1:, (0, 3)] / values[:-1, 3:4]
        beyond = (ratios > 1 + max_jump) | (ratios < 1 / (1 + max_jump))
        for k in np.flatnonzero(beyond.any(1)):
            time = int(window.close_times[first + k + 1])
            found.append(Jump(symbol, time, float(ratios[k][beyond[k]][0])))
    return found


BOOKS = "forecasts near one are degraded, and a book that held it took it for a return"
LEARNT = "the model learns one as a return"
"""What becomes of undeclared jumps."""


def of_jumps(found: Sequence[Jump], then: str = BOOKS) -> list[str]:
    """What was made of undeclared jumps, and what to do, in one sentence, if there are any."""
    told = []
    for symbol, own in groupby(sorted(found, key=lambda jump: jump.symbol), lambda jump: jump.symbol):
        first, *others = own
        often = "once" if not others else f"{1 + len(others)} times"
        place = f"to {first.ratio:.4g} times the last close at {iso(first.close_time)}"
        also = [f"at {iso(jump.close_time)}" for jump in others[: DATES - 1]]
        also += [f"{1 + len(others) - DATES} times more"] * (1 + len(others) > DATES)
        told.append(f"{symbol} jumped {often}, {', '.join([place, *also])}")
    remedy = "declare a split or a roll as an adjustment, unless the market moved so"
    return [f"{few(told, '; ')}, undeclared: {then}; {remedy}."] if told else []


def missing(window: Window, calendar: Calendar) -> tuple[int, tuple[int, int]]:
    """How many bars are missing, and the most in one hole with the close before it."""
    times = window.close_times
    count = calendar.missing_between(int(times[0]), int(times[-1])) - max(0, len(times) - 2)
    if count <= 0:
        return 0, (0, 0)
    steps = np.diff(times)
    wide = np.flatnonzero(steps > steps.min())
    return count, max(
        (calendar.missing_between(int(times[k]), int(times[k + 1])), int(times[k])) for k in wide.tolist()
    )


def of_missing(windows: Mapping[str, Window], calendars: Calendars) -> list[str]:
    """Symbols that lack bars, and what to do, in one sentence, if there are any."""
    found, names = [], set()
    for symbol, window in windows.items():
        calendar = calendars.of(symbol)
        count, (most, after) = missing(window, calendar)
        if count:
            names.add(calendar.name)
            largest = f"(the most, {most}, after {iso(after)})"
            found.append(f"{symbol} lacks {count} bars that the calendar {calendar.name} has {largest}")
    return [f"{few(found, '; ')}; {_add(names)}."] if found else []


def _add(calendars: Iterable[str]) -> str:
    """What to do about bars that calendars of these names have."""
    remedy = "add them"
    if "24x7" in calendars:
        remedy += ", or if its market shuts at night or at weekends name its calendar: fx, or an"
        remedy += " exchange's such as XNYS"
    return remedy


HELD = (
    "what a book holds of it from then on stays there at its last close; end the test there, or give bars up "
    "to what was paid"
)
UNSEEN = "the model learns nothing of it after that; check the last times of the others"
"""What becomes of symbols that end early."""


def of_ends(windows: Mapping[str, Window], start: int, calendars: Calendars, then: str = HELD) -> list[str]:
    """Symbols whose bars end before those of others do, or before the close `start` of the test."""
    end = max(int(window.close_times[-1]) for window in windows.values())
    before, early = [], []
    for symbol, window in windows.items():
        last = int(window.close_times[-1])
        if last < start:
            before.append(f"{symbol} ends at {iso(last)}, before the test, and has no part in it")
        elif lacking := calendars.of(symbol).missing_between(last, end + 1):
            early.append(f"{symbol} ends at {iso(last)}, {lacking} bars before the end")
    said = [f"{few(before, '; ')}."] if before else []
    return [*said, f"{few(early, '; ')}: {then}."] if early else said


def of_volumes(windows: Mapping[str, Window], start: int, execution: Execution) -> list[str]:
    """Bars that could fill nothing, as they have no volume."""
    if execution.volume_share is None:
        return []
    none = bars = 0
    for window in windows.values():
        volumes = window.values[window.close_times >= start, 4]
        none, bars = none + int((volumes == 0).sum()), bars + len(volumes)
    if not none:
        return []
    return [
        f"{none} of {bars} bars have volume 0, and with volume_share = {execution.volume_share:g} "
        "fill nothing; do without it where the volume is unknown."
    ]


def of_adjustments(windows: Mapping[str, Window], adjustments: Sequence[Adjustment]) -> list[str]:
    """Adjustments that change nothing, as no bar of their symbol is on one of their sides."""
    found = []
    for each in adjustments:
        window = windows.get(each.symbol)
        if window is None:
            near = difflib.get_close_matches(each.symbol, windows, n=1)
            found.append(f"{each.symbol} has no bars{f' (did you mean {near[0]}?)' if near else ''}")
        elif each.time >= window.close_times[-1]:
            found.append(f"{each.symbol} has no bar after {iso(each.time)}")
        elif each.time < window.close_times[0]:
            found.append(f"{each.symbol} has no bar up to {iso(each.time)}")
    if not found:
        return []
    return [f"{len(found)} of {len(adjustments)} adjustments change nothing: {few(found, ', ')}."]


def of_calendars(windows: Mapping[str, Window], calendars: Mapping[str, str]) -> list[str]:
    """Symbols that are given a calendar and have no bars, in one sentence, if there are any."""
    strange = [symbol for symbol in calendars if symbol not in windows]
    return (
        [f"A calendar is given of {few(strange, ', ')} without a bar: there are {few([*windows], ', ')}."]
        if strange
        else []
    )


def few(found: Sequence[str], between: str = " ") -> str:
    """The first of some texts, and how many more there are."""
    more = f"{between}and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return between.join(found[:SHOWN]) + more
