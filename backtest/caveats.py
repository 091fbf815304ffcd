"""What is to be known of the bars and settings of a backtest before its numbers are believed."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from barcast.backtest.ledger import Execution
from barcast.daemon.calendar import Calendars, iso
from barcast.daemon.ports import Hole, Outcome
from barcast.models import Adjustment, Window

SHOWN = 5
"""Sentences of one kind, and things that one sentence names."""


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
        """One for each symbol that lost something."""
        found = []
        for symbol, gaps in sorted(self.gaps.items()):
            name = calendars.of(symbol).name
            largest = gaps.hole and f" (the most, {gaps.hole.bars}, after {iso(gaps.hole.after)})"
            remedy = "add them"
            if name == "24x7":
                remedy += ", or if its market shuts at night or at weekends name its calendar: fx, or an"
                remedy += " exchange's such as XNYS"
            found.append(
                f"{symbol} lacks bars that the calendar {name} has{largest or ''}: {gaps.withheld} forecasts "
                f"were withheld for it, {gaps.degraded} degraded; {remedy}."
            )
        return found

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


def of_jumps(found: Sequence[Jump]) -> list[str]:
    """What was made of undeclared jumps, and what to do."""
    return [
        f"{jump.symbol}: the price jumped to {jump.ratio:.4g} times the last close at "
        f"{iso(jump.close_time)}, undeclared: forecasts near it are degraded, and a book that held it took "
        "it for a return; declare a split or a roll as an adjustment, unless the market moved so."
        for jump in found
    ]


def of_ends(windows: Mapping[str, Window], start: int, calendars: Calendars) -> list[str]:
    """Symbols whose bars end before those of others do, or before the close `start` of the test."""
    end = max(int(window.close_times[-1]) for window in windows.values())
    found = []
    for symbol, window in windows.items():
        last = int(window.close_times[-1])
        if last < start:
            found.append(f"{symbol} ends at {iso(last)}, before the test, and has no part in it.")
        elif missing := calendars.of(symbol).missing_between(last, end + 1):
            found.append(
                f"{symbol} ends at {iso(last)}, {missing} bars before the end: what a book holds of it from "
                "then on stays there at its last close; end the test there, or give bars up to what was paid."
            )
    return found


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


def few(found: Sequence[str], between: str = " ") -> str:
    """The first of some texts, and how many more there are."""
    more = f"{between}and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return between.join(found[:SHOWN]) + more
